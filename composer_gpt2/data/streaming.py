"""Stream a prepared corpus from a folder or an object store into training.

This is mosaicml-streaming's ``StreamingDataset`` (elastic order, resumption in mid-epoch, a cache
on disk) with what version 0.13 lacks: it checks what it reads before any work, it never trains on
a shard whose hash is wrong, and when a shard cannot be had it neither ends the epoch in silence nor
hangs. Where this file reaches below streaming's public interface, that is the reason.

Letters in shapes: B sequences of a rank's batch, T tokens of a sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from time import sleep, time_ns
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _IterState, _ShardState
from streaming.base.world import World

from composer_gpt2.data.corpus_source import Expectation, find_sources
from composer_gpt2.data.mds_columns import read_sample
from composer_gpt2.data.retrying import DEFAULT_RETRIES
from composer_gpt2.data.shard_stream import ShardError, ShardStream
from composer_gpt2.data.shared_state import SharedFailure, registration

__all__ = ["ShardError", "StreamingTokens", "build_token_dataloader"]

# As plain integers: numpy compares them ten times faster than the members of an enumeration.
_REMOTE, _PREPARING, _LOCAL = map(
    int, (_ShardState.REMOTE, _ShardState.PREPARING, _ShardState.LOCAL)
)


class StreamingTokens(StreamingDataset):
    """Sequences of tokens from one or several prepared corpora, in an order that is elastic.

    Yields ``{"input_ids": int64 array of shape (T,)}``, and, from a corpus with a loss mask,
    ``"labels"`` of the same kind, -100 where a token is no target. The global batches and their
    order are the same for every number of ranks that shares them, and after a resume in mid-epoch.

    A plain folder is read in place. Anything else is cached on disk below ``$COMPOSER_GPT2_CACHE``
    (default ``~/.cache/composer-gpt2``), in a folder of its own for each content of the remote, so
    that a corpus that was replaced is never mixed with what is left of the old one; folders there
    may be deleted at any time when no run uses them.

    Example:
        >>> dataset = StreamingTokens(remote="s3://bucket/openwebtext", sequence_length=1024,
        ...                           batch_size=64, shuffle=True)
        >>> loader = build_token_dataloader(dataset)

    Args:
        remote: Folder or address of a prepared corpus (where ``corpus.json`` lies).
        local: Folder for the cache in place of the default one; without ``remote``, the corpus.
        split: Subfolder of the corpus; empty if the shards lie beside ``corpus.json``.
        streams: In place of the three above: name to a mapping with the keys ``remote``, ``local``,
            ``split`` (default: that of ``split``), ``proportion`` and ``repeat``, in which several
            corpora are mixed. All have a proportion (of sequences; they need not sum to 1) or none
            has; then each comes once in an epoch, or ``repeat`` times (0.5: half of it).
        sequence_length: T; the shards must have it.
        batch_size: B, sequences a rank takes in one batch.
        tokenizer: That the corpus must have been prepared with: ``"gpt2"`` or a folder.
        check_tokenizer: Switch off to read shards of other tools, which have no ``corpus.json``.
        check_hashes: Switch off to read shards whose index has no hashes; hashes that are there are
            always checked.
        shuffle: Whether each epoch has another random order.
        shuffle_seed: Seed of that order and of the mixing of streams.
        shuffle_block_size: Sequences among which is shuffled; None for streaming's choice.
        num_canonical_nodes: Number of interleaved ways through the corpus; the order depends on it
            and not on the number of machines.
        sampling_method: Whether each epoch takes other sequences where a mixture takes a part of a
            corpus ("balanced"), or the same ("fixed").
        predownload: Sequences a rank prepares ahead; None for ``8 * batch_size``.
        cache_limit: Bytes (or "100gb") on disk beyond which shards used longest ago are deleted;
            every thread that fetches may exceed it by one shard.
        download_retry: Attempts after the first to fetch a shard or an index, 1, 2, 4, ... (at most
            30) seconds apart; 8 outlast a fault of two minutes.
        download_timeout: Seconds that the store may stay silent within one attempt.
        drop_last: Whether an epoch leaves out what does not fill a batch of all ranks. Otherwise
            streaming repeats sequences until each rank has as many: other ones for each number of
            ranks.

    Raises:
        ValueError: The shards are not what the arguments say, or the arguments contradict.
        FileNotFoundError: There is no such corpus, split or bucket.
        PermissionError: The store refuses the credentials.
        ConnectionError: The store does not answer.
        ShardError: While iterating: a shard cannot be had or its hash is wrong.
    """

    def __init__(
        self,
        *,
        sequence_length: int,
        batch_size: int,
        remote: str | None = None,
        local: str | None = None,
        split: str = "train",
        streams: Mapping[str, Mapping[str, Any]] | None = None,
        tokenizer: str = "gpt2",
        check_tokenizer: bool = True,
        check_hashes: bool = True,
        shuffle: bool = False,
        shuffle_seed: int = 17,
        shuffle_block_size: int | None = None,
        num_canonical_nodes: int = 1,
        sampling_method: str = "balanced",
        predownload: int | None = None,
        cache_limit: int | str | None = None,
        download_retry: int = DEFAULT_RETRIES,
        download_timeout: float = 60.0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 sequence, got {batch_size}.")
        world = World.detect()
        sources = find_sources(
            remote,
            local,
            split,
            streams,
            retries=download_retry,
            timeout_seconds=download_timeout,
        )
        expected = Expectation(
            sequence_length, tokenizer if check_tokenizer else None, check_hashes
        )
        problems = [problem for source in sources for problem in source.problems(expected)]
        problems += [
            f"{source.name}: cache_limit must not be set for a folder that is read in place, "
            "because the only copy would be deleted; drop it, or set `local` to a cache folder."
            for source in sources
            if cache_limit is not None and source.in_place
        ]
        n_samples = sum(int(source.n_samples * (source.repeat or 1)) for source in sources)
        global_batch_size = batch_size * world.num_ranks
        if n_samples < global_batch_size:
            problems.append(
                f"{', '.join(source.name for source in sources)}: an epoch must hold at least one "
                f"global batch ({global_batch_size} sequences), got {n_samples} sequences; use a "
                "smaller batch or a larger split."
            )
        if problems:
            raise ValueError("\n".join(problems))

        cached = [source for source in sources if not source.in_place]
        for source in cached:
            source.prepare_cache()
        self.sequence_length = sequence_length
        shard_streams = [
            ShardStream(
                remote=None if source.in_place else source.remote,
                local=source.folder,
                split=source.split,
                proportion=source.proportion,
                repeat=source.repeat,
                has_cache_limit=cache_limit is not None,
            )
            for source in sources
        ]
        with registration(world.is_local_leader):
            super().__init__(
                streams=shard_streams,
                batch_size=batch_size,
                shuffle=shuffle,
                shuffle_seed=shuffle_seed,
                shuffle_block_size=shuffle_block_size,
                num_canonical_nodes=num_canonical_nodes,
                sampling_method=sampling_method,
                predownload=predownload,
                cache_limit=cache_limit,
                download_retry=download_retry,
                download_timeout=download_timeout,
            )
            self._failure = SharedFailure(self._shm_prefix_int)
        if drop_last:
            self.epoch_size -= self.epoch_size % global_batch_size
            self.length = self.epoch_size // world.num_ranks
        for stream in shard_streams:
            stream.failure = self._failure
        self._event: Any = self._failure  # what streaming's loops poll, see SharedFailure
        self._process_id = os.getpid()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """This rank's (and DataLoader worker's) part of the next epoch."""
        if self._failure.is_set():
            raise ShardError(self._failure.text)
        self._drop_inherited()
        try:
            yield from super().__iter__()
        except Exception as error:
            self._failure.set(_describe(error))  # for the other processes; the first one stays
            if isinstance(error, ShardError):
                raise
            raise ShardError(self._failure.text) from error

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, np.ndarray]:
        """The sequence with this number, of all streams one after the other.

        Args:
            sample_id: 0 up to the number of sequences.
            retry: How often its shard is fetched again when `cache_limit` deleted it just before.

        Returns:
            ``{"input_ids": int64 array of shape (T,)}``.
        """
        shard_id, sample_in_shard = self.spanner[sample_id]
        for _ in range(1 + retry):
            while (state := self._shard_states[shard_id]) != _LOCAL:
                if self._failure.is_set():
                    raise ShardError(self._failure.text)
                if state == _PREPARING:
                    sleep(TICK)  # another thread, rank or worker is at it
                else:
                    self.prepare_shard(shard_id, blocking=False)
            try:
                data = self.shards[shard_id].get_sample_data(sample_in_shard)
            except FileNotFoundError:
                self.prepare_shard(shard_id, blocking=False)
                continue
            except (IndexError, ValueError):  # no such sample in the file, or one that ends outside
                data = b""
            sample = read_sample(data, self.sequence_length)
            if sample is None:
                raise ShardError(
                    f"Sample {sample_in_shard} of shard {shard_id} must have "
                    f"{self.sequence_length} tokens, got {len(data)} bytes; prepare the corpus "
                    "again."
                )
            self._shard_access_times[shard_id] = time_ns()
            return sample
        raise ShardError(
            f"A shard must stay on disk while it is read, but shard {shard_id} was deleted "
            f"{1 + retry} times in a row; raise cache_limit ({self.cache_limit})."
        )

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on from; streaming's own would read an epoch again that has just ended.

        Args:
            num_samples: Sequences that all ranks have taken of this epoch.
            from_beginning: Whether they count from its beginning or from the last resume.

        Returns:
            A state for ``load_state_dict``.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = self.next_epoch
        return state

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Bring a shard here, proven by its hash, unless another process is at it.

        Args:
            shard_id: Which one, of all streams one after the other.
            blocking: Whether to wait for the other process.

        Raises:
            ShardError: It cannot be had.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            if hasattr(self, "_iterator") and self._iterator._state == _IterState.ITERATING:
                self._failure.set(_describe(error))  # first, or others would try it once more
            # streaming leaves it PREPARING, for which others wait for ever, and keeps the lock if
            # it failed to make room.
            self._shard_states[shard_id] = _REMOTE
            self._cache_filelock.release(force=True)
            raise

    def on_exception(self, future: Future) -> None:
        """Tell all when a background thread has ended by an exception (streaming only logs it)."""
        if error := future.exception():
            if not _is_abandoned(self._iterator):
                self._failure.set(_describe(error))
            self._iterator.on_exit()

    def _drop_inherited(self) -> None:
        """In a forked worker, forget threads and file locks of the parent, which work only there.

        streaming makes new ones where it finds none, and hangs or fails where it finds these: when
        the dataset was read before its DataLoader started workers.
        """
        if self._process_id != os.getpid():
            self._process_id = os.getpid()
            for name in ("_executor", "_iterator", "_cache_filelock"):
                self.__dict__.pop(name, None)
            self._shared_barrier.__dict__.pop("lock", None)

    def _prepare_thread(self, it: _Iterator) -> None:
        """Bring here the shards of the next `predownload` sequences, the first ones first.

        streaming's own takes a file lock for each sequence.
        """
        for stream in self.streams:
            assert isinstance(stream, ShardStream)
            stream.is_abandoned = partial(_is_abandoned, it)
        # -1 fills up the last batch: any sequence of ours will do in its place.
        sample_ids = np.where(it.sample_ids == -1, it.sample_ids[0], it.sample_ids)
        shard_ids = np.searchsorted(self.sample_offset_per_shard, sample_ids, side="right") - 1
        assert self.predownload is not None  # StreamingDataset has replaced it
        while it.yield_index < it.total and not (self._failure.is_set() or _is_abandoned(it)):
            ahead = shard_ids[it.yield_index : it.yield_index + self.predownload + 1]
            missing = ahead[self._shard_states.numpy()[ahead] == _REMOTE]
            if len(missing):
                self.prepare_shard(missing[0], blocking=False)
            else:
                sleep(TICK)
        it.on_exit()

    def _ready_thread(self, it: _Iterator) -> None:
        """Let all sequences be asked for: `get_item` waits for what it needs.

        streaming's own waits without end for a shard that was deleted right after it arrived.
        """
        it.ready_index = it.total
        it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """The numbers of this part of the epoch; streaming ends quietly where this raises."""
        try:
            yield from super()._each_sample_id(it)
        except GeneratorExit:
            it.non_blocking_exit()  # left early: its threads need not read ahead
            raise
        if self._failure.is_set() and it.yield_index < it.total:
            raise ShardError(self._failure.text)
        if it.yield_index < it.total:
            raise ShardError(
                f"An epoch must be read to its end, but it stopped after {it.yield_index} of "
                f"{it.total} sequences because a second iteration over the same dataset began; "
                "make one dataset for each."
            )


def build_token_dataloader(
    dataset: StreamingTokens, *, num_workers: int = 0, drop_last: bool = False
) -> StreamingDataLoader:
    """A DataLoader that yields ``{"input_ids": int64 (B, T), "labels": the same tensor}``.

    Where the corpus has a loss mask, the labels are another tensor, with -100 for no target.

    Its batch size is that of the dataset. Composer saves and restores its place in the epoch.

    Args:
        dataset: What to read.
        num_workers: Processes that read ahead; 0, the fastest where measured, reads in a thread.
        drop_last: Whether to leave out a last batch that is not full.
    """
    return _TokenDataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=num_workers,
        drop_last=drop_last,
        collate_fn=_collate,
        # Its own: otherwise each epoch, and each resume, would draw from torch's generator.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )


class _TokenDataLoader(StreamingDataLoader):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            yield from super().__iter__()
        except ShardError as error:
            # From a worker it comes wrapped in the text of a traceback; this is the plain message.
            assert isinstance(self.dataset, StreamingTokens)
            raise ShardError(self.dataset._failure.text) from error


def _is_abandoned(it: _Iterator) -> bool:
    """Whether the process ends, or another epoch begins, while this one is being read."""
    return it._state == _IterState.EXITING


def _collate(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    input_ids = torch.from_numpy(np.stack([sample["input_ids"] for sample in samples]))  # (B, T)
    if all("labels" not in sample for sample in samples):
        return {"input_ids": input_ids, "labels": input_ids}
    labels = np.stack([sample.get("labels", sample["input_ids"]) for sample in samples])
    return {"input_ids": input_ids, "labels": torch.from_numpy(labels)}


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"

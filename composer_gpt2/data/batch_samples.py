"""Which sequences of the corpus were in a batch: for the message when its numbers are bad.

Nothing is recorded while a run trains. The order of an epoch is a pure function of the dataset and
of the place where it was resumed, so it is computed again when somebody asks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from composer import State
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.format.base.reader import SplitReader
from streaming.base.world import World

__all__ = ["SampleLocation", "describe_samples", "samples_of_batch"]


@dataclass(frozen=True, order=True)
class SampleLocation:
    """Where a sequence lies."""

    stream: str
    """Folder or address of the corpus, with its split."""
    shard: str
    """Name of the file in it."""
    index: int
    """Of the sequence in the file, from 0."""


def samples_of_batch(state: State) -> list[SampleLocation]:
    """The sequences of the batch that is being trained, on all ranks, by rank.

    It counts what the data loader has given, not ``state.timestamp``: the answer is the same before
    and after Composer counts the batch, until the loader gives the next one. Every rank can ask for
    itself. It takes as long as the start of an epoch.

    Args:
        state: Of a Trainer that trains.

    Returns:
        Empty if the corpus is not read by ``streaming``, for then nobody knows.
    """
    loader = state.train_dataloader
    dataset = loader.dataset if isinstance(loader, StreamingDataLoader) else None
    if not isinstance(loader, StreamingDataLoader) or not isinstance(dataset, StreamingDataset):
        return []
    return [_locate(dataset, sample_id) for sample_id in _sample_ids(loader, dataset)]


def describe_samples(samples: Iterable[SampleLocation]) -> str:
    """One line: ``s3://bucket/corpus/train: shard.00000.mds 3-6, 9; shard.00007.mds 1``."""
    streams = []
    for stream, in_stream in itertools.groupby(sorted(set(samples)), lambda s: s.stream):
        shards = [
            f"{shard} {_ranges([sample.index for sample in in_shard])}"
            for shard, in_shard in itertools.groupby(in_stream, lambda s: s.shard)
        ]
        streams.append(f"{stream}: {'; '.join(shards)}")
    return " | ".join(streams) or "unknown, since the data loader is not one of streaming's"


def _sample_ids(loader: StreamingDataLoader, dataset: StreamingDataset) -> list[int]:
    ranks = dataset._parallel_rank_world
    n_workers = max(1, loader.num_workers)
    world = World(ranks.num_nodes, ranks.ranks_per_node, n_workers, worker=0)
    # The epoch that is being read, and where in it this process began: 0 but after a resume.
    epoch, first_sample = dataset._resume(ranks, dataset.next_epoch - 1)
    work = generate_work(dataset.batching_method, dataset, world, epoch, first_sample)
    # (nodes, ranks of a node, workers of a rank, batches of a worker, sequences). A DataLoader
    # takes a batch from each of its workers in turn.
    assert dataset.batch_size is not None
    n_batches_before = (loader.num_samples_yielded - 1) // dataset.batch_size
    batch = work[:, :, n_batches_before % n_workers, n_batches_before // n_workers]
    return batch[batch != -1].tolist()  # -1 fills up the last batch of an epoch


def _locate(dataset: StreamingDataset, sample_id: int) -> SampleLocation:
    shard_id, index = dataset.spanner[sample_id]
    stream: Stream = dataset.streams[dataset.stream_per_shard[shard_id]]
    raw, packed = cast("SplitReader", dataset.shards[shard_id]).file_pairs[0]
    folder = os.path.join(stream.remote or stream.local, stream.split or "").rstrip("/")
    return SampleLocation(folder, (packed or raw).basename, index)


def _ranges(indices: list[int]) -> str:
    """``[3, 4, 5, 9]`` as ``3-5, 9``."""
    runs = itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    ends = [[index for _, index in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends)

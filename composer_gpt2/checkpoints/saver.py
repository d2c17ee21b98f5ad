"""Saves checkpoints so that what is there is whole, whenever the run, the disk or the store dies.

Each file is written under another name, flushed to the disk and renamed; the manifest comes last. A
run that saves to an object store writes into a folder of its own first, trains on while a thread
uploads, the pointer last, and uploads what a killed run could not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from composer import Logger, State, Time
from composer.callbacks import CheckpointSaver
from composer.utils import dist, reproducibility
from safetensors.torch import save_model

from composer_gpt2.checkpoints.manifest import (
    CheckpointError,
    Manifest,
    file_problem,
    newest_first,
    read_manifest,
    record_file,
)
from composer_gpt2.contract import language_model
from composer_gpt2.data.object_store import ObjectStore, open_store
from composer_gpt2.data.part_files import sync_to_disk
from composer_gpt2.data.retrying import DEFAULT_RETRIES
from composer_gpt2.tokenizer_by_name import is_gpt2_tokenizer

__all__ = ["UNFINISHED", "VerifiedCheckpointSaver"]

UNFINISHED = ".unfinished-"
"""Begins the names of files that are being written."""

_LATEST = "latest-rank0.pt"


class VerifiedCheckpointSaver(CheckpointSaver):
    """Composer's checkpoints with a manifest of hashes, written atomically.

    Files are ``ep0-ba100-rank0.pt`` (to go on from; loads with ``weights_only=True``),
    ``ep0-ba100-rank0.safetensors`` (the weights) and ``ep0-ba100-rank0.json`` (sizes, SHA-256, the
    recipe). ``latest-rank0.pt`` points to the newest.

    Args:
        folder: A folder or the address of one in an object store.
        staging: A local folder that outlives a killed run, for what is being uploaded.
        recipe: The resolved recipe, for the manifests.
        save_interval: A time, such as ``1000ba``; the end of the run is always saved.
        n_to_keep: Newest checkpoints to keep; -1 for all.
        keep_every: A time such as ``10000ba``: the first checkpoint in each such span is kept for
            ever, whatever ``n_to_keep`` is; ``None`` for none.
        replace: Whether checkpoints of an earlier run are deleted once this one has its first.

    Attributes:
        closing: Ended when the Trainer is closed: what the run must hold until then.

    Raises:
        CheckpointError: A checkpoint cannot be written or uploaded; the ones before are whole.
    """

    def __init__(
        self,
        folder: str,
        *,
        staging: str,
        recipe: Mapping[str, Any],
        save_interval: str,
        n_to_keep: int = -1,
        keep_every: str | None = None,
        replace: bool = False,
    ) -> None:
        is_remote = urlparse(folder).scheme != ""
        super().__init__(
            folder=staging if is_remote else folder,
            filename="ep{epoch}-ba{batch}-rank{rank}.pt",
            remote_file_name=None,
            latest_filename=_LATEST,
            latest_remote_file_name=None,
            save_interval=save_interval,
        )
        self._address = folder if is_remote else None
        self._recipe = recipe
        self._n_to_keep = n_to_keep
        self._keep_every = None if keep_every is None else Time.from_timestring(keep_every)
        self._replace = replace
        self.closing = contextlib.ExitStack()
        self._store: ObjectStore | None = None
        self._uploader = ThreadPoolExecutor(1, "upload") if is_remote else None
        self._uploads: list[Future[None]] = []
        self._manifests: dict[str, Manifest] = {}  # of whole checkpoints in the save folder

    def init(self, state: State, logger: Logger) -> None:
        """Clears what a killed run left half written, and opens the store (rank 0)."""
        if dist.get_global_rank() != 0:
            return
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{UNFINISHED}*"):
            leftover.unlink()
        if self._address is not None:
            try:
                self._store = open_store(
                    self._address, what="A save folder", open_retries=DEFAULT_RETRIES
                )
            except OSError as error:
                raise CheckpointError(f"checkpoints must be stored, but {error}") from error

    def fit_start(self, state: State, logger: Logger) -> None:
        """Learns what is there, and uploads what a killed run could not (rank 0)."""
        if dist.get_global_rank() != 0:
            return
        folder = Path(self.folder)
        whole = _manifests(os.listdir(folder), lambda name: (folder / name).read_bytes())
        unsent = []
        if self._store is not None:
            unsent = sorted(whole.values(), key=lambda manifest: manifest.batch)
            finished = {name for manifest in unsent for name in (manifest.file, *manifest.files)}
            for name in set(os.listdir(folder)) - finished:
                (folder / name).unlink()  # of a checkpoint that was never finished
            whole = _manifests(self._store.names(), self._store.read_bytes)
        # Those of a later batch are damaged, or this run would have gone on from them.
        now = state.timestamp.batch.value
        self._manifests = {
            name: manifest
            for name, manifest in whole.items()
            if self._replace or manifest.batch <= now
        }
        for manifest in unsent:
            if any(file_problem(folder / name, r) for name, r in manifest.files.items()):
                self._remove(manifest)
            else:
                self._start_upload(manifest)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Raises what an upload has raised meanwhile."""
        while self._uploads and self._uploads[0].done():
            self._uploads.pop(0).result()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Waits for the uploads."""
        self.wait()

    def post_close(self) -> None:
        """Ends the thread; what it has begun is finished."""
        if self._uploader is not None:
            self._uploader.shutdown(wait=True)
        if self._store is not None:
            self._store.close()
        self.closing.close()

    def state_dict(self) -> dict[str, Any]:
        """Empty: what is saved stands in the folder."""
        return {}

    def save_now(self, state: State, logger: Logger) -> None:
        """Saves this batch unless it is saved, and waits for the upload. All ranks call it."""
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)
        self.wait()

    def wait(self) -> None:
        """Returns when all uploads are done.

        Raises:
            CheckpointError: One has failed.
        """
        if any(not upload.done() for upload in self._uploads):
            print(f"waiting for the upload to {self._address}", file=sys.stderr, flush=True)
        while self._uploads:
            self._uploads.pop(0).result()

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        failure: list[str | None] = [None]
        if dist.get_global_rank() == 0:
            try:
                manifest = self._write(content, state)
            except (OSError, RuntimeError) as error:  # torch turns some of the former into these
                failure = [self._describe(error)]
            else:
                self._publish(manifest)
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise CheckpointError(failure[0])

    def _write(self, content: dict[str, Any], state: State) -> Manifest:
        """Writes a checkpoint into the local folder; the manifest last."""
        folder, time = Path(self.folder), state.timestamp
        manifest = Manifest(
            name=f"ep{time.epoch.value}-ba{time.batch.value}",
            times={unit: int(time.get(unit).value) for unit in ("ba", "ep", "sp", "tok")},
            files={},
            recipe=self._recipe,
        )
        network = language_model(getattr(state.model, "module", state.model), "a checkpoint")
        about = {"format": "pt", "config": network.config.to_json_string(use_diff=False)}
        tokenizer = content["state"]["integrations"]["huggingface"]["tokenizer"]
        if tokenizer and not is_gpt2_tokenizer(tokenizer):
            about["tokenizer"] = json.dumps(tokenizer)

        def save_state(path: Path) -> None:
            with path.open("wb") as file:
                torch.save(content, file)

        files = {}
        for name, write in (
            (manifest.state_file, save_state),
            (manifest.weights_file, lambda path: save_model(network, str(path), about)),
        ):
            unfinished = folder / f"{UNFINISHED}{name}"
            write(unfinished)
            files[name] = record_file(unfinished)
            sync_to_disk(unfinished)
            unfinished.replace(folder / name)
        whole = Manifest(manifest.name, manifest.times, files, manifest.recipe)
        unfinished = folder / f"{UNFINISHED}{whole.file}"
        unfinished.write_text(whole.to_json(), encoding="utf-8")
        sync_to_disk(unfinished)
        unfinished.replace(folder / whole.file)
        if self._address is None:
            link = folder / f"{UNFINISHED}{_LATEST}"
            link.symlink_to(whole.state_file)
            link.replace(folder / _LATEST)
        sync_to_disk(folder)
        return whole

    def _publish(self, manifest: Manifest) -> None:
        """A checkpoint is whole here: upload it, and delete those that are not to be kept."""
        if self._address is not None:
            self._start_upload(manifest)
            return
        self._manifests[manifest.name] = manifest
        self.saved_checkpoints.append(str(Path(self.folder) / manifest.state_file))
        for old in self._outdated(manifest):
            self._remove(old)

    def _start_upload(self, manifest: Manifest) -> None:
        assert self._uploader is not None
        if len(self._uploads) > 1:  # one under way, one waiting: more would fill the disk
            self._uploads.pop(0).result()
        self._uploads.append(self._uploader.submit(self._upload, manifest))

    def _upload(self, manifest: Manifest) -> None:
        assert self._store is not None
        assert self._address is not None
        try:
            for name in (*manifest.files, manifest.file):
                _link_or_copy(Path(self.folder) / name, self._store.work_dir / name)
                self._store.put(name)
            # As Composer's own: a pointer that its readers follow.
            key = f"{urlparse(self._address).path.strip('/')}/{manifest.state_file}".lstrip("/")
            self._store.put_bytes(f"{_LATEST}.symlink", key.encode())
            self._manifests[manifest.name] = manifest
            self.saved_checkpoints.append(f"{self._address}/{manifest.state_file}")
            for old in self._outdated(manifest):
                self._store.delete([old.file, *old.files])
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of batch {manifest.batch} must be stored in {self._address}, but "
                f"{error} It is whole in {self.folder}, and the same command, started again, goes "
                "on from it and uploads it."
            ) from error
        self._remove(manifest)

    def _remove(self, manifest: Manifest) -> None:
        for name in (manifest.file, *manifest.files):  # the manifest first: a part is no checkpoint
            (Path(self.folder) / name).unlink(missing_ok=True)

    def _outdated(self, newest: Manifest) -> list[Manifest]:
        """The checkpoints to delete now; they are forgotten."""
        ordered = sorted(self._manifests.values(), key=lambda m: m.batch, reverse=True)
        if self._replace:
            self._replace = False
            outdated = [manifest for manifest in ordered if manifest is not newest]
        elif self._n_to_keep < 0:
            outdated = []
        else:
            landmarks = self._landmarks(ordered)
            keep = max(self._n_to_keep, 1)  # the one that the run would go on from
            outdated = [m for m in ordered[keep:] if m.name not in landmarks]
        for manifest in outdated:
            del self._manifests[manifest.name]
        return outdated

    def _landmarks(self, manifests: list[Manifest]) -> set[str]:
        """Those kept for ever: the first in each span of ``keep_every``."""
        if self._keep_every is None:
            return set()
        first: dict[int, Manifest] = {}
        for manifest in sorted(manifests, key=lambda m: m.batch):
            n_spans = manifest.times[self._keep_every.unit.value] // self._keep_every.value
            first.setdefault(n_spans, manifest)
        return {manifest.name for n_spans, manifest in first.items() if n_spans > 0}

    def _describe(self, error: Exception) -> str:
        for leftover in Path(self.folder).glob(f"{UNFINISHED}*"):
            leftover.unlink()
        free = shutil.disk_usage(self.folder).free
        kept = max(self._manifests.values(), key=lambda m: m.batch, default=None)
        before = f"That of batch {kept.batch} is whole" if kept else "There is none before it"
        return (
            f"a checkpoint must be written to {self.folder}, but {type(error).__name__}: {error} "
            f"({free / 1e6:,.0f} MB are free there). {before}; make room and start the same "
            "command again."
        )


def _manifests(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, Manifest]:
    """Those among the files of a folder; a damaged one belongs to no checkpoint."""
    found = {}
    for name in newest_first(names):
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(read(name))
            found[manifest.name] = manifest
    return found


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)

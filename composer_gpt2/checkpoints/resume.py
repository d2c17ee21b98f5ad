"""Finds the checkpoint that a run goes on from, and makes sure that it is this run's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist

from composer_gpt2.checkpoints.manifest import (
    CheckpointError,
    Manifest,
    file_problem,
    newest_first,
    read_manifest,
)
from composer_gpt2.data.object_store import ObjectStore, open_store
from composer_gpt2.data.retrying import DEFAULT_RETRIES

__all__ = [
    "FREE_KEYS",
    "RecipeChangedError",
    "ResumePoint",
    "find_resume_point",
    "newest_batch",
    "recipe_changes",
    "recipe_fingerprint",
    "refuse_changes",
    "resume_path_for_all_ranks",
]

FREE_KEYS = frozenset(
    {
        "allow_recipe_changes",
        "autoresume",
        "callbacks",
        "data.cache_limit",
        "data.download_retry",
        "data.download_timeout",
        "data.local",
        "data.num_workers",
        "device_train_microbatch_size",
        "dist_timeout",
        "eval_batch_size",
        "eval_interval",
        "eval_subset_num_batches",
        "load_path",
        "load_weights_only",
        "log_interval",
        "loggers",
        "progress_bar",
        "run_folder",
        "run_name",
        "save_folder",
        "save_interval",
        "save_keep_every",
        "save_num_checkpoints_to_keep",
        "save_overwrite",
    }
)
"""Keys of a recipe that do not decide what is trained: a resumed run may change them."""

_NEVER = {
    "train_batch_size": "the order of samples and the schedules count batches of that size",
    "data.sequence_length": "the place in the corpus is counted in samples of that length",
}


class RecipeChangedError(ValueError):
    """The recipe is not that of the checkpoint that the run would go on from."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint.

    Attributes:
        manifest: What it consists of.
        state_file: A file here, whole, to be loaded.
    """

    manifest: Manifest
    state_file: Path


@contextlib.contextmanager
def resume_path_for_all_ranks(
    save_folder: str, staging: str, check: Callable[[Manifest], None]
) -> Iterator[str | None]:
    """The file that each rank goes on from; rank 0 chooses, and all raise what it raises.

    Args:
        save_folder: As for :func:`find_resume_point`.
        staging: Likewise.
        check: Raises if the run may not go on from this checkpoint.

    Yields:
        A path, the same checkpoint on every machine; ``None`` to start anew.

    Raises:
        CheckpointError: All checkpoints are damaged; or the place cannot be read, or not by all.
        RecipeChangedError: By ``check``.
    """
    with contextlib.ExitStack() as stack:
        path: str | None = None
        chosen: list[Manifest | Exception | None] = [None]
        if dist.get_global_rank() == 0:
            try:
                point = stack.enter_context(find_resume_point(save_folder, staging))
                if point is not None:
                    check(point.manifest)
                    path, chosen = str(point.state_file), [point.manifest]
            except (CheckpointError, RecipeChangedError) as error:
                chosen = [error]
            except OSError as error:
                chosen = [CheckpointError(f"checkpoints must be readable, but {error}")]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], Exception):
            raise chosen[0]
        if chosen[0] is not None and path is None and dist.get_local_rank() == 0:
            path = _fetch(save_folder, chosen[0], stack)  # the first rank of another machine
        paths = dist.all_gather_object((dist.get_node_rank(), path))
        yield next((p for node, p in paths if node == dist.get_node_rank() and p), None)
        dist.barrier()  # nobody deletes the file while another rank reads it


@contextlib.contextmanager
def find_resume_point(save_folder: str, staging: str) -> Iterator[ResumePoint | None]:
    """The newest checkpoint that verifies; what is damaged is skipped with a message.

    From an object store it is fetched into a folder that lives as long as the ``with`` block.

    Args:
        save_folder: A folder or an address.
        staging: Where the saver keeps what is not uploaded yet.

    Yields:
        It, or ``None`` where no checkpoint has ever been finished.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
        OSError: The store cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(_open(place)) for place in (staging, save_folder)]
        yield _newest(stores, stack)


def newest_batch(save_folder: str) -> int | None:
    """Batches trained at the newest checkpoint, unverified; ``None`` if there is none."""
    with _open(save_folder) as store:
        names = newest_first(store.names())
    return int(names[0].split("-ba")[1].split("-")[0]) if names else None


def recipe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two resolved recipes, dotted key to both values, free keys left out."""
    was, is_now = dict(_flat(before)), dict(_flat(now))
    return {
        key: (was.get(key), is_now.get(key))
        for key in sorted(was.keys() | is_now.keys())
        if was.get(key) != is_now.get(key) and not _is_free(key)
    }


def recipe_fingerprint(recipe: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of what decides the training: equal for equal resolved recipes."""
    decisive = {key: value for key, value in _flat(recipe) if not _is_free(key)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def refuse_changes(manifest: Manifest, recipe: Mapping[str, Any]) -> None:
    """Makes sure that a recipe goes on with the run of a checkpoint.

    Args:
        manifest: The checkpoint's.
        recipe: Resolved; its ``allow_recipe_changes`` accepts what can be accepted.

    Raises:
        RecipeChangedError: With the differences.
    """
    changes = recipe_changes(manifest.recipe, recipe)
    final = [key for key in changes if key in _NEVER]
    if not changes or (recipe["allow_recipe_changes"] and not final):
        return
    lines = "".join(
        f"\n  {key}: was {_spell(was)}, got {_spell(now)}" for key, (was, now) in changes.items()
    )
    way_on = (
        f"{final[0]} cannot change, because {_NEVER[final[0]]}; keep it, or start a new run from "
        "the weights (run_name=another load_path=... load_weights_only=true)."
        if final
        else "Take these back, accept them (allow_recipe_changes=true), or start a new run "
        "(run_name=another)."
    )
    raise RecipeChangedError(
        f"a run must go on with the recipe of its checkpoint ({manifest.name}), got "
        f"{len(changes)} change{'s' if len(changes) > 1 else ''}:{lines}\n{way_on}"
    )


def _newest(stores: list[ObjectStore], stack: contextlib.ExitStack) -> ResumePoint | None:
    """The newest whole checkpoint of all stores; its file lives as long as the stack."""
    names = {store.url: store.names() for store in stores}
    problems = []
    for wanted in newest_first(set().union(*names.values())):
        for store in (store for store in stores if wanted in names[store.url]):
            with contextlib.ExitStack() as own:
                try:
                    manifest = read_manifest(store.read_bytes(wanted))
                    path = own.enter_context(store.local_copy(manifest.state_file))
                    problem = file_problem(path, manifest.files[manifest.state_file])
                except (CheckpointError, FileNotFoundError, KeyError) as error:
                    problem = str(error)
                else:
                    if problem is None:
                        stack.push(own.pop_all())
                        return ResumePoint(manifest, path)
            problems.append(f"{store.url}/{wanted.removesuffix('-rank0.json')}: {problem}")
            print(f"skipping a damaged checkpoint: {problems[-1]}", file=sys.stderr, flush=True)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(
            f"one checkpoint at least must be whole, got {len(problems)} that are not:{lines}\n"
            "Restore one of them, or delete them to start from the beginning."
        )
    return None


def _open(place: str) -> ObjectStore:
    """As long as a run waits for its corpus, it waits for its checkpoints."""
    return open_store(place, what="A save folder", open_retries=DEFAULT_RETRIES)


def _fetch(save_folder: str, manifest: Manifest, stack: contextlib.ExitStack) -> str:
    store = stack.enter_context(_open(save_folder))
    path = stack.enter_context(store.local_copy(manifest.state_file))
    if problem := file_problem(path, manifest.files[manifest.state_file]):
        raise CheckpointError(
            f"each machine must find the checkpoint {manifest.name} in {save_folder}, but on "
            f"machine {dist.get_node_rank()} {problem}; save to a folder or an object store that "
            "all share."
        )
    return str(path)


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _is_free(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]) in FREE_KEYS for n in range(1, len(parts) + 1))


def _spell(value: Any) -> str:
    return json.dumps(value, default=str)

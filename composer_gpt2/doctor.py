"""What stands in the way of a run: this machine, its corpus, its stores, its checkpoints.

Each check is a function that looks at one thing, changes nothing and yields findings; what a check
raises is a finding too. :func:`doctor` runs those that apply.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlparse

from composer_gpt2.recipe import Recipe, load_recipe

__all__ = ["Finding", "doctor"]

Status = Literal["ok", "note", "PROBLEM"]

_RETRIES = 1  # whoever waits for an answer wants it soon
_BYTES_PER_PARAMETER = 16  # fp32 weights and gradients or safetensors, two moments
_SHARED_BYTES = 16 << 20  # streaming's own, with room; a batch of a worker comes on top
_OPEN_FILES = 1024  # streaming keeps 14 for each dataset, a DataLoader some for each worker


class Finding(NamedTuple):
    """One line of the diagnosis."""

    status: Status
    """``ok``; ``note``: good to know; ``PROBLEM``: a run would fail or lose something."""
    topic: str
    text: str
    """What was found, and what to do about it."""

    def __str__(self) -> str:
        """``PROBLEM  disk         ...``, in columns."""
        return f"{self.status:<8} {self.topic:<14} {self.text}"


Findings = Iterator[Finding]
Check = Callable[[], Iterable[Finding]]


def doctor(
    run_folder: str | None = None,
    files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    verify: bool = False,
) -> Iterator[Finding]:
    """Looks at the machine and, if one is given, at a run.

    Args:
        run_folder: Of a run that was started; its ``recipe.yaml`` comes before `files`.
        files: Recipes, as for :func:`composer_gpt2.recipe.load_recipe`.
        overrides: ``key=value`` on top of them.
        verify: Whether every shard of the corpus is read and compared with its hash.

    Yields:
        Findings, as they are made.
    """
    yield from _guarded("versions", _versions)
    recipe = None
    if run_folder is not None or files or overrides:
        try:
            recipe = _read_recipe(run_folder, files, overrides)
        except (ValueError, OSError) as error:
            yield Finding("PROBLEM", "recipe", str(error))
        else:
            yield Finding("ok", "recipe", f"is sound; the run is {recipe.run_name}")
    checks: list[tuple[str, Check]] = [
        ("gpu", partial(_gpu, recipe)),
        ("cpu", _cpu),
        ("memory", partial(_memory, recipe)),
        ("shared memory", partial(_shared_memory, recipe)),
        ("open files", _open_files),
        ("tokenizer", _tokenizer),
    ]
    if recipe is not None:
        checks += [
            ("stores", partial(_stores, recipe)),
            ("corpus", partial(_corpus, recipe, verify)),
            ("run lock", partial(_run_lock, recipe)),
            ("checkpoint", partial(_checkpoint, recipe)),
            ("disk", partial(_disk, recipe)),
            ("leftovers", partial(_leftovers, recipe)),
        ]
    for topic, check in checks:
        yield from _guarded(topic, check)


def _guarded(topic: str, check: Check) -> Findings:
    try:
        yield from check()
    except Exception as error:  # whatever it is, the other checks go on
        yield Finding("PROBLEM", topic, f"cannot be checked: {type(error).__name__}: {error}")


def _read_recipe(
    run_folder: str | None, files: Sequence[str | Path], overrides: Sequence[str]
) -> Recipe:
    from composer_gpt2.build import name_run

    saved = [] if run_folder is None else [Path(run_folder, "recipe.yaml")]
    recipe = name_run(load_recipe([*saved, *files], overrides))
    if run_folder is None:
        return recipe
    # The folder may be another one now than its recipe says, or seen from elsewhere.
    here = {"run_folder": run_folder}
    if recipe.save_folder == f"{recipe.run_folder}/checkpoints":
        here["save_folder"] = f"{run_folder}/checkpoints"
    return recipe.model_copy(update=here)


# --- The machine -------------------------------------------------------------------------------


def _versions() -> Findings:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        package = metadata.distribution("composer-gpt2")
    except metadata.PackageNotFoundError:
        yield Finding(
            "note",
            "versions",
            "composer-gpt2 is not installed, so that its requirements are not known; "
            "pip install -e . in its checkout",
        )
        return
    problems = []
    python, wanted = platform.python_version(), package.metadata["Requires-Python"]
    if python not in SpecifierSet(wanted):
        problems.append(f"Python must be {wanted}, got {python}; make an environment with one")
    requirements = [Requirement(text) for text in package.requires or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            problems.append(
                f"{requirement.name} must be {requirement.specifier}, got {found}; "
                f"pip install '{requirement}'"
            )
    yield from (Finding("PROBLEM", "versions", problem) for problem in problems)
    if not problems:
        text = f"Python {python} and {len(needed)} packages are as required"
        yield Finding("ok", "versions", text)


def _gpu(recipe: Recipe | None) -> Findings:
    import torch
    from torch.version import cuda as cuda_version

    if not torch.cuda.is_available():
        if recipe is not None and recipe.device == "gpu":
            text = "the recipe says device: gpu, but torch finds none; write device: null, or "
            yield Finding("PROBLEM", "gpu", text + "look at what nvidia-smi says")
        elif shutil.which("nvidia-smi"):
            text = f"nvidia-smi is here, but torch (CUDA {cuda_version}) finds no GPU; "
            yield Finding("PROBLEM", "gpu", text + "update the driver, see what nvidia-smi says")
        else:
            yield Finding("note", "gpu", "none; runs use the CPU")
        return
    n_gpus, has_bf16 = torch.cuda.device_count(), torch.cuda.is_bf16_supported(False)
    name = f"{n_gpus} x {torch.cuda.get_device_name()}, CUDA {cuda_version}"
    if recipe is not None and recipe.precision == "amp_bf16" and not has_bf16:
        yield Finding("PROBLEM", "gpu", f"{name} has no bfloat16; write precision: amp_fp16")
    else:
        yield Finding("ok", "gpu", f"{name}, {'with' if has_bf16 else 'without'} bfloat16")


def _cpu() -> Findings:
    from composer_gpt2.cpu_kernels.library import _cpu_features

    n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    missing = [] if "avx512_bf16" in _cpu_features() else ["AVX512-BF16"]
    missing += [] if compiler and shutil.which(compiler) else ["a C++ compiler (install g++)"]
    if missing:
        text = f"{n_cores} cores without {' and '.join(missing)}: the CPU kernels cannot run"
        yield Finding("note", "cpu", f"{text}, and torch's are used")
    else:
        yield Finding("ok", "cpu", f"{n_cores} cores with AVX512-BF16, compiler {compiler}")


def _memory(recipe: Recipe | None) -> Findings:
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        has = min(has, int(text))
    needs = 0 if recipe is None else _BYTES_PER_PARAMETER * _n_parameters(recipe)
    if needs > has:
        text = f"weights, gradients and moments take {_size(needs)}, got {_size(has)} in all; "
        yield Finding("PROBLEM", "memory", text + "choose a smaller model or a larger machine")
    else:
        yield Finding("ok", "memory", _size(has))


def _shared_memory(recipe: Recipe | None) -> Findings:
    from composer_gpt2.data.shared_state import _MARK, _NUMBER, _SHARED_MEMORY

    if not _SHARED_MEMORY.is_dir():
        yield Finding("note", "shared memory", f"this system has no {_SHARED_MEMORY}")
        return
    needs, free = _SHARED_BYTES, shutil.disk_usage(_SHARED_MEMORY).free
    if recipe is not None:  # a worker has two batches under way, of int64 tokens
        tokens = recipe.train_batch_size * recipe.data.sequence_length
        needs += recipe.data.num_workers * 2 * 8 * tokens
    if free < needs:
        text = f"a run needs {_size(needs)} in {_SHARED_MEMORY}, got {_size(free)}; make it larger "
        yield Finding("PROBLEM", "shared memory", text + "(docker run --shm-size=1g)")
    else:
        yield Finding("ok", "shared memory", f"{_size(free)} free")
    n_stale = 0
    for path in _SHARED_MEMORY.glob(f"{_NUMBER}_locals"):
        # Those end the block if it has just ended, or is another user's, or lives.
        with (
            contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError),
            path.open("rb") as file,
        ):
            if file.read().endswith(_MARK):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                n_stale += 1
    if n_stale:
        text = f"segments of {n_stale} dead dataset(s) are left; the next run removes them"
        yield Finding("note", "shared memory", text)


def _open_files() -> Findings:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < _OPEN_FILES:
        text = f"a process must be allowed {_OPEN_FILES}, got {limit}; run ulimit -n {_OPEN_FILES}"
        yield Finding("PROBLEM", "open files", text)
    else:
        yield Finding("ok", "open files", f"a process may have {limit}")


def _tokenizer() -> Findings:
    from composer_gpt2.tokenizer import get_encoding

    get_encoding()  # checks the hash of its table
    yield Finding("ok", "tokenizer", "the rank table has its published hash")


# --- The run -----------------------------------------------------------------------------------


def _stores(recipe: Recipe) -> Findings:
    from composer_gpt2.data.object_store import open_store

    places = [recipe.data.remote, *(stream.remote for stream in recipe.data.streams.values())]
    places += [] if recipe.save_interval is None else [recipe.save_folder]
    for place in sorted({place for place in places if place and urlparse(place).scheme}):
        try:
            open_store(place, retries=_RETRIES, open_retries=_RETRIES).close()
        except (ValueError, OSError) as error:
            yield Finding("PROBLEM", "stores", str(error))
        else:
            text = f"{place} answers and lets us in; whether we may write was not tried"
            yield Finding("ok", "stores", text)


def _corpus(recipe: Recipe, verify_hashes: bool) -> Findings:
    from composer_gpt2.data.corpus_source import Expectation, find_sources
    from composer_gpt2.data.verification import verify

    data = recipe.data
    streams = {name: s.model_dump(exclude_none=True) for name, s in data.streams.items()}
    tokenizer = data.tokenizer if data.check_tokenizer else None
    expected = Expectation(data.sequence_length, tokenizer, hashes=True)
    cache_bytes, caches = 0, set()
    for split in filter(None, (data.train_split, data.validation_split)):
        try:
            sources = find_sources(data.remote, data.local, split, streams or None, retries=1)
        except (ValueError, OSError) as error:
            yield Finding("PROBLEM", "corpus", str(error))
            continue
        for source in sources:
            problems = source.problems(expected)
            yield from (Finding("PROBLEM", "corpus", problem) for problem in problems)
            missing = source.in_place and source.missing_shards()
            if missing:
                text = f"{source.name}: {len(missing)} shard(s) are missing, first {missing[0]}; "
                yield Finding("PROBLEM", "corpus", text + "copy them again from a good copy")
            elif not problems:
                text = f"{source.name}: {source.n_samples:,} sequences of {data.sequence_length}"
                yield Finding("ok", "corpus", text)
            if not source.in_place:
                cache_bytes += source.n_samples * data.sequence_length * 2
                caches.add(source.folder)
    if caches and data.cache_limit is None:
        folder = _existing(min(caches))
        free = shutil.disk_usage(folder).free
        if free < cache_bytes:
            text = f"copies of the shards may take {_size(cache_bytes)}, got {_size(free)} at "
            text += f"{folder}; set data.cache_limit, or COMPOSER_GPT2_CACHE to another disk"
            yield Finding("PROBLEM", "corpus", text)
    if verify_hashes:
        for remote in filter(None, [data.remote, *(s.remote for s in data.streams.values())]):
            try:
                verify(remote, progress=False)
            except (ValueError, OSError) as error:
                yield Finding("PROBLEM", "corpus", str(error))
            else:
                yield Finding("ok", "corpus", f"every shard of {remote} has its hash")


def _run_lock(recipe: Recipe) -> Findings:
    path = Path(str(recipe.run_folder), ".lock")
    if not path.exists():
        yield Finding("ok", "run lock", f"nobody trains in {recipe.run_folder}")
        return
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = f"a process trains in {recipe.run_folder}; another cannot start until it has ended"
        yield Finding("note", "run lock", text)
    else:
        yield Finding("ok", "run lock", f"nobody trains in {recipe.run_folder}")


def _checkpoint(recipe: Recipe) -> Findings:
    from composer_gpt2.checkpoints import CheckpointError, find_resume_point, load_safely
    from composer_gpt2.checkpoints.resume import RecipeChangedError, refuse_changes
    from composer_gpt2.data.object_store import open_store

    if recipe.save_interval is None:
        yield Finding("note", "checkpoint", "nothing is saved, for save_interval is null")
        return
    try:  # soon: what follows is more patient
        open_store(str(recipe.save_folder), retries=_RETRIES, open_retries=_RETRIES).close()
    except (ValueError, OSError):
        yield Finding("note", "checkpoint", "its store must be reached first, see above")
        return
    skipped = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(skipped),
            find_resume_point(str(recipe.save_folder), _staging(recipe)) as point,
        ):
            if point is not None:
                load_safely(point.state_file)
    except (CheckpointError, OSError) as error:
        yield Finding("PROBLEM", "checkpoint", str(error))
        return
    for line in skipped.getvalue().splitlines():
        yield Finding("note", "checkpoint", line)
    if point is None:
        yield Finding("ok", "checkpoint", f"there is none in {recipe.save_folder} yet")
        return
    yield Finding("ok", "checkpoint", f"{point.manifest.name} is whole and runs no code")
    if not recipe.autoresume:
        text = "autoresume is false: a run would not go on from it"
        yield Finding("note", "checkpoint", text)
        return
    try:
        refuse_changes(point.manifest, recipe.model_dump(mode="json"))
    except RecipeChangedError as error:
        yield Finding("PROBLEM", "checkpoint", str(error))


def _disk(recipe: Recipe) -> Findings:
    if recipe.save_interval is None:
        return
    is_remote = urlparse(str(recipe.save_folder)).scheme != ""
    folder = Path(_staging(recipe) if is_remote else str(recipe.save_folder))
    saved = sorted(folder.glob("ep*-rank0.pt"), key=os.path.getmtime)
    needs = _BYTES_PER_PARAMETER * _n_parameters(recipe)
    if saved:
        weights = saved[-1].with_suffix(".safetensors")
        needs = sum(path.stat().st_size for path in (saved[-1], weights) if path.exists())
    free = shutil.disk_usage(_existing(folder)).free
    # A new one is written before an old one is deleted; those that are there take no more room.
    n_kept = 0 if is_remote else recipe.save_num_checkpoints_to_keep
    n_more = max(n_kept - len(saved), 0) + 1
    if free < needs:
        text = f"the next checkpoint takes {_size(needs)}, got {_size(free)} at {folder}; make room"
        yield Finding("PROBLEM", "disk", text)
    elif free < n_more * needs:
        text = f"the {n_more} checkpoints to come take {_size(n_more * needs)}, got {_size(free)} "
        yield Finding("PROBLEM", "disk", text + f"at {folder}; keep fewer, or make room")
    else:
        text = f"{_size(free)} at {folder}, room for {free // needs:,} checkpoints"
        yield Finding("ok", "disk", text)


def _leftovers(recipe: Recipe) -> Findings:
    from composer_gpt2.checkpoints.saver import UNFINISHED

    places = [_staging(recipe)]
    if not urlparse(str(recipe.save_folder)).scheme:
        places.append(str(recipe.save_folder))
    found = sorted(path for place in places for path in Path(place).glob(f"{UNFINISHED}*"))
    if found:
        text = f"{len(found)} half-written file(s), first {found[0]}; the next run removes them"
        yield Finding("note", "leftovers", text)


def _staging(recipe: Recipe) -> str:
    return f"{recipe.run_folder}/uploading"


def _n_parameters(recipe: Recipe) -> int:
    from composer_gpt2.configs import get_config
    from composer_gpt2.scaling import parameter_count

    return parameter_count(get_config(recipe.model.name, **recipe.model.config_overrides))


def _existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"

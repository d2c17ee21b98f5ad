"""Tasks of EleutherAI's lm-evaluation-harness, ours among them, without the network.

What our names do not cover goes to the harness, with our model as its model. Our own tasks can go
the same way, from the same local files: then it is the harness that asks and counts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.evaluation.tasks import Task
from composer_gpt2.model import GPT2Model
from composer_gpt2.text_codec import TextCodec

__all__ = [
    "HarnessSettings",
    "check_document_start",
    "harness_results",
    "is_installed",
    "known_tasks",
    "load_tasks",
    "run_harness",
    "write_task_files",
]


_BOOTSTRAP_ITERATIONS = 100  # for standard errors of what is no mean


@dataclass(frozen=True)
class HarnessSettings:
    """How the harness asks."""

    include_path: str | None = None
    """A folder with YAML files of further tasks."""
    num_fewshot: int | None = None
    """Solved examples before each question. Default: what the task says."""
    limit: int | None = None
    """Examples of each task."""


def is_installed() -> bool:
    """Whether the harness can be imported."""
    return importlib.util.find_spec("lm_eval") is not None


def known_tasks(names: Sequence[str], settings: HarnessSettings) -> set[str]:
    """Names of tasks, groups and tags: in ``include_path`` and, if ``names`` has more, all.

    Raises:
        ImportError: The harness is not installed.
    """
    return set(_task_manager(names, [settings.include_path]).all_tasks)


def load_tasks(names: Sequence[str], settings: HarnessSettings) -> None:
    """Loads tasks with their data, as asking them does, to find now what would fail later.

    Raises:
        ImportError: The harness is not installed.
        RuntimeError: A task needs a package that is not installed.
        OSError: Data that is neither here nor on a hub that can be reached.
    """
    with _quiet(), _missing_modules_named(names):
        _task_manager(names, [settings.include_path]).load(list(names))


def check_document_start(codec: TextCodec, model: GPT2Model) -> None:
    """Refuses what the harness could not ask.

    Args:
        codec: The model's.
        model: For its name in the error.

    Raises:
        ValueError: There is no token that begins documents.
    """
    if codec.document_start is None:
        raise ValueError(
            "the harness needs a model whose tokenizer has a token that begins documents, got "
            f"{model.tokenizer_name!r}, which has none; its tasks are in English for models of "
            "English."
        )


def run_harness(
    scorer: Scorer,
    names: Sequence[str] = (),
    tasks: Sequence[Task] = (),
    settings: HarnessSettings | None = None,
) -> dict[str, dict[str, Any]]:
    """Asks the harness's tasks, and ours through it.

    Args:
        scorer: The model.
        names: Of the harness.
        tasks: Of ours, with their examples.
        settings: For all of them; ``limit`` has been applied to ours.

    Returns:
        For each task the harness's results (``acc,none``, ``acc_stderr,none``, ...).

    Raises:
        ImportError: The harness is not installed.
        RuntimeError: A task needs a package that is not installed.
        ValueError: The harness does not know a name.
    """
    return harness_results(lambda: _our_model(scorer), names, tasks, settings)["results"]


def harness_results(
    build_model: Callable[[], Any],
    names: Sequence[str] = (),
    tasks: Sequence[Task] = (),
    settings: HarnessSettings | None = None,
    *,
    samples: bool = False,
) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` says of any model; ``samples`` for each answer."""
    _check_installed()
    from lm_eval.evaluator import simple_evaluate

    settings = settings or HarnessSettings()
    with (
        tempfile.TemporaryDirectory() as folder,
        _quiet(),
        _missing_modules_named([*names, *(task.name for task in tasks)]),
    ):
        ours = write_task_files(tasks, Path(folder))
        results = simple_evaluate(
            build_model(),
            tasks=[*names, *ours],
            task_manager=_task_manager(names, [folder, settings.include_path]),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            log_samples=samples,
        )
    assert results is not None  # on all ranks: each of them is rank 0 to the harness
    found: dict[str, Any] = dict(results)
    for part in ("results", "samples"):
        if part in found:
            found[part] = {ours.get(name, name): each for name, each in found[part].items()}
    return found


def write_task_files(tasks: Sequence[Task], folder: Path) -> dict[str, str]:
    """Writes our tasks as the harness reads them: examples in jsonl, the task in YAML.

    Returns:
        The names that they have in the harness, with ours.
    """
    names = {}
    for task in tasks:
        name = f"composer_gpt2_{task.name}"
        examples = folder / f"{name}.jsonl"
        one, several_contexts = _shape(task)
        rows = [
            {
                "contexts": list(example.contexts),
                # The harness puts the space in between.
                "continuations": [text.removeprefix(" ") for text in example.continuations],
                "gold": example.gold,
            }
            for example in task.examples
        ]
        examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if one:
            asked = {
                "output_type": "loglikelihood",
                "doc_to_text": "{{contexts[0]}}",
                "doc_to_target": "{{' ' + continuations[0]}}",
            }
        elif several_contexts:
            asked = {
                "output_type": "multiple_choice",
                "doc_to_text": "gold",
                "doc_to_target": "{{continuations[0]}}",
                "doc_to_choice": "contexts",
            }
        else:
            asked = {
                "output_type": "multiple_choice",
                "doc_to_text": "{{contexts[0]}}",
                "doc_to_target": "gold",
                "doc_to_choice": "continuations",
            }
        metrics = [
            {
                "metric": metric,
                "aggregation": "perplexity" if metric == "perplexity" else "mean",
                "higher_is_better": metric != "perplexity",
            }
            for metric in task.metrics
            if metric != "acc_per_token"  # the harness has none
        ]
        description = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(examples)}},
            "test_split": "test",
            **asked,
            "metric_list": metrics,
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(description))
        names[name] = task.name
    return names


def _shape(task: Task) -> tuple[bool, bool]:
    """Whether there is one choice, and whether choices differ in their contexts."""
    example = task.examples[0]
    return len(example.contexts) == 1, len(set(example.contexts)) > 1


def _our_model(scorer: Scorer) -> Any:
    from composer_gpt2.evaluation.harness_model import HarnessModel

    return HarnessModel(scorer)


def _task_manager(names: Sequence[str], folders: Sequence[str | None]) -> Any:
    """What knows the tasks in the folders, and the harness's own where these are not enough.

    The harness has 14,000 files, which it takes ten seconds to look through.
    """
    _check_installed()
    from lm_eval.tasks import TaskManager

    include: list[str | Path] = [folder for folder in folders if folder is not None]
    manager = TaskManager(include_path=include, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=include)


def _check_installed() -> None:
    if not is_installed():
        raise ImportError(
            "these tasks need the lm-evaluation-harness, which is not installed; "
            "pip install 'composer-gpt2[eval]'."
        )


@contextlib.contextmanager
def _missing_modules_named(tasks: Sequence[str]) -> Iterator[None]:
    """Tasks import packages that the harness does not install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{', '.join(tasks)}: the harness needs the module {error.name!r} for these tasks, "
            "which is not installed; install its package (sklearn is of scikit-learn)."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and datasets say more than what matters, and start no processes."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # Its standard errors of perplexities would come from processes of their own, with our threads.
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # "bootstrapping for stddev"
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

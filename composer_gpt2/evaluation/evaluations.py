"""What is to be measured, by name, checked before a model is there; and measuring it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from composer_gpt2.arguments import nearest
from composer_gpt2.evaluation.batching import plan_batches
from composer_gpt2.evaluation.harness import (
    HarnessSettings,
    check_document_start,
    is_installed,
    known_tasks,
    load_tasks,
    run_harness,
)
from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.evaluation.measurements import Measurement
from composer_gpt2.evaluation.perplexity import measure_perplexity
from composer_gpt2.evaluation.tasks import TASKS, Task, load_task
from composer_gpt2.evaluation.texts import TEXTS, Text, open_text
from composer_gpt2.model import GPT2Model
from composer_gpt2.text_codec import TextCodec, text_codec
from composer_gpt2.tokenizer_by_name import describe_loaded_tokenizer, describe_tokenizer

__all__ = ["Evaluations", "check_evaluations", "evaluate", "find_evaluations"]


@dataclass(frozen=True)
class Evaluations:
    """Everything that is to be measured."""

    tasks: Sequence[Task] = ()
    """With their examples."""
    texts: Sequence[Text] = ()
    """Found, and not read yet."""
    harness_tasks: Sequence[str] = ()
    """Names that are the lm-evaluation-harness's."""
    harness: HarnessSettings = HarnessSettings()  # noqa: RUF009  # frozen
    ours_by_harness: bool = False
    """Whether the harness asks and counts our tasks, too."""
    max_tokens: int | None = None
    """Of each text, from its start."""


def find_evaluations(
    names: Sequence[str],
    data: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    max_tokens: int | None = None,
    harness: HarnessSettings | None = None,
    ours_by_harness: bool = False,
) -> Evaluations:
    """Finds what the names stand for, and reads the examples of tasks.

    A name is a task of ours (``lambada``, ``piqa``, ``hellaswag``, ``winogrande``: from ``data`` or
    the hub), a text of ours (``wikitext``, ``enwik8``, ``text8``: from ``data``), any other name in
    ``data`` (a corpus), or one of the lm-evaluation-harness's.

    Args:
        names: What to measure. Default: all that is in ``data``.
        data: Files and folders by name.
        limit: Examples of each task.
        max_tokens: Tokens of each text.
        harness: For the harness's tasks.
        ours_by_harness: As in :class:`Evaluations`.

    Raises:
        ValueError: A name that is none of these (with the nearest), data of another shape, or the
            harness is needed and not installed.
        FileNotFoundError: Data that is not there.
        ConnectionError: A task that is on the hub, which does not answer.
    """
    data = dict(data or {})
    names = list(dict.fromkeys(names or data))
    known = {*TASKS, *TEXTS, *data}
    settings = replace(harness or HarnessSettings(), limit=limit)
    if not names:
        raise ValueError(
            f"there must be something to measure, got no name; tasks are {', '.join(TASKS)}, texts "
            f"are {', '.join(TEXTS)} and whatever you name with data (NAME=PATH)."
        )
    for number, least in (("limit", limit), ("max_tokens", max_tokens)):
        if least is not None and least < 1:
            raise ValueError(f"{number} must be at least 1, got {least}.")
    unused = sorted(data.keys() - set(names))
    if unused:
        raise ValueError(
            f"data must be for what is measured, got also {', '.join(unused)}; add it to the tasks "
            "or leave it out."
        )
    missing = [name for name in names if name in TEXTS and name not in data]
    if missing:
        raise ValueError(
            f"{missing[0]} must have its file, got none; say where it is ({missing[0]}=PATH)."
        )
    others = [name for name in names if name not in known]
    if settings.num_fewshot and ours_by_harness:
        raise ValueError(
            f"num_fewshot must be 0 where the harness asks our tasks, got {settings.num_fewshot}: "
            "their only examples are those of the test; leave it out."
        )
    for option, value in (
        ("num_fewshot", settings.num_fewshot),
        ("include_path", settings.include_path),
    ):
        if value is not None and not others:
            raise ValueError(
                f"{option} is for tasks of the lm-evaluation-harness, got {value} and only "
                f"{', '.join(names)}, which have no use for it; leave it out."
            )
    if (others or ours_by_harness) and not is_installed():
        asked = f"{others[0]} is none of ours{nearest(others[0], known)}; it" if others else "That"
        raise ValueError(
            f"{asked} needs the lm-evaluation-harness, which is not installed; pip install "
            f"'composer-gpt2[eval]', or choose among {', '.join(sorted(known))}."
        )
    if others:
        theirs = known_tasks(others, settings)
        for name in others:
            if name not in theirs:
                raise ValueError(
                    f"{name} is no task{nearest(name, [*known, *theirs])}; ours are "
                    f"{', '.join(sorted(known))}, and there are {len(theirs):,} of the "
                    "lm-evaluation-harness (`lm_eval ls tasks`)."
                )
    return Evaluations(
        texts=[open_text(name, data[name]) for name in names if name in data.keys() - TASKS.keys()],
        tasks=[load_task(name, data.get(name), limit=limit) for name in names if name in TASKS],
        harness_tasks=others,
        harness=settings,
        ours_by_harness=ours_by_harness,
        max_tokens=max_tokens,
    )


def check_evaluations(
    scorer: Scorer, evaluations: Evaluations, *, stride: int | None = None
) -> None:
    """Reads and encodes all that will be measured, to find now what would fail later.

    The harness's own tasks are loaded, but not encoded.

    Args:
        scorer: The model.
        evaluations: What will be measured.
        stride: As for :func:`evaluate`.

    Raises:
        ValueError: What :func:`evaluate` would raise.
        RuntimeError: A task of the harness needs a package that is not installed.
        OSError: The data of such a task cannot be had.
    """
    codec = _suitable_codec(scorer.model, evaluations)
    _scorers_of_contexts(scorer, (), stride)
    for task in evaluations.tasks:
        plan_batches(
            task.requests(codec),
            context_length=scorer.context_length,
            batch_tokens=scorer.batch_tokens,
        )
    for text in evaluations.texts:
        text.read(codec, evaluations.max_tokens)
    if evaluations.harness_tasks:
        load_tasks(evaluations.harness_tasks, evaluations.harness)


def evaluate(
    scorer: Scorer,
    evaluations: Evaluations,
    *,
    contexts: Sequence[int] = (),
    stride: int | None = None,
) -> list[Measurement]:
    """Measures; texts at each of the context lengths, tasks at the scorer's.

    Args:
        scorer: The model.
        evaluations: What to measure.
        contexts: Tokens that windows over a text read. Default: the scorer's context.
        stride: Tokens by which windows move. Default: as long as the window, without overlap.

    Raises:
        ValueError: A context beyond the model's positions, a stride beyond the smallest context, or
            a text or task that does not suit the model's tokenizer.
    """
    # All contexts before any work.
    scorers = _scorers_of_contexts(scorer, contexts, stride)
    codec = _suitable_codec(scorer.model, evaluations)
    found: list[Measurement] = []
    for task in () if evaluations.ours_by_harness else evaluations.tasks:
        requests = task.requests(codec)
        metrics = task.measure(requests, scorer.log_likelihoods(requests, task.name))
        found += [
            Measurement(task.name, name, *each, len(task.examples), scorer.context_length, None)
            for name, each in metrics.items()
        ]
    for text in evaluations.texts:
        streams = text.read(codec, evaluations.max_tokens)
        for each in scorers:
            result = measure_perplexity(each, streams, stride=stride, description=text.name)
            found += [
                Measurement(
                    text.name,
                    name,
                    value,
                    None,
                    result.n_tokens,
                    result.context_length,
                    result.stride,
                    text.note,
                )
                for name, value in result.metrics.items()
            ]
    through_harness = evaluations.tasks if evaluations.ours_by_harness else ()
    if evaluations.harness_tasks or through_harness:
        results = run_harness(
            scorer, evaluations.harness_tasks, through_harness, evaluations.harness
        )
        for task, values in results.items():
            found += _of_harness(task, values, scorer.context_length)
    return found


def _scorers_of_contexts(
    scorer: Scorer, contexts: Sequence[int], stride: int | None
) -> list[Scorer]:
    scorers = [replace(scorer, context_length=length) for length in contexts] or [scorer]
    shortest = min(each.context_length for each in scorers)
    if stride is not None and not 1 <= stride <= shortest:
        raise ValueError(
            f"stride must be from 1 to the shortest context ({shortest}), got {stride}; a longer "
            "one would skip tokens."
        )
    return scorers


def _suitable_codec(model: GPT2Model, evaluations: Evaluations) -> TextCodec:
    codec = text_codec(model)
    if evaluations.harness_tasks or evaluations.ours_by_harness:
        check_document_start(codec, model)
    for text in evaluations.texts:
        _check_tokenizer(text, model)
    return codec


def _check_tokenizer(text: Text, model: GPT2Model) -> None:
    """Refuses tokens of another tokenizer: they would be scored, and mean nothing."""
    mine = describe_tokenizer("gpt2")
    if model.tokenizer_name != "gpt2" and model.tokenizer is not None:
        mine = describe_loaded_tokenizer(model.tokenizer)
    if text.tokenizer is not None and dict(text.tokenizer) != mine:
        raise ValueError(
            f"{text.name} must have been prepared with the model's tokenizer ({mine}), got "
            f"{dict(text.tokenizer)}; measure it on the text that it was prepared from."
        )


def _of_harness(task: str, values: Mapping, context_length: int) -> list[Measurement]:
    """The harness has ``acc,none``, ``acc_stderr,none`` and other things in one mapping."""
    found = []
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        found.append(
            Measurement(
                task,
                name if filtered == "none" else f"{name} ({filtered})",
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                int(values.get("sample_len", 0)),
                context_length,
                None,
                "by the lm-evaluation-harness",
            )
        )
    return found

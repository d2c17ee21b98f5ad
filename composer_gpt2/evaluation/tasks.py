"""Tasks with right answers: LAMBADA, PIQA, HellaSwag and WinoGrande, from files or the hub.

Each is a question for likelihoods, in the words of EleutherAI's lm-evaluation-harness, so that
numbers can be compared with everybody's:

==============  ==================================  ============================================
``lambada``     the last word of a passage          ``acc`` (is it the greedy text), ``perplexity``
``piqa``        two ways to a goal                  ``acc``, ``acc_norm``
``hellaswag``   four endings of a scene             ``acc``, ``acc_norm``, ``acc_per_token``
``winogrande``  two readings of a pronoun: the      ``acc``
                likelihood of what follows
==============  ==================================  ============================================

``acc`` takes the choice with the highest likelihood, ``acc_norm`` divides it by the characters of
the choice, ``acc_per_token`` by its tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from composer_gpt2.data.corpora import open_decompressed
from composer_gpt2.evaluation.likelihood import Likelihood, Request
from composer_gpt2.metrics import perplexity_of
from composer_gpt2.text_codec import TextCodec

__all__ = ["TASKS", "Example", "Metric", "Task", "encode_request", "load_task", "read_records"]


@dataclass(frozen=True)
class Example:
    """A question: choices to compare, or one text to predict."""

    contexts: tuple[str, ...]
    """One for each choice."""
    continuations: tuple[str, ...]
    """One for each choice; what is scored. Begins with the space that parts it from its context."""
    gold: int
    """The number of the right choice."""


class Metric(NamedTuple):
    """A number, and how sure it is."""

    value: float
    stderr: float | None
    """Standard error of the mean over examples, where it is one."""


@dataclass(frozen=True)
class Task:
    """Examples of a kind, and how answers are counted."""

    name: str
    examples: Sequence[Example]
    metrics: Sequence[str] = field(default=("acc",))

    def requests(self, codec: TextCodec) -> list[Request]:
        """Every choice of every example, in order."""
        return [
            encode_request(codec, context, continuation)
            for example in self.examples
            for context, continuation in zip(example.contexts, example.continuations, strict=True)
        ]

    def measure(
        self, requests: Sequence[Request], likelihoods: Sequence[Likelihood]
    ) -> dict[str, Metric]:
        """The task's metrics.

        Args:
            requests: Those of :meth:`requests`.
            likelihoods: One for each.
        """
        values: dict[str, list[float]] = {metric: [] for metric in self.metrics}
        start = 0
        for example in self.examples:
            stop = start + len(example.contexts)
            found, tokens = likelihoods[start:stop], requests[start:stop]
            for metric in self.metrics:
                values[metric].append(_MEASURES[metric](example, found, tokens))
            start = stop
        return {
            metric: _perplexity(each) if metric == "perplexity" else _mean(each)
            for metric, each in values.items()
        }


def load_task(name: str, source: str | Path | None = None, *, limit: int | None = None) -> Task:
    """A task from a local file or, without one, from the Hugging Face hub.

    Files are jsonl (also .gz, .xz, .zst) or parquet, in the hub's columns or in those of
    llm-foundry's (``context`` and ``continuation``; ``query``, ``choices`` and ``gold``;
    ``context_options``, ``continuation`` and ``gold``).

    Args:
        name: One of :data:`TASKS`.
        source: The file.
        limit: The first so many examples only.

    Raises:
        ValueError: No such task, a record of another shape, or one without its answer.
        FileNotFoundError: No such file.
        ConnectionError: The hub does not answer.
    """
    kind = TASKS[name]
    if source is not None:
        records, where = read_records(source), str(source)
    else:
        records, where = _from_hub(name, kind), kind.hub[0]
    records = records[:limit]
    if not records:
        raise ValueError(f"{name} must have at least one example, got none from {where}.")
    examples = []
    for number, record in enumerate(records, 1):
        read = next((read for keys, read in kind.readers if keys <= record.keys()), None)
        try:
            if read is None:
                raise KeyError(*record)
            examples.append(read(record))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            layouts = " or ".join(", ".join(sorted(keys)) for keys, _ in kind.readers)
            raise ValueError(
                f"{where}: record {number} must be an example of {name} with its answer ({layouts})"
                f", got {_shortened(record)} ({error!r}); the test splits of some tasks have no "
                "answers, use validation."
            ) from error
    return Task(name, examples, kind.metrics)


def encode_request(codec: TextCodec, context: str, continuation: str) -> Request:
    """Tokens of a continuation as they stand in the whole text.

    White space at the end of the context goes to the continuation, as in the harness: tokens begin
    with their space.

    Raises:
        ValueError: There is no context, and the model has no token to begin a document with.
    """
    if not context:
        if codec.document_start is None:
            raise ValueError(
                "a text must have a context, or the model a token that begins documents, got "
                f"neither for {continuation[:60]!r}."
            )
        return Request([codec.document_start], codec.encode(continuation))
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    tokens = codec.encode(kept)
    return Request(tokens, codec.encode(kept + continuation)[len(tokens) :])


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file (also .gz, .xz, .zst) or the rows of a parquet file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"examples must be in a file, got {str(path)!r}, which is none.")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    records = []
    with open(path, "rb") as raw, open_decompressed(raw) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: must be JSON, got {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: must be an object, got {_shortened(record)}")
            records.append(record)
    return records


# --- Layouts -------------------------------------------------------------------------------------

_Record = Mapping[str, Any]


class _Kind(NamedTuple):
    metrics: tuple[str, ...]
    hub: tuple[str, str | None, str]
    """Data set, configuration and split."""
    readers: tuple[tuple[frozenset[str], Callable[[_Record], Example]], ...]
    """The columns by which a layout is known, and how to read it; the first that fits."""


def _choices(context: str, choices: Sequence[str], gold: Any) -> Example:
    """One context, several continuations."""
    return _checked(
        Example((context,) * len(choices), tuple(f" {choice}" for choice in choices), int(gold))
    )


def _checked(example: Example) -> Example:
    if not 0 <= example.gold < len(example.contexts):
        raise ValueError(f"choice {example.gold} of {len(example.contexts)}")
    return example


def _lambada(record: _Record) -> Example:
    context, _, word = record["text"].rpartition(" ")
    return Example((context,), (f" {word}",), 0)


def _lambada_split(record: _Record) -> Example:
    return Example((record["context"].rstrip(),), (f" {record['continuation'].strip()}",), 0)


def _piqa(record: _Record) -> Example:
    query = f"Question: {record['goal']}\nAnswer:"
    return _choices(query, (record["sol1"], record["sol2"]), record["label"])


def _piqa_query(record: _Record) -> Example:
    # llm-foundry's queries end before "Answer:", which its settings add.
    query = record["query"]
    query = query if query.endswith("Answer:") else f"{query.rstrip()}\nAnswer:"
    return _choices(query, record["choices"], record["gold"])


def _hellaswag(record: _Record) -> Example:
    scene = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    query = _without_marks(f"{record['activity_label']}: {scene}")
    return _choices(query, [_without_marks(e) for e in record["endings"]], record["label"])


def _query(record: _Record) -> Example:
    return _choices(record["query"].rstrip(), record["choices"], record["gold"])


def _without_marks(text: str) -> str:
    """Without the marks that WikiHow's pages left in HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(record: _Record) -> Example:
    before, _, after = record["sentence"].partition("_")
    contexts = (before + record["option1"], before + record["option2"])
    return _checked(Example(contexts, (f" {after.strip()}",) * 2, int(record["answer"]) - 1))


def _winogrande_options(record: _Record) -> Example:
    contexts = tuple(context.rstrip() for context in record["context_options"])
    continuation = f" {record['continuation'].strip()}"
    return _checked(Example(contexts, (continuation,) * len(contexts), int(record["gold"])))


TASKS: Mapping[str, _Kind] = {
    "lambada": _Kind(
        ("acc", "perplexity"),
        ("EleutherAI/lambada_openai", "default", "test"),
        (
            (frozenset({"context", "continuation"}), _lambada_split),
            (frozenset({"text"}), _lambada),
        ),
    ),
    "piqa": _Kind(
        ("acc", "acc_norm"),
        ("baber/piqa", None, "validation"),
        (
            (frozenset({"goal", "sol1", "sol2", "label"}), _piqa),
            (frozenset({"query", "choices", "gold"}), _piqa_query),
        ),
    ),
    "hellaswag": _Kind(
        ("acc", "acc_norm", "acc_per_token"),
        ("Rowan/hellaswag", None, "validation"),
        (
            (frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"}), _hellaswag),
            (frozenset({"query", "choices", "gold"}), _query),
        ),
    ),
    "winogrande": _Kind(
        ("acc",),
        ("allenai/winogrande", "winogrande_xl", "validation"),
        (
            (frozenset({"sentence", "option1", "option2", "answer"}), _winogrande),
            (frozenset({"context_options", "continuation", "gold"}), _winogrande_options),
        ),
    ),
}
"""What can be loaded by name."""


def _from_hub(name: str, kind: _Kind) -> list[dict[str, Any]]:
    from datasets import load_dataset

    dataset, configuration, split = kind.hub
    try:
        return [dict(row) for row in load_dataset(dataset, configuration, split=split)]
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"{name} must be in a file here or on the Hugging Face hub, which cannot be read "
            f"({reason}); give the file ({name}=PATH)."
        ) from error


def _shortened(record: Any) -> str:
    text = repr(record)
    return text if len(text) <= 200 else f"{text[:200]}..."


# --- Metrics -------------------------------------------------------------------------------------


def _accuracy(example: Example, found: Sequence[Likelihood], _: Sequence[Request]) -> float:
    if len(found) == 1:
        return float(found[0].is_greedy)
    return _is_best(example, [each.log_likelihood for each in found])


def _accuracy_by_characters(
    example: Example, found: Sequence[Likelihood], _: Sequence[Request]
) -> float:
    # The space before a choice is not of its length.
    lengths = [len(continuation) - 1 for continuation in example.continuations]
    return _is_best(
        example, [each.log_likelihood / n for each, n in zip(found, lengths, strict=True)]
    )


def _accuracy_by_tokens(
    example: Example, found: Sequence[Likelihood], requests: Sequence[Request]
) -> float:
    lengths = [len(request.continuation) for request in requests]
    return _is_best(
        example, [each.log_likelihood / n for each, n in zip(found, lengths, strict=True)]
    )


def _is_best(example: Example, values: Sequence[float]) -> float:
    return float(max(range(len(values)), key=values.__getitem__) == example.gold)


_MEASURES: Mapping[str, Callable[..., float]] = {
    "acc": _accuracy,
    "acc_norm": _accuracy_by_characters,
    "acc_per_token": _accuracy_by_tokens,
    "perplexity": lambda example, found, _: found[example.gold].log_likelihood,
}


def _mean(values: Sequence[float]) -> Metric:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Metric(mean, None)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Metric(mean, math.sqrt(variance / len(values)))


def _perplexity(log_likelihoods: Sequence[float]) -> Metric:
    """Of an answer as a whole, as the harness has it."""
    return Metric(perplexity_of(-sum(log_likelihoods) / len(log_likelihoods)), None)

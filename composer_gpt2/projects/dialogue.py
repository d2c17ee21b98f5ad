r"""Dialogues: the chat prompt format, and a corpus in which only the assistant's words are targets.

A conversation is plain text, so that any GPT-2 can be trained on it without new tokens::

    User: What does zlib.compress do?
    Assistant: Returns a bytes object containing compressed data.<|endoftext|>

Every turn is a line that begins with who speaks; each answer ends with ``<|endoftext|>``, at which
generation stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from composer_gpt2.data.array_corpus import write_array_corpus
from composer_gpt2.documentation import read_summaries
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding

__all__ = ["Message", "encode_dialogue", "format_prompt", "read_dialogues", "write_dialogues"]

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": ...}``, as chat interfaces have it."""

_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}
_SHORTEST, _LONGEST = 20, 200  # characters of an answer: a sentence


def format_prompt(messages: Sequence[Message]) -> str:
    """What a model continues with its answer.

    The answers of earlier turns are lines like the others: as text, ``<|endoftext|>`` would be
    spelled out.

    Args:
        messages: The last one is not the assistant's.

    Raises:
        ValueError: It is, or a message has another role or no content.
    """
    _check(messages)
    if messages[-1]["role"] == "assistant":
        raise ValueError("a prompt must end with a message of the user, got one of the assistant.")
    return "".join(map(_line, messages)) + f"{_SPEAKERS['assistant']}:"


def encode_dialogue(messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Tokens of a dialogue, and 1 for those that are targets: the assistant's and their ends.

    Raises:
        ValueError: No message is the assistant's, or one has another role or no content.
    """
    _check(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("a dialogue must have an answer of the assistant, got none.")
    encode = get_encoding().encode_ordinary
    tokens: list[int] = []
    targets: list[int] = []
    for message in messages:
        if message["role"] == "assistant":
            said = encode(f"{_SPEAKERS['assistant']}:")
            answer = [*encode(f" {message['content']}"), END_OF_TEXT]
            tokens += said + answer
            targets += [0] * len(said) + [1] * len(answer)
        else:
            line = encode(_line(message))
            tokens += line
            targets += [0] * len(line)
    return tokens, targets


def read_dialogues(file: str | Path | None) -> Iterator[list[Message]]:
    """Dialogues from JSON lines, ``{"messages": [{"role": ..., "content": ...}, ...]}``.

    Args:
        file: ``None`` for questions about Python, answered by its documentation on this machine.

    Raises:
        ValueError: A line is something else.
        FileNotFoundError: There is no such file.
    """
    if file is None:
        for name, summary in read_summaries():
            if _SHORTEST <= len(summary) <= _LONGEST:
                question = {"role": "user", "content": f"What does {name} do?"}
                yield [question, {"role": "assistant", "content": summary}]
        return
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                messages = json.loads(line)["messages"]
                _check(messages)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}, line {number}, must be {{"messages": [{{"role": ..., "content": '
                    f"...}}]}}, but {type(error).__name__}: {error}"
                ) from error
            yield messages


def write_dialogues(
    out: str | Path,
    file: str | Path | None = None,
    *,
    sequence_length: int = 256,
    validation_fraction: float = 0.05,
) -> None:
    """Writes dialogues as a corpus, as many whole ones to a sample as fit.

    A sample begins with ``<|endoftext|>``, and with it, not as a target, is filled up; a dialogue
    that is longer than a sample is cut.

    Args:
        out: The corpus.
        file: As for :func:`read_dialogues`.
        sequence_length: Tokens of a sample, at least 16.
        validation_fraction: Share of the dialogues, chosen by a hash of their text.

    Raises:
        ValueError: A number is out of range, a dialogue is none, or a split is empty.
        FileExistsError: ``out`` holds something else.
    """
    if sequence_length < 16 or not 0 < validation_fraction < 1:
        raise ValueError(
            "sequence_length must be at least 16 and validation_fraction between 0 and 1, got "
            f"{sequence_length} and {validation_fraction}."
        )
    dialogues: dict[str, list[list[Message]]] = {"train": [], "validation": []}
    for messages in read_dialogues(file):
        digest = xxhash.xxh64_intdigest(json.dumps(messages, sort_keys=True).encode())
        split = "validation" if digest < validation_fraction * 2**64 else "train"
        dialogues[split].append(messages)
    for split, found in dialogues.items():
        if not found:
            raise ValueError(f"the {split} split must have a dialogue, got none; add dialogues.")
    packed = {split: _pack(found, sequence_length) for split, found in dialogues.items()}
    write_array_corpus(
        out,
        {split: tokens for split, (tokens, _) in packed.items()},
        loss_masks={split: targets for split, (_, targets) in packed.items()},
        source="documentation on this machine" if file is None else Path(file).name,
    )


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("a dialogue must have a message, got none.")
    for message in messages:
        if (
            not isinstance(message, Mapping)
            or message.get("role") not in _SPEAKERS
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"a message must have a role of {', '.join(_SPEAKERS)} and a text as content, got "
                f"{message!r:.100}."
            )


def _line(message: Message) -> str:
    return f"{_SPEAKERS[message['role']]}: {message['content']}\n"


def _pack(dialogues: Iterable[Sequence[Message]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, shape ``(N, length)``."""
    rows: list[tuple[list[int], list[int]]] = []
    for messages in dialogues:
        tokens, targets = encode_dialogue(messages)
        if not rows or len(rows[-1][0]) + len(tokens) > length:
            rows.append(([END_OF_TEXT], [0]))
        rows[-1][0].extend(tokens)
        rows[-1][1].extend(targets)
    shape = (len(rows), length)
    packed, mask = np.full(shape, END_OF_TEXT), np.zeros(shape, dtype=np.int64)
    for number, (tokens, targets) in enumerate(rows):
        packed[number, : len(tokens)] = tokens[:length]
        mask[number, : len(targets)] = targets[:length]
    return packed, mask

"""Several models on the same tokens: loss of each, and how sure the differences are."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from composer_gpt2.data.download import read_bytes
from composer_gpt2.data.streaming import StreamingTokens, build_token_dataloader
from composer_gpt2.evaluation.batching import Request
from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.metrics import IGNORE_INDEX, perplexity_of
from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import token_byte_lengths
from composer_gpt2.tokenizer_by_name import describe_tokenizer
from composer_gpt2.trained_model import load_trained_model

__all__ = ["Compared", "compare", "format_comparison"]

_RETRIES, _TIMEOUT_SECONDS = 3, 30.0


@dataclass(frozen=True)
class Compared:
    """A model on the tokens that all of them read."""

    name: str
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float | None
    """``None`` for another tokenizer than GPT-2's."""
    difference: float
    """Its loss less that of the first model."""
    standard_error: float
    """Of the difference, from its spread over the sequences."""
    n_tokens: int
    sequence_length: int


def compare(
    models: Sequence[str],
    data: str,
    *,
    split: str = "validation",
    max_sequences: int | None = None,
    batch_tokens: int = 0,
) -> list[Compared]:
    """The loss of each model on a split of a prepared corpus, in order.

    Sequences longer than the shortest context of the models are cut into parts, so that all read
    the same tokens after the same context.

    Args:
        models: At least two, as for :func:`composer_gpt2.trained_model.load_trained_model`.
        data: The corpus, a folder or an address; all models must have its tokenizer.
        split: Its folder.
        max_sequences: Of the corpus, from its beginning; ``None`` for all.
        batch_tokens: Tokens of a forward pass. Default: 512 on a CPU, 32,768 on a GPU.

    Raises:
        ValueError: Fewer than two models, or models or a corpus with other tokenizers.
        OSError: A model or the corpus cannot be read.
    """
    if len(models) < 2:
        raise ValueError(f"there must be at least two models to compare, got {len(models)}.")
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences must be at least 1, got {max_sequences}.")
    if batch_tokens < 0:
        raise ValueError(f"batch_tokens must be at least 1, or 0, got {batch_tokens}.")
    corpus = _read_corpus(data)
    # A split that is not there is for the dataset to refuse.
    n_samples = max(1, corpus["splits"].get(split, {}).get("samples", 1))
    n_sequences = min(max_sequences or n_samples, n_samples)
    loaded = [load_trained_model(name) for name in models]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _shared_tokenizer(models, loaded, folder)
        contexts = [m.context_length for m in loaded if m.context_length is not None]
        length = min([corpus["sequence_length"], *contexts])
        scorers = [
            Scorer(model, context_length=length, batch_tokens=batch_tokens, progress=False)
            for model in loaded
        ]
        dataset = StreamingTokens(
            remote=data,
            split=split,
            sequence_length=corpus["sequence_length"],
            batch_size=min(max(1, scorers[0].batch_tokens // length), n_sequences),
            tokenizer=tokenizer,
        )
        return _measure(models, scorers, dataset, length, n_sequences, tokenizer == "gpt2")


def format_comparison(compared: Sequence[Compared]) -> str:
    """A table, and a line on what was measured."""
    rows = [("model", "loss", "perplexity", "bits/byte", "difference")]
    for i, one in enumerate(compared):
        bits = "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        difference = "" if i == 0 else f"{one.difference:+.4f} +- {one.standard_error:.4f}"
        rows.append((one.name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", bits, difference))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    first = compared[0]
    lines.append(
        f"{first.n_tokens:,} predicted tokens in sequences of {first.sequence_length}; differences "
        "from the first model, with their standard error over sequences"
    )
    return "\n".join(lines)


def _measure(
    names: Sequence[str],
    scorers: Sequence[Scorer],
    dataset: StreamingTokens,
    length: int,
    n_sequences: int,
    counts_bytes: bool,
) -> list[Compared]:
    sums: list[list[float]] = [[] for _ in scorers]  # nats of each sequence
    counts: list[int] = []  # targets of each sequence
    n_bytes = 0
    byte_lengths = torch.from_numpy(token_byte_lengths().copy())
    with tqdm(total=n_sequences * len(scorers), unit="seq", desc="comparing") as bar:
        for tokens, labels in _parts(dataset, n_sequences, length):
            targets = labels[:, 1:]
            counts += (targets != IGNORE_INDEX).sum(dim=1).tolist()
            if counts_bytes:
                n_bytes += int(byte_lengths[targets[targets != IGNORE_INDEX]].sum())
            for scorer, own in zip(scorers, sums, strict=True):
                own += _nats(scorer, tokens, labels)
                bar.update(len(tokens) * length / dataset.sequence_length)
    total = sum(counts)
    if total == 0:
        raise ValueError("the corpus must have tokens to predict, got none.")
    compared = []
    for name, own in zip(names, sums, strict=True):
        # The difference a token, weighted by tokens, and its error as that of a ratio of sums.
        loss, first = sum(own) / total, sum(sums[0]) / total
        residuals = [
            a - b - (loss - first) * n for a, b, n in zip(own, sums[0], counts, strict=True)
        ]
        error = 0.0
        if len(residuals) > 1:
            error = statistics.stdev(residuals) * math.sqrt(len(residuals)) / total
        compared.append(
            Compared(
                name=name,
                loss=loss,
                perplexity=perplexity_of(loss),
                bits_per_byte=sum(own) / (n_bytes * math.log(2)) if n_bytes else None,
                difference=loss - first,
                standard_error=error,
                n_tokens=total,
                sequence_length=length,
            )
        )
    return compared


def _parts(
    dataset: StreamingTokens, n_sequences: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels, (n, length), of the first sequences; a rest shorter than that is left."""
    seen = 0
    for batch in build_token_dataloader(dataset):
        tokens = batch["input_ids"][: n_sequences - seen]
        labels = batch["labels"][: n_sequences - seen]
        seen += len(tokens)
        n_parts = tokens.shape[1] // length
        for i in range(n_parts):
            part = slice(i * length, (i + 1) * length)
            yield tokens[:, part], labels[:, part]
        if seen >= n_sequences:
            return


def _nats(scorer: Scorer, tokens: Tensor, labels: Tensor) -> list[float]:
    """Nats of the targets of each sequence; tokens and labels have shape (n, length)."""
    requests, of_sequence = [], []
    is_target = labels != IGNORE_INDEX
    is_target[:, 0] = False  # nothing comes before it
    for number, (sequence, wanted) in enumerate(
        zip(tokens.tolist(), is_target.tolist(), strict=True)
    ):
        for asked, group in itertools.groupby(range(len(wanted)), wanted.__getitem__):
            places = list(group)
            if asked:
                requests.append(
                    Request(sequence[: places[0]], sequence[places[0] : places[-1] + 1])
                )
                of_sequence.append(number)
    nats = [0.0] * len(tokens)
    for number, found in zip(of_sequence, scorer.log_likelihoods(requests), strict=True):
        nats[number] -= found.log_likelihood
    return nats


def _read_corpus(data: str) -> dict[str, Any]:
    address = f"{data.rstrip('/')}/corpus.json"
    text = read_bytes(address, retries=_RETRIES, timeout_seconds=_TIMEOUT_SECONDS)
    return json.loads(text)


def _shared_tokenizer(names: Sequence[str], models: Sequence[GPT2Model], folder: str) -> str:
    """``"gpt2"``, or the folder in which the tokenizer of all models is now."""
    descriptions = []
    for model in models:
        if model.tokenizer_name == "gpt2":
            descriptions.append(describe_tokenizer("gpt2"))
            continue
        if model.tokenizer is None:
            raise ValueError("models to compare must have a tokenizer, got one without.")
        model.tokenizer.save_pretrained(folder)
        descriptions.append(describe_tokenizer(folder))
    for name, description in zip(names, descriptions, strict=True):
        if description != descriptions[0]:
            raise ValueError(
                f"models to compare must have one tokenizer, got {description} for {name} and "
                f"{descriptions[0]} for {names[0]}: losses a token cannot be compared."
            )
    return "gpt2" if models[0].tokenizer_name == "gpt2" else folder

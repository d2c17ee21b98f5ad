"""A corpus from arrays of tokens: for small tasks whose samples are computed, not read.

What :func:`composer_gpt2.data.prepare` makes of text, this makes of arrays, with two things that
text does not need: a tokenizer of its own, and a mask of the tokens that are to be learned.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from streaming import MDSWriter

from composer_gpt2 import __version__
from composer_gpt2.data.mds_columns import column_encodings
from composer_gpt2.data.preparation import CORPUS
from composer_gpt2.data.token_shards import TOKENIZER_FOLDER
from composer_gpt2.tokenizer_by_name import describe_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["write_array_corpus"]


def write_array_corpus(
    out: str | Path,
    splits: Mapping[str, np.ndarray],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    loss_masks: Mapping[str, np.ndarray] | None = None,
    source: str,
) -> dict[str, Any]:
    """Writes samples as MDS shards, with ``corpus.json`` and the tokenizer.

    Args:
        out: A folder; a corpus that this function wrote there is replaced.
        splits: The samples of each split: integers, shape ``(N, T)``, with one ``T`` for all.
        tokenizer: Saved as ``out/tokenizer``, the folder that a recipe names in ``data.tokenizer``.
            ``None``: GPT-2's.
        loss_masks: For each split shape ``(N, T)``: 1 where a token is a target, 0 where it is only
            read. ``None``: all are targets.
        source: Where the samples are from, for ``corpus.json``.

    Returns:
        The content of ``corpus.json``.

    Raises:
        ValueError: The arrays have other shapes, are empty, or hold what is no token or no mask.
        FileExistsError: ``out`` holds something else.
    """
    out = Path(out)
    lengths = {array.shape[1] for array in splits.values() if array.ndim == 2 and array.size}
    if len(lengths) != 1 or any(array.ndim != 2 or not array.size for array in splits.values()):
        shapes = {name: array.shape for name, array in splits.items()}
        raise ValueError(
            f"every split must have shape (N, T), with the same T and N of 1 or more, got {shapes}."
        )
    (sequence_length,) = lengths
    _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    name = "gpt2"
    if tokenizer is not None:
        name = str(out / TOKENIZER_FOLDER)
        tokenizer.save_pretrained(name)
    description = describe_tokenizer(name)
    for split, tokens in splits.items():
        if tokens.min() < 0 or tokens.max() >= description["vocab_size"]:
            raise ValueError(
                f"tokens of {split} must be from 0 to {description['vocab_size'] - 1}, got "
                f"{tokens.min()} to {tokens.max()}."
            )
        mask = None if loss_masks is None else loss_masks[split]
        if mask is not None and (mask.shape != tokens.shape or not np.isin(mask, (0, 1)).all()):
            raise ValueError(
                f"the loss mask of {split} must be 0 or 1, of shape {tokens.shape}, got shape "
                f"{mask.shape} and values {np.unique(mask)[:5]}."
            )
        _write_split(out / split, tokens, mask)
    corpus = {
        "format": "composer-gpt2-corpus",
        "version": 1,
        "sequence_length": sequence_length,
        "dtype": "uint16",
        "tokenizer": description,
        "loss_mask": loss_masks is not None,
        "sources": [{"source": source}],
        "splits": {
            split: {
                "documents": len(tokens),
                "tokens": tokens.size,
                "samples": len(tokens),
                "shards": len(list((out / split).glob("shard.*.mds"))),
                "remainder_tokens": 0,
            }
            for split, tokens in splits.items()
        },
        "bad_documents": 0,
        "versions": {
            "composer-gpt2": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("mosaicml-streaming", "numpy")},
        },
    }
    unfinished = out / f".{CORPUS}"
    unfinished.write_text(json.dumps(corpus, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, out / CORPUS)  # last of all: where it is, the corpus is complete
    return corpus


def _clear(out: Path) -> None:
    """Removes a corpus of ours."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CORPUS).is_file() or "loss_mask" not in json.loads((out / CORPUS).read_text()):
        raise FileExistsError(
            f"{out} must be empty or hold a corpus written from arrays, got something else; choose "
            "another folder."
        )
    shutil.rmtree(out)


def _write_split(folder: Path, tokens: np.ndarray, mask: np.ndarray | None) -> None:
    columns = column_encodings(tokens.shape[1], has_loss_mask=mask is not None)
    with MDSWriter(
        out=str(folder), columns=columns, hashes=["xxh64"], progress_bar=False
    ) as writer:
        for number, row in enumerate(tokens.astype(np.uint16)):
            sample = {"tokens": row}
            if mask is not None:
                sample["loss_mask"] = mask[number].astype(np.uint8)
            writer.write(sample)

"""From documents to tokens: the part of preparation that runs in threads."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding

__all__ = ["Part", "encode_documents"]


class Part(NamedTuple):
    """What some documents add to a split."""

    documents: int
    bytes: int  # of text, in UTF-8
    tokens: np.ndarray  # uint16, of all documents in a row, <|endoftext|> after each


def encode_documents(texts: list[str], threshold: int) -> dict[str, Part]:
    """Encodes documents and sends each to the split that a hash of its text says.

    Args:
        texts: The documents; no lone surrogates.
        threshold: A document is for validation if its xxh64 is below this (of ``2**64``).

    Returns:
        For each split that got a document: their tokens in the order given.
    """
    tokens: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    n_bytes = {"train": 0, "validation": 0}
    for text in texts:
        data = text.encode("utf-8")
        split = "validation" if xxhash.xxh64_intdigest(data) < threshold else "train"
        n_bytes[split] += len(data)
        tokens[split].append(_encode_document(text))
    return {
        split: Part(len(documents), n_bytes[split], np.concatenate(documents))
        for split, documents in tokens.items()
        if documents
    }


def _encode_document(text: str) -> np.ndarray:
    """The tokens of a document as ordinary text, and ``<|endoftext|>``; uint16."""
    encoding = get_encoding()
    try:
        pieces = [encoding.encode_to_numpy(text, disallowed_special=())]
    except ValueError:
        # tiktoken's regular expression gives up on a million white-space characters in a row
        # with something after them. It would make all but the last of them one piece: cutting
        # there changes no token.
        runs = _LONG_SPACE.finditer(text)
        cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
        pieces = [
            encoding.encode_to_numpy(text[start:end], disallowed_special=())
            for start, end in pairwise(cuts)
        ]
    tokens = np.empty(sum(map(len, pieces)) + 1, np.uint16)
    np.concatenate(pieces, out=tokens[:-1], casting="unsafe")
    tokens[-1] = END_OF_TEXT
    return tokens


# Unicode's White_Space, which is what \s means to tiktoken but not quite to re.
_LONG_SPACE = re.compile(
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{100000,}"
)

"""The GPT-2 byte-pair encoding, offline.

One rank table (``assets/r50k_base.tiktoken``: 50,256 byte strings in the order in which they were
learned) gives two tokenizers with the same ids: ``tiktoken`` for speed, and a Hugging Face fast
tokenizer for Composer checkpoints, ``generate`` and exported models. Nothing here opens a socket.

Source: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

if TYPE_CHECKING:
    from transformers import GPT2TokenizerFast

__all__ = [
    "END_OF_TEXT",
    "RANKS_SHA256",
    "VOCAB_SIZE",
    "get_encoding",
    "get_tokenizer",
    "printable_bytes",
    "token_byte_lengths",
]

END_OF_TEXT_STRING = "<|endoftext|>"
END_OF_TEXT = 50256  # separates documents; the last id, after the 50,256 ranks
VOCAB_SIZE = 50257
CONTEXT_LENGTH = 1024  # GPT-2's; only a hint in the saved tokenizer, nothing is cut
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# How text is split before byte pairs are merged: English contractions, then runs of letters, of
# digits, of other signs, each with at most one space before it, then white space.
_SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@functools.cache
def get_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding as tiktoken runs it, from the rank table in this package.

    Encode corpora with ``encode_ordinary``: it treats ``<|endoftext|>`` in a document as plain
    text, so that no document can inject a separator.

    Raises:
        RuntimeError: The rank table is not the published one (a damaged installation).
    """
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=_SPLIT_PATTERN,
        mergeable_ranks=_load_ranks(),
        special_tokens={END_OF_TEXT_STRING: END_OF_TEXT},
    )


@functools.cache
def _tokenizer_json() -> str:
    """The `tokenizers` description of the same encoding, built once a process (0.5 s)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks = _load_ranks()
    letters = printable_bytes()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT_STRING] = END_OF_TEXT
    merges = [
        (spell(left), spell(right))
        for left, right in (_last_merge(token, ranks) for token in ranks if len(token) > 1)
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # The stubs of `tokenizers` declare these three read-only.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT_STRING, special=True, normalized=False)])
    return tokenizer.to_str()


def get_tokenizer() -> GPT2TokenizerFast:
    """A Hugging Face fast tokenizer with the ids of :func:`get_encoding`.

    It is a fresh object at each call, so that changing one (a pad token, a chat template) does not
    change another. By default it reads ``<|endoftext|>`` in text as the separator, as every Hugging
    Face tokenizer does; pass ``split_special_tokens=True`` to encode it as plain text.

    Raises:
        RuntimeError: The rank table is not the published one (a damaged installation).
    """
    from tokenizers import Tokenizer
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        name_or_path="gpt2",
        bos_token=END_OF_TEXT_STRING,
        eos_token=END_OF_TEXT_STRING,
        unk_token=END_OF_TEXT_STRING,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )


@functools.cache
def token_byte_lengths() -> np.ndarray:
    """How many bytes of text each token stands for: the denominator of bits per byte.

    Returns:
        Shape ``(50257,)``, int64, read-only; 0 for ``<|endoftext|>``, which is no text.

    Raises:
        RuntimeError: The rank table is not the published one (a damaged installation).
    """
    lengths = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for token, rank in _load_ranks().items():
        lengths[rank] = len(token)
    lengths.flags.writeable = False
    return lengths


def printable_bytes() -> list[str]:
    """GPT-2's letter for each of the 256 bytes: itself if printable, else one from U+0100 on.

    Byte-level vocabularies of Hugging Face spell tokens in these letters.
    """
    letters, n_moved = [], 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            letters.append(chr(byte))
        else:
            letters.append(chr(0x100 + n_moved))
            n_moved += 1
    return letters


@functools.cache
def _load_ranks() -> dict[bytes, int]:
    """Each token's bytes and its rank, in rank order; the lowest rank merges first."""
    table = resources.files("composer_gpt2").joinpath("assets/r50k_base.tiktoken").read_bytes()
    digest = hashlib.sha256(table).hexdigest()
    if digest != RANKS_SHA256:
        raise RuntimeError(
            f"GPT-2's rank table must have sha256 {RANKS_SHA256}, got {digest}: the file "
            "assets/r50k_base.tiktoken of composer_gpt2 is damaged; install the package again."
        )
    lines = (line.split() for line in table.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose merge made ``token``.

    The rank table does not list merges, but they follow from it: merging the token's bytes with
    the ranks below its own always ends with exactly two parts.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, VOCAB_SIZE) for left, right in pairwise(parts)]
        at = min(range(len(joined)), key=joined.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    left, right = parts
    return left, right

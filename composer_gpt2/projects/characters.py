"""Language models of characters and bytes, on any text file.

The text is cut into windows. Where a corpus is small and read many times, the windows of training
overlap, so that a character is met in many places of its context; nanoGPT draws its windows at
random places for the same reason.
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from composer_gpt2.data.array_corpus import write_array_corpus
from composer_gpt2.data.corpora import open_decompressed
from composer_gpt2.small_tokenizers import byte_tokenizer, character_tokenizer

__all__ = ["read_one_file", "write_characters"]

Unit = Literal["character", "byte"]
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)


def write_characters(
    text_file: str | Path,
    out: str | Path,
    *,
    sequence_length: int = 256,
    stride: int | None = None,
    unit: Unit = "character",
    shares: tuple[float, ...] = (0.9, 0.1),
) -> None:
    """Writes a text as a corpus with a token for each character or byte.

    Args:
        text_file: UTF-8; or packed, as for :func:`read_one_file`.
        out: The corpus.
        sequence_length: Tokens of a window.
        stride: Tokens from a window of training to the next. Default: ``sequence_length``, no
            overlap. The other splits never overlap.
        unit: What a token is.
        shares: Of the text, from its beginning, for the splits ``train``, ``validation`` and, if
            there are three, ``test``. The default is nanoGPT's, (0.9, 0.05, 0.05) the one of text8
            and enwik8 (90, 5 and 5 million).

    Raises:
        ValueError: A number is out of range, the text is no UTF-8, or a split is shorter than a
            window; or as of :func:`read_one_file`.
        FileNotFoundError: There is no such text.
        FileExistsError: ``out`` holds something else.
    """
    stride = sequence_length if stride is None else stride
    if sequence_length < 1 or stride < 1:
        raise ValueError(
            f"sequence_length and stride must be at least 1, got {sequence_length} and {stride}."
        )
    if len(shares) not in (2, 3) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares must be two or three, above 0, of sum 1, got {shares}.")
    tokens, tokenizer = _tokens(read_one_file(Path(text_file)), unit, text_file)
    cuts = np.round(np.cumsum(shares)[:-1] * len(tokens)).astype(int)
    splits = dict(zip(("train", "validation", "test"), np.split(tokens, cuts), strict=False))
    for name, part in splits.items():
        if len(part) < sequence_length:
            raise ValueError(
                f"the {name} split must have a window of {sequence_length} {unit}s, got "
                f"{len(part)}; take a longer text or a shorter sequence_length."
            )
    write_array_corpus(
        out,
        {
            name: _windows(part, sequence_length, stride if name == "train" else sequence_length)
            for name, part in splits.items()
        },
        tokenizer=tokenizer,
        source=f"{Path(text_file).name}, by {unit}s",
    )


def read_one_file(path: Path) -> bytes:
    """The content of a file, or of the one in a ``.zip``; ``.gz``, ``.xz`` and ``.zst`` unpacked.

    Raises:
        ValueError: The archive is damaged, or a ``.zip`` holds more or less than one file.
        FileNotFoundError: There is no such file.
    """
    try:
        if path.suffix.lower() != ".zip":
            with open(path, "rb") as raw, open_decompressed(raw) as content:
                return content.read()
        with zipfile.ZipFile(path) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
            if len(files) == 1:
                return archive.read(files[0])
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the data
        raise ValueError(
            f"{path} must be a readable {path.suffix} archive, but {error}; fetch it again or "
            "unpack it."
        ) from error
    raise ValueError(f"{path} must hold one file, got {len(files)}; unpack it and take one.")


def _tokens(
    data: bytes, unit: Unit, text_file: str | Path
) -> tuple[np.ndarray, PreTrainedTokenizerFast]:
    if unit == "byte":
        return np.frombuffer(data, np.uint8).astype(np.uint16), byte_tokenizer()
    try:
        # Without "\r\n" as "\n": a benchmark counts every character.
        code_points = np.frombuffer(data.decode("utf-8").encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{text_file} must be UTF-8 to be read by characters, but {error}; read it by bytes."
        ) from error
    alphabet, tokens = np.unique(code_points, return_inverse=True)
    if not 0 < len(alphabet) <= 2**16:
        raise ValueError(
            f"{text_file} must have from 1 to 65,536 different characters, got {len(alphabet)}."
        )
    return tokens.astype(np.uint16), character_tokenizer(map(chr, alphabet))


def _windows(tokens: np.ndarray, length: int, stride: int) -> np.ndarray:
    """Shape ``(N, length)``, without copying."""
    return np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride]

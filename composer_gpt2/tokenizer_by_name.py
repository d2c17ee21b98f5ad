"""Tokenizers as recipes name them: GPT-2's, or one in a folder.

A corpus and a model belong together only if they have the same one; :func:`describe_tokenizer` is
what they compare.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_gpt2.tokenizer import RANKS_SHA256, VOCAB_SIZE, get_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "TokenizerFiles",
    "describe_loaded_tokenizer",
    "describe_tokenizer",
    "is_gpt2_tokenizer",
    "load_tokenizer",
    "read_tokenizer_folder",
    "saved_tokenizer",
]

TokenizerFiles = Mapping[str, Mapping[str, Any]]
"""A saved tokenizer as Composer keeps it in checkpoints: name of each file to its ``content``."""

_FILES = ("tokenizer.json", "tokenizer_config.json")  # all that a fast tokenizer needs


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a name; nothing is fetched from anywhere.

    Args:
        name: ``"gpt2"``, or a folder with a saved Hugging Face tokenizer.

    Raises:
        ValueError: It is neither.
    """
    if name == "gpt2":
        return get_tokenizer()
    if not (Path(name) / "tokenizer.json").is_file():
        raise ValueError(
            "a tokenizer must be 'gpt2' or a folder with a saved Hugging Face tokenizer "
            f"(tokenizer.json), got {name!r}; download other tokenizers first and pass their "
            "folder, or write the corpus that comes with it (composer-gpt2 project)."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, local_files_only=True, use_fast=True)


def describe_tokenizer(name: str) -> dict[str, Any]:
    """What ``corpus.json`` says of a tokenizer: its name, size and hash.

    Args:
        name: As for :func:`load_tokenizer`.

    Raises:
        ValueError: It is no name of a tokenizer.
    """
    if name == "gpt2":
        return {"name": "gpt2", "vocab_size": VOCAB_SIZE, "ranks_sha256": RANKS_SHA256}
    return describe_loaded_tokenizer(load_tokenizer(name))


def describe_loaded_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The same of a tokenizer that is not GPT-2's and is here already."""
    description = tokenizer.backend_tokenizer.to_str().encode()
    return {
        "name": "saved",
        "vocab_size": len(tokenizer),
        "sha256": hashlib.sha256(description).hexdigest(),
    }


def is_gpt2_tokenizer(files: TokenizerFiles) -> bool:
    """Whether it has GPT-2's tokens, by whatever name it was saved."""
    ours = json.loads(get_tokenizer().backend_tokenizer.to_str())["model"]
    theirs = _content(files, "tokenizer.json").get("model", {})
    return theirs.get("vocab") == ours["vocab"]


def read_tokenizer_folder(folder: Path) -> TokenizerFiles:
    """The files of a tokenizer that Hugging Face saved; none if it has no fast one."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    return {
        name: {"content": json.loads((folder / name).read_text(encoding="utf-8"))}
        for name in _FILES
        if (folder / name).is_file()
    }


@contextlib.contextmanager
def saved_tokenizer(files: TokenizerFiles) -> Iterator[str]:
    """A folder, as long as the context lasts, from which :func:`load_tokenizer` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in _FILES:
            content = json.dumps(_content(files, name))
            (Path(folder) / name).write_text(content, encoding="utf-8")
        yield folder


def _content(files: TokenizerFiles, name: str) -> dict[str, Any]:
    # Composer's names have no suffix, its older ones have.
    return dict((files.get(name) or files.get(name.removesuffix(".json")) or {}).get("content", {}))

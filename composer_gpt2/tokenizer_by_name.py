"""Tokenizers as recipes name them: GPT-2's, or one in a folder.

A corpus and a model belong together only if they have the same one; :func:`describe_tokenizer` is
what they compare.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
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
    "fetch_tokenizer",
    "is_gpt2_tokenizer",
    "load_tokenizer",
    "read_tokenizer_folder",
    "saved_tokenizer",
]

TokenizerFiles = Mapping[str, Mapping[str, Any]]
"""A saved tokenizer as Composer keeps it in checkpoints: name of each file to its ``content``."""

_FILES = ("tokenizer.json", "tokenizer_config.json")  # all that a fast tokenizer needs
_SLOW_FILES = ("vocab.json", "merges.txt")  # what older versions of transformers saved of GPT-2's


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
    """Whether it has GPT-2's tokens and no others, by whatever name it was saved."""
    ours = json.loads(get_tokenizer().backend_tokenizer.to_str())
    theirs = _content(files, "tokenizer.json")
    later = _content(files, "tokenizer_config.json").get("added_tokens_decoder", {})
    added = {token["content"] for token in (*theirs.get("added_tokens", ()), *later.values())}
    return theirs.get("model", {}).get("vocab") == ours["model"]["vocab"] and added <= {
        token["content"] for token in ours["added_tokens"]
    }


def read_tokenizer_folder(folder: Path, name: str | None = None) -> TokenizerFiles:
    """The files of a tokenizer that Hugging Face saved; none if there is none.

    ``vocab.json`` and ``merges.txt`` without ``tokenizer.json`` are read as GPT-2's kind.

    Args:
        folder: Where they are.
        name: Of whose tokenizer they are, for errors. Default: the folder.

    Raises:
        ValueError: A file is no JSON, one of these two is missing, or they hold no such tokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        files = [folder / file for file in _FILES if (folder / file).is_file()]
        return {file.name: {"content": _parse(file, name or str(folder))} for file in files}
    found = [name for name in _SLOW_FILES if (folder / name).is_file()]
    if not found:
        return {}
    from transformers import GPT2TokenizerFast

    try:
        if len(found) < len(_SLOW_FILES):
            raise ValueError(f"only {found[0]}")
        tokenizer = GPT2TokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises no narrower one
        raise ValueError(
            "a tokenizer must be tokenizer.json, or vocab.json and merges.txt of GPT-2's kind, got "
            f"{error} in {name or folder}; save it again, or pass tokenizer_name."
        ) from error
    with tempfile.TemporaryDirectory() as converted:
        tokenizer.save_pretrained(converted)
        return read_tokenizer_folder(Path(converted))


def _parse(file: Path, whose: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and UTF-8's
        raise ValueError(
            f"{file.name} must be JSON, got {error} in {whose}; save the tokenizer again, or pass "
            "tokenizer_name."
        ) from error


def fetch_tokenizer(hub_id: str, revision: str | None = None) -> TokenizerFiles:
    """The same of a model on the Hugging Face hub, or in its cache; none if it has none.

    Args:
        hub_id: Of the model.
        revision: The commit of its weights. Default: the newest.

    Raises:
        FileNotFoundError: The hub cannot be asked, and the cache does not tell.
        ValueError: As for :func:`read_tokenizer_folder`.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: LocalEntryNotFoundError | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in (*_FILES, *_SLOW_FILES, "special_tokens_map.json", "added_tokens.json"):
            path = try_to_load_from_cache(hub_id, name, revision=revision)
            if path is None and unreachable is None:
                try:
                    path = hf_hub_download(hub_id, name, revision=revision)
                except LocalEntryNotFoundError as error:
                    unreachable = error
                except EntryNotFoundError:
                    pass
            if isinstance(path, str):  # and not the mark of a file that is known to be missing
                shutil.copy(path, folder)
        files = read_tokenizer_folder(Path(folder), hub_id)
    if not files and unreachable is not None:
        raise FileNotFoundError(
            f"the tokenizer of {hub_id} must be on the hub or in its cache, got an unreachable hub "
            "and none in the cache; load the model once with a connection, or pass tokenizer_name."
        ) from unreachable
    return files


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

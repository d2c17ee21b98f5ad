"""Tokenizers without merges: a token for each character of a text, or for each byte.

Small models learn spelling from them, and benchmarks count in them: text8 in bits per character,
enwik8 in bits per byte. They are Hugging Face tokenizers, saved with a corpus, in checkpoints and
in exported models like GPT-2's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from composer_gpt2.tokenizer import printable_bytes

__all__ = ["byte_tokenizer", "character_tokenizer"]


def character_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each character, numbered in the order of their code points.

    It has no unknown token: other characters are refused when they are encoded.

    Args:
        characters: Those of the text, such as ``set(text)``; at least one.

    Raises:
        ValueError: There are none, or something is not one character.
    """
    alphabet = sorted(set(characters))
    if not alphabet or any(len(character) != 1 for character in alphabet):
        raise ValueError(
            f"characters must be single characters, at least one, got {alphabet[:10]!r}."
        )
    ids = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(ids))  # type: ignore[reportCallIssue]
    # The stubs of `tokenizers` declare these read-only.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[reportAttributeAccessIssue]
    return _fast(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes of UTF-8, with the byte as its number."""
    ids = {letter: byte for byte, letter in enumerate(printable_bytes())}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)

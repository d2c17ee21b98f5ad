"""Text to the tokens of a model and back, whichever tokenizer it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_encoding

__all__ = ["TextCodec", "text_codec"]


@dataclass(frozen=True)
class TextCodec:
    """What a model's tokenizer does to plain text; nothing in a text is read as a special token."""

    encode: Callable[[str], list[int]]
    """Text to tokens, none of them special. Raises ``ValueError`` at what the tokenizer cannot
    spell."""
    decode: Callable[[Sequence[int]], str]
    """Tokens to text; special tokens stand for none. Bytes that are no UTF-8 become U+FFFD."""
    n_tokens: int
    """Tokens that it knows: a network may have more rows, and those stand for nothing."""
    document_start: int | None
    """The token after which documents begin and with which they end; ``None`` if there is none."""


def text_codec(model: GPT2Model) -> TextCodec:
    """The tokenizer of a model, by tiktoken where it is GPT-2's.

    Raises:
        ValueError: The model has no tokenizer.
    """
    if model.tokenizer_name == "gpt2":
        encoding = get_encoding()

        def decode(ids: Sequence[int]) -> str:
            # Ids from the padding of a vocabulary are never predicted, and stand for nothing.
            return encoding.decode([token for token in ids if token < END_OF_TEXT])

        return TextCodec(encoding.encode_ordinary, decode, VOCAB_SIZE, END_OF_TEXT)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            "the model must have a tokenizer to read or write text, got tokenizer_name=None; load "
            "it with the folder of its tokenizer."
        )

    def encode_with(text: str) -> list[int]:
        try:
            return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        except Exception as error:  # the only class that `tokenizers` raises
            known = set(tokenizer.get_vocab())
            strange = sorted(set(text) - known)
            raise ValueError(
                f"text must consist of the {len(known)} characters that the model knows, got "
                f"{strange[:10]!r}; leave them out."
            ) from error

    def decode_with(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    document_start = cast("int | None", tokenizer.bos_token_id)
    return TextCodec(encode_with, decode_with, len(tokenizer), document_start)

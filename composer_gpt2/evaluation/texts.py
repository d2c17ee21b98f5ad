"""Texts whose perplexity is measured: corpora, WikiText, enwik8 and text8.

A text is one or more streams of tokens, and the bytes, characters and words that they stand for,
which is what a loss is divided by to be comparable between tokenizers.

===============  ===================================================================================
a corpus         prepared by ``composer-gpt2 prepare`` (a folder or an address such as s3://...), or
                 any file or folder that can be prepared: jsonl, parquet, txt. One stream, each
                 document ended by the token that ends documents, as in training.
``wikitext``     WikiText-2 or -103, raw or tokenised: de-tokenised, a stream for each article, and
                 the words of the original, as in the lm-evaluation-harness
``enwik8``       of the 100,000,000 bytes the last 5,000,000, the customary test set; a text of
                 another size as a whole. As it is, or in a zip, gz, xz or zst
``text8``        the same
===============  ===================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from composer_gpt2.data.corpora import BadDocument, open_decompressed, open_sources
from composer_gpt2.data.mds_index import MDSIndex
from composer_gpt2.data.object_store import open_store
from composer_gpt2.data.preparation import CORPUS
from composer_gpt2.data.token_shards import INDEX
from composer_gpt2.data.verification import read_shard
from composer_gpt2.evaluation.tasks import read_records
from composer_gpt2.projects.characters import read_one_file
from composer_gpt2.text_codec import TextCodec
from composer_gpt2.tokenizer import token_byte_lengths

__all__ = ["TEXTS", "Text", "TokenStream", "detokenize_wikitext", "open_text"]


class TokenStream(NamedTuple):
    """Tokens in a row, and what they stand for."""

    tokens: np.ndarray
    """Shape ``(n,)``. The first one is only read: nothing comes before it."""
    n_bytes: int
    """Of the text in UTF-8, without its first token."""
    n_characters: int | None
    """``None`` where only tokens are known."""
    n_words: int | None
    """Separated by white space; ``None`` where only tokens are known."""


@dataclass(frozen=True)
class Text:
    """A text that is there and has not been read yet."""

    name: str
    note: str
    """What it is, for the results."""
    read: Callable[[TextCodec, int | None], list[TokenStream]]
    """The streams of a codec; if a number is given, of about so many tokens from the start."""
    tokenizer: Mapping[str, Any] | None = None
    """That of tokens that have been prepared, as ``corpus.json`` describes it."""


def open_text(name: str, path: str) -> Text:
    """Finds a text and checks what can be checked without a tokenizer.

    Args:
        name: One of :data:`TEXTS` for texts with a convention of their own; anything else is a
            corpus.
        path: A file, a folder or the address of a prepared corpus.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is of another kind.
    """
    if name in TEXTS:
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"{name} must be a file here, got {path!r}, which is none.")
        return _TEXTS[name](name, file)
    prepared = _prepared_corpus(path)
    if prepared is not None:
        return Text(
            name,
            f"prepared tokens from {prepared.folder}",
            lambda codec, n: [_prepared_stream(codec, prepared, n)],
            prepared.tokenizer,
        )
    files = open_sources([path])[path]
    if not files:
        raise FileNotFoundError(f"{name} must have text, got none in {path!r}.")

    def documents() -> Iterator[str]:
        for file in files:
            for document in file.documents():
                if isinstance(document, BadDocument):
                    raise ValueError(f"{document.where} {document.reason}.")
                yield document

    return Text(name, f"documents of {path}", lambda codec, n: [_one_stream(codec, documents(), n)])


# --- Corpora -------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    folder: str
    length: int
    """Tokens of a sample."""
    tokenizer: Mapping[str, Any]


def _prepared_corpus(path: str) -> _Prepared | None:
    """A split of a prepared corpus (by default ``validation``); None if it is no corpus."""
    if "://" not in path and not Path(path).expanduser().is_dir():
        return None
    root, split = path.rstrip("/"), ""
    with open_store(root) as store:
        names = store.names()
    if INDEX in names:
        root, _, split = root.rpartition("/")
        root = root or "."
    elif CORPUS not in names:
        if "://" in path:
            raise FileNotFoundError(
                f"a text at an address must be a prepared corpus, got {path!r}, which has no "
                f"{CORPUS}; prepare it, or copy the file here."
            )
        return None
    with open_store(root) as store:
        corpus = json.loads(store.read_bytes(CORPUS))
    splits = corpus["splits"]
    split = split or ("validation" if "validation" in splits else next(iter(splits)))
    if corpus.get("loss_mask"):
        raise ValueError(
            f"a text must be a corpus in which every token is a target, got {path!r}, which has a "
            "loss mask; the evaluation of its training run minds it."
        )
    return _Prepared(f"{root}/{split}", corpus["sequence_length"], corpus["tokenizer"])


def _prepared_stream(codec: TextCodec, corpus: _Prepared, n_tokens: int | None) -> TokenStream:
    parts, n_read = [], 0
    with open_store(corpus.folder) as store:
        content = store.read_bytes(INDEX)
        MDSIndex.model_validate_json(content)
        for shard in json.loads(content)["shards"]:
            name = (shard["zip_data"] or shard["raw_data"])["basename"]
            with store.local_copy(name) as path:
                tokens = read_shard(path, shard, corpus.length, has_loss_mask=False)
            if isinstance(tokens, str):
                raise ValueError(f"{corpus.folder}/{name}: {tokens}.")
            parts.append(tokens.reshape(-1))
            n_read += tokens.size
            if n_tokens is not None and n_read > n_tokens:
                break
    if n_read < 2:
        raise ValueError(f"{corpus.folder} must have tokens to be scored, got {n_read}.")
    tokens = np.concatenate(parts).astype(np.int64)[: None if n_tokens is None else n_tokens + 1]
    if corpus.tokenizer["name"] == "gpt2":
        return TokenStream(tokens, int(token_byte_lengths()[tokens[1:]].sum()), None, None)
    text = codec.decode(tokens[1:].tolist())
    return TokenStream(tokens, len(text.encode()), len(text), None)


def _one_stream(codec: TextCodec, documents: Iterable[str], n_tokens: int | None) -> TokenStream:
    """Documents one after the other, each after the token that parts them, if there is one."""
    end = [] if codec.document_start is None else [codec.document_start]
    tokens, read = [*end], []
    for document in documents:
        tokens += [*codec.encode(document), *end]
        read.append(document)
        if n_tokens is not None and len(tokens) > n_tokens:
            break
    if n_tokens is None or len(tokens) <= n_tokens + 1:
        return _stream(tokens, "".join(read), read, codec)
    kept = tokens[: n_tokens + 1]
    return _stream(kept, codec.decode(kept), None, codec)


def _stream(
    tokens: Sequence[int], text: str, documents: Sequence[str] | None, codec: TextCodec
) -> TokenStream:
    """With the counts of a text; where no token parts documents, its first token is not counted."""
    if len(tokens) < 2:
        raise ValueError("a text must have at least two tokens to be scored, got an empty one.")
    if codec.document_start is None:
        text = text[len(codec.decode(tokens[:1])) :]
    n_words = sum(len(each.split()) for each in (documents or [text]))
    return TokenStream(
        np.asarray(tokens, np.int64), len(text.encode("utf-8", "replace")), len(text), n_words
    )


# --- WikiText ------------------------------------------------------------------------------------


def _open_wikitext(name: str, file: Path) -> Text:
    def articles() -> list[str]:
        if file.suffix in (".jsonl", ".parquet") or ".jsonl." in file.name:
            records = read_records(file)
            if records and "page" in records[0]:
                return [record["page"] for record in records]
            return _articles("".join(record["text"] for record in records))
        with open(file, "rb") as raw, open_decompressed(raw) as content:
            return _articles(content.read().decode("utf-8"))

    def read(codec: TextCodec, n_tokens: int | None) -> list[TokenStream]:
        streams: list[TokenStream] = []
        for article in articles():
            if n_tokens is not None and sum(len(s.tokens) - 1 for s in streams) >= n_tokens:
                break
            start = [] if codec.document_start is None else [codec.document_start]
            tokens = [*start, *codec.encode(detokenize_wikitext(article))]
            # What a word and a byte is, the original decides.
            n_words, n_bytes = len(re.split(r"\s+", article)), len(article.encode())
            streams.append(TokenStream(np.asarray(tokens), n_bytes, len(article), n_words))
        return streams

    return Text(name, "articles, de-tokenised; words and bytes of the original", read)


_TITLE = re.compile(r"= [^=].*[^=] =|= [^=] =")


def _articles(text: str) -> list[str]:
    """Cut before the title of each article: a line ``= Title =`` between empty ones."""
    lines = text.splitlines(keepends=True)
    is_empty = [True, *(not line.strip() for line in lines), True]
    articles = [""]
    for number, line in enumerate(lines):
        is_title = _TITLE.fullmatch(line.strip()) and is_empty[number] and is_empty[number + 2]
        if is_title and articles[-1].strip():
            articles.append("")
        articles[-1] += line
    return articles


# In this order, which is the customary one. Some rules do more than they mean to (" N " is the
# number 1 of an older corpus); they stay, for a number is compared with others' numbers.
_WIKITEXT_RULES: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """WikiText as its authors would have written it: no spaces before signs, no ``@-@``.

    Source: the rules are those that GPT-2's zero-shot numbers made customary (Radford et al., 2019,
    section 3.1, "de-tokenizers"), as the lm-evaluation-harness has them.
    """
    for pattern, replacement in _WIKITEXT_RULES:
        if isinstance(pattern, str):
            text = text.replace(pattern, replacement)
        else:
            text = pattern.sub(replacement, text)
    return text


# --- enwik8 and text8 ----------------------------------------------------------------------------

_WHOLE, _TEST = 100_000_000, 5_000_000  # bytes; 90, 5 and 5 million to train, validate and test


def _open_bytes(name: str, file: Path) -> Text:
    data = read_one_file(file)
    note = f"all of its {len(data):,} bytes"
    if len(data) == _WHOLE:
        data, note = data[-_TEST:], f"the last {_TEST:,} bytes"

    def read(codec: TextCodec, n_tokens: int | None) -> list[TokenStream]:
        # The cut may go through a character: its bytes count, and are read as U+FFFD.
        text = data.decode("utf-8", "replace")
        if n_tokens is not None:
            # Some tokens more than are wanted, for the last ones depend on where the text is cut.
            n_characters = 4 * n_tokens + 64
            while n_characters < len(text):
                if len(codec.encode(text[:n_characters])) >= n_tokens + 64:
                    break
                n_characters *= 2
            text = text[:n_characters]
        stream = _one_stream(codec, [text], n_tokens)
        if n_tokens is None and codec.document_start is not None:
            stream = stream._replace(n_bytes=len(data))
        return [stream]

    return Text(name, note, read)


_TEXTS: dict[str, Callable[[str, Path], Text]] = {
    "wikitext": _open_wikitext,
    "enwik8": _open_bytes,
    "text8": _open_bytes,
}
TEXTS = tuple(_TEXTS)
"""Names of texts that are measured by a convention of their own."""

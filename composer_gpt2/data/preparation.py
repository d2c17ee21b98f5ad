"""A corpus becomes shards of tokens that training can stream.

``prepare`` reads documents in a fixed order and sends each to a split by a hash of its text. Every
document is encoded as ordinary text (``<|endoftext|>`` in it is seven tokens like any other) and
followed by the token ``<|endoftext|>`` (50256); the stream of a split is cut into samples of
``sequence_length`` tokens, and samples fill MDS shards. So the shards follow from the documents and
the settings alone: not from the number of threads, nor from how often the run was interrupted.

What lies in the output, in the order in which it appears::

    unfinished.npz                   how far the run has come; gone when it is finished
    train/shard.00000.mds, ...       each complete when it appears
    train/index.json                 after the last shard
    corpus.json                      last of all: where it is, the corpus is complete

(and ``validation/`` like ``train/``).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash
from tqdm import tqdm

from composer_gpt2 import __version__
from composer_gpt2.data.corpora import BadDocument, Source, open_sources
from composer_gpt2.data.encoding import Part, encode_documents
from composer_gpt2.data.object_store import ObjectStore, open_store
from composer_gpt2.tokenizer import RANKS_SHA256, VOCAB_SIZE

if TYPE_CHECKING:
    from composer_gpt2.data.token_shards import Position, TokenShards

__all__ = ["CORPUS", "BadDocumentError", "prepare", "summarize"]

log = logging.getLogger(__name__)

CORPUS = "corpus.json"


def prepare(
    sources: Sequence[str],
    out: str,
    *,
    sequence_length: int = 1024,
    text_field: str = "text",
    split_on: str | None = None,
    validation_fraction: float = 0.0005,
    compression: str | None = None,
    shard_size_limit: int | str = "64mb",
    num_threads: int | None = None,
    on_error: str = "stop",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into MDS shards for training and validation.

    A run that was stopped in any way goes on where it was when it is started again with the same
    arguments; ``num_threads``, ``on_error``, ``overwrite`` and ``progress`` may differ.

    Args:
        sources: Files, folders, globs and ``hf://`` addresses, read in this order: see
            :mod:`composer_gpt2.data.corpora`.
        out: A folder, or ``s3://bucket/prefix`` (``gs://``, ``oci://``, ``azure://``).
        sequence_length: Tokens a sample.
        text_field: Field or column that holds the text.
        split_on: Cuts txt files into documents; without it each file is one.
        validation_fraction: Share of the documents, from 0 (no validation split) to below 1. Which
            ones follows from a hash of their text: equal documents are on one side, in any order
            of the sources. The default is nanoGPT's for OpenWebText.
        compression: Of the shards: None, or an algorithm of streaming, such as ``"zstd"``.
        shard_size_limit: Largest shard before compression, in bytes or as ``"64mb"``.
        num_threads: Threads that tokenize; as many as cores by default.
        on_error: At a document that cannot be read, ``"stop"``, or ``"skip"`` it and count it.
        overwrite: Replace a corpus, or an unfinished one made with other arguments.
        progress: Show a progress bar.

    Returns:
        The content of ``corpus.json``. In each split ``tokens`` counts one ``<|endoftext|>`` for
        each document and equals ``samples * sequence_length + remainder_tokens``; ``bytes`` is the
        UTF-8 length of the documents.

    Raises:
        ValueError: An argument or a source is wrong; a split is smaller than one sample; ``out``
            holds an unfinished corpus made with other arguments.
        FileNotFoundError: A source or the bucket does not exist.
        FileExistsError: ``out`` holds a corpus already.
        PermissionError: The bucket refuses the credentials.
        ConnectionError: The bucket's endpoint does not answer.
        BadDocumentError: A document cannot be read, with ``on_error="stop"``.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1 token, got {sequence_length}.")
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction must be at least 0 and below 1, got {validation_fraction}."
        )
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
    groups = open_sources(sources, text_field=text_field, split_on=split_on)
    files = [file for group in groups.values() for file in group]

    # Importing streaming takes seconds, which the mistakes above need not wait for.
    from composer_gpt2.data.token_shards import STATE, TokenShards, check_shard_format

    request = {
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "split_on": split_on,
        "compression": compression,
        "shard_size_limit": check_shard_format(sequence_length, compression, shard_size_limit),
        "sources": [_describe_source(source, group) for source, group in groups.items()],
    }
    with open_store(out) as store:
        store.start_writing()
        resume = _clear_or_resume(store, request, overwrite)
        if resume and CORPUS in store.names():  # killed between its last two steps
            store.delete([STATE])
            return json.loads(store.read_bytes(CORPUS))
        splits = ["train", "validation"] if validation_fraction else ["train"]
        with TokenShards(store, request, splits) as shards:
            if resume:
                shards.resume()
            shards.save()  # marks the output, and shows before the work that we may write
            shards.wait()
            _tokenize(files, shards, validation_fraction, num_threads, on_error, progress)
            _check_splits(store, shards, sequence_length, validation_fraction)
            corpus = {
                "format": "composer-gpt2-corpus",
                "version": 1,
                "sequence_length": sequence_length,
                "dtype": "uint16",
                "tokenizer": {
                    "name": "gpt2",
                    "vocab_size": VOCAB_SIZE,
                    "ranks_sha256": RANKS_SHA256,
                },
                "sources": request["sources"],
                "text_field": text_field,
                "split_on": split_on,
                "validation_fraction": validation_fraction,
                "splits": shards.finish(),
                "bad_documents": shards.position.bad_documents,
                "versions": {
                    "composer-gpt2": __version__,
                    "python": platform.python_version(),
                    **{name: version(name) for name in ("mosaicml-streaming", "numpy", "tiktoken")},
                },
            }
            store.put_bytes(CORPUS, (json.dumps(corpus, indent=2) + "\n").encode())
            store.delete([STATE])
            return corpus


class BadDocumentError(ValueError):
    """A document cannot be used; the message names file and line, row or archive member."""


def summarize(corpus: dict[str, Any]) -> str:
    """What was prepared, one line a split, from the content of ``corpus.json``."""
    lines = [
        f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
        f"{split['samples']:,} samples of {corpus['sequence_length']:,} in {split['shards']:,} "
        f"shards; left out: {split['remainder_tokens']:,} tokens at the end that fill no sample"
        for name, split in corpus["splits"].items()
    ]
    if corpus["bad_documents"]:
        lines.append(f"skipped {corpus['bad_documents']:,} bad documents")
    return "\n".join(lines)


# A task for a thread: large enough to hide its overhead, small enough to keep all of them busy.
_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 1 << 12
_BATCHES_PER_THREAD = 3
_BAD_DOCUMENTS_SHOWN = 10


class _Batch(NamedTuple):
    """Some documents, and where reading is after them."""

    texts: list[str]
    position: Position
    n_bytes_read: int


def _tokenize(
    files: list[Source],
    shards: TokenShards,
    validation_fraction: float,
    num_threads: int | None,
    on_error: str,
    progress: bool,
) -> None:
    """Reads on from ``shards.position``, encodes in threads, and adds to the shards in order."""
    n_threads = num_threads or _n_cores()
    threshold = round(validation_fraction * 2**64)
    tasks: deque[tuple[_Batch, Future[dict[str, Part]]]] = deque()
    with (
        _ProgressBar(files, shards, progress) as bar,
        ThreadPoolExecutor(n_threads, thread_name_prefix="tokenize") as threads,
    ):

        def add_first() -> None:
            batch, task = tasks.popleft()
            shards.add(task.result(), batch.position)
            bar.update(batch.n_bytes_read)

        for batch in _batches(files, shards.position, on_error):
            tasks.append((batch, threads.submit(encode_documents, batch.texts, threshold)))
            if len(tasks) >= _BATCHES_PER_THREAD * n_threads:
                add_first()
        while tasks:
            add_first()


def _batches(files: list[Source], start: Position, on_error: str) -> Iterator[_Batch]:
    from composer_gpt2.data.token_shards import Position

    texts: list[str] = []
    n_characters = 0
    n_bad = start.bad_documents
    n_bytes_before = sum(file.n_bytes or 0 for file in files[: start.source])
    for number, file in enumerate(files[start.source :], start.source):
        first = start.document if number == start.source else 0
        for position, document in enumerate(file.documents(first), first + 1):
            if isinstance(document, BadDocument):
                n_bad += 1
                _report(document, n_bad, on_error)
                continue
            texts.append(document)
            n_characters += len(document)
            if n_characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                here = Position(number, position, n_bad)
                yield _Batch(texts, here, n_bytes_before + file.n_bytes_read)
                texts, n_characters = [], 0
        n_bytes_before += file.n_bytes or 0
    yield _Batch(texts, Position(len(files), 0, n_bad), n_bytes_before)


def _report(document: BadDocument, n_bad: int, on_error: str) -> None:
    if on_error == "stop":
        raise BadDocumentError(
            f"{document.where} {document.reason}. Mend it, or skip such documents with "
            "on_error='skip' (on the command line: --on-error skip)."
        )
    if n_bad <= _BAD_DOCUMENTS_SHOWN:
        log.warning("skipped: %s %s", document.where, document.reason)
    if n_bad == _BAD_DOCUMENTS_SHOWN:
        log.warning("further bad documents are only counted")


class _ProgressBar:
    """Bytes read of all sources with the time left, documents/s and tokens/s."""

    def __init__(self, files: list[Source], shards: TokenShards, shown: bool) -> None:
        sizes = [file.n_bytes for file in files]
        self._counts = shards.counts.values()
        self._start = time.monotonic()
        self._documents = self._n_documents()
        self._tokens = self._n_tokens()
        self._bar = tqdm(
            total=None if None in sizes else sum(size or 0 for size in sizes),
            initial=sum(size or 0 for size in sizes[: shards.position.source]),
            desc="prepare",
            unit="B",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not shown,
        )

    def update(self, n_bytes_read: int) -> None:
        seconds = time.monotonic() - self._start
        documents = (self._n_documents() - self._documents) / seconds
        tokens = (self._n_tokens() - self._tokens) / seconds
        self._bar.set_postfix_str(
            f"{documents:,.0f} documents/s, {tokens / 1e6:.2f}M tokens/s", refresh=False
        )
        self._bar.update(n_bytes_read - self._bar.n)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _n_documents(self) -> int:
        return sum(counts.documents for counts in self._counts)

    def _n_tokens(self) -> int:
        return sum(counts.tokens for counts in self._counts)


def _n_cores() -> int:
    """Of this process, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _describe_source(source: str, files: list[Source]) -> dict[str, Any]:
    """A source as ``corpus.json`` names it and as a run that goes on recognises it."""
    digest = xxhash.xxh64()
    for file in files:
        digest.update(f"{file.name}\n{file.fingerprint()}\n".encode())
    sizes = [file.n_bytes for file in files]
    return {
        "source": source,
        "files": len(files),
        "bytes": None if None in sizes else sum(size or 0 for size in sizes),
        "xxh64": digest.hexdigest(),
    }


_OURS = re.compile(
    r"corpus\.json|unfinished\.npz|(train|validation)/(index\.json|shard\.\d+\.mds(\.\w+)?)"
)


def _clear_or_resume(store: ObjectStore, request: dict[str, Any], overwrite: bool) -> bool:
    """Whether to go on with what is in ``store``; if not, it is empty afterwards.

    Raises:
        FileExistsError: It holds a corpus, and ``overwrite`` is false.
        ValueError: It holds an unfinished one made with other arguments, and likewise.
    """
    from composer_gpt2.data.token_shards import STATE, read_request

    names = store.names()
    ours = {name for name in names if _OURS.fullmatch(name)}
    if STATE in ours:
        differences = _differences(read_request(store), request)
        if not differences:
            return True
        if not overwrite:
            raise ValueError(
                "An unfinished corpus can only be continued with the arguments and sources it was "
                f"begun with, but for {store.url} " + "; ".join(differences) + ". Use those again, "
                "or start anew with overwrite (--overwrite), or write elsewhere."
            )
    elif ours and not overwrite:
        what = "a finished corpus" if CORPUS in ours else f"files of a corpus ({min(ours)})"
        raise FileExistsError(
            f"{store.url} must be empty, but it holds {what}; write elsewhere, or replace it with "
            "overwrite (--overwrite)."
        )
    _clear(store)
    return False


def _clear(store: ObjectStore) -> None:
    """Deletes a corpus, first what makes it look finished; other files are not touched."""
    from composer_gpt2.data.token_shards import INDEX, STATE

    ours = [name for name in store.names() if _OURS.fullmatch(name)]
    order = [CORPUS, STATE, f"train/{INDEX}", f"validation/{INDEX}"]
    store.delete([name for name in order if name in ours])
    store.delete(sorted(name for name in ours if name not in order))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    differences = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in new
        if key != "sources" and old.get(key) != new[key]
    ]
    before = {source["source"]: source for source in old["sources"]}
    after = {source["source"]: source for source in new["sources"]}
    for name in before.keys() | after.keys():
        if name not in after:
            differences.append(f"the source {name!r} is missing")
        elif name not in before:
            differences.append(f"the source {name!r} is new")
        elif before[name] != after[name]:
            was, now = before[name], after[name]
            differences.append(
                f"the source {name!r} has changed (it was {was['files']} files of {was['bytes']} "
                f"bytes and is {now['files']} of {now['bytes']}; xxh64 {was['xxh64']} and "
                f"{now['xxh64']})"
            )
    if not differences and list(before) != list(after):
        differences.append("the sources were in another order")
    return differences


def _check_splits(
    store: ObjectStore, shards: TokenShards, sequence_length: int, validation_fraction: float
) -> None:
    """Refuses a split smaller than one sample, and clears the output, which cannot be finished."""
    n_tokens = {name: counts.tokens for name, counts in shards.counts.items()}
    for name, tokens in n_tokens.items():
        if tokens >= sequence_length:
            continue
        shards.wait()
        _clear(store)
        total = sum(n_tokens.values())
        if total < 2 * sequence_length:
            advice = (
                f"the whole corpus has {total:,}; give it more text or a shorter sequence_length"
            )
        elif name == "train":
            advice = "choose a smaller validation_fraction (--validation-fraction)"
        else:
            # Ten samples, were the documents spread evenly; they are not where they are few.
            fraction = max(10 * sequence_length / total, 2 * validation_fraction)
            fraction = min(0.5, float(f"{fraction:.1g}"))
            advice = (
                f"choose a larger validation_fraction (--validation-fraction {fraction}), or 0 for "
                "none"
            )
        raise ValueError(
            f"The {name} split must have at least one sample of {sequence_length:,} tokens, got "
            f"{tokens:,} tokens; {advice}."
        )

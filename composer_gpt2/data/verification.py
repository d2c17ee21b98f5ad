"""Is a prepared corpus what its ``corpus.json`` says, byte for byte?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from composer_gpt2.data.mds_columns import column_encodings, sample_bytes
from composer_gpt2.data.mds_index import SAFE_NAME, MDSIndex, describe_problem
from composer_gpt2.data.object_store import ObjectStore, open_store
from composer_gpt2.data.preparation import CORPUS
from composer_gpt2.data.token_shards import INDEX, STATE, TOKENIZER_FOLDER
from composer_gpt2.tokenizer import END_OF_TEXT
from composer_gpt2.tokenizer_by_name import describe_tokenizer

__all__ = ["DamagedCorpusError", "read_shard", "verify"]


def verify(url: str, *, progress: bool = True) -> dict[str, Any]:
    """Reads every shard of a prepared corpus and checks it.

    Each shard must be there with the size and the hash that the index holds, in the right format,
    with as many samples as the index says and no token outside the vocabulary; there must be no
    other shards; and samples, tokens and ends of documents must add up to ``corpus.json``.

    Args:
        url: The ``out`` that was prepared: a folder or an object store.
        progress: Show a progress bar.

    Returns:
        The content of ``corpus.json``.

    Raises:
        DamagedCorpusError: Something does not hold; the message has one line for each mistake and
            begins it with the file.
        FileNotFoundError: There is no corpus, or no bucket.
        PermissionError: The bucket refuses the credentials.
        ConnectionError: The bucket's endpoint does not answer.
    """
    with open_store(url) as store:
        names = store.names()
        if CORPUS not in names:
            if STATE in names:
                raise DamagedCorpusError(
                    f"{url} must hold a finished corpus, but its preparation was interrupted; "
                    "run the same prepare command again to finish it."
                )
            raise FileNotFoundError(
                f"{url} must hold a prepared corpus, but there is no {CORPUS}; check the path, or "
                "prepare one."
            )
        corpus = _read_description(store, url)
        mistakes = list(_mistakes(store, names, corpus, progress))
    if mistakes:
        lines = "".join(f"\n  {mistake}" for mistake in mistakes)
        raise DamagedCorpusError(
            f"{url} must be as it was prepared, but:{lines}\nCopy these files again from a good "
            "copy, or prepare the corpus again with overwrite (--overwrite)."
        )
    return corpus


def _read_description(store: ObjectStore, url: str) -> dict[str, Any]:
    """``corpus.json``, with everything in it that is used below."""
    content = store.read_bytes(CORPUS)
    try:
        _Description.model_validate_json(content)
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = describe_problem(error)
        raise DamagedCorpusError(
            f"{url} must be as it was prepared, but {CORPUS} is not a description of a corpus "
            f"({reason}); copy it again from a good copy, or prepare the corpus again."
        ) from error


class _Split(BaseModel):
    model_config = ConfigDict(strict=True)

    samples: int
    shards: int
    tokens: int
    remainder_tokens: int
    documents: int


class _Description(BaseModel):
    model_config = ConfigDict(strict=True)

    sequence_length: Annotated[int, Field(gt=0)]
    splits: dict[Annotated[str, Field(pattern=SAFE_NAME)], _Split]


class DamagedCorpusError(ValueError):
    """A corpus is not what it was when it was prepared; the message names the files."""


def _mistakes(
    store: ObjectStore, names: set[str], corpus: dict[str, Any], progress: bool
) -> Iterator[str]:
    expected = {
        "format": "composer-gpt2-corpus",
        "version": 1,
        "dtype": "uint16",
        "tokenizer": _expected_tokenizer(store, names, corpus),
    }
    wrong = [key for key in expected if corpus.get(key) != expected[key]]
    if wrong:
        yield from (
            f"{CORPUS}: {key} must be {expected[key]!r}, got {corpus.get(key)!r}" for key in wrong
        )
        return
    indexes = {}
    for split in corpus["splits"]:
        if f"{split}/{INDEX}" not in names:
            yield f"{split}/{INDEX}: is missing"
            continue
        try:
            content = store.read_bytes(f"{split}/{INDEX}")
            MDSIndex.model_validate_json(content)
            indexes[split] = json.loads(content)["shards"]
        except (ValueError, RecursionError) as error:
            yield f"{split}/{INDEX}: is not an index ({describe_problem(error)})"
    n_bytes = sum(_stored(shard)["bytes"] for shards in indexes.values() for shard in shards)
    with tqdm(total=n_bytes, desc="verify", unit="B", unit_scale=True, disable=not progress) as bar:
        for split, shards in indexes.items():
            yield from _split_mistakes(store, names, corpus, split, shards, bar)


def _split_mistakes(
    store: ObjectStore,
    names: set[str],
    corpus: dict[str, Any],
    split: str,
    shards: list[dict[str, Any]],
    bar: tqdm,
) -> Iterator[str]:
    length, counts = corpus["sequence_length"], corpus["splits"][split]
    vocab_size = corpus["tokenizer"]["vocab_size"]
    # Arrays of tokens have no ends of documents to count.
    n_ends: int | None = None if "loss_mask" in corpus else 0
    for shard in shards:
        name = f"{split}/{_stored(shard)['basename']}"
        if name not in names:
            yield f"{name}: is missing"
            n_ends = None
            continue
        with store.local_copy(name) as path:
            tokens = read_shard(path, shard, length, has_loss_mask=bool(corpus.get("loss_mask")))
        bar.update(_stored(shard)["bytes"])
        if isinstance(tokens, str):
            yield f"{name}: {tokens}"
            n_ends = None
            continue
        if tokens.max() >= vocab_size:
            yield f"{name}: tokens must be below {vocab_size}, got {tokens.max()}"
        if n_ends is not None:
            n_ends += int(np.count_nonzero(tokens == END_OF_TEXT))
    listed = {f"{split}/{_stored(shard)['basename']}" for shard in shards}
    for name in sorted(names - listed):
        if name.startswith(f"{split}/shard."):
            yield f"{name}: is not in {split}/{INDEX}"

    n_samples = sum(shard["samples"] for shard in shards)
    n_remainder = counts["remainder_tokens"]
    if (n_samples, len(shards)) != (counts["samples"], counts["shards"]):
        yield (
            f"{split}/{INDEX}: must have {counts['samples']} samples in {counts['shards']} shards "
            f"as {CORPUS} says, got {n_samples} in {len(shards)}"
        )
    if counts["samples"] * length + n_remainder != counts["tokens"]:
        yield (
            f"{CORPUS}: {split}: samples * sequence_length + remainder_tokens must be tokens "
            f"({counts['tokens']}), got {counts['samples'] * length + n_remainder}"
        )
    # Each document has one end, of which some may lie in the remainder.
    if n_ends is not None and not n_ends <= counts["documents"] <= n_ends + n_remainder:
        yield (
            f"{CORPUS}: {split}: documents must be the number of <|endoftext|> in the shards, "
            f"{n_ends} to {n_ends + n_remainder}, got {counts['documents']}"
        )


def _expected_tokenizer(
    store: ObjectStore, names: set[str], corpus: dict[str, Any]
) -> dict[str, Any]:
    """The description of GPT-2's tokenizer, or of the one that is saved in the corpus."""
    saved = sorted(name for name in names if name.startswith(f"{TOKENIZER_FOLDER}/"))
    if "loss_mask" not in corpus or not saved:
        return describe_tokenizer("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        for name in saved:
            (Path(folder) / Path(name).name).write_bytes(store.read_bytes(name))
        return describe_tokenizer(folder)


def read_shard(
    path: Path, shard: dict[str, Any], length: int, *, has_loss_mask: bool
) -> np.ndarray | str:
    """The tokens of a shard, or what is wrong with it.

    Args:
        path: The file, as it lies in the store.
        shard: Its description in the index.
        length: Tokens of a sample.
        has_loss_mask: Whether samples say which of their tokens are targets.

    Returns:
        uint16, shape ``(samples, length)``, or a sentence about the file.
    """
    from streaming.base.compression import decompress

    encodings = column_encodings(length, has_loss_mask=has_loss_mask)
    expected = {
        "format": "mds",
        "column_names": list(encodings),
        "column_encodings": list(encodings.values()),
    }
    for key, value in expected.items():
        if shard.get(key) != value:
            return f"{key} in the index must be {value!r}, got {shard.get(key)!r}"
    data = path.read_bytes()
    if shard["zip_data"]:
        if mistake := _compare(data, shard["zip_data"]):
            return mistake
        try:
            data = decompress(shard["compression"], data)
        except Exception as error:  # each algorithm has exceptions of its own
            return f"must be {shard['compression']}, got {type(error).__name__}: {error}"
    if mistake := _compare(data, shard["raw_data"]):
        return mistake
    # MDS: the number of samples, where each begins and the last ends, a header, the samples.
    n_samples = int.from_bytes(data[:4], "little")
    if n_samples != shard["samples"]:
        return f"must have {shard['samples']} samples, got {n_samples}"
    if len(data) < 4 * (n_samples + 2):
        return f"must have room for {n_samples} samples, got {len(data)} bytes"
    starts = np.frombuffer(data, np.uint32, n_samples + 1, offset=4).astype(np.int64)
    size = sample_bytes(length, has_loss_mask=has_loss_mask)
    if starts[-1] != len(data) or (np.diff(starts) != size).any():
        return f"must hold samples of {length} tokens, {size} bytes, got others"
    samples = np.frombuffer(data, np.uint8, n_samples * size, offset=starts[0])
    samples = samples.reshape(n_samples, size)[:, -2 * length :]  # without the loss mask
    return np.ascontiguousarray(samples).view(np.uint16)


def _stored(shard: dict[str, Any]) -> dict[str, Any]:
    """The index's description of the file that lies in the store."""
    return shard["zip_data"] or shard["raw_data"]


def _compare(data: bytes, info: dict[str, Any]) -> str | None:
    if len(data) != info["bytes"]:
        return f"must have {info['bytes']} bytes, got {len(data)}"
    digest = xxhash.xxh64_hexdigest(data)
    if digest != info["hashes"].get("xxh64"):
        return f"must have xxh64 {info['hashes'].get('xxh64')}, got {digest}"
    return None

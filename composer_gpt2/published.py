"""Published checkpoints and models, brought here by address or hub id, with their hashes."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

from composer_gpt2.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    newest_first,
    read_manifest,
)
from composer_gpt2.data.download import read_bytes
from composer_gpt2.data.object_store import open_store
from composer_gpt2.data.resumable import download_resumable
from composer_gpt2.data.retrying import DEFAULT_RETRIES

__all__ = ["OPENAI", "Downloaded", "download_published"]

OPENAI = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
"""OpenAI's released models, and where they are on the Hugging Face hub."""

_HUB_ID = re.compile(r"(hf://)?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What a model needs; the hub keeps the same weights in other formats beside them.
_NEEDED = re.compile(r"[^/]+\.(safetensors|json|txt|model|py|md)|LICENSE")
_OLD_WEIGHTS = re.compile(r"pytorch_model[^/]*\.bin")
# A folder may have a dot in its name (gpt2-1.3b), so a store's files are told by these alone.
_FILE = re.compile(
    r".*\.(bin|ckpt|csv|gz|jsonl?|md|mds|model|np[yz]|onnx|parquet|pth?|py|safetensors|tar|tgz|txt|xz"
    r"|ya?ml|zip|zst)",
    re.IGNORECASE,
)
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Downloaded:
    """What has been brought here."""

    use_as: Path
    """What to give to ``generate`` and the other commands."""
    n_checked: int
    """Files whose SHA-256 was published, and is right."""
    unchecked: tuple[str, ...]
    """Files without a published hash."""


@dataclass(frozen=True)
class _File:
    name: str
    url: str
    sha256: str | None = None
    n_bytes: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def download_published(
    name: str,
    out: str | Path | None = None,
    *,
    sha256: str | None = None,
    weights_only: bool = False,
    retries: int = DEFAULT_RETRIES,
) -> Downloaded:
    """Downloads a checkpoint or a model; what was interrupted goes on, what is here stays.

    Args:
        name: The address (``https://``, ``http://``, ``s3://``, ``gs://``, ...) of a manifest of
            ours (``ep0-ba100-rank0.json``), of a folder in an object store with such manifests (the
            newest is taken), or of one file, told by its suffix; a hub id, ``owner/name`` or
            ``hf://owner/name``, with ``@revision`` or without; or one of :data:`OPENAI`.
        out: The folder to be. Default: the last word of ``name`` in the current folder.
        sha256: Of the one file; for what is several files it is refused.
        weights_only: Of a checkpoint the weights alone, as safetensors, without what a run needs to
            go on (the optimizer's state, twice the size).
        retries: As for :func:`composer_gpt2.data.resumable.download_resumable`.

    Raises:
        ValueError: The name is none of these, or an option is not for it.
        CheckpointError: A manifest cannot be read, or what is published or arrives has another
            hash.
        FileNotFoundError: There is nothing.
        PermissionError: It is not for us.
        ConnectionError: It cannot be reached.
        OSError: The disk is full or read-only.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}.")
    name = OPENAI.get(name, name)
    is_address = "://" in name and not name.startswith("hf://")
    folder = Path(out) if out is not None else _default_folder(name)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {folder}; choose another.")
    if not is_address:
        files = _files_of_the_hub(name)
        use_as = folder
        if weights_only:
            raise ValueError(
                f"weights_only is for checkpoints, got the hub id {name}; leave it out."
            )
    elif _is_file(name):
        if weights_only:
            raise ValueError(
                f"weights_only is for a manifest or a folder of checkpoints, got the file {name}; "
                "leave it out."
            )
        files = [_File(_last_word(name), name)]
        use_as = folder / files[0].name
    else:
        files, use_as = _files_of_a_checkpoint(name, folder, weights_only, retries)
    if sha256 is not None:
        if len(files) != 1:
            raise ValueError(f"sha256 is for one file, got {name}, which is {len(files)} files.")
        published = files[0].sha256
        if published is not None and published.lower() != sha256.lower():
            raise CheckpointError(
                f"{files[0].name} must have the SHA-256 {sha256}, got one that is published as "
                f"{published}; check the address and the hash."
            )
        files = [replace(files[0], sha256=sha256)]
    unchecked = []
    for file in files:
        checked = download_resumable(
            file.url,
            folder / file.name,
            sha256=file.sha256,
            n_bytes=file.n_bytes,
            headers=file.headers,
            retries=retries,
        )
        if not checked:
            unchecked.append(file.name)
    return Downloaded(use_as, len(files) - len(unchecked), tuple(unchecked))


def _files_of_a_checkpoint(
    url: str, folder: Path, weights_only: bool, retries: int
) -> tuple[list[_File], Path]:
    """The files of a manifest, or of the newest one in a folder; the manifest itself last."""
    if not url.endswith(".json"):
        url = _newest_manifest(url.rstrip("/"), retries)
    manifest = _read_manifest(url, retries)
    base = posixpath.dirname(url)
    names = [manifest.weights_file] if weights_only else list(manifest.files)
    missing = [name for name in names if name not in manifest.files]
    if missing or any("/" in name for name in names):
        raise CheckpointError(
            f"the manifest {url} must name {manifest.weights_file} among files without folders, "
            f"got {', '.join(manifest.files)}."
        )
    files = [
        _File(name, f"{base}/{name}", manifest.files[name].sha256, manifest.files[name].n_bytes)
        for name in names
    ]
    if not weights_only:
        # It is last, as in a save folder: a checkpoint without one was never finished.
        files.append(_File(manifest.file, f"{base}/{manifest.file}"))
    use = manifest.weights_file if weights_only else manifest.state_file
    return files, folder / use


def _read_manifest(url: str, retries: int) -> Manifest:
    if urlparse(url).scheme in ("http", "https"):
        import tempfile

        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "manifest.json"
            download_resumable(url, path, retries=retries)
            text = path.read_bytes()
    else:
        text = read_bytes(url, retries=retries, timeout_seconds=_TIMEOUT_SECONDS)
    return read_manifest(text)


def _newest_manifest(url: str, retries: int) -> str:
    if urlparse(url).scheme in ("http", "https"):
        raise ValueError(
            "an address on the web must be that of a file or of a manifest "
            f"(.../ep0-ba100-rank0.json), got {url}, in which nothing can be listed."
        )
    with open_store(url, what="A published checkpoint", retries=retries) as store:
        names = newest_first(store.names())
    if not names:
        raise FileNotFoundError(
            f"{url} must hold a checkpoint with its manifest (ep0-ba100-rank0.json), got none; "
            "check the address."
        )
    return f"{url}/{names[0]}"


def _files_of_the_hub(name: str) -> list[_File]:
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ValueError(
            f"what to download must be an address (https://, s3://, ...), a hub id (owner/name) or "
            f"one of {', '.join(OPENAI)}, got {name!r}."
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers

    api, repository = HfApi(), match["name"]
    try:
        info = api.model_info(repository, revision=match["revision"], files_metadata=True)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403, 404):
            raise ConnectionError(
                f"{repository} must be readable on the hub, got {error}."
            ) from error
        raise FileNotFoundError(
            f"{repository} must be a model on the Hugging Face hub at {api.endpoint} that we may "
            "see, got none; check the name, and HF_TOKEN if it is private."
        ) from error
    names = [sibling.rfilename for sibling in info.siblings or []]
    needed = {each for each in names if _NEEDED.fullmatch(each)}
    if not any(each.endswith(".safetensors") for each in needed):
        weights = {each for each in names if _OLD_WEIGHTS.fullmatch(each)}
        if not weights:
            raise FileNotFoundError(
                f"{repository} must have its weights as *.safetensors or pytorch_model*.bin, got "
                f"none among its {len(names)} files; choose another model."
            )
        needed |= weights
    headers = build_hf_headers()
    return [
        _File(
            name=sibling.rfilename,
            # The commit, so that all files are of one version.
            url=f"{api.endpoint}/{repository}/resolve/{info.sha}/{quote(sibling.rfilename)}",
            sha256=None if sibling.lfs is None else sibling.lfs.sha256,
            n_bytes=sibling.size,
            headers=headers,
        )
        for sibling in info.siblings or []
        if sibling.rfilename in needed
    ]


def _is_file(url: str) -> bool:
    """Whether an address is that of one file, and of no manifest."""
    word = _last_word(url)
    if MANIFEST_NAME.fullmatch(word):
        return False
    if urlparse(url).scheme in ("http", "https"):
        return "." in word  # the web has no folders that we could list
    return _FILE.fullmatch(word) is not None


def _last_word(url: str) -> str:
    return unquote(posixpath.basename(urlparse(url).path.rstrip("/")))


def _default_folder(name: str) -> Path:
    word = _last_word(name.partition("@")[0]) if "://" in name else name.rpartition("/")[2]
    return Path(word.partition("@")[0].removesuffix(".json") or "downloaded")

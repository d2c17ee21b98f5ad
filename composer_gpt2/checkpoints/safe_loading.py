"""Loads checkpoints without running code from them.

A checkpoint is a pickle, and a pickle may name any function to be called while it is read. Here
torch's restricted reader takes tensors, plain containers and a short list of harmless types, and
refuses everything else.
"""

from __future__ import annotations

import datetime
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from composer_gpt2.checkpoints.manifest import CheckpointError

__all__ = ["load_safely", "safe_loading"]

# What Composer's checkpoints hold besides tensors: numpy's random state, wall-clock times, and the
# version of torch. None of these does anything but hold a value.
_HARMLESS = [
    np.core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
    np.core.multiarray.scalar,  # pyright: ignore[reportAttributeAccessIssue]
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"]},
    datetime.timedelta,
    TorchVersion,
]

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch reads it at each load


@contextmanager
def safe_loading(source: object) -> Iterator[None]:
    """Within it every ``torch.load`` is restricted, even where a library asks for the other kind.

    Args:
        source: What is being loaded, for the message.

    Raises:
        CheckpointError: Something loaded within it would run code, or is no checkpoint at all.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a checkpoint must hold tensors and plain values only, but {source} "
            f"{_reason(source, error)}; it has not been loaded. Use a checkpoint from a source "
            "that you trust, or a .safetensors file."
        ) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def load_safely(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors mapped from the file.

    Raises:
        CheckpointError: It would run code, or is no checkpoint.
    """
    with safe_loading(path):
        is_zip = zipfile.is_zipfile(path)  # torch's format since 2020; older ones cannot be mapped
        try:
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
        except (OSError, pickle.UnpicklingError):
            raise
        except Exception as error:  # a file that is not of torch's making may raise anything
            raise CheckpointError(
                f"a checkpoint must be a file that torch.save wrote, got {path} ({error})."
            ) from error


def _reason(source: object, error: Exception) -> str:
    """What the file would have called; torch's own text is a long advice on how to allow it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own storages
            named = torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        # No file, one of torch's before 2020, or none of its making: the error has said so.
        named = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    harmless = {f"{kind.__module__}.{kind.__qualname__}" for kind in _HARMLESS}
    wanted = sorted(set(named) - harmless)
    if wanted:
        return f"wants {', '.join(wanted)}"
    return f"cannot be read as such ({str(error).splitlines()[0].split('.')[0]})"

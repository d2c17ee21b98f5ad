"""Compiles the kernels of this folder for the CPU it runs on, once, and loads them.

The result is kept in ``$XDG_CACHE_HOME/composer_gpt2`` (default ``~/.cache``) under a name made of
the sources, the flags, the compiler and the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # loads the OpenMP runtime that the kernels share with it

__all__ = ["KernelsUnavailableError", "kernel_library"]

_SOURCES = ("attention.cpp", "pointwise.cpp")
_HEADERS = ("lanes.h",)
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")


class KernelsUnavailableError(RuntimeError):
    """The kernels cannot run here; the message says what is missing."""


@functools.cache
def kernel_library() -> ctypes.CDLL:
    """The kernels, compiled on first use, which takes some seconds.

    Raises:
        KernelsUnavailableError: The CPU has no AVX512-BF16, there is no C++ compiler, or what it
            made cannot be loaded.
    """
    features = _cpu_features()
    if "avx512_bf16" not in features:
        raise KernelsUnavailableError(
            "the CPU must have AVX512-BF16 (AMD since Zen 4, Intel since Cooper Lake), got "
            f"{platform.machine()} without it"
        )
    wanted = os.environ.get("CXX")
    compiler = shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        found = f"CXX={wanted}, which is no program" if wanted else "none"
        raise KernelsUnavailableError(f"a C++ compiler must be there, got {found}; install g++")
    path = _cache_folder() / f"kernels-{_fingerprint(compiler, features)}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailableError(
            f"the compiled kernels must be loadable, got {error}; delete {path} and try again"
        ) from error


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # no Linux
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split()[2:])


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "composer_gpt2"


def _fingerprint(compiler: str, features: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update(Path(__file__).with_name(name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(version + " ".join([*_FLAGS, torch.__version__, *sorted(features)]).encode())
    return digest.hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Into another file first: several ranks may be at it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    sources = [str(Path(__file__).with_name(name)) for name in _SOURCES]
    try:
        finished = subprocess.run(
            [compiler, *_FLAGS, *sources, "-o", unfinished], capture_output=True, text=True
        )
        if finished.returncode != 0:
            errors = [line for line in finished.stderr.splitlines() if "error" in line]
            raise KernelsUnavailableError(
                f"{compiler} must compile the kernels, got status {finished.returncode}: "
                f"{errors[0] if errors else finished.stderr.strip()[-200:]}"
            )
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)

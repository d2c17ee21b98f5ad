"""A corpus that every machine has: the documentation inside Python and installed packages.

It is read from the machine it is used on and belongs to its authors; nothing of it is stored here.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

__all__ = ["read_documentation", "read_summaries", "write_documentation"]

_PACKAGES = ("numpy", "pandas", "torch")  # the docstrings of these: about 8 MB
_SHORTEST = 80  # characters; a shorter docstring is a label, not prose


def write_documentation(path: Path) -> Path:
    """Writes the documents of :func:`read_documentation` as JSON lines, ``{"text": ...}``.

    Args:
        path: The file; its folder is made.

    Returns:
        The same path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for text in tqdm(
            read_documentation(), desc="collecting text", unit=" documents", disable=None
        ):
            file.write(json.dumps({"text": text}) + "\n")
    return path


def read_documentation() -> Iterator[str]:
    """Documents in an order that depends only on what is installed: about 14 MB of English.

    First the topics of Python's ``help()``, then the descriptions of installed packages, then, a
    document for each module, the docstrings of the standard library and of numpy, pandas and torch.
    """
    from pydoc_data.topics import topics

    yield from (topics[name].strip() for name in sorted(topics))
    descriptions = {
        distribution.metadata["Name"].lower(): _description(distribution)
        for distribution in metadata.distributions()
    }
    yield from (descriptions[name] for name in sorted(descriptions) if descriptions[name])
    site_packages = Path(sysconfig.get_path("purelib"))
    yield from _docstrings(Path(sysconfig.get_path("stdlib")))
    for package in _PACKAGES:
        yield from _docstrings(site_packages / package)


def read_summaries() -> Iterator[tuple[str, str]]:
    """Dotted names of the standard library and what each is in a sentence: some 10,000 pairs.

    They are read from the same files, in an order that depends only on what is installed. Names of
    methods have no class before them.
    """
    site_packages = Path(sysconfig.get_path("purelib"))
    folders = [Path(sysconfig.get_path("stdlib")), *(site_packages / name for name in _PACKAGES)]
    for folder in folders:
        prefix = "" if folder is folders[0] else f"{folder.name}."
        for module, docstrings in _modules(folder):
            for name, text in docstrings.items():
                summary = " ".join(text.partition("\n\n")[0].split())
                if name.isidentifier() and not name.startswith("_") and summary.endswith("."):
                    yield f"{prefix}{module}.{name}", summary


def _description(distribution: metadata.Distribution) -> str:
    """A package's README: what follows the header of its metadata."""
    return (distribution.read_text("METADATA") or "").partition("\n\n")[2].strip()


def _docstrings(folder: Path) -> Iterator[str]:
    """A document for each module below ``folder``, tests and other people's packages left out."""
    for _, docstrings in _modules(folder):
        long = [text for text in docstrings.values() if len(text) >= _SHORTEST]
        if long:
            yield "\n\n".join(long)


def _modules(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Each module's dotted name, and its docstrings by the names of what they describe.

    Names are as Python spells them, with a number behind one that is met again.
    """
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if {"test", "tests", "testing", "site-packages", "idlelib"} & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's source
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and samples of broken code
        docstrings: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    name = "" if isinstance(node, ast.Module) else node.name
                    docstrings[name if name not in docstrings else f"{name}#{len(docstrings)}"] = (
                        text
                    )
        yield ".".join(part for part in parts if part != "__init__"), docstrings

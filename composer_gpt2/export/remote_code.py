"""The Python file of a remote-code export: the model's, with the algorithms' at its end."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from composer_gpt2 import registry
from composer_gpt2.export.architecture import NotExportableError
from composer_gpt2.export.remote import modeling_composer_gpt2

__all__ = ["MODELING_FILE", "remote_code"]

MODELING_FILE = "modeling_composer_gpt2.py"
_MAY_IMPORT = {"torch", "transformers", *sys.stdlib_module_names}
_CHANGES = "CHANGES: dict[str, Callable[..., None]] = {}\n"


def remote_code(changes: Iterable[str]) -> str:
    """The text of the file.

    Args:
        changes: Names of algorithms with ``exported_as``, in the order of application.

    Raises:
        NotExportableError: A function or its file is not there, imports another package, or two
            files use one name.
    """
    path = modeling_composer_gpt2.__file__
    model = _read(Path(path), "the model")
    parts, entries = [model], []
    for name in changes:
        algorithm = registry.get("algorithms", name).load()
        module, _, function = algorithm.exported_as.partition(":")  # type: ignore[attr-defined]
        part = _read(_file(module, name), name)
        if function not in part.names:
            raise NotExportableError(
                f"exported_as of {name} must name a function of {module}, got {function!r}."
            )
        parts.append(part)
        entries.append(f'"{name}": {function}')
    _check_names(parts)
    imports = sorted({line for part in parts[1:] for line in part.imports} - {*model.imports})
    first = "from __future__ import annotations\n\n"
    header = model.header.replace(first, first + "".join(f"{line}\n" for line in imports), 1)
    table = _CHANGES.replace("{}", "{\n" + "".join(f"    {entry},\n" for entry in entries) + "}")
    pieces = [header, model.body.replace(_CHANGES, ""), *(part.with_heading for part in parts[1:])]
    return "\n\n".join(piece.strip("\n") + "\n" for piece in pieces) + "\n\n" + table


@dataclass(frozen=True)
class _Part:
    """A file in pieces."""

    name: str
    docstring: str
    imports: list[str]
    header: str
    """Everything up to its first statement that is neither an import nor ``__all__``."""
    body: str
    names: set[str]
    """What it defines."""

    @property
    def with_heading(self) -> str:
        """Its body under its docstring as a comment."""
        lines = [f"# {line}".rstrip() for line in self.docstring.splitlines()]
        return "\n".join([*lines, "", "", self.body.strip("\n")])


def _read(path: Path, name: str) -> _Part:
    text = path.read_text(encoding="utf-8")
    tree, imports, names, end = ast.parse(text), [], set(), 0
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        defined = _defined(node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            _check_import(node, name)
            imports.append(ast.unparse(node))
        elif not is_docstring and defined != {"__all__"}:
            names |= defined
            continue
        end = node.end_lineno or 0
    lines = text.splitlines(keepends=True)
    return _Part(
        name=name,
        docstring=ast.get_docstring(tree) or "",
        imports=[line for line in imports if "__future__" not in line],
        header="".join(lines[:end]),
        body="".join(lines[end:]),
        names=names,
    )


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _check_import(node: ast.Import | ast.ImportFrom, name: str) -> None:
    wanted = (
        [node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    )
    if isinstance(node, ast.ImportFrom) and node.level:
        wanted = ["." * node.level + (node.module or "")]
    others = [module for module in wanted if module.partition(".")[0] not in _MAY_IMPORT]
    if others:
        raise NotExportableError(
            "exported code must import torch, transformers and the standard library alone, got "
            f"{', '.join(others)} in the file of {name}."
        )


def _check_names(parts: list[_Part]) -> None:
    for i, part in enumerate(parts):
        for other in parts[:i]:
            shared = sorted(part.names & other.names)
            if shared:
                raise NotExportableError(
                    "exported code must define each name once, got "
                    f"{', '.join(shared)} in the files of {other.name} and {part.name}."
                )


def _file(module: str, name: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise NotExportableError(
            f"exported_as of {name} must name a module that is there, got {module!r}."
        )
    return Path(spec.origin)

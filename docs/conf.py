"""Sphinx configuration; `make docs` builds with -W, so that every warning is an error."""

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import algorithms  # noqa: E402 (found through the line above)
import composer_gpt2  # noqa: E402

project = "composer-gpt2"
version = release = composer_gpt2.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "generated"]
exclude_patterns = ["_build", "reference"]
suppress_warnings = ["myst.xref_missing"]  # method cards link to benchmarks/, which has no page
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"composer-gpt2 {version}"
html_show_copyright = False
html_show_sphinx = False
myst_heading_anchors = 3
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False  # types are in the signature


def setup(app):
    app.connect("builder-inited", describe_constants)
    app.connect("autodoc-process-docstring", mend_docstring, priority=400)  # before napoleon
    app.connect("env-check-consistency", check_public_names)


def describe_constants(app):
    """Lets autodoc see public constants without a docstring: with the comment on their line."""
    for module in public_modules():
        analyzer = ModuleAnalyzer.for_module(module.__name__)
        analyzer.analyze()
        for name in getattr(module, "__all__", ()):
            if line := re.search(rf"^{name}\b[^#\n]*=[^#\n]*(?:# (.*))?$", analyzer.code, re.M):
                has_address = " at 0x" in repr(getattr(module, name))
                text = [line[1] or "", "", ":meta hide-value:" if has_address else "", ""]
                analyzer.attr_docs.setdefault(("", name), text)


def mend_docstring(app, what, name, obj, options, lines):
    """Keeps what is not ours off a constant or attribute, and keeps what is ours as it is."""
    if what not in ("attribute", "data", "property"):
        return
    text = "\n".join(lines).strip()
    if text in (inspect.getdoc(obj), inspect.getdoc(type(obj))) and what == "data":
        lines.clear()  # the docstring of `str`, `dict`, ...
    elif text.startswith("Alias for field number"):
        lines.clear()  # what a NamedTuple says of its fields
    else:
        lines[:0] = ["..", ""]  # or napoleon takes what stands before a colon for a type


def check_public_names(app, env):
    """Warns of each public name of the package that no page documents.

    A name that a module passes on from another one of ours is documented where either of them is.
    """
    warn = logging.getLogger(__name__).warning
    documented = env.get_domain("py").objects
    owners = {}  # (name, identity of the object): the modules that have it in __all__
    for module in public_modules():
        if not hasattr(module, "__all__"):
            warn("%s has no __all__: say which of its names are public", module.__name__)
        for name in getattr(module, "__all__", ()):
            owners.setdefault((name, id(getattr(module, name))), []).append(module.__name__)
    for (name, _), modules in owners.items():
        # The page of commands has these, with their options.
        is_command = name.endswith("_command")
        if not is_command and not any(f"{module}.{name}" in documented for module in modules):
            warn(
                "%s.%s is public, but no page documents it: add its module to docs/api.md or "
                "docs/internals.md",
                *(modules[-1], name),
            )


def public_modules():
    """The packages' modules, but for those whose path has a leading underscore."""
    yield composer_gpt2
    for package in (composer_gpt2, algorithms):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not any(part.startswith("_") for part in found.name.split(".")):
                yield importlib.import_module(found.name)

"""Sphinx directives whose content is computed from the library, so that no page repeats it by hand.

Each returns Markdown; the pages use them as ```` ```{recipe-keys} Recipe ```` and so on.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pydantic
import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

from composer_gpt2 import cli, configs, recipe, registry, scaling
from composer_gpt2.durations import UNITS

ROOT = Path(__file__).parent.parent


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives."""
    for variable in ("OPENWEBTEXT_REMOTE", "MIXTURE_REMOTE"):  # the tables of recipes load them
        os.environ.setdefault(variable, "unused")
    for name, write in {
        "command-options": command_options,
        "model-family": model_family,
        "recipe-error": recipe_error,
        "recipe-keys": recipe_keys,
        "recipe-names": recipe_names,
        "recipe-refusals": recipe_refusals,
        "shipped-recipes": shipped_recipes,
        "time-units": time_units,
    }.items():
        app.add_directive(name, _directive(write))
    return {"parallel_read_safe": True}


def recipe_keys(schema_name: str) -> str:
    """A table of the keys of a class in ``recipe.py``, with type, default and meaning."""
    schema: type[pydantic.BaseModel] = getattr(recipe, schema_name)
    meanings = ModuleAnalyzer.for_module(schema.__module__).find_attr_docs()
    types = schema.model_json_schema()["properties"]
    return "\n\n".join(
        (f"**{title[0].upper()}{title[1:]}**\n\n" if title else "")
        + _table(
            ("key", "type", "default", "meaning"),
            (
                (
                    f"`{name}`",
                    _type(types[name], schema.model_fields[name]),
                    _default(schema.model_fields[name]),
                    _meaning(meanings.get((schema_name, name)), schema.model_fields[name]),
                )
                for name in names
            ),
        )
        for title, names in _groups(schema).items()
    )


def recipe_names(kind: registry.Kind) -> str:
    """A table of the names that a recipe may use for one kind of thing, with their arguments."""
    entries = [registry.get(kind, name) for name in registry.names(kind)]
    return _table(
        ("name", "class", "arguments"),
        (
            (f"`{entry.name}`", f"`{entry.path.replace(':', '.')}`", _arguments(entry))
            for entry in entries
            if entry.distribution == "composer-gpt2"
        ),
    )


def recipe_refusals(kind: registry.Kind) -> str:
    """A table of the names that Composer or torch has and a recipe may not use."""
    return _table(
        ("name", "why not"),
        ((f"`{name}`", reason) for name, reason in sorted(registry.refused(kind).items())),
    )


def recipe_error(arguments: str) -> str:
    """What ``run.py`` answers to these arguments, which must be wrong."""
    words = shlex.split(arguments)
    files = [following for word, following in pairwise(words) if word == "-f"]
    overrides = [word for word in words if word != "-f" and word not in files]
    try:
        recipe.load_recipe([os.path.relpath(ROOT / file) for file in files], overrides)
    except recipe.RecipeError as error:
        text = str(error).replace(os.path.relpath(ROOT) + os.sep, "")
        return f"```text\n$ composer run.py {arguments}\nRecipeError: {text}\n```"
    raise ValueError(f"run.py {arguments} must be a mistake, but it is none.")


def shipped_recipes(names: str) -> str:
    """A table of the numbers of the recipes in ``yamls/``: all of them, or those named."""
    rows = []
    paths = [ROOT / "yamls" / f"{name}.yaml" for name in names.split()]
    for path in paths or sorted((ROOT / "yamls").glob("*.yaml"), key=_by_size):
        loaded = recipe.load_recipe([path])
        n_parameters, count = _parameters(loaded)
        tokens = loaded.train_tokens
        assert tokens is not None  # no shipped recipe counts in epochs or seconds
        warmups = [s["t_warmup"] for s in loaded.schedulers.values() if "t_warmup" in s]
        rows.append(
            (
                f"`{path.name}`",
                count,
                f"{loaded.train_batch_size:,} x {loaded.data.sequence_length:,}",
                f"{tokens // loaded.tokens_per_batch:,}",
                _amount(tokens),
                f"{tokens / n_parameters:.2g}",
                f"`{loaded.optimizer_name}`",
                f"{loaded.optimizer_arguments['lr']:.1e}",
                ", ".join(warmups),
            )
        )
    header = (
        *("recipe", "parameters", "batch", "batches", "tokens"),
        *("tokens a parameter", "optimizer", "peak learning rate", "warm-up"),
    )
    return _table(header, rows)


def _parameters(loaded: recipe.Recipe) -> tuple[int, str]:
    """Parameters, and how to write them: the size of a corpus' own tokenizer may be unknown."""
    config = _config(loaded)
    if loaded.data.tokenizer == "gpt2" or "vocab_size" in loaded.model.config_overrides:
        count = scaling.parameter_count(config)
        return count, f"{count:,}"
    config.vocab_size = 0
    count = scaling.parameter_count(config)
    return count, f"{count:,} + {config.n_embd} a token"


def model_family(names: str) -> str:
    """A table of the models of the family, or of those named: shape, cost and predicted loss."""
    rows = []
    for name in names.split() or configs.family():
        config = configs.get_config(name)
        rows.append(
            (
                f"`{name}`",
                config.n_layer,
                config.n_embd,
                config.n_head,
                config.n_positions,
                f"{scaling.parameter_count(config):,}",
                _amount(scaling.flops_per_token(config)),
                f"{scaling.predicted_loss(config):.2f}",
                f"{scaling.predicted_perplexity(config):.2f}",
            )
        )
    header = (
        *("name", "layers", "width", "heads", "context", "parameters", "FLOPs a token"),
        *("predicted loss", "perplexity"),
    )
    return _table(header, rows)


def command_options(name: str) -> str:
    """A table of the arguments and options of a ``composer-gpt2`` command."""
    group: Any = typer.main.get_command(cli.app)
    return _table(
        ("argument", "default", "meaning"),
        (
            (
                ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts]),
                "required"
                if option.required
                else ""
                if option.default is None
                else _yaml(option.default),
                _escape(option.help or ""),
            )
            for option in group.commands[name].params
        ),
    )


def time_units(_: str) -> str:
    """A table of the units of a time in a recipe."""
    return _table(("unit", "meaning"), ((f"`{unit}`", text) for unit, text in UNITS.items()))


def _directive(write: Callable[[str], str]) -> type[SphinxDirective]:
    class Generated(SphinxDirective):
        optional_arguments = 1
        final_argument_whitespace = True

        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # the library may change while the page does not
            return self.parse_text_to_nodes(write(" ".join(self.arguments)))

    return Generated


def _groups(schema: type[pydantic.BaseModel]) -> dict[str, list[str]]:
    """The keys below each ``# --- comment ---`` in the source of a class."""
    groups: dict[str, list[str]] = {}
    title = ""
    for line in inspect.getsource(schema).splitlines():
        if comment := re.fullmatch(r" +# --- (.+) ---", line):
            title = comment[1]
        if (key := re.match(r"    (\w+): ", line)) and key[1] in schema.model_fields:
            groups.setdefault(title, []).append(key[1])
    return groups


def _type(schema: dict[str, Any], field: pydantic.fields.FieldInfo) -> str:
    """A JSON schema in words."""
    if units := _time_units(field):
        null = " or `null`" if {"type": "null"} in schema.get("anyOf", ()) else ""
        return f"time in {', '.join(f'`{unit}`' for unit in units)}{null}"
    if "anyOf" in schema:
        return " or ".join(_type(option, field) for option in schema["anyOf"])
    if "$ref" in schema:
        return "mapping, below"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{word}`" for word in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "object":
        inner = schema["additionalProperties"]
        return "name: " + (_type(inner, field) if "$ref" in inner else "{arguments}")
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true`, `false`",
        "string": "text",
        "null": "`null`",
    }
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{word} {schema[bound]}" for bound, word in bounds.items() if bound in schema]
    return " ".join([words[schema["type"]], ", ".join(limits)]).strip()


def _time_units(field: pydantic.fields.FieldInfo) -> list[str]:
    """The units that a key takes; none if it is not a time."""
    adapter = pydantic.TypeAdapter(field.rebuild_annotation())

    def takes(text: str) -> bool:
        try:
            adapter.validate_python(text)
        except pydantic.ValidationError:
            return False
        return True

    return [] if takes("1 of something") or takes("x") else [u for u in UNITS if takes(f"1{u}")]


def _meaning(docstring: list[str] | None, field: pydantic.fields.FieldInfo) -> str:
    """The docstring of a key, else that of its type, in Markdown: only roles are other there."""
    text = inspect.getdoc(field.annotation) if docstring is None else " ".join(docstring)
    assert text, "a key of a recipe needs a docstring"
    return _escape(re.sub(r":(func|class|data|meth|mod):`", r"{py:\1}`", text.strip()))


def _default(field: pydantic.fields.FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _yaml(field.get_default(call_default_factory=True))


def _yaml(value: Any) -> str:
    text = json.dumps(value, default=str)
    return "`" + text.strip('"') + "`"


def _arguments(entry: registry.Entry) -> str:
    """The arguments of an entry; those without a default are those that must be given."""
    arguments = []
    for name, parameter in entry.parameters().items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.append("any others")
        elif parameter.default is inspect.Parameter.empty or name in entry.required:
            arguments.append(f"**`{name}`**")
        else:
            arguments.append(f"`{name}`")
    return ", ".join(arguments) or "none"


def _config(loaded: recipe.Recipe) -> Any:
    return configs.get_config(loaded.model.name, **loaded.model.config_overrides)


def _by_size(path: Path) -> tuple[str, int]:
    """Families in alphabetic order, models of a family by size."""
    loaded = recipe.load_recipe([path])
    return path.stem.partition("-")[0], scaling.parameter_count(_config(loaded))


def _amount(number: float) -> str:
    """Three digits and a word: ``4.72 billion``."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def _escape(text: str) -> str:
    return text.replace("|", r"\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(_table_lines(tuple(header), rows))


def _table_lines(header: tuple[str, ...], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"

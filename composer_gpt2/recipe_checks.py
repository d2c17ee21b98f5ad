"""Everything that can be known to be wrong with a recipe before anything is built.

Names and arguments against the registry, keys and types against the schema, the model's settings,
then the rules of ``recipe_rules.py``; the mistakes of all of them are reported together.
"""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import BaseModel

from composer_gpt2 import registry
from composer_gpt2.arguments import nearest
from composer_gpt2.configs import family, get_config
from composer_gpt2.recipe import WEIGHT_DECAY_EXCLUDE, Data, Recipe, Stream
from composer_gpt2.recipe_files import CHOICES, KeyPath, Merged, Mistake
from composer_gpt2.recipe_rules import RULES, NotKnown, Unchecked, configuration_settings
from composer_gpt2.tokenizer import VOCAB_SIZE
from composer_gpt2.tokenizer_by_name import load_tokenizer

__all__ = ["check"]


def check(merged: Merged) -> list[Mistake]:
    """All mistakes beyond those of reading.

    What ``name: null`` switches off leaves ``merged.values``, so that the schema sees what remains.
    """
    recipe = Unchecked(merged)
    for section in CHOICES:
        _check_choices(recipe, section)
    _check_schema(recipe)
    _check_model(recipe)
    for rule in RULES:
        try:
            rule(recipe)
        except NotKnown:
            continue
    return recipe.mistakes


# --- Names and arguments -----------------------------------------------------------------------


_KIND_OF: dict[str, registry.Kind] = {"optimizer": "optimizers", **{k: k for k in registry.KINDS}}


def _check_choices(recipe: Unchecked, section: str) -> None:
    chosen = recipe.values.get(section, {})
    if chosen is None:
        chosen = {}  # `callbacks: null` switches all of them off.
    if not isinstance(chosen, dict):
        return  # The schema says so.
    switched_on = {}
    for name, arguments in chosen.items():
        try:
            entry = registry.get(_KIND_OF[section], name)
        except ValueError as error:
            recipe.fail((section, name), str(error).removeprefix(f"{name} "))
            continue
        if arguments is None:
            continue
        if not isinstance(arguments, dict):
            recipe.fail((section, name), f"must be {{arguments}} or null, got {arguments!r}")
            continue
        switched_on[name] = arguments
        for_the_class = dict(arguments)
        if section == "optimizer":
            excluded = for_the_class.pop("weight_decay_exclude", [])
            if not _is_list_of(excluded, WEIGHT_DECAY_EXCLUDE):
                recipe.fail(
                    (section, name, "weight_decay_exclude"),
                    f"must be a list of some of {', '.join(WEIGHT_DECAY_EXCLUDE)}, "
                    f"got {excluded!r}",
                )
        for mistake in entry.check_arguments(for_the_class):
            argument = () if mistake.argument is None else (mistake.argument,)
            recipe.fail((section, name, *argument), mistake.message)
    recipe.values[section] = switched_on
    if section == "optimizer" and (section,) not in recipe.wrong:
        _check_one_optimizer(recipe, list(switched_on))


def _is_list_of(value: Any, allowed: tuple[str, ...]) -> bool:
    return isinstance(value, list) and all(item in allowed for item in value)


def _check_one_optimizer(recipe: Unchecked, names: list[str]) -> None:
    if len(names) > 1:
        off = ", ".join(f"{name}: null" for name in names[:-1])
        recipe.fail(
            ("optimizer",),
            f"must have exactly one name, got {' and '.join(names)}; write {off} to switch off "
            f"what you do not want",
        )
    elif not names and recipe.merged.complete and not recipe.wrong:
        recipe.fail(
            ("optimizer",), "must have exactly one name, got none; e.g. adamw: {lr: 6.0e-4}"
        )


# --- Keys and types ----------------------------------------------------------------------------


def _check_schema(recipe: Unchecked) -> None:
    try:
        Recipe.model_validate(recipe.values)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        return
    requirements: dict[KeyPath, list[str]] = {}
    for problem in problems:
        path = _written(recipe.values, problem["loc"])
        if not path and problem["type"] not in ("missing", "invalid_key"):
            continue  # A default that follows from a value that is wrong itself.
        if problem["type"] == "missing":
            path = problem["loc"]
            if not recipe.merged.complete or path in recipe.wrong:
                recipe.wrong.add(path)  # It may well have been written.
                continue
        requirements.setdefault(path, []).append(_requirement(problem, path))
    for path, texts in requirements.items():
        # Where several types would do, each has its requirement.
        recipe.fail(path, " or ".join(texts) + _got(recipe.values, path, texts))


def _written(values: Any, location: KeyPath) -> KeyPath:
    """The part of pydantic's location that is a path in the recipe."""
    path: KeyPath = ()
    for key in location:
        if not (isinstance(values, dict) and key in values):
            break  # pydantic goes on with positions and with the names of the types that it tried.
        path, values = (*path, key), values[key]
    return path


def _requirement(problem: Any, path: KeyPath) -> str:
    """Pydantic's message in words that fit after a key."""
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] == "extra_forbidden":
        return _unknown_key(path)
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "string_pattern_mismatch":
        return "must be letters, digits, '.', '_' and '-', and not begin with one of the last three"
    words = {
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "dict_type": "must be a mapping",
        "model_type": "must be a mapping",
        "invalid_key": "has a key that is not text; put it in quotes",
    }
    return words.get(problem["type"]) or problem["msg"].replace("Input should be", "must be")


def _got(values: Any, path: KeyPath, requirements: list[str]) -> str:
    """``", got ..."`` unless that has been said, or nothing was given."""
    if not any(text.startswith("must") and "got " not in text for text in requirements):
        return ""
    for key in path:
        values = values[key]
    allowed = [word for text in requirements for word in text.split("'")[1::2]]
    return f", got {values!r}{nearest(values, allowed)}"


def _unknown_key(path: KeyPath) -> str:
    schema: type[BaseModel] = Recipe
    if path[0] == "data":
        schema = Stream if "streams" in path else Data
    known = list(schema.model_fields)
    elsewhere = _DOTTED_KEYS.get(str(path[-1]))
    suggestion = f" (did you mean {elsewhere!r}?)" if elsewhere else nearest(path[-1], known)
    return f"is not a key of a recipe{suggestion or ', which has ' + ', '.join(known)}"


_DOTTED_KEYS = {name: f"data.{name}" for name in Data.model_fields} | {
    name: name for name in Recipe.model_fields
}


# --- The model ---------------------------------------------------------------------------------


def _check_model(recipe: Unchecked) -> None:
    try:
        model = dict(recipe["model",])
    except NotKnown:
        return
    name, model = model.pop("name"), configuration_settings(model)
    if name not in family():
        recipe.fail(
            ("model", "name"),
            f"must be one of {', '.join(family())}; got {name!r}{nearest(name, family())}",
        )
    defaults = {**get_config("gpt2").to_dict(), "dropout": 0.1, "attn_implementation": "sdpa"}
    for key, value in model.items():
        problem = _config_problem(key, value, defaults)
        if problem is not None:
            recipe.fail(("model", key), problem)
    if any(path[0] == "model" for path in recipe.wrong):
        return
    try:
        config = get_config(name, **model)
    except ValueError as error:
        recipe.fail(("model",), str(error))
        return
    n_tokens = _tokenizer_size(recipe)
    if config.vocab_size < n_tokens:
        recipe.fail(
            ("model", "vocab_size"),
            f"must be at least the tokenizer's {n_tokens}, got {config.vocab_size}",
        )


def _tokenizer_size(recipe: Unchecked) -> int:
    """Tokens of ``data.tokenizer``; 0 while its folder is not there or the key is wrong."""
    try:
        name = recipe["data", "tokenizer"]
        return VOCAB_SIZE if name == "gpt2" else len(load_tokenizer(name))
    except (NotKnown, ValueError, OSError):
        return 0


def _config_problem(key: str, value: Any, defaults: dict[str, Any]) -> str | None:
    """What is wrong with a setting of GPT2Config, which itself takes any value for any of them."""
    if key not in defaults:
        return f"is not a setting of GPT-2{nearest(key, defaults)}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.endswith("pdrop") or key in ("dropout", "summary_first_dropout"):
        if not (is_number and 0 <= value < 1):
            return f"must be a number in [0, 1), got {value!r}"
    elif key.startswith("n_") or key == "vocab_size":
        if not (isinstance(value, int) and is_number and value > 0) and (key, value) != (
            "n_inner",
            None,
        ):
            return f"must be a whole number above 0, got {value!r}"
    elif isinstance(defaults[key], float):
        if not (is_number and value > 0):
            return f"must be a number above 0, got {value!r}"
    elif defaults[key] is not None and not isinstance(value, type(defaults[key])):
        return f"must be a {type(defaults[key]).__name__}, got {value!r}"
    elif key == "activation_function":
        from transformers.activations import ACT2FN

        if value not in ACT2FN:
            return f"must be one of {', '.join(ACT2FN)}; got {value!r}{nearest(value, ACT2FN)}"
    return None

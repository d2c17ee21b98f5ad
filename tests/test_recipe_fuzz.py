"""Recipes of every kind: a valid recipe or one RecipeError, soon, and nothing else happens."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_gpt2.recipe import Recipe, RecipeError, load_recipe

YAMLS = Path(__file__).parent.parent / "yamls"
SHIPPED = sorted(path.name for path in YAMLS.glob("*.yaml"))
SECONDS = 20.0  # what takes for ever takes much longer, and a loaded machine not as long

BASE = """\
model: {name: gpt2-tiny}
data: {remote: /corpus, sequence_length: 128}
train_batch_size: 8
max_duration: 100ba
optimizer: {adamw: {lr: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1}}
schedulers: {cosine_decay_with_warmup: {t_warmup: 10ba}}
algorithms: {gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "base.yaml").write_text(BASE)
    os.mkfifo(folder / "pipe")
    load_recipe([folder / "base.yaml"])  # imports Composer, which is not what is timed
    return folder


def outcome(folder: Path, content: str | bytes | None = None, *overrides: str) -> str:
    """The text of the one error, or nothing; anything else goes through."""
    files = [folder / "base.yaml"]
    if content is not None:
        files.append(folder / "fuzzed.yaml")
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        files[-1].write_bytes(raw)
    return outcome_of(files, overrides)


def outcome_of(files, overrides=()) -> str:
    begin = time.monotonic()
    try:
        recipe = load_recipe(files, overrides)
    except RecipeError as error:
        text, n_mistakes = str(error), len(error.mistakes)
    else:
        text, n_mistakes = "", 0
        assert isinstance(recipe, Recipe)
        json.dumps(recipe.model_dump(mode="json"))
        assert recipe.to_yaml()
    assert text.startswith(f"{n_mistakes} mistake" if n_mistakes else "")
    assert time.monotonic() - begin < SECONDS
    return text


def fuzz(n: int):
    return settings(
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=n,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# What YAML can say, as it is written.
LITERALS = st.sampled_from(
    [
        *("1e400", "-1e400", "9" * 5000, "0x" + "f" * 5000, "0b_", "0x_", "1:59:59", "1_000"),
        *(".nan", ".inf", "-.inf", "~", "null", "yes", "'1'", "''", "???", "-1", "0", "1.5"),
        *("2020-01-01", "2020-99-99", "2020-01-01T00:00:00Z", "18446744073709551616"),
        *("!!int ''", "!!int x", "!!bool x", "!!timestamp x", "!!binary '@'", "!!set {a, b}"),
        *("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!local x", "!!str 1"),
        *("${model.name}", "${oc.env:HOME}", "${oc.env:NOT_SET_HERE}", "${oc.env:X,1}", "${a"),
        *("${oc.create:{a: 1}}", "${oc.decode:1}", "${oc.coerce:this.it,1}", "${nowhere:1}"),
        *("${${run_name}}", "${run_name}", "${model}", "${.x}", r"\${x}", "'${oc.env:\"\0\"}'"),
        *('"\\ud800"', '"\\0"', '"\\x07"', "'\ufeff'", "\t", "@a", "`a`", "%", "|", "&a [*a]"),
        *("[]", "{}", "[[1]]", "[null]", "{1: 2}", "{null: 1}", "{? [a] : b}", "{.nan: 1}"),
        *("{a: 1, a: 2}", "<<", "{<<: {a: 1}}", "{<<: 1}", "=", "100ba", "1e300ba", "1e999ba"),
        *("0ba", "\u0661ba", "1e999dur", "0.5dur", "1ep", "9" * 30 + "tok", "-1ba", "x" * 5000),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
).map(json.dumps)
SECTIONS = {
    "optimizer": ["adamw", "sgd", "adam", "decoupled_adamw", "lbfgs"],
    "schedulers": ["cosine_decay_with_warmup", "constant", "multistep", "step"],
    "algorithms": ["alibi", "gradient_clipping", "seq_length_warmup", "ema", "mixup", "swa"],
    "callbacks": ["speed_monitor", "early_stopper", "generate"],
    "loggers": ["file", "tensorboard", "nothing"],
    "model": ["name", "n_layer", "n_embd", "dropout", "activation_function", "vocab_size"],
    "data": ["remote", "streams", "sequence_length", "cache_limit", "download_timeout", "x"],
}
ARGUMENTS = ["lr", "betas", "t_warmup", "alpha_f", "duration", "window_size", "clipping_threshold"]


@st.composite
def keys(draw) -> str:
    section = draw(st.sampled_from([*Recipe.model_fields, *SECTIONS, "base", "nonsense"]))
    path = [section]
    if section in SECTIONS:
        path += draw(st.lists(st.sampled_from(SECTIONS[section]), max_size=1))
        if len(path) == 2:
            path += draw(st.lists(st.sampled_from(ARGUMENTS), max_size=1))
    return ".".join(path)


def as_yaml(key: str, value: str) -> str:
    names = key.split(".")
    lines = [f"{'  ' * n}{name}:" for n, name in enumerate(names)]
    return "\n".join(lines) + f" {value}\n"


@fuzz(120)
@given(settings=st.lists(st.tuples(keys(), LITERALS | JSON), min_size=1, max_size=3))
def test_any_value_at_any_key_of_a_file(folder, settings):
    outcome(folder, "".join(as_yaml(key, value) for key, value in dict(settings).items()))


@fuzz(120)
@given(overrides=st.lists(st.tuples(keys(), LITERALS | JSON), min_size=1, max_size=3))
def test_any_override(folder, overrides):
    outcome(folder, None, *(f"{key}={value}" for key, value in overrides))


@fuzz(100)
@given(content=st.binary(max_size=60) | st.text("[]{}:,-!&*#|>%@? ab1.'\"${}\\\n\t\0\ufeff"))
def test_any_content(folder, content):
    outcome(folder, content)


@fuzz(100)
@given(words=st.lists(st.text("ab.=[]{}:!&*${}'\"\0 ") | st.text(), max_size=3))
def test_any_words_on_the_command_line(folder, words):
    outcome(folder, None, *words)


@fuzz(100)
@given(data=st.data())
def test_shipped_recipes_with_lines_that_are_wrong(folder, data):
    name = data.draw(st.sampled_from(SHIPPED))
    lines = (YAMLS / name).read_text().replace("base: ", f"base: {YAMLS}/").splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        n = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["drop", "double", "indent", "value", "cut"])):
            case "drop":
                lines[n] = ""
            case "double":
                lines.insert(n, lines[n])
            case "indent":
                lines[n] = "  " + lines[n]
            case "value":
                lines[n] = f"{lines[n].partition(':')[0]}: {data.draw(LITERALS)}"
            case "cut":
                lines[n] = lines[n][: data.draw(st.integers(0, len(lines[n])))]
    (folder / "shipped.yaml").write_text("\n".join(lines), "utf-8", "surrogatepass")
    outcome_of([folder / "shipped.yaml"], ["data.remote=/corpus"])


# --- Bombs, and what is not a file -------------------------------------------------------------


def doubling(line: str, n: int = 40) -> str:
    return "".join(line.format(n=n, below=n - 1) + "\n" for n in range(1, n))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a0: &a0 [x]\n" + doubling("a{n}: &a{n} [*a{below}, *a{below}]"), "more than 1,000 keys"),
        ("a0: &a0 {{x: 1}}\n" + doubling("a{n}: &a{n} {{{{<<: [*a{below}, *a{below}]}}}}", 30), ""),
        ("a0: ''\n" + doubling("a{n}: '${{a{below}}}${{a{below}}}'"), "that multiply"),
        ("a0: xxxx\n" + doubling("a{n}: ['${{a{below}}}', '${{a{below}}}']"), "that multiply"),
        ("a0: x\n" + doubling("a{n}: ${{a{below}}}", 400), "that multiply"),
        ("a: ${b}\nb: ${a}\n", "Recursive interpolation"),
        ("a: &a [*a]\n", "inside itself"),
        ("a: &a {b: {c: *a}}\n", "inside itself"),
        ("a: " + "[" * 5000, "more than 20 levels deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "more than 20 levels deep"),
        ("a:\n  " + "- " * 3000 + "x", "more than 20 levels deep"),
        ("? " * 3000 + "x", "more than 20 levels deep"),
        ("".join("  " * n + f"k{n}:\n" for n in range(300)), "more than 20 levels deep"),
        ("run_name: " + "x" * 300_000, "more than 262,144 bytes"),
        ("run_name: " + "${model.name}" * 1000, "more than 1,000 characters"),
        ("".join(f"k{n}: 1\n" for n in range(600)), "more than 1,000 keys and values"),
        ("seed: " + "9" * 5000, "more than 18 digits"),
        ("base: 0x" + "f" * 5000, "more than 18 digits"),
        (b"\xff\xfes\x00e\x00e\x00d\x00", "must be UTF-8"),
        (b"seed: 1\0", "must be plain YAML"),
        ("data:\n\tremote: x\n", "must be plain YAML"),
        ("---\nseed: 1\n---\nseed: 2\n", "must be plain YAML"),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) < 50 else "",
)
def test_bombs_are_refused_and_not_built(folder, content, reason):
    begin = time.monotonic()
    text = outcome(folder, content)
    assert reason in text
    assert text
    assert time.monotonic() - begin < 5


def test_deep_overrides(folder):
    assert "more than 20 levels" in outcome(folder, None, "run_name=" + "[" * 5000)
    assert "at most 20 keys" in outcome(folder, None, ".".join("a" * 3000) + "=1")
    assert "more than 1,000 keys" in outcome(folder, None, f"run_name={[1] * 1001}")
    assert "more than 18 digits" in outcome(folder, None, "seed=" + "9" * 5000)


def test_hundreds_of_unknown_names_are_reported_in_time(folder):
    assert outcome(folder, f"algorithms: {[f'k{n}' for n in range(400)]}").count("\n") == 400
    assert outcome(folder, "".join(f"k{n}: 1\n" for n in range(450))).count("\n") == 450


@pytest.mark.parametrize(
    "place",
    ["/dev/zero", "/dev/random", "/", ".", "..", "", "pipe", "a\0b", "x" * 5000, "gone", "loop"],
)
def test_what_is_no_recipe_file(folder, place):
    if place == "loop" and not (folder / "loop").is_symlink():
        (folder / "loop").symlink_to("loop")
    assert "readable file" in outcome(folder, f"base: {json.dumps(place)}\n")
    assert "readable file" in outcome_of([folder / "base.yaml", folder / place])
    assert "readable file" in outcome_of([place] if place != "pipe" else [folder / place])


def test_a_long_chain_of_bases(folder):
    for n in range(30):
        (folder / f"chain{n}.yaml").write_text(f"base: chain{n + 1}.yaml\n")
    assert "chain of more than 20 files" in outcome_of([folder / "chain0.yaml"])


def test_a_byte_order_mark_is_no_mistake(folder):
    assert outcome(folder, b"\xef\xbb\xbfseed: 1\n") == ""


# --- No code -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [{place}]",
        "!!python/object/apply:pathlib.Path [{place}]",
        "!!python/object/new:subprocess.Popen [[touch, {place}]]",
        "!!python/module:touching",
        "${{oc.coerce:touching.x,1}}",
        "${{oc.decode:'\\${{oc.coerce:touching.x,1}}'}}",
        "${{oc.env:NOT_SET,${{oc.coerce:touching.x,1}}}}",
        "'${{oc.create:${{oc.coerce:touching.x,1}}}}'",
        "${{${{name}}:touching.x,1}}",
    ],
)
@pytest.mark.parametrize("on_the_command_line", [False, True])
def test_no_recipe_runs_code(folder, tmp_path, monkeypatch, value, on_the_command_line):
    """Neither objects of YAML nor OmegaConf's resolvers, one of which imports modules."""
    place = tmp_path / "touched"
    (tmp_path / "touching.py").write_text(f"open({str(place)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    value = value.format(place=place)
    if on_the_command_line:
        text = outcome(folder, "name: oc.coerce\n", f"run_name={value}")
    else:
        text = outcome(folder, f"name: oc.coerce\nrun_name: {value}\n")
    assert "constructor for the tag" in text or "may refer to" in text
    assert not place.exists()


def test_tags_by_another_name(folder):
    content = "%TAG ! tag:yaml.org,2002:python/\n---\nrun_name: !name:os.system x\n"
    assert "constructor for the tag" in outcome(folder, content)


def test_plain_tags_and_anchors_are_fine(folder):
    content = "run_name: !!str 12\nsave_folder: &a /x\nload_path: *a\ndata: !!map {}\n"
    recipe = load_recipe_of(folder, content)
    assert (recipe.run_name, recipe.save_folder, recipe.load_path) == ("12", "/x", "/x")


def load_recipe_of(folder: Path, content: str) -> Recipe:
    (folder / "fine.yaml").write_text(content)
    return load_recipe([folder / "base.yaml", folder / "fine.yaml"])


def test_every_shipped_recipe_is_within_the_limits():
    for name in SHIPPED:
        n_nodes = sum(isinstance(e, yaml.NodeEvent) for e in yaml.parse((YAMLS / name).read_text()))
        assert n_nodes < 200, name

"""Recipes: precedence, all mistakes in one message with their places, and the resolved recipe."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer_gpt2.recipe import Data, Recipe, RecipeError, Stream, load_recipe

BASE = """\
model: {name: gpt2-tiny}
data:
  remote: /corpus
  sequence_length: 128
train_batch_size: 8
max_duration: 100ba
optimizer:
  adamw: {lr: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1}
schedulers:
  cosine_decay_with_warmup: {t_warmup: 10ba}
algorithms:
  gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}
"""


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file below tmp_path and gives its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def base(write) -> Path:
    return write(BASE, "base.yaml")


def mistakes(*files: Path | str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the RecipeError; none if the recipe loads."""
    try:
        load_recipe(files, overrides)
    except RecipeError as error:
        first, *lines = str(error).split("\n")
        assert f"{len(lines)} mistake" in first
        return [line.strip() for line in lines]
    return []


def only_mistake(*files: Path | str, overrides: tuple[str, ...] = ()) -> str:
    found = mistakes(*files, overrides=overrides)
    assert len(found) == 1, found
    return found[0]


# --- What a good recipe gives ------------------------------------------------------------------


def test_values_and_defaults(base):
    recipe = load_recipe([base])
    assert recipe.model.name == "gpt2-tiny"
    assert recipe.model.config_overrides == {}
    assert recipe.optimizer_name == "adamw"
    assert recipe.optimizer_arguments == {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    assert recipe.weight_decay_exclude == ("bias", "norm", "embedding")
    assert recipe.schedulers == {"cosine_decay_with_warmup": {"t_warmup": "10ba"}}
    assert recipe.eval_batch_size == recipe.train_batch_size == 8
    assert recipe.precision == "amp_bf16"
    assert recipe.seed == 17
    assert recipe.data.shuffle
    assert recipe.data.validation_split == "validation"


def test_times_in_tokens(base):
    recipe = load_recipe([base])
    assert recipe.tokens_per_batch == 8 * 128
    assert recipe.train_tokens == 100 * 8 * 128
    assert recipe.tokens("10ba") == 10 * 8 * 128
    assert recipe.tokens("3sp") == 3 * 128
    assert recipe.tokens("5e3tok") == 5000
    assert recipe.tokens("0.5dur") == 50 * 8 * 128
    assert recipe.tokens("2ep") is None
    epochs = load_recipe(
        [base],
        ["max_duration=2ep", "schedulers.cosine_decay_with_warmup.t_warmup=0.1dur"],
    )
    assert epochs.train_tokens is None
    assert epochs.tokens("0.5dur") is None


def test_model_overrides_reach_the_configuration(base):
    recipe = load_recipe([base], ["model.n_positions=256", "model.dropout=0.0"])
    assert recipe.model.config_overrides == {"n_positions": 256, "dropout": 0.0}


def test_a_recipe_is_frozen(base):
    recipe = load_recipe([base])
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_says_what_it_is():
    """The recipe reference is made of these."""
    for schema in (Recipe, Data, Stream):
        for name, field in schema.model_fields.items():
            assert field.description or name in ("model", "data"), name


def test_run_name_decides_the_folders(base):
    unnamed = load_recipe([base])
    assert unnamed.run_folder is None
    assert unnamed.save_folder is None
    named = unnamed.with_run_name("first")
    assert (named.run_folder, named.save_folder) == ("runs/first", "runs/first/checkpoints")
    assert named == load_recipe([base], ["run_name=first"])
    chosen = load_recipe([base], ["run_name=first", "run_folder=/x", "save_folder=s3://b/c"])
    assert (chosen.run_folder, chosen.save_folder) == ("/x", "s3://b/c")


def test_one_file_may_be_given_as_text(base):
    assert load_recipe(str(base)) == load_recipe([base])


# --- Precedence --------------------------------------------------------------------------------


def test_precedence_schema_base_files_dotlist(write):
    write("{}\n" + BASE.replace("train_batch_size: 8", "train_batch_size: 2"), "bad.yaml")
    write(BASE + "seed: 1\nprecision: fp32\ndist_timeout: 1\ndevice: cpu\n", "grand.yaml")
    write("base: ../grand.yaml\nseed: 2\nprecision: amp_bf16\ndist_timeout: 2\n", "a/parent.yaml")
    first = write("base: parent.yaml\nseed: 3\ndist_timeout: 3\n", "a/first.yaml")
    second = write("seed: 4\n", "second.yaml")
    recipe = load_recipe([first, second], ["seed=5"])
    assert recipe.seed == 5  # dotlist
    assert load_recipe([first, second]).seed == 4  # later file
    assert load_recipe([first]).seed == 3  # the file over its bases
    assert recipe.dist_timeout == 3
    assert recipe.precision == "amp_bf16"  # the parent over the grandparent
    assert recipe.device == "cpu"  # the grandparent over the schema
    assert not recipe.compile  # the schema


def test_a_list_of_bases_merges_in_order(write, base):
    write("seed: 1\nmax_duration: 200ba\n", "one.yaml")
    write("seed: 2\n", "two.yaml")
    recipe = load_recipe([write("base: [base.yaml, one.yaml, two.yaml]\n")])
    assert (recipe.seed, recipe.max_duration) == (2, "200ba")


def test_a_base_reached_twice_does_not_undo_what_is_above_it(write, base):
    first = write("base: base.yaml\ntrain_batch_size: 16\n", "first.yaml")
    fragment = write("base: base.yaml\nseed: 3\n", "fragment.yaml")
    assert load_recipe([first, fragment]).train_batch_size == 16


def test_merging_is_key_by_key_and_lists_replace(base):
    recipe = load_recipe([base], ["optimizer.adamw.betas=[0.8, 0.9]", "optimizer.adamw.eps=1e-6"])
    assert recipe.optimizer["adamw"] == {
        "lr": 1e-3,
        "betas": [0.8, 0.9],
        "weight_decay": 0.1,
        "eps": 1e-6,
    }


def test_null_switches_off(write, base):
    variant = write(
        "base: base.yaml\n"
        "optimizer:\n  adamw: null\n  decoupled_adamw: {lr: 2.0e-3, weight_decay: 0.0}\n"
        "schedulers: {cosine_decay_with_warmup: null}\n"
        "algorithms: null\n"
    )
    recipe = load_recipe([variant])
    assert recipe.optimizer == {"decoupled_adamw": {"lr": 2e-3, "weight_decay": 0.0}}
    assert recipe.schedulers == {}
    assert recipe.algorithms == {}


def test_what_was_switched_off_starts_anew(base):
    """Arguments from before `null` do not come back with the name."""
    recipe = load_recipe(
        [base], ["optimizer.adamw=null", "optimizer.adamw={lr: 1, weight_decay: 0}"]
    )
    assert recipe.optimizer["adamw"] == {"lr": 1, "weight_decay": 0}


@pytest.mark.parametrize("section", ["schedulers", "algorithms", "callbacks"])
def test_the_list_spelling_of_2022(write, base, section):
    spelling = {
        "schedulers": "- cosine_decay_with_warmup: {t_warmup: 20ba}\n- constant: {}\n",
        "algorithms": "- gradient_clipping: {clipping_threshold: 2.0}\n- ema: {half_life: 10ba}\n",
        "callbacks": "- speed_monitor: {window_size: 5}\n- lr_monitor\n",
    }[section]
    recipe = load_recipe([write(f"base: base.yaml\n{section}:\n{spelling}")])
    assert (
        getattr(recipe, section)
        == {
            "schedulers": {"cosine_decay_with_warmup": {"t_warmup": "20ba"}, "constant": {}},
            "algorithms": {
                "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 2.0},
                "ema": {"half_life": "10ba"},
            },
            "callbacks": {"speed_monitor": {"window_size": 5}, "lr_monitor": {}},
        }[section]
    )


def test_environment_and_cross_references(write, base, monkeypatch):
    monkeypatch.setenv("CORPUS", "s3://bucket/x")
    recipe = load_recipe(
        [
            write(
                "base: base.yaml\ndata: {remote: '${oc.env:CORPUS}'}\n"
                "eval_batch_size: ${train_batch_size}\nrun_name: ${model.name}-1\n"
                "run_folder: '${oc.env:NOT_SET_HERE,fallback}'\n"
            )
        ]
    )
    assert recipe.data.remote == "s3://bucket/x"
    assert recipe.eval_batch_size == 8
    assert recipe.run_name == "gpt2-tiny-1"
    assert recipe.run_folder == "fallback"


def test_an_unset_variable_matters_only_where_it_is_needed(write, base):
    write("base: base.yaml\ndata: {remote: '${oc.env:NOT_SET_HERE}'}\n", "needs.yaml")
    found = only_mistake(base.parent / "needs.yaml")
    assert found == (
        f"{base.parent}/needs.yaml:2: data.remote needs the environment variable NOT_SET_HERE, "
        "which is not set; export NOT_SET_HERE=... or pass data.remote=..."
    )
    recipe = load_recipe([base.parent / "needs.yaml"], ["data.remote=/elsewhere"])
    assert recipe.data.remote == "/elsewhere"


# --- Every mistake, each with its place --------------------------------------------------------


def test_all_mistakes_in_one_error(write, base):
    mine = write(
        "base: base.yaml\n"
        "optimizer:\n"
        "  adamw:\n"
        "    lrr: 1.0e-3\n"
        "    betas: [0.9, 1.5]\n"
        "data: {sequence_lenght: 64}\n"
        "algorithms: {mixup: {}}\n"
        "max_duration: 100\n",
        "mine.yaml",
    )
    found = mistakes(
        mine, overrides=("precision=bf16", "train_batchsize=3", "words", "model.name=gpt2-52")
    )
    expected = [
        (f"{mine}:4: optimizer.adamw.lrr ", "did you mean 'lr'?"),
        (f"{mine}:5: optimizer.adamw.betas ", "two numbers in [0, 1), got [0.9, 1.5]"),
        (f"{mine}:6: data.sequence_lenght ", "did you mean 'sequence_length'?"),
        (f"{mine}:7: algorithms.mixup cannot be used", "for images"),
        (f"{mine}:8: max_duration must be a number with a unit", "got 100, write e.g. 100ba"),
        ("command line: precision must be 'fp32', ", "got 'bf16' (did you mean 'amp_bf16'?)"),
        ("command line: train_batchsize ", "did you mean 'train_batch_size'?"),
        ("command line: must be key=value, got 'words'", "e.g. max_duration=100ba"),
        ("command line: model.name ", "got 'gpt2-52' (did you mean 'gpt2-52m'?)"),
    ]
    for start, part in expected:
        assert any(line.startswith(start) and part in line for line in found), (start, found)
    assert len(found) == len(expected)


def test_the_place_is_the_last_layer_that_set_the_key(write, base):
    write("base: base.yaml\nseed: -1\n", "first.yaml")
    assert only_mistake(base.parent / "first.yaml").startswith(f"{base.parent}/first.yaml:2: seed")
    again = write("seed: -2\n", "again.yaml")
    assert only_mistake(base.parent / "first.yaml", again).startswith(f"{again}:1: seed")
    found = only_mistake(base.parent / "first.yaml", again, overrides=("seed=-3",))
    assert found.startswith("command line: seed")
    assert not mistakes(base.parent / "first.yaml", again, overrides=("seed=3",))


def test_the_place_of_what_was_switched_off_is_forgotten(base):
    overrides = ("optimizer.adamw=null", "optimizer.adamw={weight_decay: 0}")
    found = only_mistake(base, overrides=overrides)
    assert found == "command line: optimizer.adamw.lr is missing; adamw needs it"


# key=value, the key that is reported, and parts of the message
WRONG_VALUES = [
    ("optimizer.adamw.lr=0", "optimizer.adamw.lr", "above 0, got 0"),
    ("optimizer.adamw.lr='1e-3'", "optimizer.adamw.lr", "a number, got '1e-3'"),
    ("optimizer.adamw.lr=null", "optimizer.adamw.lr", "a number, got None"),
    ("optimizer.adamw.betas=[0.9]", "optimizer.adamw.betas", "a list, got [0.9]"),
    ("optimizer.adamw.betas=0.9", "optimizer.adamw.betas", "a list, got 0.9"),
    ("optimizer.adamw.weight_decay=-0.1", "optimizer.adamw.weight_decay", "0 or above"),
    ("optimizer.adamw.fused=1", "optimizer.adamw.fused", "true or false, got 1"),
    (
        "optimizer.adamw.weight_decay_exclude=[biases]",
        "optimizer.adamw.weight_decay_exclude",
        "some of bias, norm, embedding, got ['biases']",
    ),
    ("optimizer.adamw=3", "optimizer.adamw", "{arguments} or null, got 3"),
    ("optimizer.adam_w={lr: 1}", "optimizer.adam_w", "did you mean 'adamw'?"),
    ("optimizer=null", "optimizer", "exactly one name, got none"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=10", "t_warmup", "a time such as 10ba, got 10"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=1.5ba", "t_warmup", "whole number of batches"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=5sec", "t_warmup", "got '5sec'"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=-5ba", "t_warmup", "got '-5ba'"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=101ba", "t_warmup", "not be longer than"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=1.1dur", "t_warmup", "not be longer than"),
    ("schedulers.cosine_decay_with_warmup.t_max=99ba", "t_max", "not be shorter than"),
    ("schedulers.cosine_decay_with_warmup.t_warmup=10240tok", "t_warmup", "write 10ba"),
    ("schedulers.linear_with_warmup={}", "schedulers.linear_with_warmup.t_warmup", "is missing"),
    ("schedulers.multistep={milestones: [1ba, x]}", "schedulers.multistep.milestones", "got 'x'"),
    ("schedulers.step={step_size: 0.1dur, gamma: -1}", "schedulers.step.gamma", "0 or above"),
    ("algorithms.gradient_clipping.clipping_type=nrm", "clipping_type", "did you mean 'norm'?"),
    ("algorithms.ema.half_life=5tok", "algorithms.ema.half_life", "got '5tok'"),
    ("algorithms.ema.smoothing=0.9", "algorithms.ema", "Only one of  half_life or smoothing"),
    ("algorithms.sam.interval=true", "algorithms.sam.interval", "a whole number, got True"),
    ("algorithms.swa={}", "algorithms.swa.update_interval", "averaging would never start"),
    (
        "algorithms.low_precision_layernorm={}",
        "algorithms.low_precision_layernorm",
        "write device: gpu",
    ),
    ("callbacks.nan_monitor.threshold=3", "callbacks.nan_monitor.threshold", "takes none"),
    ("callbacks.speed_monitr={}", "callbacks.speed_monitr", "did you mean 'speed_monitor'?"),
    ("callbacks.speed_monitor=true", "callbacks.speed_monitor", "{arguments} or null, got True"),
    ("callbacks.activation_monitor.interval=soon", "interval", "got 'soon'"),
    ("callbacks.early_stopper={monitor: loss}", "dataloader_label", "is missing"),
    ("callbacks=[lr_monitor, lr_monitor]", "callbacks", "each name once"),
    ("callbacks=lr_monitor", "callbacks", "must be a mapping, got 'lr_monitor'"),
    ("loggers.progress_bar={}", "loggers.progress_bar", "the recipe has progress_bar"),
    ("model.n_layer='2'", "model.n_layer", "whole number above 0, got '2'"),
    ("model.n_head=3", "model", "n_embd must be a multiple of n_head"),
    ("model.dropout=1", "model.dropout", "in [0, 1), got 1"),
    ("model.n_embed=64", "model.n_embed", "did you mean 'n_embd'?"),
    ("model.activation_function=gelu_nw", "model.activation_function", "did you mean 'gelu_new'?"),
    ("model.vocab_size=50000", "model.vocab_size", "at least the tokenizer's 50257, got 50000"),
    ("model=[gpt2-tiny]", "model", "must be a mapping, got ['gpt2-tiny']"),
    ("model=gpt2-tiny", "model", "must be a mapping, got 'gpt2-tiny'"),
    ("data.sequence_length=2048", "data.sequence_length", "at most the model's n_positions (1024)"),
    ("data.num_workers=-1", "data.num_workers", "greater than or equal to 0, got -1"),
    ("data.shuffle=1", "data.shuffle", "must be true or false, got 1"),
    ("data.remote=null", "data", "must have remote or streams"),
    ("data.streams={a: {remote: /a}}", "data.streams", "write data.remote: null"),
    ("data.streams.a={remote: /a, locl: /b}", "data.streams.a.locl", "did you mean 'local'?"),
    ("data.validation_split=train", "data.validation_split", "must not be the training split"),
    ("data.cache_limit=1gb", "data.cache_limit", "delete the only copy"),
    ("train_batch_size=8.0", "train_batch_size", "must be a whole number, got 8.0"),
    ("device_train_microbatch_size=3", "device_train_microbatch_size", "divide"),
    ("device_train_microbatch_size=16", "device_train_microbatch_size", "try 8"),
    ("device_train_microbatch_size=aut", "device_train_microbatch_size", "did you mean 'auto'?"),
    ("max_duration=0ba", "max_duration", "above 0, got '0ba'"),
    ("max_duration=1dur", "max_duration", "got '1dur'"),
    ("max_duration=100 ba", "max_duration", "got '100 ba'"),
    ("max_duration=2e9token", "max_duration", "got '2e9token'"),
    ("eval_interval=10", "eval_interval", "write e.g. 10ba"),
    ("save_num_checkpoints_to_keep=-2", "save_num_checkpoints_to_keep", "got -2"),
    ("run_name=a/b", "run_name", "got 'a/b'"),
    ("save_keep_every=1dur", "save_keep_every", "got '1dur'"),
    ("load_weights_only=true", "load_weights_only", "no effect without load_path"),
    ("device=tpu", "device", "must be 'cpu' or 'gpu', got 'tpu'"),
    ("sequence_length=64", "sequence_length", "did you mean 'data.sequence_length'?"),
    ("seed=", "seed", "has no value"),
    ("=3", "", "must be key=value"),
    ("a..b=3", "", "must be key=value"),
    ("seed=[1", "seed", "plain YAML value"),
    ("run_name=${nowhere}", "run_name", "'nowhere' not found"),
    ("run_name=${run_name}", "run_name", "Recursive interpolation"),
    ("model.inner=${model}", "model.inner", "Interpolation to parent node"),
    ("run_name=???", "run_name", "must be given"),
    ("seed=!!python/object/apply:os.getcwd []", "seed", "plain YAML value"),
]


@pytest.mark.parametrize(
    ("override", "key", "part"), WRONG_VALUES, ids=[w[0] for w in WRONG_VALUES]
)
def test_a_wrong_value_is_one_clear_line(base, override, key, part):
    found = only_mistake(base, overrides=(override,))
    place, _, message = found.partition(": ")
    assert place == "command line"
    assert key in message.split(" ")[0]
    assert part in message


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (("optimizer.sgd={lr: 1}",), "optimizer", "got adamw and sgd; write adamw: null"),
        (
            (
                "data.remote=null",
                "data.streams={a: {remote: /a, proportion: 0.5}, b: {remote: /b}}",
            ),
            "data.streams",
            "all have a proportion",
        ),
        (
            ("data.remote=null", "data.streams={a: {remote: /a, proportion: 0.5}}"),
            "data.streams",
            "sum 1, got 0.5",
        ),
        (("device=cpu", "device_train_microbatch_size=auto"), "device_train", "device: cpu"),
        (("device=cpu", "precision=amp_fp16"), "precision", "device: cpu"),
        (("data.validation_split=null", "eval_interval=5ba"), "eval_interval", "has no effect"),
        (
            (
                "data.validation_split=null",
                "callbacks.early_stopper={monitor: a, dataloader_label: eval}",
            ),
            "callbacks.early_stopper",
            "needs data.validation_split",
        ),
        (("save_keep_every=1000ba",), "save_keep_every", "save_num_checkpoints_to_keep: 3"),
        (("algorithms.sam={}", "load_path=x.pt"), "algorithms.sam", "cannot be resumed"),
    ],
)
def test_keys_that_do_not_go_together(base, overrides, key, part):
    found = only_mistake(base, overrides=overrides)
    assert found.startswith(f"command line: {key}")
    assert part in found


def test_keys_that_refer_to_each_other(base):
    found = mistakes(base, overrides=("model.a=${data}", "data.b=${model}"))
    assert "command line: model must not refer to itself" in found


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.validation_split=null",),
        ("algorithms.sam={}", "load_path=x.pt", "load_weights_only=true"),
        ("device=gpu", "algorithms.low_precision_layernorm={}"),
        ("data.remote=null", "data.streams={a: {remote: /a}, b: {remote: /b}}"),
        ("data.cache_limit=1gb", "data.local=/cache"),
        ("data.cache_limit=1gb", "data.remote=s3://bucket/x"),
        ("schedulers.cosine_decay_with_warmup.t_warmup=0ba",),
        ("schedulers.multistep_with_warmup={t_warmup: 100tok, milestones: [0.5dur]}",),
        ("schedulers.cosine_decay_with_warmup.t_warmup=1dur",),
        ("max_duration=102400tok", "schedulers.cosine_decay_with_warmup.t_warmup=1024tok"),
        ("max_duration=1ep", "schedulers.cosine_decay_with_warmup.t_warmup=0.1dur"),
        ("max_duration=2ep", "schedulers.cosine_decay_with_warmup.t_warmup=20ba"),
        ("max_duration=600sec", "schedulers.cosine_decay_with_warmup.t_warmup=0.1dur"),
        ("algorithms.gradient_clipping.clipping_threshold=.inf",),
        ("algorithms.swa={update_interval: 5ba}",),
        ("optimizer.adamw.weight_decay_exclude=[]",),
        ("eval_interval=null",),
        ("model.n_inner=null",),
    ],
)
def test_what_makes_sense_is_accepted(base, overrides):
    load_recipe([base], overrides)


def test_evaluation_switched_off_over_a_base_that_evaluates(write, base):
    """Who switches it off need not also undo the base's eval_interval."""
    write("base: base.yaml\neval_interval: 10ba\n", "evaluates.yaml")
    silent = write("base: evaluates.yaml\ndata: {validation_split: null}\n")
    assert load_recipe([silent]).data.validation_split is None


def test_an_empty_value_is_not_taken_for_null(write, base):
    """In YAML `speed_monitor:` is null, which would switch off what the writer wants."""
    found = mistakes(write("base: base.yaml\ncallbacks:\n  speed_monitor:\n  lr_monitor: {}\n"))
    assert len(found) == 1
    assert ":3: callbacks.speed_monitor has no value; write {}" in found[0]
    assert ":2: algorithms has no value" in only_mistake(write("base: base.yaml\nalgorithms:\n"))


def test_missing_keys_are_all_named(write):
    found = mistakes(write("seed: 3\n"))
    for key in ("model", "data", "train_batch_size", "max_duration"):
        assert f"{key} is missing" in found
    assert any(line.startswith("optimizer must have exactly one name, got none") for line in found)


def test_files_that_cannot_be_read(write, base, tmp_path):
    assert "did you mean 'base.yaml'?" in only_mistake(tmp_path / "bas.yaml")
    found = only_mistake(write("seed: 3\nbase: bsae.yaml\n"))
    assert f"{tmp_path}/recipe.yaml:2: base" in found
    assert "did you mean 'base.yaml'?" in found
    assert "Is a directory" in only_mistake(tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "must be a mapping of keys to values"),
        ("seed: [1\n", "must be plain YAML: while parsing a flow sequence at line 1"),
        ("seed: 1\nseed: 2\n", "found duplicate key seed at line 2"),
        ("seed: !!python/object/apply:os.system [echo]\n", "could not determine a constructor"),
        ("seed: !!python/name:os.system\n", "could not determine a constructor"),
        ("a: &a [*a]\n", "must be plain YAML: YAML recursive aliases"),
        ("seed: ${oops\n", "must be plain YAML"),
        ("base: 3\n", "base must be a path or a list of paths, got 3"),
        ("base: {a: b}\n", "base must be a path or a list of paths"),
    ],
)
def test_files_that_are_no_recipes(write, text, part):
    assert part in only_mistake(write(text))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    assert "must be UTF-8 text" in only_mistake(tmp_path / "latin.yaml")


def test_a_base_cannot_lead_back(write, tmp_path):
    write("base: b.yaml\n", "a.yaml")
    write("base: [c.yaml]\n", "b.yaml")
    write("seed: 1\nbase: a.yaml\n", "c.yaml")
    found = only_mistake(tmp_path / "a.yaml")
    assert found == (
        f"{tmp_path}/c.yaml:2: base must not lead back to its file, got "
        "a.yaml -> b.yaml -> c.yaml -> a.yaml"
    )


def test_values_of_an_unreadable_base_are_not_called_missing(write):
    found = mistakes(write("base: nowhere.yaml\nseed: -1\n"))
    assert len(found) == 2
    assert not any("is missing" in line for line in found)


# --- Resolved recipes --------------------------------------------------------------------------


def test_the_resolved_recipe_has_no_interpolations_and_no_base(write, base, monkeypatch):
    monkeypatch.setenv("CORPUS", "s3://bucket/x")
    recipe = load_recipe([write("base: base.yaml\ndata: {remote: '${oc.env:CORPUS}'}\n")])
    monkeypatch.delenv("CORPUS")
    text = recipe.to_yaml()
    assert "base" not in text
    assert "$" not in text
    assert load_recipe([write(text, "resolved.yaml")]) == recipe


_WORDS = st.text(st.characters(exclude_categories=("Cs",))).filter(lambda text: text != "???")
_VALUES = st.one_of(
    _WORDS,
    st.sampled_from(
        ["${x}", "\\${x}", "a\\\\${oc.env:HOME}", "null", "1e3", "yes", "012", "~", "\t"]
    ),
    st.text("\\${}a:"),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.tuples(_VALUES, _VALUES, _VALUES),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    batch=st.integers(1, 10**9),
    shuffle=st.booleans(),
    tags=st.lists(_VALUES, max_size=3),
)
def test_any_recipe_comes_back_equal_from_its_yaml(base, words, lr, batch, shuffle, tags):
    original = load_recipe([base])
    values = original.model_dump()
    values["data"].update(local=words[0], shuffle=shuffle)
    values["optimizer"]["adamw"]["lr"] = lr
    values.update(train_batch_size=batch, run_folder=words[1], load_path=words[2])
    values["callbacks"] = {"activation_monitor": {"ignore_module_types": tags}}
    recipe = Recipe.model_validate(values)
    path = base.parent / "resolved.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe([path]) == recipe


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    override=st.one_of(
        st.text(),
        st.builds(
            "{}={}".format,
            st.sampled_from(["seed", "model", "optimizer.adamw", "callbacks", "data.streams", "x"]),
            st.one_of(st.text(), st.text("[]{}:,-!&* a1.'\"${}\n")),
        ),
    )
)
def test_no_text_on_the_command_line_breaks_the_loader(base, override):
    try:
        load_recipe([base], [override])
    except RecipeError as error:
        places = {mistake.origin.source for mistake in error.mistakes if mistake.origin}
        if "command line" not in places:
            raise


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(), st.text("[]{}:,-!&*#|> ab1.'\"${}\n").map(str.encode)))
def test_no_file_breaks_the_loader(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe([path])

"""The recipes that we ship: each loads, builds, and has the numbers of its source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel

from composer_gpt2 import registry
from composer_gpt2.algorithms import ALiBi
from composer_gpt2.configs import get_config
from composer_gpt2.recipe import Recipe, load_recipe

YAMLS = Path(__file__).parents[1] / "yamls"
FILES = sorted(YAMLS.glob("**/*.yaml"))
NAMES = [file.stem for file in FILES]


@pytest.fixture(autouse=True)
def _remote(monkeypatch) -> None:
    monkeypatch.setenv("OPENWEBTEXT_REMOTE", "s3://bucket/openwebtext")
    monkeypatch.setenv("MIXTURE_REMOTE", "s3://bucket/mixture")
    for variable in ("CORPUS_REMOTE", "CORPUS_TOKENIZER"):
        monkeypatch.delenv(variable, raising=False)


def load(name: str) -> Recipe:
    return load_recipe([YAMLS / f"{name}.yaml"])


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_its_resolved_form_is_the_same(name, tmp_path):
    recipe = load(name)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe([tmp_path / "resolved.yaml"]) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_its_model_builds(name):
    """On the meta device, where even 13B parameters cost nothing."""
    recipe = load(name)
    config = get_config(recipe.model.name, **recipe.model.config_overrides)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    counts = re.findall(r"([\d,]{9,}) parameters", (YAMLS / f"{name}.yaml").read_text("utf-8"))
    for count in counts:
        assert model.num_parameters() == int(count.replace(",", ""))


@pytest.mark.parametrize("name", NAMES)
def test_its_parts_build(name):
    recipe = load(name)
    parameter = torch.nn.Parameter(torch.zeros(1))
    entry = registry.get("optimizers", recipe.optimizer_name)
    optimizer = entry.load()([parameter], **recipe.optimizer_arguments)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for kind in ("schedulers", "algorithms", "callbacks", "loggers"):
        for choice, arguments in getattr(recipe, kind).items():
            registry.get(kind, choice).load()(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_holds_only_what_differs_from_its_base(name):
    """A value that the base has already would be missed when the base changes."""
    written = yaml.safe_load((YAMLS / f"{name}.yaml").read_text("utf-8"))
    if "base" not in written:
        return
    base = load_recipe([YAMLS / written.pop("base")]).model_dump()

    def repeated(mine: dict, theirs: object, path: str) -> list[str]:
        found = []
        for key, value in mine.items():
            other = theirs.get(key) if isinstance(theirs, dict) else None
            if isinstance(value, dict):
                found += repeated(value, other, f"{path}{key}.")
            elif value is not None and value == other:
                found.append(f"{path}{key}")
        return found

    assert repeated(written, base, "") == []


@pytest.mark.parametrize("name", NAMES)
def test_learning_rates_are_written_to_be_read(name):
    """6.0e-4, not 0.0006 or 6e-4 (which YAML itself would take for text)."""
    for value in re.findall(
        r"\b(?:lr|eps): ([^,}\s]+)", (YAMLS / f"{name}.yaml").read_text("utf-8")
    ):
        assert re.fullmatch(r"\d\.\de-\d", value), value


# Composer's recipes of 2022: peak learning rate, sequences a batch, batches, warm-up in batches,
# billions of tokens.
COMPOSER = {
    "gpt2-52m": (1.5e-3, 512, 9000, 90, 4.72),
    "gpt2-83m": (1.0e-3, 512, 11000, 110, 5.77),
    "gpt2-125m": (6.0e-4, 512, 14000, 140, 7.34),
    "gpt2-350m": (3.0e-4, 512, 11000, 110, 5.77),
    "gpt2-760m": (2.5e-4, 512, 14000, 140, 7.34),
    "gpt2-1.3b": (2.0e-4, 1024, 7000, 140, 7.34),
    "gpt2-2.7b": (1.6e-4, 1024, 7000, 140, 7.34),
    "gpt2-6.7b": (1.2e-4, 2048, 3500, 140, 7.34),
    "gpt2-13b": (1.0e-4, 2048, 3500, 140, 7.34),
}
GPT3 = {
    "gpt3-125m": (6.0e-4, 256, 20000, 200, 10.49),
    "gpt3-350m": (3.0e-4, 256, 20000, 200, 10.49),
    "gpt3-760m": (2.5e-4, 256, 20000, 200, 10.49),
}
# OpenAI's shapes with the settings of the nearest size above.
OPENAI = {"gpt2-medium": "gpt2-350m", "gpt2-large": "gpt2-760m", "gpt2-xl": "gpt2-1.3b"}


@pytest.mark.parametrize("name", [*COMPOSER, *GPT3])
def test_the_numbers_of_the_table(name):
    lr, batch_size, n_batches, warmup, billions = {**COMPOSER, **GPT3}[name]
    recipe = load(name)
    is_gpt3 = name in GPT3
    assert recipe.model.name == name
    assert recipe.model.config_overrides == {}
    assert recipe.data.sequence_length == (2048 if is_gpt3 else 1024)
    assert recipe.train_batch_size == batch_size
    assert recipe.max_duration == f"{n_batches}ba"
    n_tokens = n_batches * batch_size * recipe.data.sequence_length
    assert recipe.train_tokens == n_tokens
    assert n_tokens / 1e9 == pytest.approx(billions, abs=0.005)
    assert recipe.optimizer == {
        "decoupled_adamw" if is_gpt3 else "adamw": {
            "lr": lr,
            "betas": [0.9, 0.95] if is_gpt3 else [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
        }
    }
    (schedule,) = recipe.schedulers.items()
    assert schedule[0] == "cosine_decay_with_warmup"
    assert schedule[1]["alpha_f"] == 0
    assert recipe.tokens(schedule[1]["t_warmup"]) == warmup * recipe.tokens_per_batch
    assert recipe.algorithms == {
        "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
        "skip_nonfinite": {"max_skipped": 10, "max_skipped_in_all": 100},
    }
    assert recipe.seed == 17
    config = get_config(name)
    dropout = 0.0 if is_gpt3 else 0.1
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (dropout,) * 3
    assert recipe.eval_interval == "1000ba"
    assert recipe.eval_batch_size is not None
    evaluated = recipe.eval_subset_num_batches * recipe.eval_batch_size * config.n_positions
    assert evaluated == 102_400_000


@pytest.mark.parametrize("name", OPENAI)
def test_openais_sizes_train_as_composers_of_that_size(name):
    recipe, nearest = load(name), load(OPENAI[name])
    assert recipe.model.name == name
    assert recipe.model_copy(update={"model": nearest.model}) == nearest


def test_the_large_recipes_need_their_corpus(monkeypatch):
    monkeypatch.delenv("OPENWEBTEXT_REMOTE")
    with pytest.raises(ValueError, match="environment variable OPENWEBTEXT_REMOTE"):
        load("gpt2-125m")
    assert load_recipe([YAMLS / "gpt2-125m.yaml"], ["data.remote=/here"]).data.remote == "/here"


@pytest.mark.parametrize("name", ["gpt2-tiny", "quickstart", "smoke"])
def test_the_small_recipes_run_on_any_machine(name, monkeypatch):
    recipe = load(name)
    assert recipe.device_train_microbatch_size is None  # auto would need a GPU
    assert recipe.data.remote == "runs/quickstart/corpus"
    monkeypatch.setenv("CORPUS_REMOTE", "s3://bucket/mine")
    assert load(name).data.remote == "s3://bucket/mine"


def test_smoke_gives_two_ranks_the_loss_of_one():
    """Nothing in it depends on the number of ranks: fp32, no dropout, a batch for two."""
    recipe = load("smoke")
    assert recipe.precision == "fp32"
    assert recipe.device == "cpu"
    assert recipe.model.config_overrides == {"dropout": 0.0}
    assert recipe.train_batch_size % 2 == 0
    assert recipe.train_tokens is not None
    assert recipe.train_tokens <= 20_000


SPEEDUPS = ("gpt2-52m", "gpt2-83m", "gpt2-125m")


@pytest.mark.parametrize("name", SPEEDUPS)
def test_a_speedup_recipe_differs_in_its_algorithms_only(name):
    speedup, plain = load(f"{name}-speedup"), load(name)
    added = set(speedup.algorithms) - set(plain.algorithms)
    assert added == {
        "alibi",
        "fused_cross_entropy",
        "fused_layernorm",
        "pad_vocabulary",
        "seq_length_warmup",
    }
    assert speedup.model_copy(update={"algorithms": plain.algorithms}) == plain


FAST = ("gpt2-52m", "gpt2-125m")


@pytest.mark.parametrize("name", FAST)
def test_a_fast_recipe_trains_the_same_without_dropout(name):
    plain = load(name)
    for kind, algorithms in {
        "fast": {"fused_block", "fused_cross_entropy"},
        "fast-gpu": {"fused_cross_entropy", "pad_vocabulary"},
    }.items():
        fast = load(f"{name}-{kind}")
        assert set(fast.algorithms) - set(plain.algorithms) == algorithms
        assert fast.model.config_overrides == {"dropout": 0.0}
        assert fast.compile is (kind == "fast-gpu")
        unchanged = ("algorithms", "model", "compile", "device_train_microbatch_size")
        same = {field: getattr(plain, field) for field in unchanged}
        assert fast.model_copy(update=same) == plain


GPT_STAR = {"gptstar-127m": (6, 1024, 128), "gptstar-303m": (8, 1536, 192)}


@pytest.mark.parametrize("name", GPT_STAR)
def test_gpt_star(name):
    n_layers, d_model, d_head = GPT_STAR[name]
    recipe = load(name)
    config = get_config(recipe.model.name)
    assert (config.n_layer, config.n_embd) == (n_layers, d_model)
    assert config.n_embd // config.n_head == d_head
    assert recipe.tokens_per_batch == 1024 * 512
    alibi = ALiBi(**recipe.algorithms["alibi"])
    assert alibi.sequence_length_after(recipe.data.sequence_length) == 512
    assert recipe.data.sequence_length == 1024  # of evaluation
    assert recipe.max_duration == "51000ba"
    of_size, always = {"alibi", "parallel_residual"}, {"gradient_clipping", "skip_nonfinite"}
    assert set(recipe.algorithms) == of_size | always
    assert recipe.optimizer_arguments["weight_decay"] == 0.1
    assert recipe.optimizer_arguments["betas"] == [0.9, 0.95]
    (schedule,) = recipe.schedulers.values()
    assert schedule == {"t_warmup": "4000ba", "t_decay": "45000ba", "alpha_f": 0.1}


def test_gpt_stars_mixture_sees_its_third_corpus_half_as_often():
    streams = load("gptstar-127m-mixture").data.streams
    assert [stream.repeat for stream in streams.values()] == [1, 1, 0.5, 1, 1]
    assert [stream.remote[-2:] for stream in streams.values()] == ["/1", "/2", "/3", "/4", "/5"]


def test_finetuning_begins_with_openais_weights_at_nanogpts_rate(monkeypatch):
    recipe = load("finetune")
    assert (recipe.model.name, recipe.model.pretrained) == ("gpt2", "openai-community/gpt2")
    assert (recipe.optimizer_arguments["lr"], recipe.schedulers) == (3e-5, {})
    assert (recipe.tokens_per_batch, recipe.max_duration) == (32_768, "20ba")
    monkeypatch.setenv("PRETRAINED", "openai-community/gpt2-medium")
    assert load("finetune").model.pretrained == "openai-community/gpt2-medium"


def test_every_recipe_is_looked_at():
    small = {"gpt2-tiny", "quickstart", "smoke", "finetune"}
    characters = {"characters", "characters-cpu", "characters-fast"}
    projects = {"adder", "sorter", *characters, "text8", "enwik8", "dialogue"}
    speedups = {f"{name}-speedup" for name in SPEEDUPS}
    fast = {f"{name}-{kind}" for name in FAST for kind in ("fast", "fast-gpu")}
    stars = {*GPT_STAR, "gptstar-127m-mixture"}
    assert set(NAMES) == {*COMPOSER, *GPT3, *OPENAI, *small, *projects, *speedups, *fast, *stars}

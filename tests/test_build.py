from __future__ import annotations

import json
import math

import pytest
import torch
from composer.core import Event
from torch import nn

from composer_gpt2 import build
from composer_gpt2.build import build_dataloader, build_model, build_trainer, parameter_groups
from composer_gpt2.model import GPT2Model
from composer_gpt2.plan import algorithm_order, derived_numbers, format_table
from composer_gpt2.recipe import RecipeError, load_recipe
from composer_gpt2.run_folder import write_metrics, write_run_folder

RECIPE = """
model: {name: gpt2-tiny, n_embd: 32, dropout: 0.0}
data: {sequence_length: 64}
train_batch_size: 4
max_duration: 10ba
optimizer:
  adamw: {lr: 1.0e-2, weight_decay: 0.1}
schedulers:
  cosine_decay_with_warmup: {t_warmup: 0.4dur, alpha_f: 0.1}
algorithms:
  gradient_clipping: {clipping_type: norm, clipping_threshold: 0.5}
precision: fp32
eval_interval: null
save_interval: null
run_name: test
"""


@pytest.fixture
def load(tmp_path, tiny_corpus):
    def load(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE)
        own = [f"data.remote={tiny_corpus}", f"run_folder={tmp_path / 'run'}"]
        return load_recipe([path], [*own, *overrides])

    return load


# Weight decay.


def groups_by_name(model, *args, **kwargs):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {names[parameter] for parameter in group["params"]}
        for group in parameter_groups(model, *args, **kwargs)
    ]


def test_biases_norms_and_embeddings_do_not_decay():
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32)
    decayed, undecayed = groups_by_name(model, 0.1, exclude=("bias", "norm", "embedding"))
    everything = {name for name, _ in model.named_parameters()}
    assert decayed | undecayed == everything
    assert not decayed & undecayed
    assert len(decayed) == 2 * 4  # the four matrices of each block
    assert all(name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) for name in decayed)


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ((), set()),
        (("norm",), {"weight", "bias"}),
        (("embedding",), {"wte.weight", "wpe.weight"}),
    ],
)
def test_what_does_not_decay_can_be_chosen(exclude, expected):
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32)
    groups = groups_by_name(model, 0.1, exclude=exclude)
    undecayed = groups[1] if len(groups) > 1 else set()
    assert all(name.endswith(tuple(expected)) for name in undecayed)
    assert bool(undecayed) == bool(expected)
    if exclude == ("norm",):
        assert len(undecayed) == 2 * (2 * 2) + 2
        assert all("ln_" in name for name in undecayed)


def test_no_weight_decay_is_one_group_and_frozen_parameters_are_none():
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32)
    assert len(groups_by_name(model, 0.0, exclude=("bias",))) == 1
    assert len(groups_by_name(model, None, exclude=("bias",))) == 2
    model.model.transformer.wpe.weight.requires_grad_(False)
    (only,) = groups_by_name(model, 0.0, exclude=())
    assert not any("wpe" in name for name in only)


def test_an_optimizers_own_decay_spares_the_norms_too(load):
    recipe = load("optimizer.adamw=null", "optimizer.adafactor.lr=1.0e-3")
    model = build_model(recipe, on_cpu=True)
    optimizer = build.build_optimizer(recipe, model)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [optimizer.defaults["weight_decay"], 0.0]


def test_adamw_is_fused_unless_told_otherwise(load):
    recipe = load()
    model = build_model(recipe, on_cpu=True)
    assert build.build_optimizer(recipe, model).defaults["fused"] is True
    recipe = load("optimizer.adamw.foreach=true")
    assert build.build_optimizer(recipe, model).defaults["fused"] is None


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_so_are_adam_and_sgd(load, name):
    recipe = load(f"optimizer={{adamw: null, {name}: {{lr: 1.0e-3}}}}")
    optimizer = build.build_optimizer(recipe, build_model(recipe, on_cpu=True))
    assert type(optimizer).__name__.lower() == name
    assert optimizer.defaults["fused"] is True


# The Trainer is what the recipe says.


def test_the_learning_rate_follows_the_schedule(load):
    trainer = build_trainer(load())
    seen = []

    class Watch(build.Callback):
        def run_event(self, event, state, logger):
            if event is Event.BATCH_START:
                seen.append(state.optimizers[0].param_groups[0]["lr"])

    trainer.state.callbacks.append(Watch())
    trainer.fit()
    warmup = [1e-2 * batch / 4 for batch in range(4)]
    decay = [1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * b / 6)) / 2) for b in range(6)]
    # Composer sets the rate before it counts the batch: every batch has its predecessor's.
    assert seen == pytest.approx([0.0, *warmup, *decay][:10], rel=1e-6)


def test_training_learns_and_evaluates_and_leaves_a_record(load, tmp_path, capfd):
    recipe = load("max_duration=40ba", "eval_interval=20ba", "log_interval=20ba")
    trainer = build_trainer(recipe)
    folder = write_run_folder(recipe, n_ranks=1, receipts=[])
    trainer.fit()
    write_metrics(recipe, trainer.state)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["batches"] == 40
    assert metrics["tokens"] == 40 * 4 * 64
    assert 0 < metrics["eval"]["LanguageCrossEntropy"] < 4  # from 10.8: ten words are all there is
    assert set(metrics["eval"]) == {"LanguageCrossEntropy", "LanguagePerplexity", "BitsPerByte"}
    said = capfd.readouterr().err
    assert [line.split(" (")[0] for line in said.splitlines() if line.startswith("batch")] == [
        "batch 1",
        "batch 20",
        "batch 40",
    ]
    assert said.count("evaluation at batch") == 2
    assert "tokens/s" in said
    # The resolved recipe repeats the run.
    again = load_recipe([folder / "recipe.yaml"])
    assert again == recipe
    assert json.loads((folder / "versions.json").read_text())["torch"] in torch.__version__


def test_the_same_recipe_gives_the_same_weights(load):
    def weights():
        trainer = build_trainer(load())
        trainer.fit()
        trainer.close()
        return dict(trainer.state.model.named_parameters())

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_are_accumulated_over_micro_batches(load):
    def trained(*overrides):
        trainer = build_trainer(load("max_duration=3ba", *overrides))
        trainer.fit()
        trainer.close()
        return nn.utils.parameters_to_vector(trainer.state.model.parameters())

    whole, halves = trained(), trained("device_train_microbatch_size=2")
    uneven = trained("device_train_microbatch_size=1")
    # Adam's first steps are of size lr whatever the gradient: rounding in it is amplified.
    torch.testing.assert_close(halves, whole, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(uneven, whole, atol=2e-5, rtol=1e-4)
    assert not torch.equal(halves, whole)


def test_clipping_is_applied(load):
    trainer = build_trainer(
        load("max_duration=3ba", "algorithms.gradient_clipping.clipping_threshold=1.0e-3")
    )
    norms = []

    class Watch(build.Callback):
        def run_event(self, event, state, logger):
            if event is Event.BATCH_END:
                gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
                norms.append(nn.utils.get_total_norm(gradients).item())

    trainer.state.callbacks.append(Watch())
    trainer.fit()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_a_stopped_run_resumes_to_the_same_weights(load, tmp_path):
    save = ["save_interval=5ba", f"save_folder={tmp_path}/checkpoints"]

    def train(*overrides):
        trainer = build_trainer(load(*overrides))
        trainer.fit()
        trainer.close()
        return dict(trainer.state.model.named_parameters())

    whole = train()
    # The schedule must not know that the run will stop: the same recipe, cut off by an exception.
    trainer = build_trainer(load(*save))

    class Stop(build.Callback):
        def run_event(self, event, state, logger):
            if event is Event.BATCH_END and state.timestamp.batch == 7:
                raise KeyboardInterrupt

    trainer.state.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.close()
    resumed = train(*save, "autoresume=true")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bf16_on_a_cpu_is_the_models_own_autocast(load):
    recipe = load("precision=amp_bf16", "max_duration=3ba")
    trainer = build_trainer(recipe)
    trainer.fit()
    assert trainer.state.model.cpu_precision == "amp_bf16"
    assert trainer.state.outputs.logits.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}


def test_batches_are_labelled_token_ids_of_a_split(load):
    recipe = load("data.shuffle=false")
    batch = next(iter(build_dataloader(recipe, "train").dataloader))
    assert batch["input_ids"].shape == (4, 64)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    validation = next(iter(build_dataloader(recipe, "validation").dataloader))
    assert not torch.equal(validation["input_ids"], batch["input_ids"])


def test_a_run_without_a_name_gets_one(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load("run_name=null", "run_folder=null")
    trainer = build_trainer(recipe)
    assert trainer.state.run_name.startswith("gpt2-tiny-")


# Mistakes that only this machine knows.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device_train_microbatch_size=auto"], "device_train_microbatch_size .*got 'auto'"),
        (["precision=amp_fp16"], "precision .*got 'amp_fp16'"),
        (["data.remote=/no/such/corpus"], "data: .*/no/such/corpus"),
        (["data.sequence_length=32"], "data: .*sequence_length"),
    ],
)
def test_what_cannot_run_here_is_refused(load, overrides, message):
    with pytest.raises(RecipeError, match=message):
        build_trainer(load("device=cpu", *overrides))


def test_batches_must_fit_the_ranks(load):
    check = build.check_for_this_machine
    with pytest.raises(RecipeError, match="2 mistakes") as caught:
        check(load(), n_ranks=3, on_cpu=True)
    assert "train_batch_size must be a multiple of the 3 ranks, got 4; try 3" in str(caught.value)
    assert "eval_batch_size must be a multiple" in str(caught.value)
    recipe = load("train_batch_size=12", "device_train_microbatch_size=4")
    check(recipe, n_ranks=1, on_cpu=True)
    with pytest.raises(RecipeError, match="must divide a rank's share of the batch, 12 / 2 = 6"):
        check(recipe, n_ranks=2, on_cpu=True)


def test_a_run_does_not_overwrite_another_of_its_name(load, tmp_path):
    save = ["save_interval=1ba", f"save_folder={tmp_path / 'checkpoints'}", "max_duration=3ba"]
    trainer = build_trainer(load(*save))
    trainer.fit()
    trainer.close()
    with pytest.raises(RecipeError, match=r"run_name must be new, but .*autoresume=true"):
        build_trainer(load(*save, "autoresume=false"))
    check = build.check_for_this_machine
    for way_on in ("autoresume=true", "save_overwrite=true", "run_name=other"):
        anew = [] if way_on == "autoresume=true" else ["autoresume=false"]
        other = ["save_folder=null"] if way_on == "run_name=other" else []
        check(load(*save, way_on, *anew, *other), n_ranks=1, on_cpu=True)


# What a run says before it starts.


def test_the_table_of_derived_numbers(monkeypatch):
    monkeypatch.setenv("OPENWEBTEXT_REMOTE", "s3://bucket/openwebtext")
    rows = derived_numbers(
        load_recipe(["yamls/gpt2-125m.yaml"]), n_ranks=8, n_parameters=124_439_808
    )
    assert rows["parameters"] == "124,439,808"
    assert rows["batch"] == "512 sequences x 1,024 = 524,288 tokens"
    assert rows["duration"] == "14,000 batches = 7,340,032,000 tokens, 59.0 a parameter"
    assert "loss 3.20, perplexity 24.64" in rows["compute-efficient"]
    table = format_table(rows).splitlines()
    assert len({line.index(value) for line, value in zip(table, rows.values(), strict=True)}) == 1


def test_algorithms_are_listed_in_the_order_in_which_they_run(load):
    recipe = load("algorithms.ema.half_life=10ba")
    order = algorithm_order(build_trainer(recipe))
    assert "GradientClipping" in order["at after_train_batch"]
    assert any("EMA" in names for names in order.values())

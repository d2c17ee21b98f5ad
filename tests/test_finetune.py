"""Runs that begin with trained weights, and go on from their own checkpoints."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_checkpoints import KillAfter, Killed, assert_equal
from test_importing import nanogpt

from composer_gpt2.algorithms import apply_alibi, apply_pad_vocabulary
from composer_gpt2.build import build_trainer
from composer_gpt2.contract import architecture
from composer_gpt2.model import GPT2Model
from composer_gpt2.recipe import RecipeError, load_recipe

RECIPE = """
model: {name: gpt2-tiny, n_embd: 32, n_positions: 64, dropout: 0.0}
data: {sequence_length: 64, validation_split: null}
train_batch_size: 2
max_duration: 4ba
optimizer: {adamw: {lr: 1.0e-2, weight_decay: 0.1}}
precision: fp32
save_interval: 2ba
run_name: test
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Hugging Face folder with weights unlike those at the start of training."""
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=64)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("pretrained") / "weights"
    model.model.save_pretrained(folder)
    return folder


@pytest.fixture
def load(tmp_path, tiny_corpus):
    def load(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE)
        own = [f"data.remote={tiny_corpus}", f"run_folder={tmp_path / 'run'}"]
        return load_recipe([path], [*own, *overrides])

    return load


@torch.no_grad()
def logits(model, tokens):
    return model.eval()({"input_ids": tokens}).logits[..., :50257]


def test_a_run_begins_with_the_weights_and_keeps_their_function(load, weights):
    recipe = load(
        f"model.pretrained={weights}",
        "model.dropout=0.1",
        "algorithms.pad_vocabulary={}",
        "algorithms.fused_gelu={}",
    )
    trainer = build_trainer(recipe)
    model, tokens = trainer.state.model, torch.randint(50257, (2, 64))
    expected = logits(GPT2Model.from_pretrained(weights), tokens)
    assert (logits(model, tokens) - expected).abs().max() < 1e-4
    assert model.model.config.attn_pdrop == 0.1
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    held = {p for group in trainer.state.optimizers[0].param_groups for p in group["params"]}
    assert held == trainable
    trainer.close()


def test_a_resumed_run_does_not_read_the_weights_again(load, weights, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(weights, source)
    recipe = load(f"model.pretrained={source}")

    def train(recipe, kill_after=None):
        trainer = build_trainer(recipe)
        if kill_after is None:
            trainer.fit()
        else:
            trainer.state.callbacks.append(KillAfter(kill_after))
            with pytest.raises(Killed):
                trainer.fit()
        trainer.close()
        return dict(trainer.state.model.named_parameters())

    whole = train(load(f"model.pretrained={source}", f"run_folder={tmp_path / 'whole'}"))
    train(recipe, kill_after=3)
    (source / "model.safetensors").unlink()  # its configuration is still there to be checked
    assert_equal(train(recipe), whole)
    # Another run must read them.
    with pytest.raises(RecipeError, match=r"model\.pretrained"):
        train(load(f"model.pretrained={source}", f"run_folder={tmp_path / 'another'}"))


@pytest.mark.parametrize("name", ["alibi", "parallel_residual"])
def test_an_algorithm_that_would_destroy_them_is_refused_unless_told(load, weights, name):
    chosen = (f"model.pretrained={weights}", f"algorithms.{name}={{}}")
    with pytest.raises(RecipeError, match=rf"algorithms\.{name}.*would destroy"):
        load(*chosen)
    # Also for weights that are not here yet.
    with pytest.raises(RecipeError, match="would destroy"):
        load("model.pretrained=openai-community/gpt2", chosen[1])
    trainer = build_trainer(load(*chosen, "model.allow_destructive_algorithms=true"))
    assert name in architecture(trainer.state.model.model)
    trainer.close()


def test_weights_with_an_algorithm_need_it(load, weights, tmp_path):
    model = GPT2Model.from_pretrained(weights)
    apply_pad_vocabulary(model)
    apply_alibi(model)
    model.model.save_pretrained(tmp_path / "alibi")
    own = f"model.pretrained={tmp_path / 'alibi'}"
    with pytest.raises(RecipeError, match="has alibi and computes nothing without"):
        load(own, "algorithms.pad_vocabulary={}")
    trainer = build_trainer(load(own, "algorithms.alibi={}", "algorithms.pad_vocabulary={}"))
    tokens = torch.randint(50257, (2, 64))
    expected = logits(model, tokens)
    assert (logits(trainer.state.model, tokens) - expected).abs().max() < 1e-4
    trainer.close()


def test_what_does_not_fit_is_said_with_the_recipe(load, weights, tmp_path):
    with pytest.raises(RecipeError) as raised:
        load(f"model.pretrained={weights}", "model.n_layer=3", "model.n_positions=128")
    assert "model.n_layer" in str(raised.value)
    assert "must be that of model.pretrained, 64, got 128" in str(raised.value)
    for overrides, problem in (
        (["model.pretrained=runs/no/such"], "does not exist"),
        (["model.allow_destructive_algorithms=true"], "has no effect without model.pretrained"),
        ([f"model.pretrained={weights}", "load_path=x.pt"], "must not stand beside"),
        (["model.pretrained=5"], "must be text"),
    ):
        with pytest.raises(RecipeError, match=problem):
            load(*overrides)


def test_a_checkpoint_without_its_configuration_is_refused(load, tmp_path):
    torch.save({"state": {"model": {}, "integrations": {}}}, tmp_path / "other.pt")
    with pytest.raises(RecipeError, match=r"saved of a GPT2Model, got .*other\.pt without"):
        load(f"model.pretrained={tmp_path / 'other.pt'}")


def test_nanogpts_weights_are_finetuned(load, tmp_path):
    network = nanogpt(tmp_path / "ckpt.pt")
    shape = ["model.n_embd=48", "model.n_head=3", "model.n_positions=32", "data.sequence_length=32"]
    own = [f"model.pretrained={tmp_path / 'ckpt.pt'}", *shape]
    with pytest.raises(RecipeError, match=r"activation_function.*'gelu', got 'gelu_new'"):
        load(*own)
    recipe = load(*own, "model.activation_function=gelu", "data.check_tokenizer=false")
    from composer_gpt2.build import build_model

    model, tokens = build_model(recipe, on_cpu=True, pretrained=True), torch.randint(50257, (2, 32))
    expected = network(tokens)[..., :50257]
    assert (logits(model, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()

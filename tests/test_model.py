from __future__ import annotations

import math
import socket

import pytest
import torch
from composer import Trainer
from torch.utils.data import DataLoader
from torchmetrics import Metric
from transformers import GPT2Config, GPT2LMHeadModel

import composer_gpt2
from composer_gpt2 import GPT2Model
from composer_gpt2.checkpoints import CheckpointError
from composer_gpt2.configs import get_config
from composer_gpt2.metrics import BitsPerByte
from composer_gpt2.tokenizer import get_encoding, token_byte_lengths

SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}


def make_batch(B=3, T=16, vocab_size=50257):
    tokens = torch.randint(vocab_size, (B, T))
    return {"input_ids": tokens, "labels": tokens}


def make_loader(batch):
    """A loader whose every epoch is this one batch."""
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    return DataLoader(rows, batch_size=len(rows))  # type: ignore[arg-type]


def make_trainer(model, batch, **kwargs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Trainer(
        model=model,
        train_dataloader=make_loader(batch),
        optimizers=optimizer,
        precision="fp32",
        progress_bar=False,
        **{"max_duration": "2ba", **kwargs},
    )


@pytest.fixture
def model():
    return GPT2Model.from_name("gpt2-tiny", dropout=0.0, **SMALL)


# The function: it is GPT-2's and nobody else's.


def test_logits_are_bitwise_hugging_faces_and_the_loss_is_theirs(model):
    batch = make_batch()
    outputs = model(batch)
    theirs = model.model(input_ids=batch["input_ids"], labels=batch["labels"])
    assert outputs.logits.shape == (3, 16, 50257)
    assert torch.equal(outputs.logits, theirs.logits)
    assert model.loss(outputs, batch).item() == pytest.approx(theirs.loss.item(), abs=1e-6)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    batch = make_batch()
    outputs = model(batch)
    log_probabilities = outputs.logits.double().log_softmax(-1)
    targets = batch["input_ids"][:, 1:, None]
    naive = -log_probabilities[:, :-1].gather(-1, targets).mean()
    assert model.loss(outputs, batch).item() == pytest.approx(naive.item(), abs=1e-5)


def test_initialisation_is_gpt2s():
    config = get_config("gpt2-tiny", n_layer=6, n_embd=256, n_head=4)
    parameters = dict(GPT2Model(config=config).model.named_parameters())
    scaled = 0.02 / math.sqrt(2 * config.n_layer)
    n_checked = 0
    for name, weight in parameters.items():
        if name.endswith("c_proj.weight"):  # residual projections: attention's and the MLP's
            expected = scaled
        elif name.endswith((".weight",)) and "ln_" not in name:
            expected = 0.02
        else:
            value = 1.0 if name.endswith("weight") else 0.0
            assert torch.equal(weight, torch.full_like(weight, value)), name
            n_checked += 1
            continue
        # The standard error of a standard deviation over n values is s / sqrt(2 n): five of them.
        tolerance = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=tolerance), name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name
        n_checked += 1
    assert n_checked == len(parameters) == 2 + 6 * 12 + 2
    model = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_no_mask_reaches_attention_when_every_token_is_real(model, monkeypatch):
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    batch = make_batch()
    plain = model(batch).logits
    assert seen == [(True, True)] * 2
    ones = torch.ones_like(batch["input_ids"])
    assert torch.equal(model({**batch, "attention_mask": ones}).logits, plain)
    assert seen == [(True, True)] * 4
    assert not torch.equal(model({**batch, "attention_mask": ones.tril(12)}).logits, plain)
    assert (False, False) in seen


# Precision.


def test_amp_bf16_works_on_a_cpu():
    config = get_config("gpt2-tiny", dropout=0.0, **SMALL)
    module = GPT2LMHeadModel(config)
    full, mixed = GPT2Model(module), GPT2Model(module, cpu_precision="amp_bf16")
    batch = make_batch()
    reference, outputs = full(batch), mixed(batch)
    assert reference.logits.dtype == torch.float32
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    # bfloat16 has 8 bits: 1/256 relative on logits of about 0.1 moves a loss of 10.8 by less.
    assert outputs.loss.item() == pytest.approx(reference.loss.item(), abs=1e-2)
    outputs.loss.backward()
    assert module.transformer.wte.weight.grad.dtype == torch.float32
    assert mixed.generate(batch["input_ids"], max_new_tokens=2).shape == (3, 18)


def test_precision_is_checked():
    with pytest.raises(ValueError, match="cpu_precision must be 'fp32' or 'amp_bf16', got 'bf16'"):
        GPT2Model.from_name("gpt2-tiny", cpu_precision="bf16")  # type: ignore[arg-type]


# Metrics.


def test_metrics_equal_what_the_logits_say(model):
    first, second = make_batch(3), make_batch(5)
    second["labels"] = second["labels"].clone()
    second["labels"][:, 4:9] = -100
    metrics = model.get_metrics(is_train=False)
    assert list(metrics) == ["LanguageCrossEntropy", "LanguagePerplexity", "BitsPerByte"]
    assert list(model.get_metrics(is_train=True)) == list(metrics)
    nats, n_bytes, n_targets = 0.0, 0, 0
    model.eval()
    for batch in (first, second):
        outputs = model.eval_forward(batch)
        for metric in metrics.values():
            model.update_metric(batch, outputs, metric)
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        nats += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        real = targets[targets != -100]
        n_bytes += token_byte_lengths()[real.numpy()].sum()
        n_targets += len(real)
    assert n_targets == 3 * 15 + 5 * 10
    values = {name: metric.compute().item() for name, metric in metrics.items()}
    assert values["LanguageCrossEntropy"] == pytest.approx(nats / n_targets, rel=1e-6)
    assert values["LanguagePerplexity"] == pytest.approx(math.exp(nats / n_targets), rel=1e-5)
    assert values["BitsPerByte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_text():
    tokens = torch.tensor([get_encoding().encode_ordinary("x Stra\u00dfe \U0001f600 end")])
    metric = BitsPerByte()
    metric.update(torch.tensor(math.log(2)), tokens)  # one bit a token
    n_bytes = len(" Stra\u00dfe \U0001f600 end".encode())  # "x" is no target
    assert metric.compute().item() == pytest.approx((tokens.shape[1] - 1) / n_bytes)


def test_a_batch_without_targets_adds_nothing(model):
    metric = model.get_metrics(is_train=False)["LanguageCrossEntropy"]
    metric.update(torch.tensor(2.0), torch.ones(1, 4, dtype=torch.long))
    metric.update(torch.tensor(math.nan), torch.full((1, 4), -100))
    assert metric.compute().item() == 2.0


def test_other_metrics_get_logits_and_shifted_labels(model):
    seen = []

    class Recorder(Metric):
        def update(self, logits, targets):
            seen.append((logits.shape, targets))

        def compute(self):
            return torch.tensor(0.0)

    batch = make_batch()
    model.update_metric(batch, model.eval_forward(batch), Recorder())
    (shape, targets), *_ = seen
    assert shape == (3, 15, 50257)
    assert torch.equal(targets, batch["labels"][:, 1:])


# Under Composer's Trainer.


def test_training_lowers_the_loss_and_reports_the_metrics(model):
    batch = make_batch()
    trainer = make_trainer(
        model, batch, max_duration="20ba", eval_dataloader=make_loader(batch), eval_interval="20ba"
    )
    before = model(batch).loss.item()
    trainer.fit()
    train = trainer.state.train_metric_values
    assert model(batch).loss.item() < before - 1
    assert set(train) == {"LanguageCrossEntropy", "LanguagePerplexity", "BitsPerByte"}
    evaluated = trainer.state.eval_metric_values["LanguageCrossEntropy"]
    assert float(evaluated) == pytest.approx(model(batch).loss.item(), rel=1e-5)


def test_a_composer_checkpoint_gives_the_same_model(model, tmp_path):
    trainer = make_trainer(model, make_batch(), save_folder=str(tmp_path), save_interval="1ba")
    trainer.fit()
    loaded = GPT2Model.from_pretrained(tmp_path / "latest-rank0.pt")
    batch = make_batch()
    assert not loaded.training
    assert torch.equal(loaded(batch).logits, model.eval()(batch).logits)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert loaded.config.to_dict() == model.config.to_dict()


# Construction.


def test_as_in_the_model_card():
    config = get_config("gpt2-tiny")
    module = GPT2LMHeadModel(config)
    model = GPT2Model(module=module, config=config, tokenizer_name="gpt2")
    assert model.model is module
    assert model.tokenizer is not None
    assert isinstance(model, composer_gpt2.GPT2Model)
    assert len(model.tokenizer) == 50257


def test_a_configuration_that_is_not_the_modules_is_refused():
    module = GPT2LMHeadModel(get_config("gpt2-tiny", **SMALL))
    with pytest.raises(ValueError, match=r"config must describe module, .* n_layer"):
        GPT2Model(module=module, config=get_config("gpt2-tiny", **{**SMALL, "n_layer": 3}))


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused():
    config = GPT2Config(vocab_size=100, **SMALL)
    with pytest.raises(ValueError, match="at least the tokenizer's 50257 tokens, got 100"):
        GPT2Model(config=config)
    model = GPT2Model(config=config, tokenizer_name=None)
    assert list(model.get_metrics(is_train=True)) == ["LanguageCrossEntropy", "LanguagePerplexity"]


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"a tokenizer must be 'gpt2' or a folder.*got 'gpt-2'"):
        GPT2Model.from_name("gpt2-tiny", tokenizer_name="gpt-2", **SMALL)


def test_a_hugging_face_folder_gives_the_same_model_without_network(model, tmp_path, monkeypatch):
    model.model.save_pretrained(tmp_path / "hf")
    model.tokenizer.save_pretrained(tmp_path / "hf")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    batch = make_batch()
    expected = model.eval()(batch).logits
    for tokenizer_name in ("gpt2", str(tmp_path / "hf"), None):
        loaded = GPT2Model.from_pretrained(tmp_path / "hf", tokenizer_name=tokenizer_name)
        assert torch.equal(loaded(batch).logits, expected)


@pytest.mark.parametrize("path", ["runs/a/checkpoint.pt", "./nothing", "/no/such", "a/b/c", "x.pt"])
def test_a_path_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
        GPT2Model.from_pretrained(path)


def test_a_path_that_looks_like_a_hub_id_is_named():
    with pytest.raises(FileNotFoundError, match="'owner/nothere' must be a file or folder here"):
        GPT2Model.from_pretrained("owner/nothere")


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="'runs/nowhere', which does not exist"):
        GPT2Model.from_pretrained("runs/nowhere")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt must be a checkpoint of Composer"):
        GPT2Model.from_pretrained(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"torch\.save wrote, got .*text\.pt"):
        GPT2Model.from_pretrained(tmp_path / "text.pt")


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="must hold a GPT-2, got model_type 'bert'"):
        GPT2Model.from_pretrained(tmp_path)

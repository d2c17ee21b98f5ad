"""Weights of nanoGPT, minGPT, OpenAI and Hugging Face: the same logits in GPT2Model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from composer_gpt2.checkpoints import CheckpointError
from composer_gpt2.export import export_model
from composer_gpt2.model import GPT2Model

# A network of our own in the layout of those two: nn.Linear, and names that are OpenAI's.


class Norm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width: int, n_heads: int, length: int, bias: bool, buffer: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.n_heads = n_heads
        if buffer:
            self.register_buffer("bias", torch.ones(1, 1, length, length).tril())

    def forward(self, x):
        B, T, E = x.shape
        q, k, v = (
            part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in self.c_attn(x).split(E, 2)
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, E))


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool, tanh: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.approximate = "tanh" if tanh else "none"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, width, n_heads, length, bias, buffer, tanh) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = Norm(width, bias), Norm(width, bias)
        self.attn = Attention(width, n_heads, length, bias, buffer)
        self.mlp = MLP(width, bias, tanh)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Foreign(nn.Module):
    def __init__(
        self, vocabulary, width, n_heads, n_layers, length, *, bias=True, tied=True, mingpt=False
    ) -> None:
        super().__init__()
        blocks = [Block(width, n_heads, length, bias, mingpt, mingpt) for _ in range(n_layers)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(length, width),
                "h": nn.ModuleList(blocks),
                "ln_f": Norm(width, bias),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, 0.3)

    def forward(self, tokens):
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


def nanogpt(path, *, vocabulary=50304, bias=True, compiled=True, **model_args):
    """A file as nanoGPT's train.py writes it, and its network."""
    network = Foreign(vocabulary, 48, 3, 2, 32, bias=bias)
    prefix = "_orig_mod." if compiled else ""
    arguments = dict(
        n_layer=2, n_head=3, n_embd=48, block_size=32, bias=bias, vocab_size=vocabulary, dropout=0.2
    )
    optimizer = torch.optim.AdamW(network.parameters())
    checkpoint = {
        "model": {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": arguments | model_args,
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "compile": compiled, "learning_rate": 6e-4},
    }
    torch.save(checkpoint, path)
    return network


def mingpt(path, *, width=48, n_heads=3, n_layers=3, vocabulary=50257):
    """A file as minGPT's users write it, and its network."""
    network = Foreign(vocabulary, width, n_heads, n_layers, 32, tied=False, mingpt=True)
    torch.save(network.state_dict(), path)
    return network


@torch.no_grad()
def assert_same_logits(model, network, *, vocabulary=50257):
    tokens = torch.randint(vocabulary, (2, 32))
    ours, theirs = model({"input_ids": tokens}).logits, network(tokens)[..., :vocabulary]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint(bias, tmp_path):
    network = nanogpt(tmp_path / "ckpt.pt", bias=bias, compiled=bias)
    model = GPT2Model.from_pretrained(tmp_path / "ckpt.pt")
    assert_same_logits(model, network)
    config = model.model.config
    assert config.activation_function == "gelu"  # with the tanh of GPT-2's it would be 1e-3 off
    assert config.vocab_size == 50257
    assert (config.attn_pdrop, config.n_positions) == (0.2, 32)
    assert not model.training


def test_nanogpts_small_vocabulary_stays(tmp_path):
    network = nanogpt(tmp_path / "ckpt.pt", vocabulary=65)
    with pytest.raises(ValueError, match="tokenizer_name=None"):
        GPT2Model.from_pretrained(tmp_path / "ckpt.pt")
    model = GPT2Model.from_pretrained(tmp_path / "ckpt.pt", tokenizer_name=None)
    assert_same_logits(model, network, vocabulary=65)
    assert model.model.config.eos_token_id is None


def test_mingpts_state_dict(tmp_path):
    network = mingpt(tmp_path / "nano.pt")  # 3 layers of width 48: gpt-nano, which has 3 heads
    model = GPT2Model.from_pretrained(tmp_path / "nano.pt")
    assert_same_logits(model, network)
    assert model.model.config.n_head == 3
    assert not model.model.config.tie_word_embeddings


def test_heads_that_nobody_says_are_asked_for(tmp_path):
    path = tmp_path / "own.pt"
    network = mingpt(path, width=40, n_heads=5, n_layers=2)
    with pytest.raises(ValueError, match=r"2 layers of width 40.*--heads"):
        GPT2Model.from_pretrained(path)
    with pytest.raises(ValueError, match="must divide the width"):
        GPT2Model.from_pretrained(path, n_head=3)
    assert_same_logits(GPT2Model.from_pretrained(path, n_head=5), network)
    exported = export_model(str(path), tmp_path / "out", n_head=5)
    assert exported.difference < 1e-4
    assert_same_logits(GPT2Model.from_pretrained(tmp_path / "out"), network)


def test_a_file_that_says_its_heads_is_not_overruled(tmp_path):
    nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="must be 3, as it says, got 6"):
        GPT2Model.from_pretrained(tmp_path / "ckpt.pt", n_head=6)


def test_what_is_no_gpt2_is_named(tmp_path):
    path = tmp_path / "ckpt.pt"
    network = mingpt(path)
    state = network.state_dict()
    for change, problem in (
        ({"transformer.h.0.attn.rotary": torch.ones(2)}, "has the unknown transformer.h.0.attn"),
        ({"transformer.ln_f.weight": None}, "lacks transformer.ln_f.weight"),
        (
            {"transformer.h.1.mlp.c_fc.weight": torch.ones(7, 48)},
            r"of shape \(48, 7\)|of shape \(7",
        ),
        ({"transformer.wte.weight": None}, "nanoGPT's"),
    ):
        changed = {name: t for name, t in {**state, **change}.items() if t is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=problem):
            GPT2Model.from_pretrained(path)


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_no_code_is_run(tmp_path, capsys):
    torch.save({"model": {"a": Harm()}, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="print"):
        GPT2Model.from_pretrained(tmp_path / "ckpt.pt")
    folder = tmp_path / "folder"
    network = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2))
    network.config.save_pretrained(folder)
    torch.save(network.state_dict() | {"transformer.harm": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="must hold tensors and plain values only"):
        GPT2Model.from_pretrained(folder)
    assert "harm" not in capsys.readouterr().out


def test_openais_own_layout_and_pytorch_files(tmp_path):
    network = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    tokens = torch.randint(50257, (2, 32))
    expected = network(tokens).logits
    body = network.transformer.state_dict()
    mask = torch.ones(1, 1, 32, 32).tril()
    openai = {**body, **{f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}}
    for name in ("openai", "bin"):
        folder = tmp_path / name
        network.config.save_pretrained(folder)
        if name == "openai":
            save_file(openai, folder / "model.safetensors", {"format": "pt"})
        else:
            torch.save(network.state_dict(), folder / "pytorch_model.bin")
        model = GPT2Model.from_pretrained(folder)
        assert torch.equal(model({"input_ids": tokens}).logits, expected)
    # The same state dicts as single files, the first in the format of 2019.
    state = network.state_dict()
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=False)
    model = GPT2Model.from_pretrained(tmp_path / "state.pt", n_head=2)
    assert torch.equal(model({"input_ids": tokens}).logits, expected)
    torch.save(openai, tmp_path / "openai.pt")
    model = GPT2Model.from_pretrained(tmp_path / "openai.pt", n_head=2)
    assert torch.equal(model({"input_ids": tokens}).logits, expected)

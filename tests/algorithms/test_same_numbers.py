"""The fast paths on a CPU train to the losses of Hugging Face's GPT-2, step for step.

The reference is transformers' network with torch's AdamW, one parameter at a time. A fast path is
the network after our algorithms, with AdamW's fused kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from settings import ALGORITHMS, runs_here
from transformers import GPT2Config, GPT2LMHeadModel

from algorithms.fused_block import apply_fused_block
from algorithms.fused_cross_entropy import apply_fused_cross_entropy, fused_cross_entropy
from algorithms.fused_gelu import apply_fused_gelu

N_STEPS = 20
SEEDS = range(16)
V, B, T = 251, 4, 48

Apply = Callable[[GPT2LMHeadModel], object]
PATHS: dict[str, Sequence[Apply]] = {
    "with kernels": (apply_fused_block, apply_fused_cross_entropy),
    "without AVX512-BF16": (apply_fused_gelu, apply_fused_cross_entropy),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> Sequence[Apply]:
    if request.param == "without AVX512-BF16":
        monkeypatch.setattr(fused_cross_entropy, "_has_kernel", lambda device: False)
    elif not runs_here(ALGORITHMS["fused_block"]):
        pytest.skip("needs a CPU with AVX512-BF16 and a C++ compiler")
    return PATHS[request.param]


def losses(precision: str, path: Sequence[Apply] = (), seed: int = 0) -> torch.Tensor:
    """Of each step, on four batches that are the same for a seed; all is trained."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=3, n_embd=64, n_head=2, n_positions=T, vocab_size=V)
    dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout)).train()
    model.loss_type = "ForCausalLM"
    for apply in path:
        apply(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, eps=1e-6, weight_decay=0.1,
        fused=True if path else None, foreach=None if path else False,
    )  # fmt: skip
    batches = torch.randint(V, (4, B, T), generator=torch.Generator().manual_seed(seed))
    found = []
    for number in range(N_STEPS):
        ids = batches[number % 4]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@functools.cache
def reference(precision: str, seed: int) -> torch.Tensor:
    return losses(precision, seed=seed)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_in_float32_each_loss_is_the_references(path, seed):
    ours, theirs = losses("fp32", path, seed), reference("fp32", seed)
    assert ours.shape == theirs.shape == (N_STEPS,)
    assert theirs[-1] < 0.9 * theirs[0]  # it does learn
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_in_bfloat16_losses_are_as_near_float32_as_plain_autocasts(path):
    """Mean over steps and seeds; single losses scatter with their roundings.

    One run's distance scatters by 40% of the mean, so that the ratio of two means of 16 has a
    standard deviation of 0.4 x sqrt(2 / 16) = 0.14 and the margin is three and a half of these.
    """
    ours, theirs = (
        torch.stack([get(seed) - reference("fp32", seed) for seed in SEEDS]).abs()
        for get in (
            lambda seed: losses("amp_bf16", path, seed),
            lambda seed: reference("amp_bf16", seed),
        )
    )
    assert 0 < theirs.mean() < 0.02  # nats; else there is nothing to compare
    assert ours.mean() <= 1.5 * theirs.mean(), (ours.mean(), theirs.mean())

"""The CPU's kernels against the formulas in float64, and how they come to be compiled.

bfloat16 results are judged by what torch's own operations in bfloat16 are off: a kernel rounds no
more often than they, but at other places, so that twice their error covers the scatter of small
tensors. float32 results may differ by sums in another order: 1e-5 of their norm.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from composer_gpt2 import cpu_kernels as kernels
from composer_gpt2.cpu_kernels import KernelsUnavailableError, kernel_library, library

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-5
NAN, INF = math.nan, math.inf

compilers_here = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
runs_here = "avx512_bf16" in library._cpu_features() and any(map(shutil.which, compilers_here))
needs_kernels = pytest.mark.skipif(
    not runs_here, reason="needs a CPU with AVX512-BF16 and a C++ compiler"
)
each_type = pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
each_width = pytest.mark.parametrize("width", [16, 48, 768])
each_number_of_rows = pytest.mark.parametrize("rows", [1, 7, 65])


@pytest.fixture
def two_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


def distance(ours: Tensor, true: Tensor) -> float:
    assert ours.shape == true.shape
    return float((ours.double() - true.double()).norm() / true.double().norm())


def assert_near(
    ours: Sequence[Tensor], true: Sequence[Tensor], plain: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """As near float64 as torch's way in this type; for float32, within sums in another order."""
    for mine, right, theirs in zip(ours, true, plain, strict=True):
        bound = 1e-5 if dtype is FP32 else 2 * distance(theirs, right) + 1e-5
        assert distance(mine, right) <= bound


def differentiate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The values and the gradients of all inputs, computed in a type."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    return [output.detach(), *gradients]


def run_with_threads(n_threads: int, function: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        return list(function())
    finally:
        torch.set_num_threads(before)


# --- Attention -----------------------------------------------------------------------------------


def naive_attention(qkv: Tensor, scale: float, slopes: Tensor | None) -> Tensor:
    """The formula, (B, T, 3, H, K) to (B, T, H, K)."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, K) each
    scores = (query @ key.transpose(-1, -2)) * scale
    numbers = torch.arange(qkv.shape[1])
    distances = numbers[:, None] - numbers
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distances
    weights = scores.masked_fill(distances < 0, -INF).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


def attend(qkv: Tensor, upstream: Tensor, scale: float, slopes: Tensor | None) -> list[Tensor]:
    output, log_sums = kernels.attention(qkv, scale, slopes)
    gradient = kernels.attention_backward(qkv, output, log_sums, upstream, scale, slopes)
    return [output, gradient]


@needs_kernels
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize(
    ("T", "K"),
    # Around the 48 and 256 queries and the 64 keys that the kernels take at a time, and odd ones.
    [(1, 16), (2, 64), (17, 48), (48, 16), (49, 80), (64, 64), (65, 16), (256, 64), (257, 16),
     (301, 128)],
)  # fmt: skip
def test_attention_and_its_gradient(T, K, biased):
    B, H = 2, 3
    qkv, upstream = torch.randn(B, T, 3, H, K).to(BF16), torch.randn(B, T, H, K).to(BF16)
    slopes = torch.tensor([0.5, 0.0625, 0.0039]) if biased else None
    scale = K**-0.5

    def naive(x: Tensor) -> Tensor:
        return naive_attention(x, scale, slopes)

    true = differentiate(naive, [qkv], upstream, torch.float64)
    plain = differentiate(naive, [qkv], upstream, BF16)
    ours = attend(qkv, upstream, scale, slopes)
    assert [tensor.dtype for tensor in ours] == [BF16, BF16]
    assert_near(ours, true, plain, BF16)
    # Each of queries, keys and values for itself: the values' gradient is the largest. With one
    # token the first two are 0, for its weight is 1 whatever the scores.
    for part in range(3):
        mine, right, theirs = (tensor[:, :, part] for tensor in (ours[1], true[1], plain[1]))
        if T == 1 and part < 2:
            assert mine.abs().max() <= 0.02  # a rounding of sums of K products
        else:
            assert_near([mine], [right], [theirs], BF16)


@needs_kernels
def test_attentions_softmax_has_the_denominator_that_it_says():
    qkv, scale = torch.randn(1, 70, 3, 2, 16).to(BF16), 0.3
    _, log_sums = kernels.attention(qkv, scale)
    query, key, _ = qkv.double().permute(2, 0, 3, 1, 4)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(
        torch.ones(70, 70, dtype=torch.bool).triu(1), -INF
    )
    torch.testing.assert_close(
        log_sums.double(), scores.logsumexp(-1) / math.log(2), rtol=1e-5, atol=1e-5
    )


@needs_kernels
def test_attention_sees_nothing_of_later_tokens():
    qkv, T = torch.randn(1, 130, 3, 2, 32).to(BF16), 130
    before, _ = kernels.attention(qkv, 0.2)
    for first in (1, 47, 48, 100, T - 1):
        changed = qkv.clone()
        changed[:, first:] = 9 * torch.randn_like(changed[:, first:])
        after, _ = kernels.attention(changed, 0.2)
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])


@needs_kernels
def test_attention_with_scores_far_apart_and_far_from_zero():
    """Where an exponential would overflow and most weights are exactly 0."""
    qkv, upstream = 30 * torch.randn(1, 60, 3, 2, 16), torch.randn(1, 60, 2, 16).to(BF16)
    qkv = qkv.to(BF16)
    output, _ = attend(qkv, upstream, 1.0, None)
    assert output.isfinite().all()
    assert distance(output, naive_attention(qkv.double(), 1.0, None)) <= 0.01  # 8 bits
    slopes = torch.tensor([0.0, 100.0])  # the second head sees the token itself alone
    output, gradient = attend(qkv / 30, upstream, 0.1, slopes)
    assert gradient.isfinite().all()
    assert torch.equal(output[:, :, 1], (qkv / 30)[:, :, 2, 1])


@needs_kernels
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("token", [0, 21, 63, 69])
def test_attention_hides_no_number_that_is_none(value, part, token):
    qkv, upstream = torch.randn(1, 70, 3, 2, 16).to(BF16), torch.randn(1, 70, 2, 16).to(BF16)
    clean, _ = kernels.attention(qkv, 0.25)
    qkv[0, token, part, 1, 3] = value
    output, gradient = attend(qkv, upstream, 0.25, None)
    if part == 2:
        assert not output[0, token:, 1, 3].isfinite().any()
    else:  # where a score is -inf, a weight is 0, as it should be
        right = naive_attention(qkv.double(), 0.25, None)
        assert not output[~right.isfinite()].isfinite().any()
        assert output[0, token:, 1].isnan().any() or not math.isnan(value)
    assert not gradient[0, :, :, 1].isfinite().all()
    # The other head knows nothing of it.
    assert torch.equal(output[:, :, 0], clean[:, :, 0])
    assert gradient[0, :, :, 0].isfinite().all()
    upstream[0, token, 0, 5] = NAN
    _, gradient = attend(torch.where(qkv.isfinite(), qkv, 0), upstream, 0.25, None)
    assert gradient[0, :, :, 0].isnan().any()


# --- Addition with LayerNorm ---------------------------------------------------------------------


def add_and_normalize(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + y, weight.shape, weight, bias, EPS)


def norm_inputs(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Far from zero mean, where a variance by squares would cancel."""
    return {
        "x": 3 + 2 * torch.randn(rows, width),
        "y": torch.randn(rows, width).to(dtype),
        "weight": 1 + 0.1 * torch.randn(width),
        "bias": torch.randn(width),
        "grad_norm": torch.randn(rows, width).to(dtype),
        "grad_stream": torch.randn(rows, width),
    }


@needs_kernels
@each_type
@each_width
@each_number_of_rows
@pytest.mark.parametrize("added", [True, False], ids=["sum", "alone"])
def test_addition_with_layer_norm_and_its_gradient(rows, width, dtype, added):
    given = norm_inputs(rows, width, dtype)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    y = given["y"] if added else None
    addend = given["y"] if added else torch.zeros_like(given["y"])
    inputs = [x, addend, weight, bias]
    output, total = kernels.add_layer_norm(x, y, weight, bias, EPS, dtype, return_sum=True)
    results = kernels.add_layer_norm_backward(
        x, y, weight, EPS, given["grad_norm"], given["grad_stream"], for_projection=True
    )
    gradient, rounded, grad_weight, grad_bias, row_sum = results
    assert output.dtype == rounded.dtype == dtype
    torch.testing.assert_close(total, x + addend.float(), rtol=0, atol=0)
    assert torch.equal(rounded, gradient.to(dtype))
    assert distance(row_sum, gradient.double().sum(0)) <= 1e-5

    true = differentiate(add_and_normalize, inputs, given["grad_norm"], torch.float64)
    true[1] = true[1] + given["grad_stream"]
    plain = differentiate(  # norms stay in float32 under autocast
        lambda *leaves: add_and_normalize(*leaves).to(dtype), inputs, given["grad_norm"], FP32
    )
    plain[1] = plain[1] + given["grad_stream"]
    ours = [output, gradient, grad_weight, grad_bias]
    assert_near(ours, [true[i] for i in (0, 1, 3, 4)], [plain[i] for i in (0, 1, 3, 4)], dtype)

    alone, nothing = kernels.add_layer_norm(x, y, weight, bias, EPS, dtype)
    assert nothing is None
    assert torch.equal(alone, output)
    again = kernels.add_layer_norm_backward(
        x, y, weight, EPS, given["grad_norm"], given["grad_stream"]
    )
    assert again[1] is again[4] is None
    assert torch.equal(again[0], gradient)


@needs_kernels
@each_type
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["x", "y", "grad_norm", "grad_stream"])
def test_norms_hide_no_number_that_is_none(name, value, dtype):
    given = norm_inputs(5, 48, dtype)
    given[name][3, 17] = value
    x, y, weight, bias, *gradients = given.values()
    output, total = kernels.add_layer_norm(x, y, weight, bias, EPS, dtype, return_sum=True)
    results = kernels.add_layer_norm_backward(x, y, weight, EPS, *gradients, for_projection=True)
    if name in "xy":
        assert output[3].isnan().all()
        assert not total[3, 17].isfinite()
    assert output[[0, 1, 2, 4]].isfinite().all()
    assert not results[0][3, 17].isfinite()
    assert not results[1][3, 17].isfinite()
    assert not results[4][17].isfinite()
    assert results[0][[0, 1, 2, 4]].isfinite().all()


# --- GELU and sums -------------------------------------------------------------------------------


def tanh_gelu(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


@needs_kernels
@each_type
@each_width
@each_number_of_rows
def test_gelu_and_its_gradient(rows, width, dtype):
    x, upstream = 3 * torch.randn(rows, width), torch.randn(rows, width)
    x, upstream = x.to(dtype), upstream.to(dtype)
    true = differentiate(tanh_gelu, [x], upstream, torch.float64)
    plain = differentiate(lambda leaf: F.gelu(leaf, approximate="tanh"), [x], upstream, dtype)
    gradient = upstream.clone()
    value, row_sum = kernels.gelu_backward_(x, gradient)
    assert torch.equal(kernels.gelu(x), value)
    assert_near([value, gradient], true, plain, dtype)
    # Summed before they are rounded: nearer the truth than the sum of what is stored.
    assert distance(row_sum, true[1].sum(0)) <= 1e-5 * math.sqrt(rows) + 1e-5
    assert row_sum.dtype == FP32


@needs_kernels
@each_type
def test_gelu_far_out(dtype):
    x = torch.tensor([0.0, -0.0, 1e-30, -9.0, 9.0, -40.0, 40.0, -1e4, 1e4, 1e18, -1e18, 5, -5, 1,
                      -1, 0.5])  # fmt: skip
    x = x.to(dtype)
    gradient = torch.ones_like(x)[None]
    _, _ = kernels.gelu_backward_(x[None], gradient)
    leaf = x.double().requires_grad_()
    right = tanh_gelu(leaf)
    (slope,) = torch.autograd.grad(right.sum(), leaf)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(kernels.gelu(x).double(), right.detach(), rtol=rounding, atol=1e-7)
    near = x.abs() < 1e3  # beyond, autograd's own formula is inf * 0
    torch.testing.assert_close(
        gradient[0].double()[near],
        slope[near],
        rtol=rounding,
        atol=1e-5,  # at 9, terms of 9 x 19 cancel: 9 x 19 x 2**-24
    )
    assert gradient.isfinite().all()


@needs_kernels
@each_type
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_gelu_hides_no_number_that_is_none(value, dtype):
    x = torch.randn(4, 32).to(dtype)
    x[2, 5] = value
    assert not kernels.gelu(x)[2, 5].isfinite()
    assert kernels.gelu(x).isfinite().sum() == 4 * 32 - 1
    gradient = torch.ones_like(x)
    output, row_sum = kernels.gelu_backward_(x, gradient)
    assert not output[2, 5].isfinite()
    if math.isnan(value):  # at infinity a slope of 1 or 0 is as good
        assert gradient[2, 5].isnan()
        assert row_sum[5].isnan()
    gradient = torch.ones_like(x)
    gradient[1, 7] = value
    _, row_sum = kernels.gelu_backward_(torch.randn(4, 32).to(dtype), gradient)
    assert not gradient[1, 7].isfinite()
    assert not row_sum[7].isfinite()


@needs_kernels
@each_type
@each_width
@each_number_of_rows
def test_sums_over_rows(rows, width, dtype):
    x = torch.randn(rows, width) + 1
    rounded, row_sum = kernels.round_and_sum_rows(x, dtype)
    assert torch.equal(rounded, x.to(dtype))
    assert distance(row_sum, x.double().sum(0)) <= 1e-6 * math.sqrt(rows)
    assert distance(kernels.sum_rows(rounded), rounded.double().sum(0)) <= 1e-6 * math.sqrt(rows)
    x[0, 3] = NAN
    rounded, row_sum = kernels.round_and_sum_rows(x, dtype)
    assert rounded[0, 3].isnan()
    assert row_sum[3].isnan()
    assert row_sum.isnan().sum() == 1
    assert kernels.sum_rows(rounded)[3].isnan()


# --- Cross entropy -------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the kernel; the logits stay."""
    gradient, losses = logits.clone(), torch.empty(len(logits))
    kernels.cross_entropy_(gradient, bias, targets, losses)
    return losses, gradient


def naive_cross_entropy(
    logits: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    leaf = logits.to(dtype).requires_grad_()
    scores = leaf if bias is None else leaf + bias.to(dtype)
    losses = F.cross_entropy(scores, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


@needs_kernels
@each_type
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 101, 1009])
@pytest.mark.parametrize("N", [1, 3, 33])
def test_cross_entropy_and_its_gradient(N, V, biased, dtype):
    logits = (4 * torch.randn(N, V) + 5).to(dtype)
    bias = torch.randn(V) if biased else None
    targets = torch.randint(V, (N,))
    targets[0], targets[-1] = 0, V - 1
    losses, gradient = cross_entropy(logits, bias, targets)
    true_losses, true = naive_cross_entropy(logits, bias, targets, torch.float64)
    # The logits are read once and all is float32 until the gradient is stored.
    torch.testing.assert_close(losses.double(), true_losses, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gradient.double(), true, rtol=rounding + 1e-5, atol=2e-6)


@needs_kernels
@each_type
def test_what_is_never_predicted_has_no_part_in_the_loss(dtype):
    """The rows of padding of a vocabulary."""
    N, V, padded = 5, 37, 48
    logits, targets = torch.randn(N, padded).to(dtype), torch.randint(V, (N,))
    bias = torch.zeros(padded)
    bias[V:] = -INF
    losses, gradient = cross_entropy(logits, bias, targets)
    true_losses, true = naive_cross_entropy(logits[:, :V], None, targets, torch.float64)
    torch.testing.assert_close(losses.double(), true_losses, rtol=1e-5, atol=1e-5)
    assert (gradient[:, V:] == 0).all()
    assert gradient.isfinite().all()
    assert distance(gradient[:, :V], true) <= torch.finfo(dtype).eps
    losses, _ = cross_entropy(logits, bias, torch.full((N,), V))
    assert (losses == INF).all()


@needs_kernels
@each_type
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("column", [0, 9, 31, 32, 36])
def test_cross_entropy_hides_no_number_that_is_none(column, value, dtype):
    logits, targets = torch.randn(3, 37).to(dtype), torch.tensor([0, 36, 9])
    logits[1, column] = value
    losses, gradient = cross_entropy(logits, None, targets)
    assert losses[1].isnan()
    assert gradient[1].isnan().all()
    assert losses[[0, 2]].isfinite().all()
    assert gradient[[0, 2]].isfinite().all()
    losses, gradient = cross_entropy(torch.full((1, 37), -INF).to(dtype), None, targets[:1])
    assert losses.isnan().all()
    assert gradient.isnan().all()


# --- All of them ---------------------------------------------------------------------------------


def everything(dtype: torch.dtype) -> list[Tensor]:
    """All results of all kernels, on inputs that are the same each time."""
    torch.manual_seed(3)
    given = norm_inputs(67, 48, dtype)
    x, y, weight, bias, *gradients = given.values()
    logits, targets = torch.randn(67, 101).to(dtype), torch.randint(101, (67,))
    results = [*kernels.add_layer_norm(x, y, weight, bias, EPS, dtype, return_sum=True)]
    results += kernels.add_layer_norm_backward(x, y, weight, EPS, *gradients, for_projection=True)
    results += [kernels.gelu(y), *kernels.gelu_backward_(y, gradients[0])]
    results += [*kernels.round_and_sum_rows(x, dtype), kernels.sum_rows(y), gradients[0]]
    results += cross_entropy(logits, None, targets)
    if dtype is BF16:
        qkv, upstream = torch.randn(2, 150, 3, 3, 16).to(dtype), torch.randn(2, 150, 3, 16)
        results += attend(qkv, upstream.to(dtype), 0.25, torch.tensor([0.5, 0.1, 0.0]))
    return results


@needs_kernels
@each_type
def test_the_same_inputs_give_the_same_bits(dtype, two_threads):
    first = everything(dtype)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(dtype), strict=True))


@needs_kernels
@each_type
def test_two_threads_give_what_one_gives_but_for_the_order_of_sums(dtype):
    one = run_with_threads(1, lambda: everything(dtype))
    two = run_with_threads(2, lambda: everything(dtype))
    for mine, theirs in zip(one, two, strict=True):
        if mine.ndim > 1:  # rows and heads, each of one thread
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_what_the_kernels_cannot_read_is_refused():
    with pytest.raises(AssertionError):
        kernels.gelu(torch.randn(32, 32).t()[:, ::2])


# --- How they come to be compiled ----------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Iterator[Path]:
    """The folder of an empty cache, which the next call of kernel_library() looks into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel_library.cache_clear()
    yield tmp_path / "composer_gpt2"
    kernel_library.cache_clear()


def compilers(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_kernels
def test_the_kernels_are_compiled_once(fresh, monkeypatch):
    assert kernel_library() is kernel_library()
    (compiled,) = fresh.iterdir()  # nothing unfinished is left
    before = compiled.stat().st_mtime_ns
    kernel_library.cache_clear()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    kernel_library()
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]
    assert fresh.stat().st_mode & 0o077 == 0  # others cannot put code there


@needs_kernels
def test_other_sources_flags_or_cpus_have_kernels_of_their_own(monkeypatch):
    compiler, features = shutil.which("c++") or "g++", frozenset({"avx512_bf16"})
    name = library._fingerprint(compiler, features)
    assert library._fingerprint(compiler, features) == name
    assert library._fingerprint(compiler, features | {"amx"}) != name
    assert library._fingerprint("true", features) != name
    monkeypatch.setattr(library, "_FLAGS", ("-O0",))
    assert library._fingerprint(compiler, features) != name


def test_a_cpu_without_the_instructions_is_said(fresh, monkeypatch):
    monkeypatch.setattr(library, "_cpu_features", lambda: frozenset({"avx2"}))
    with pytest.raises(KernelsUnavailableError, match=r"must have AVX512-BF16 .* got \w+ without"):
        kernel_library()
    assert not fresh.exists()


def test_a_missing_compiler_is_said(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_cpu_features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelsUnavailableError, match=r"got none; install g\+\+"):
        kernel_library()


def test_a_broken_compiler_is_said_with_its_first_error(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_cpu_features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(KernelsUnavailableError, match=r"false must compile .* got status 1"):
        kernel_library()
    script = "echo warning; echo 'x.cpp:1: error: no such instruction' >&2; exit 4"
    monkeypatch.setenv("CXX", compilers(tmp_path, script))
    with pytest.raises(KernelsUnavailableError, match=r"status 4: x\.cpp:1: error: no such"):
        kernel_library()
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_is_not_there_is_said(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_cpu_features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(KernelsUnavailableError, match=r"got CXX=.*none, which is no program"):
        kernel_library()


def test_a_compiler_that_makes_something_else_is_said(fresh, monkeypatch, tmp_path):
    """And so is a file in the cache that a crash of the machine has damaged."""
    monkeypatch.setattr(library, "_cpu_features", lambda: frozenset({"avx512_bf16"}))
    script = 'test "$1" = --version && exit; for last; do :; done; echo damaged > "$last"'
    monkeypatch.setenv("CXX", compilers(tmp_path, script))
    with pytest.raises(KernelsUnavailableError, match=r"must be loadable, got .*; delete .*\.so"):
        kernel_library()


@needs_kernels
def test_two_processes_compile_at_once(tmp_path):
    program = (
        "import torch; from composer_gpt2 import cpu_kernels as k; "
        "print(float(k.gelu(torch.ones(16))[0]))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = str(Path(library.__file__).parents[2])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in both:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert said.startswith("0.841")
    assert len(list((tmp_path / "composer_gpt2").iterdir())) == 1

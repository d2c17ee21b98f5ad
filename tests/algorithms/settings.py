"""Every algorithm once, as the tests that all of them must pass need it.

Sequences of the tests have 32 tokens, the model 2 layers of width 32 with 2 heads and no dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from algorithms.activation_checkpointing import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from algorithms.alibi import ALiBi, apply_alibi
from algorithms.fused_block import FusedBlock, apply_fused_block
from algorithms.fused_cross_entropy import FusedCrossEntropy, apply_fused_cross_entropy
from algorithms.fused_gelu import FusedGELU, apply_fused_gelu
from algorithms.fused_layernorm import FusedLayerNorm, apply_fused_layernorm
from algorithms.pad_vocabulary import PadVocabulary, apply_pad_vocabulary
from algorithms.parallel_residual import ParallelResidual, apply_parallel_residual
from algorithms.seq_length_warmup import SequenceLengthWarmup
from algorithms.skip_loss_spikes import SkipLossSpikes
from algorithms.skip_nonfinite import SkipNonfinite
from composer_gpt2 import cpu_kernels
from composer_gpt2.contract import SpeedupAlgorithm
from composer_gpt2.model import CPUPrecision

__all__ = ["ALGORITHMS", "Case", "runs_here"]


@dataclass(frozen=True)
class Case:
    """One algorithm under test."""

    make: Callable[[], SpeedupAlgorithm]
    """Builds it with settings that have an effect on the tests' model and batches."""
    function: Callable[[Any], Any] | None
    """The plain function on a network, with the same settings; None if it only acts on batches."""
    changes_loss: bool
    """Whether the loss differs from the plain model's by more than rounding."""
    cpu_precision: CPUPrecision = "fp32"
    """The precision in which it has an effect."""
    neutral: Callable[[], SpeedupAlgorithm] | None = None
    """Settings under which training is bitwise that without it; None if it has none."""
    needs_cpu_kernels: bool = False
    """Whether it refuses a CPU without AVX512-BF16, where its tests are skipped."""


ALGORITHMS: dict[str, Case] = {
    "activation_checkpointing": Case(
        make=lambda: ActivationCheckpointing(every=2),
        function=lambda model: apply_activation_checkpointing(model, every=2),
        changes_loss=False,
    ),
    "alibi": Case(make=ALiBi, function=apply_alibi, changes_loss=True),
    "alibi at half the length": Case(
        make=lambda: ALiBi(train_sequence_length_scaling=0.5), function=None, changes_loss=True
    ),
    "pad_vocabulary": Case(
        make=lambda: PadVocabulary(multiple_of=16),
        function=lambda model: apply_pad_vocabulary(model, multiple_of=16),
        changes_loss=False,
        neutral=lambda: PadVocabulary(multiple_of=1),
    ),
    "fused_gelu": Case(make=FusedGELU, function=apply_fused_gelu, changes_loss=False),
    "fused_cross_entropy": Case(
        make=lambda: FusedCrossEntropy(rows=16),
        function=lambda model: apply_fused_cross_entropy(model, rows=16),
        changes_loss=False,
    ),
    "parallel_residual": Case(
        make=ParallelResidual, function=apply_parallel_residual, changes_loss=True
    ),
    "fused_block": Case(
        make=FusedBlock,
        function=apply_fused_block,
        changes_loss=False,
        cpu_precision="amp_bf16",
        needs_cpu_kernels=True,
    ),
    "fused_layernorm": Case(
        make=FusedLayerNorm,
        function=lambda model: apply_fused_layernorm(model, cpu_precision="amp_bf16"),
        changes_loss=False,
        cpu_precision="amp_bf16",
    ),
    "seq_length_warmup": Case(
        make=lambda: SequenceLengthWarmup(duration="0.5dur"),
        function=None,
        changes_loss=True,
        neutral=lambda: SequenceLengthWarmup(duration="0dur"),
    ),
    "seq_length_warmup by reshaping": Case(
        make=lambda: SequenceLengthWarmup(duration="0.5dur", truncate=False),
        function=None,
        changes_loss=True,
        neutral=lambda: SequenceLengthWarmup(duration="0dur", truncate=False),
    ),
    # Nothing is skipped before the third batch, and no loss is seen after it in most tests.
    "skip_loss_spikes": Case(
        make=lambda: SkipLossSpikes(loss_z_threshold=0.9, norm_z_threshold=0.9, window=2),
        function=None,
        changes_loss=False,
        neutral=SkipLossSpikes,
    ),
    "skip_nonfinite": Case(make=SkipNonfinite, function=None, changes_loss=False),
}


@functools.cache
def _has_cpu_kernels() -> bool:
    try:
        cpu_kernels.kernel_library()
    except cpu_kernels.KernelsUnavailableError:
        return False
    return True


def runs_here(case: Case) -> bool:
    """Whether this machine can run it."""
    return not case.needs_cpu_kernels or _has_cpu_kernels()

"""The speedup algorithms: ``from composer_gpt2.algorithms import ALiBi, apply_alibi``.

They live in the top-level package ``algorithms``, one folder each. That is a common name, so this
module makes sure that it is ours.
"""

from __future__ import annotations

from pathlib import Path

import algorithms

_ours = Path(__file__).parent.with_name("algorithms")
_found = [Path(folder) for folder in algorithms.__path__]
if not any(folder.samefile(_ours) for folder in _found if folder.exists()):
    raise ImportError(
        f"the package 'algorithms' must be composer-gpt2's, in {_ours}, got "
        f"{', '.join(map(str, _found))}: another distribution or a folder on the path has that "
        "name; uninstall it or put composer-gpt2 first on the path."
    )

# ruff: noqa: E402 - only after that check
from algorithms.activation_checkpointing import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from algorithms.alibi import ALiBi, alibi_bias, apply_alibi, linear_bias_slopes
from algorithms.fused_block import FusedBlock, apply_fused_block
from algorithms.fused_cross_entropy import FusedCrossEntropy, apply_fused_cross_entropy
from algorithms.fused_gelu import FusedGELU, apply_fused_gelu
from algorithms.fused_layernorm import FusedLayerNorm, apply_fused_layernorm
from algorithms.pad_vocabulary import PadVocabulary, apply_pad_vocabulary, trim_vocabulary
from algorithms.parallel_residual import ParallelResidual, apply_parallel_residual
from algorithms.seq_length_warmup import SequenceLengthWarmup, set_batch_sequence_length
from algorithms.skip_loss_spikes import SkipLossSpikes, newest_z_score
from algorithms.skip_nonfinite import SkipNonfinite, drop_nonfinite_gradients
from composer_gpt2.contract import NoEffectError
from composer_gpt2.update_skipping import NonfiniteError

__all__ = [
    "ALiBi",
    "ActivationCheckpointing",
    "FusedBlock",
    "FusedCrossEntropy",
    "FusedGELU",
    "FusedLayerNorm",
    "NoEffectError",
    "NonfiniteError",
    "PadVocabulary",
    "ParallelResidual",
    "SequenceLengthWarmup",
    "SkipLossSpikes",
    "SkipNonfinite",
    "alibi_bias",
    "apply_activation_checkpointing",
    "apply_alibi",
    "apply_fused_block",
    "apply_fused_cross_entropy",
    "apply_fused_gelu",
    "apply_fused_layernorm",
    "apply_pad_vocabulary",
    "apply_parallel_residual",
    "drop_nonfinite_gradients",
    "linear_bias_slopes",
    "newest_z_score",
    "set_batch_sequence_length",
    "trim_vocabulary",
]

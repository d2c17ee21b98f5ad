"""What a model costs and what it should reach: parameters, FLOPs, predicted loss.

Letters follow Kaplan et al., 2020, "Scaling Laws for Neural Language Models",
https://arxiv.org/abs/2001.08361: ``N`` parameters outside the embeddings, ``C_min`` the least
compute for a loss, in PF-days (1e15 FLOP/s for a day, 8.64e19 FLOPs). A model is a name of the
family or a ``transformers.GPT2Config``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from composer_gpt2.configs import get_config

if TYPE_CHECKING:
    from transformers import GPT2Config

__all__ = [
    "compute_optimal_tokens",
    "flops_per_token",
    "parameter_count",
    "predicted_loss",
    "predicted_perplexity",
]


def parameter_count(model: str | GPT2Config) -> int:
    """All trainable parameters, the tied embedding counted once.

    Raises:
        ValueError: The name is not in the family.
    """
    config = _config(model)
    d_model, d_mlp = config.n_embd, config.n_inner or 4 * config.n_embd
    embeddings = (config.vocab_size + config.n_positions) * d_model
    norm = 2 * d_model  # gain and bias
    attention = (d_model + 1) * 3 * d_model + (d_model + 1) * d_model
    mlp = (d_model + 1) * d_mlp + (d_mlp + 1) * d_model
    untied_head = 0 if config.tie_word_embeddings else config.vocab_size * d_model
    return embeddings + config.n_layer * (2 * norm + attention + mlp) + norm + untied_head


def flops_per_token(model: str | GPT2Config, sequence_length: int | None = None) -> int:
    """Floating-point operations of a training step for each token, forward and backward.

    ``6 * (matrix parameters) + 12 * n_layer * n_embd * sequence_length``: two FLOPs a parameter
    forward, four backward, and the scores and weighted sums of attention. The matrices are those of
    the blocks and the vocabulary projection; looking up an embedding costs nothing. Attention is
    counted in full, though a causal kernel may skip half of it.

    Args:
        model: A name of the family or a configuration.
        sequence_length: Tokens a sequence; default: all the model's positions.

    Raises:
        ValueError: The name is not in the family.

    Source: Kaplan et al., 2020, table 1; Chowdhery et al., 2022, "PaLM", appendix B.
    """
    config = _config(model)
    length = config.n_positions if sequence_length is None else sequence_length
    matrices = _non_embedding_parameters(config) + config.vocab_size * config.n_embd
    return 6 * matrices + 12 * config.n_layer * config.n_embd * length


def predicted_loss(model: str | GPT2Config) -> float:
    """Test loss, in nats a token, when the model is trained for its compute-efficient budget.

    ``N = 1.3e9 * C_min**0.73`` is solved for ``C_min``, then ``loss = (C_min / 3.1e8)**-0.050``.
    The constants were fitted on WebText2; the model card of the 2022 recipes prints this column
    for OpenWebText.

    Raises:
        ValueError: The name is not in the family.

    Source: Kaplan et al., 2020, sections 1.2 (equation 1.3) and 6.1 (table 6).
    """
    return (3.1e8 / _compute_budget(model)) ** 0.050


def predicted_perplexity(model: str | GPT2Config) -> float:
    """Exponential of :func:`predicted_loss`.

    Raises:
        ValueError: The name is not in the family.
    """
    return math.exp(predicted_loss(model))


def compute_optimal_tokens(model: str | GPT2Config) -> float:
    """Tokens to train for at the compute-efficient budget, ``2e10 * C_min**0.27``.

    Raises:
        ValueError: The name is not in the family.

    Source: Kaplan et al., 2020, section 6.1 (table 6).
    """
    return 2e10 * _compute_budget(model) ** 0.27


def _compute_budget(model: str | GPT2Config) -> float:
    """``C_min`` in PF-days."""
    return (_non_embedding_parameters(_config(model)) / 1.3e9) ** (1 / 0.73)


def _non_embedding_parameters(config: GPT2Config) -> int:
    """``12 * n_layer * n_embd**2`` for GPT-2's MLP: weights of the blocks, no biases or norms."""
    d_mlp = config.n_inner or 4 * config.n_embd
    return config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * d_mlp)


def _config(model: str | GPT2Config) -> GPT2Config:
    return get_config(model) if isinstance(model, str) else model

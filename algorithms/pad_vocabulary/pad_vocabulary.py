"""Pads the vocabulary to a multiple of a power of two; padding is never predicted.

Matrix kernels work in tiles: 50,257 rows leave an odd one in every tile, 50,304 = 786 x 64 do not.

Shapes: ``B`` batch, ``T`` tokens, ``V`` vocabulary, ``P`` the padded one, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from typing_extensions import override

from composer_gpt2.contract import (
    NoEffectError,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    forget_architecture,
    language_model,
    record_architecture,
)
from composer_gpt2.optimizer_groups import exchange_parameters

__all__ = ["PadVocabulary", "apply_pad_vocabulary", "trim_vocabulary"]


def apply_pad_vocabulary(
    model: nn.Module, *, multiple_of: int = 64, optimizers: Sequence[Optimizer] = ()
) -> Receipt:
    """Gives the tied embedding and head rows of zeros up to the next multiple.

    The head's logits have shape ``(B, T, P)``, those of padding ``-inf``: probability and gradient
    are exactly 0, so that the new rows stay zeros and the loss is that of the model before.

    Args:
        model: A ``GPT2LMHeadModel``, or a ``GPT2Model`` that holds one; changed in place.
        multiple_of: Rows; 1 changes nothing.
        optimizers: Their groups get the longer parameter in the place of the old one.

    Raises:
        NoEffectError: The model is no GPT-2, its head is not tied, or its vocabulary is such a
            multiple already.
        ValueError: ``multiple_of`` is below 1.

    Source: Karpathy, nanoGPT, ``vocab_size`` ("50257, padded up to nearest multiple of 64 for
    efficiency").
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}.")
    module = language_model(model, "pad_vocabulary")
    head = module.lm_head
    old = cast(nn.Parameter, head.weight)
    if old is not module.transformer.wte.weight:
        raise NoEffectError(
            "pad_vocabulary pads a head that is tied to the embedding, got two separate ones."
        )
    settings = {"multiple_of": multiple_of}
    if isinstance(head, PaddedHead):
        record_architecture(module, "pad_vocabulary", settings)  # refuses other settings
        return _receipt(module, head, settings)
    n_real, width = old.shape
    n_padding = -n_real % multiple_of
    if not n_padding:
        if multiple_of > 1:
            raise NoEffectError(
                f"pad_vocabulary looked for a vocabulary that is not a multiple of {multiple_of}, "
                f"got {n_real:,}; leave it out."
            )
        return Receipt("pad_vocabulary", settings, "padded nothing: multiple_of is 1", 0, {})

    padding = old.new_zeros(n_padding, width)
    new = nn.Parameter(torch.cat([old.detach(), padding]), requires_grad=old.requires_grad)
    module.transformer.wte.weight = new
    module.transformer.wte.num_embeddings = n_real + n_padding
    module.lm_head = PaddedHead(new, n_real)
    exchange_parameters(optimizers, {old: new})
    vocabulary = {"vocab_size": n_real + n_padding}
    record_architecture(module, "pad_vocabulary", settings, config_changes=vocabulary)
    return _receipt(module, module.lm_head, settings)


def trim_vocabulary(model: nn.Module) -> None:
    """Takes the padding away again, for export: a plain network with the same predictions.

    Raises:
        NoEffectError: The model has no padding.
    """
    module = language_model(model, "trim_vocabulary")
    head = module.lm_head
    if not isinstance(head, PaddedHead):
        raise NoEffectError("trim_vocabulary looked for a padded vocabulary and found none.")
    trimmed = nn.Parameter(head.weight.detach()[: head.n_real].clone())
    module.transformer.wte.weight = trimmed
    module.transformer.wte.num_embeddings = head.n_real
    module.lm_head = nn.Linear(head.in_features, head.n_real, bias=False, device="meta")
    module.lm_head.weight = trimmed
    forget_architecture(module, "pad_vocabulary")


@dataclass(eq=False)
class PadVocabulary(SpeedupAlgorithm):
    """Pads the vocabulary to a multiple of ``multiple_of`` (50,257 to 50,304).

    Changes: the embedding, which is also the head, has more rows in the network and in the
    optimizer; ``config.vocab_size`` follows. Losses and predictions stay.

    Args:
        multiple_of: Rows; 64 suits every GPU, 1 changes nothing.

    Raises:
        ValueError: ``multiple_of`` is below 1.

    Source: as :func:`apply_pad_vocabulary`.
    """

    multiple_of: int = 64

    name = "pad_vocabulary"
    stage = Stage.EMBEDDING
    architectural = True
    keeps_function = True

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, got {self.multiple_of}.")

    @classmethod
    @override
    def take_out(cls, module: GPT2LMHeadModel) -> bool:
        trim_vocabulary(module)
        return True

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        return apply_pad_vocabulary(module, multiple_of=self.multiple_of, optimizers=optimizers)


class PaddedHead(nn.Linear):
    """A head whose last rows are padding: a bias of ``-inf``, which costs no pass of its own."""

    bias: Tensor

    def __init__(self, weight: nn.Parameter, n_real: int) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.n_real = n_real
        self.weight = weight
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        bias[n_real:] = -torch.inf
        del self._parameters["bias"]
        self.register_buffer("bias", bias, persistent=False)


@torch.no_grad()
def _receipt(module: GPT2LMHeadModel, head: PaddedHead, settings: dict[str, int]) -> Receipt:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, head.in_features, generator=generator).to(head.weight)
    probability = head(hidden).float().softmax(dim=-1)[:, head.n_real :].max()
    if not probability == 0:
        raise NoEffectError(
            "pad_vocabulary measured that padding would be predicted, with probability "
            f"{probability:.2g} (must be 0): the model does not use its lm_head's bias."
        )
    n_padding = head.out_features - head.n_real
    return Receipt(
        algorithm="pad_vocabulary",
        settings=settings,
        changed=f"padded the vocabulary from {head.n_real:,} to {head.out_features:,} rows",
        count=n_padding,
        probe={"largest probability of padding": float(probability)},
    )

"""Language-model metrics that reuse the loss of the forward pass.

Composer's own metrics of the same names compute the cross entropy a second time from the logits: on
GPT-2 that is a second softmax over ``batch x tokens x 50257`` values, a good part of a step. Ours
take the mean loss the model has just returned, so a metric costs nothing and needs no logits.

Shapes: ``B`` batch, ``T`` tokens of a sequence, ``V`` vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from composer_gpt2.tokenizer import token_byte_lengths

__all__ = ["BitsPerByte", "LanguageCrossEntropy", "LanguagePerplexity", "perplexity_of"]

IGNORE_INDEX = -100  # labels with this value are no targets, as in torch.nn.CrossEntropyLoss


def perplexity_of(nats: float) -> float:
    """The perplexity of a cross entropy in nats; infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


class LanguageCrossEntropy(Metric):
    """Mean negative log likelihood of a target token, in nats, over all batches and ranks."""

    full_state_update = False  # torchmetrics: one call of `update` a batch, not two
    sum_loss: Tensor  # nats
    total_items: Tensor  # target tokens

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum_loss", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_items", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            loss: Mean over the batch's target tokens, in nats; a scalar.
            labels: Shape ``(B, T)``; position ``t`` is the target of position ``t - 1``, so the
                first column is no target, nor is ``-100``.
        """
        n_targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        # A batch without a target has the loss NaN (0/0) and adds nothing.
        self.sum_loss += torch.where(n_targets > 0, loss.double() * n_targets, 0.0)
        self.total_items += n_targets

    def compute(self) -> Tensor:
        """The mean, in nats a token."""
        return (self.sum_loss / self.total_items).float()


class LanguagePerplexity(LanguageCrossEntropy):
    """Exponential of the mean cross entropy a token."""

    def compute(self) -> Tensor:
        """The perplexity: how many tokens the model hesitates between."""
        return super().compute().exp()


class BitsPerByte(LanguageCrossEntropy):
    """Cross entropy in bits for each byte of UTF-8 text: comparable between tokenizers.

    ``<|endoftext|>`` is predicted at a cost and stands for no byte, as in Gao et al., 2020, "The
    Pile", section 3.1, where the length of a document is that of its text.
    """

    total_bytes: Tensor
    byte_lengths: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total_bytes", torch.tensor(0), dist_reduce_fx="sum")
        lengths = torch.from_numpy(token_byte_lengths().copy())  # (V,)
        self.register_buffer("byte_lengths", lengths, persistent=False)

    def update(self, loss: Tensor, labels: Tensor) -> None:
        """Adds a batch; see :meth:`LanguageCrossEntropy.update`."""
        super().update(loss, labels)
        targets = labels[:, 1:]
        self.total_bytes += self.byte_lengths[targets[targets != IGNORE_INDEX]].sum()

    def compute(self) -> Tensor:
        """The mean, in bits a byte."""
        return (self.sum_loss / (self.total_bytes * math.log(2))).float()

"""No update from a batch whose loss or gradients are not finite.

One NaN in a gradient is, after one optimizer step, in every weight and every moment, and a run of
days is lost. Left out of the update it costs one batch. Where batch after batch is bad, the fault
is no single sample, and the run stops with what it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from composer import State
from composer.core import Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel
from typing_extensions import override

from composer_gpt2.contract import Receipt
from composer_gpt2.data.batch_samples import describe_samples, samples_of_batch
from composer_gpt2.update_skipping import (
    NonfiniteError,
    Update,
    UpdateSkipper,
    drop_gradients,
    gradient_norm,
    measure_effect,
)

__all__ = ["SkipNonfinite", "drop_nonfinite_gradients"]


def drop_nonfinite_gradients(parameters: Iterable[nn.Parameter], loss: Tensor | float) -> bool:
    """Takes all gradients away if the loss or the norm of the gradients is NaN or infinite.

    A torch optimizer that then makes its step changes nothing, neither weights nor its own state.
    For a training loop of your own, between ``backward`` and clipping::

        loss.backward()
        n_skipped += drop_nonfinite_gradients(model.parameters(), loss)
        optimizer.step()

    Args:
        parameters: All that are trained. With several ranks their gradients must be reduced.
        loss: Of the batch; the ranks must have the same one, or decide differently.

    Returns:
        Whether it did.
    """
    parameters = list(parameters)
    if math.isfinite(float(loss)) and math.isfinite(float(gradient_norm(parameters))):
        return False
    drop_gradients(parameters)
    return True


@dataclass(eq=False)
class SkipNonfinite(UpdateSkipper):
    """Leaves the update of a batch out if its loss or its gradient norm is NaN or infinite.

    Changes: nothing, until a batch is bad. Then no weight and nothing that the optimizer remembers
    changes; the batch is counted, and schedules and data go on. Loss and norm are those of the
    global batch, before clipping, so that all ranks decide alike.

    Under ``amp_fp16`` infinite gradients are how the gradient scaler finds its scale. It skips such
    updates itself; here only the loss counts then.

    Example::

        Trainer(..., algorithms=[SkipNonfinite(max_skipped=10)])

    Args:
        max_skipped: Updates skipped in a row that are tolerated: more of them mean that the model
            and not a sample is bad. 0 stops at the first.
        max_skipped_in_all: Updates skipped in the whole run that are tolerated, those before a
            resume included.

    Raises:
        NonfiniteError: In training, when one more would have to be skipped, or when a parameter is
            not finite itself, so that no batch could be good any more.
    """

    max_skipped: int = 10
    max_skipped_in_all: int = 100

    name = "skip_nonfinite"

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped <= self.max_skipped_in_all:
            raise ValueError(
                "max_skipped must be from 0 to max_skipped_in_all, got "
                f"{self.max_skipped} and {self.max_skipped_in_all}."
            )

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        probe = measure_effect(
            self.name, optimizers, math.nan, lambda p: drop_nonfinite_gradients(p, loss=0.0)
        )
        return Receipt(
            self.name,
            self.settings,
            "skips updates whose loss or gradient norm is not finite, up to "
            f"{self.max_skipped} in a row and {self.max_skipped_in_all} in all",
            sum(len(group["params"]) for o in optimizers for group in o.param_groups),
            probe,
        )

    @override
    def reason_to_skip(self, update: Update, state: State) -> str | None:
        scaled = state.precision is Precision.AMP_FP16
        if math.isfinite(update.loss) and (scaled or math.isfinite(update.gradient_norm)):
            return None
        return f"loss {update.loss:.4g}, gradient norm {update.gradient_norm:.4g}"

    @override
    def before_skip(self, update: Update, state: State) -> None:
        ruined = [n for n, p in state.model.named_parameters() if not p.isfinite().all()]
        last_update = state.timestamp.batch.value - self.n_skipped_in_a_row
        if ruined:  # by an update from finite gradients; no batch can be good any more
            found = (
                f"{len(ruined)} parameters have not been finite since batch {last_update} (too "
                "high a learning rate?); go on from a checkpoint before it"
            )
        elif self.n_skipped_in_a_row >= self.max_skipped or (
            self.n_skipped >= self.max_skipped_in_all
        ):
            found = (
                f"{self.n_skipped_in_a_row} updates in a row and {self.n_skipped} in all have been "
                f"skipped before (max_skipped {self.max_skipped}, max_skipped_in_all "
                f"{self.max_skipped_in_all}). The weights are finite, as batch {last_update} left "
                "them, and so are those of the last checkpoint; look at the samples, lower the "
                "learning rate, or raise the limit"
            )
        else:
            return
        raise NonfiniteError(
            f"Loss and gradients must be finite, but those of batch "
            f"{state.timestamp.batch.value + 1} are not (loss {update.loss:.4g}, gradient norm "
            f"{update.gradient_norm:.4g}), and {found}. Samples of the batch: "
            f"{describe_samples(samples_of_batch(state))}."
        )

"""One run from the command line: parse, load, build, fit.

``composer -n 8 run.py -f yamls/gpt2-125m.yaml optimizer.adamw.lr=4.0e-4``; from an installed
package ``composer -n 8 -m composer_gpt2.train -f gpt2-125m.yaml``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from composer import Trainer
from composer.core import Time
from composer.utils import dist

from composer_gpt2.build import build_trainer
from composer_gpt2.checkpoints import CheckpointError, RecipeChangedError, VerifiedCheckpointSaver
from composer_gpt2.contract import (
    ArchitectureMismatchError,
    NoEffectError,
    Receipt,
    receipts,
)
from composer_gpt2.data.streaming import ShardError
from composer_gpt2.parent_death import signal_at_parent_death
from composer_gpt2.plan import algorithm_order, derived_numbers, format_table
from composer_gpt2.rank_failure import RankWatch
from composer_gpt2.recipe import Recipe, RecipeError, load_recipe
from composer_gpt2.run_folder import has_metrics, write_metrics, write_run_folder
from composer_gpt2.stop_signals import PARENT_DIED, StopAtBatchEnd, Stopped, StopSignals
from composer_gpt2.update_skipping import NonfiniteError

__all__ = ["main", "train"]

_USER_ERROR = 2  # exit statuses: as argparse has it,
_FAILURE = 1  # and as after any other failure
_USER_ERRORS = (RecipeError, RecipeChangedError, NoEffectError, ArchitectureMismatchError)
_FAULTS = (ShardError, CheckpointError, NonfiniteError, BlockingIOError)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line says.

    What the user can mend is one message without a traceback: a recipe, a corpus or a checkpoint
    that cannot be, or an algorithm without effect (status 2, and nothing has been trained); a shard
    or a checkpoint that is lost or damaged, a disk that is full, numbers that are not finite
    (status 1).

    SIGTERM or SIGINT stops the run at the end of a batch, with a checkpoint (status 0); see
    ``stop_signals.py``. A rank that fails ends all ranks; see ``rank_failure.py``.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="composer -n N run.py",
        description="Train a GPT-2 from a recipe.",
        epilog="Later files win over earlier ones, overrides over files.",
    )
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        required=True,
        metavar="RECIPE.yaml",
        help="a recipe, or a fragment on top of one; may be given several times",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="single settings, such as optimizer.adamw.lr=4.0e-4 or max_duration=100ba",
    )
    arguments = parser.parse_intermixed_args(argv)
    if "RANK" in os.environ:
        signal_at_parent_death(PARENT_DIED)
    with StopSignals() as signals, RankWatch() as watch:

        def stop_now(signal_name: str) -> NoReturn:
            os._exit(watch.fail(f"Stopped by {signal_name} before the first batch.", 0))

        signals.stop_now = stop_now
        try:
            train(load_recipe(arguments.file, arguments.overrides), signals)
        except (*_USER_ERRORS, *_FAULTS) as error:
            status = _USER_ERROR if isinstance(error, _USER_ERRORS) else _FAILURE
            return watch.fail(f"{type(error).__name__}: {error}", status)
    return 0


def train(recipe: Recipe, signals: StopSignals) -> None:
    """Runs a recipe on this rank, to its end or until a signal; rank 0 says what it amounts to.

    Args:
        recipe: A checked recipe.
        signals: What may stop the run.

    Raises:
        RecipeError: The recipe does not fit the number of ranks, the device or the corpus.
        NoEffectError: An algorithm of the recipe changes nothing.
        ArchitectureMismatchError: The checkpoint to go on from has other algorithms.
        RecipeChangedError: The checkpoint to go on from was made with another recipe.
        BlockingIOError: Another process trains in the run folder.
        ShardError: In mid-run, a shard cannot be had or its hash is wrong.
        CheckpointError: One cannot be written or stored; or there are some, and none is whole.
        NonfiniteError: Loss or gradients were not finite, too often or for good.
    """
    trainer = build_trainer(recipe)
    recipe = recipe.with_run_name(trainer.state.run_name)
    savers = [c for c in trainer.state.callbacks if isinstance(c, VerifiedCheckpointSaver)]
    save = savers[0].save_now if savers else None
    trainer.state.callbacks.append(StopAtBatchEnd(signals, save))
    if trainer.state.timestamp >= Time.from_timestring(recipe.max_duration):
        # A finished run, started again; Composer would call that an error.
        _make_up_for_the_last_evaluation(recipe, trainer)
        _say(
            f"{trainer.state.run_name} is trained for {recipe.max_duration}: nothing to do. For "
            "another run with this recipe: run_name=another"
        )
    else:
        _start(recipe, trainer)
        try:
            trainer.fit()
        except Stopped as stopped:
            _say(_how_to_go_on(recipe, stopped))
        else:
            if dist.get_global_rank() == 0:
                write_metrics(recipe, trainer.state)
    trainer.close()


def _make_up_for_the_last_evaluation(recipe: Recipe, trainer: Trainer) -> None:
    """Evaluates a finished run that was ended before its metrics were written."""
    written = [has_metrics(recipe)]
    dist.broadcast_object_list(written)
    if written[0]:
        return
    if trainer.state.evaluators:
        trainer.eval()
    if dist.get_global_rank() == 0:
        write_metrics(recipe, trainer.state)


def _start(recipe: Recipe, trainer: Trainer) -> None:
    """Says what the run amounts to, and begins its record."""
    proofs = receipts(trainer.state.algorithms)
    if dist.get_global_rank() == 0:
        write_run_folder(recipe, dist.get_world_size(), proofs)
    n_parameters = sum(p.numel() for p in trainer.state.model.parameters())
    rows = derived_numbers(recipe, dist.get_world_size(), n_parameters, trainer.state.algorithms)
    rows |= algorithm_order(trainer)
    for proof in proofs:
        rows[f"effect of {proof['algorithm']}"] = str(Receipt(**proof)).split(": ", 1)[1]
    _say(format_table(rows | {"run folder": str(recipe.run_folder)}))


def _how_to_go_on(recipe: Recipe, stopped: Stopped) -> str:
    if recipe.save_interval is None:
        return f"{stopped}; nothing is saved, for save_interval is null."
    command = "the same command" if recipe.autoresume else "the same command with autoresume=true"
    return f"{stopped}, which is saved in {recipe.save_folder}; {command} goes on from there."


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

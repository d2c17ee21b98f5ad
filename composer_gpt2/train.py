"""One run from the command line: parse, load, build, fit.

``composer -n 8 run.py -f yamls/gpt2-125m.yaml optimizer.adamw.lr=4.0e-4``; from an installed
package ``composer -n 8 -m composer_gpt2.train -f gpt2-125m.yaml``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from composer.core import Time
from composer.utils import dist

from composer_gpt2.build import build_trainer
from composer_gpt2.contract import (
    ArchitectureMismatchError,
    NoEffectError,
    Receipt,
    receipts,
)
from composer_gpt2.data.streaming import ShardError
from composer_gpt2.plan import algorithm_order, derived_numbers, format_table
from composer_gpt2.recipe import Recipe, RecipeError, load_recipe
from composer_gpt2.run_folder import write_metrics, write_run_folder

__all__ = ["main", "train"]

_USER_ERROR = 2  # exit statuses: as argparse has it,
_DATA_ERROR = 1  # and as after any other failure
_SECONDS_FOR_RANK_0 = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line says.

    What the user can mend is one message without a traceback: a recipe, a corpus or a checkpoint
    that cannot be, or an algorithm without effect (status 2, and nothing has been trained); a shard
    that is lost or damaged (status 1).

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
    try:
        train(load_recipe(arguments.file, arguments.overrides))
    except (RecipeError, ShardError, NoEffectError, ArchitectureMismatchError) as error:
        # All ranks end up here together. The launcher shows rank 0 and kills it as soon as another
        # one has failed, so the others let it speak first; what only they know they say later.
        if dist.get_global_rank() != 0:
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return _DATA_ERROR if isinstance(error, ShardError) else _USER_ERROR
    return 0


def train(recipe: Recipe) -> None:
    """Runs a recipe to its end on this rank; rank 0 says what it amounts to and keeps the record.

    Raises:
        RecipeError: The recipe does not fit the number of ranks, the device or the corpus.
        NoEffectError: An algorithm of the recipe changes nothing.
        ArchitectureMismatchError: The checkpoint to go on from has other algorithms.
        ShardError: In mid-run, a shard cannot be had or its hash is wrong.
    """
    trainer = build_trainer(recipe)
    recipe = recipe.with_run_name(trainer.state.run_name)
    if trainer.state.timestamp >= Time.from_timestring(recipe.max_duration):
        # An automatic resume of a finished run; Composer would call that an error.
        _say(f"{trainer.state.run_name} is trained for {recipe.max_duration}: nothing to do.")
    else:
        proofs = receipts(trainer.state.algorithms)
        if dist.get_global_rank() == 0:
            write_run_folder(recipe, dist.get_world_size(), proofs)
        n_parameters = sum(p.numel() for p in trainer.state.model.parameters())
        rows = derived_numbers(
            recipe, dist.get_world_size(), n_parameters, trainer.state.algorithms
        )
        rows |= algorithm_order(trainer)
        for proof in proofs:
            rows[f"effect of {proof['algorithm']}"] = str(Receipt(**proof)).split(": ", 1)[1]
        _say(format_table(rows | {"run folder": str(recipe.run_folder)}))
        trainer.fit()
        if dist.get_global_rank() == 0:
            write_metrics(recipe, trainer.state)
    trainer.close()


def _say(text: str) -> None:
    if dist.get_global_rank() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

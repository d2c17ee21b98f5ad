"""What a recipe amounts to, in numbers that nobody has to work out: printed when a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from composer import Algorithm, Trainer
from composer.core import Event

from composer_gpt2 import scaling
from composer_gpt2.configs import get_config
from composer_gpt2.contract import installation_order
from composer_gpt2.recipe import Recipe

__all__ = ["algorithm_order", "derived_numbers", "format_table"]


def derived_numbers(
    recipe: Recipe, n_ranks: int, n_parameters: int, algorithms: Sequence[Algorithm] = ()
) -> dict[str, str]:
    """Everything that follows from a recipe, as text with units, in the order of interest.

    Args:
        recipe: A checked recipe.
        n_ranks: Processes that train together, one for each device.
        n_parameters: Those of the model as it will be trained; algorithms may have changed it.
        algorithms: Those of the run; they decide at which length it trains, and on what part of a
            batch.
    """
    config = get_config(recipe.model.name, **recipe.model.config_overrides)
    ours = installation_order(algorithms)
    trained_length = recipe.data.sequence_length
    for algorithm in ours:
        trained_length = algorithm.sequence_length_after(trained_length)
    flops = scaling.flops_per_token(config, trained_length)
    any_length = any(algorithm.reads_any_length for algorithm in ours)
    drops_tokens = any(algorithm.drops_tokens for algorithm in ours)
    rows = {
        "model": f"{recipe.model.name}: {config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads, {'no' if any_length else config.n_positions} positions",
        "parameters": f"{n_parameters:,}",
        **({"pretrained": recipe.model.pretrained} if recipe.model.pretrained else {}),
        "batch": f"{recipe.train_batch_size:,} sequences x {recipe.data.sequence_length:,} = "
        f"{recipe.tokens_per_batch:,} tokens",
        "ranks": f"{n_ranks} x {recipe.train_batch_size // n_ranks:,} sequences, micro-batch "
        f"{recipe.device_train_microbatch_size or recipe.train_batch_size // n_ranks}",
    }
    tokens = recipe.train_tokens
    if tokens is None:
        rows["duration"] = recipe.max_duration
    else:
        n_batches = f"{tokens / recipe.tokens_per_batch:,.0f} batches"
        in_tokens = recipe.max_duration.endswith("tok")
        if drops_tokens:
            n_batches = f"at least {n_batches}" if in_tokens else f"{n_batches}, at most"
        else:
            n_batches = f"{n_batches} ="
        rows["duration"] = f"{n_batches} {tokens:,} tokens, {tokens / n_parameters:.1f} a parameter"
        rows["compute"] = (
            f"{flops:.3g} FLOPs a token at {trained_length:,} tokens = {flops * tokens:.3g} in all"
        )
    rows["compute-efficient"] = (
        f"{scaling.compute_optimal_tokens(config):.3g} tokens, loss "
        f"{scaling.predicted_loss(config):.2f}, perplexity "
        f"{scaling.predicted_perplexity(config):.2f} (Kaplan et al., 2020, on WebText2)"
    )
    rows["optimizer"] = _call(recipe.optimizer_name, recipe.optimizer_arguments)
    for name, arguments in recipe.schedulers.items():
        rows[f"scheduler {name}"] = _call(name, arguments)
    return rows


def algorithm_order(trainer: Trainer) -> dict[str, str]:
    """For each event at which algorithms run, their names in the order in which they will.

    Composer turns the order round on ``after_*`` events; this asks it instead of guessing. At
    ``init`` ours see to their order themselves.
    """
    ours = installation_order(trainer.state.algorithms)
    others = [a for a in trainer.state.algorithms if a.match(Event.INIT, trainer.state)]
    first = [*ours, *(a for a in others if a not in ours)]
    rows = {"at init": ", ".join(type(a).__name__ for a in first)} if first else {}
    batch, trainer.state.batch = trainer.state.batch, None  # outside of training there is none
    for event in Event:
        if event is Event.INIT:
            continue
        running = [a for a in trainer.state.algorithms if a.match(event, trainer.state)]
        if running:
            ordered: Sequence[Algorithm] = trainer.engine._compile(running, event)
            rows[f"at {event.value}"] = ", ".join(type(a).__name__ for a in ordered)
    trainer.state.batch = batch
    return rows


def format_table(rows: dict[str, str]) -> str:
    """Two aligned columns, one row a line."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _call(name: str, arguments: dict) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"

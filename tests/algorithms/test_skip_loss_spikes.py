"""skip_loss_spikes: the scores of llm.c, and spikes that single sequences make in real runs."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Algorithm, Callback, Trainer
from composer.algorithms import GradientClipping
from torch import nn
from training import TOKENS, build_network, trainer, weights

from algorithms.skip_loss_spikes import SkipLossSpikes, newest_z_score
from algorithms.skip_nonfinite import SkipNonfinite
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import receipts
from composer_gpt2.update_skipping import Update

WINDOW = 6
HIGH = 2.2  # of at most sqrt(5) = 2.24: only what dwarfs all else in the window
N_BATCHES = 12
MARKED = 100  # the first token of a sequence that makes a spike


def tokens_with_spikes(*batches: int) -> torch.Tensor:
    """Batches of which all but the marked ones are one and the same."""
    tokens = TOKENS[:4].repeat(N_BATCHES, 1)
    tokens[tokens == MARKED] = 0
    for batch in batches:
        tokens[4 * batch + 2, 0] = MARKED
    return tokens


def network_with_spikes(factor: float = 30.0) -> GPT2Model:
    """What it predicts for a marked sequence is wrong with certainty."""
    model = build_network()

    inner, marked = model.model, []

    def note(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        marked[:] = [arguments[0][:, 0] == MARKED]

    def amplify(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.where(marked[0], factor, 1.0)[:, None, None]

    inner.transformer.wte.register_forward_hook(note)
    inner.lm_head.register_forward_hook(amplify)
    return model


class WithoutStep(Callback):
    """The optimizer makes no step in these batches."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def batch_start(self, state, logger):
        (optimizer,) = state.optimizers
        if state.timestamp.batch.value in self.batches:
            optimizer.step = lambda closure: closure()

    def batch_end(self, state, logger):
        state.optimizers[0].__dict__.pop("step", None)


def fit(model: GPT2Model, algorithms: Sequence[Algorithm], spikes: Sequence[int], **arguments: Any):
    arguments = {"max_duration": f"{N_BATCHES}ba", "lr": 1e-4, **arguments}
    run = trainer(model, algorithms, tokens=tokens_with_spikes(*spikes), **arguments)
    run.fit()
    run.close()
    return run


def assert_same_end(one: Trainer, other: Trainer) -> None:
    end = weights(other.state.model)
    for name, value in weights(one.state.model).items():
        assert torch.equal(value, end[name]), name
    mine, theirs = (run.state.optimizers[0].state_dict()["state"] for run in (one, other))
    for key, remembered in mine.items():
        for name, value in remembered.items():
            assert torch.equal(value, theirs[key][name]), (key, name)


# The score


def test_a_worked_case():
    assert newest_z_score([1.0, 1.0, 1.0, 1.0, 2.0]) == 2.0  # mean 1.2, deviation 0.4
    assert newest_z_score([2.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(-0.5)
    assert newest_z_score([0.1] * 3) == 0.0


def test_what_is_skipped_is_what_llm_c_skips():
    """Against running sums over a ring, which is how it does it."""
    rng = np.random.default_rng(0)
    losses = 3.0 + 0.1 * rng.standard_normal(300)
    losses[rng.integers(20, 300, 12)] += 2.0
    window, threshold = 16, 2.5
    ring, total, squares, expected = [], 0.0, 0.0, []
    for n, loss in enumerate(losses):
        if n >= window:
            total, squares = total - ring[n % window], squares - ring[n % window] ** 2
            ring[n % window] = loss
        else:
            ring.append(loss)
        total, squares = total + loss, squares + loss**2
        mean = total / window
        if n >= window and (loss - mean) / math.sqrt(squares / window - mean**2) > threshold:
            expected.append(n)
    algorithm, state = SkipLossSpikes(threshold, window=window), build_state()
    skipped = []
    for n, loss in enumerate(losses):
        if algorithm.reason_to_skip(Update(loss, 1.0), state):
            skipped.append(n)
        algorithm.after_batch(state)
    assert skipped == expected
    assert len(skipped) == 9


def build_state() -> Any:
    return None  # neither method looks at it


def test_values_that_are_not_finite_are_nobody_elses_measure():
    algorithm, state = SkipLossSpikes(1.5, 1.5, window=4), build_state()
    for loss, norm in [(3.0, 1.0), (3.1, math.inf), (math.nan, 1.1), (2.9, 0.9), (3.0, 1.0)]:
        assert algorithm.reason_to_skip(Update(loss, norm), state) is None
        algorithm.after_batch(state)
    values = algorithm.state_dict()["values"]
    assert values == {"loss": [3.0, 3.1, 2.9, 3.0], "gradient norm": [1.0, 1.1, 0.9, 1.0]}
    assert algorithm.reason_to_skip(Update(math.nan, math.nan), state) is None
    assert "gradient norm 9" in str(algorithm.reason_to_skip(Update(3.0, 9.0), state))


# In a run


def test_a_spike_costs_the_update_of_its_batch_and_nothing_else(caplog):
    spike = 8
    algorithm = SkipLossSpikes(loss_z_threshold=HIGH, window=WINDOW)
    with caplog.at_level(logging.WARNING):
        run = fit(network_with_spikes(), [algorithm], [spike])
    assert algorithm.n_skipped == 1
    (said,) = [r.message for r in caplog.records if "skipped" in r.message]
    assert said.startswith("skip_loss_spikes: skipped the update of batch 9, loss ")
    assert "with a z-score of 2.2" in said
    expected = fit(network_with_spikes(), [], [spike], callbacks=[WithoutStep(spike)])
    assert_same_end(run, expected)
    plain = fit(network_with_spikes(), [], [spike])
    name = "model.transformer.ln_f.weight"
    assert not torch.equal(weights(run.state.model)[name], weights(plain.state.model)[name])


@pytest.mark.parametrize("first", [True, False])
def test_the_norm_is_that_before_clipping(first):
    """After clipping, every batch has one norm, and none stands out."""
    spike, clipping = 9, GradientClipping("norm", 0.01)
    algorithm = SkipLossSpikes(norm_z_threshold=HIGH, window=WINDOW)
    algorithms = [algorithm, clipping] if first else [clipping, algorithm]
    run = fit(network_with_spikes(), algorithms, [spike])
    assert algorithm.n_skipped == 1
    expected = fit(network_with_spikes(), [clipping], [spike], callbacks=[WithoutStep(spike)])
    assert_same_end(run, expected)


@pytest.mark.parametrize(("spike", "n_skipped"), [(WINDOW - 1, 0), (WINDOW, 1)])
def test_nothing_is_skipped_before_the_window_is_full(spike, n_skipped):
    algorithm = SkipLossSpikes(loss_z_threshold=HIGH, window=WINDOW)
    fit(network_with_spikes(), [algorithm], [spike])
    assert algorithm.n_skipped == n_skipped


def test_not_even_what_stands_out_from_the_first_values():
    algorithm, state = SkipLossSpikes(1.0, window=WINDOW), build_state()
    reasons = []
    for n in range(WINDOW + 1):
        reasons.append(algorithm.reason_to_skip(Update(10.0**n, 1.0), state))
        algorithm.after_batch(state)
    assert [reason is None for reason in reasons] == [True] * WINDOW + [False]


def test_what_was_skipped_enters_the_window_so_that_a_new_level_becomes_usual():
    algorithm = SkipLossSpikes(loss_z_threshold=HIGH, window=WINDOW)
    fit(network_with_spikes(), [algorithm], [8, 9, 10, 11])
    assert algorithm.n_skipped == 1


def test_a_resumed_run_knows_what_was_usual(tmp_path):
    def run(folder: str, **arguments):
        algorithm = SkipLossSpikes(loss_z_threshold=HIGH, norm_z_threshold=HIGH, window=WINDOW)
        save = {"save_folder": str(tmp_path / folder), "save_interval": "1ba"}
        return fit(network_with_spikes(), [algorithm], [8, 11], **save, **arguments), algorithm

    whole, expected = run("whole")
    assert expected.n_skipped >= 1
    for n_batches in (4, 8, 9):
        checkpoint = str(tmp_path / "whole" / f"ep0-ba{n_batches}-rank0.pt")
        part, algorithm = run(f"from-{n_batches}", load_path=checkpoint)
        assert algorithm.n_skipped == expected.n_skipped
        assert algorithm.state_dict()["values"] == expected.state_dict()["values"]
        assert_same_end(part, whole)


def test_a_nan_is_left_to_the_other_algorithm():
    spikes, nonfinite = SkipLossSpikes(HIGH, HIGH, window=WINDOW), SkipNonfinite()
    for algorithms in ([spikes, nonfinite], [nonfinite, spikes]):
        run = fit(network_with_spikes(math.nan), algorithms, [8])
        assert (spikes.n_skipped, nonfinite.n_skipped) == (0, 1)
        assert all(torch.isfinite(value).all() for value in weights(run.state.model).values())
        assert all(math.isfinite(v) for vs in spikes.state_dict()["values"].values() for v in vs)


# Settings


@pytest.mark.parametrize("settings", [{}, {"loss_z_threshold": math.inf, "window": 2}])
def test_without_a_threshold_no_bit_changes_and_the_receipt_says_so(settings):
    algorithm = SkipLossSpikes(**settings)
    assert algorithm.loss_z_threshold is None
    run = fit(network_with_spikes(), [algorithm], [8])
    (receipt,) = receipts(run.state.algorithms)
    assert (receipt["count"], receipt["changed"]) == (0, "skips nothing: it has no threshold")
    assert_same_end(run, fit(network_with_spikes(), [], [8]))


@pytest.mark.parametrize("threshold", [0.0, -1.0, 11.3, math.nan])
def test_a_threshold_that_no_score_could_pass_is_refused(threshold):
    """A value among 128 is at most sqrt(127) = 11.27 deviations from their mean."""
    with pytest.raises(ValueError, match=r"loss_z_threshold must be .* 11\.27, got"):
        SkipLossSpikes(loss_z_threshold=threshold)
    with pytest.raises(ValueError, match="norm_z_threshold must be"):
        SkipLossSpikes(norm_z_threshold=threshold)
    with pytest.raises(ValueError, match="window must be at least 2"):
        SkipLossSpikes(window=1)


def test_the_highest_score_is_what_the_message_says():
    for n in (2, 6, 128):
        assert newest_z_score([0.0] * (n - 1) + [1.0]) == pytest.approx(math.sqrt(n - 1))


# Two ranks

TWO_RANKS = """
import sys
import torch
from composer.utils import dist
from test_skip_loss_spikes import HIGH, WINDOW, SkipLossSpikes, fit, network_with_spikes, weights

torch.set_num_threads(1)
algorithm = SkipLossSpikes(loss_z_threshold=HIGH, window=WINDOW)
run = fit(network_with_spikes(), [algorithm], [8], microbatch_size=2)
torch.save([algorithm.state_dict(), weights(run.state.model)],
           f"{sys.argv[1]}/{dist.get_global_rank()}.pt")
"""


def test_ranks_judge_by_the_loss_of_all(tmp_path):
    """The spike is on one of them."""
    script = tmp_path / "two_ranks.py"
    here = Path(__file__).parent
    script.write_text(f"import sys\nsys.path[:0] = [{str(here)!r}]\n{TWO_RANKS}")
    subprocess.run(
        [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(script), str(tmp_path)],
        check=True,
        timeout=300,
        cwd=here.parents[1],
    )
    (first, ours), (second, theirs) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert first["n_skipped"] == second["n_skipped"] == 1
    assert first["values"] == second["values"]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    one_rank = SkipLossSpikes(loss_z_threshold=HIGH, window=WINDOW)
    fit(network_with_spikes(), [one_rank], [8])
    for what, values in one_rank.state_dict()["values"].items():
        assert first["values"][what] == pytest.approx(values, rel=1e-4)

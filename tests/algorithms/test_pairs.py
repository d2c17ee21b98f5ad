"""Every pair of algorithms trains together, whatever the order of their lines, or says why not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import composer.algorithms
import pytest
import torch
from composer import Algorithm
from settings import ALGORITHMS, runs_here
from training import build_network, train, weights

from algorithms.alibi import ALiBi
from algorithms.pad_vocabulary import PadVocabulary
from algorithms.parallel_residual import ParallelResidual
from composer_gpt2 import registry
from composer_gpt2.contract import NoEffectError, SpeedupAlgorithm, receipts

# Composer's own that a recipe may use on a CPU, each with arguments by which it acts at once.
COMPOSERS: dict[str, Callable[[], Algorithm]] = {
    "gradient_clipping": lambda: composer.algorithms.GradientClipping("norm", 0.1),
    "ema": lambda: composer.algorithms.EMA(half_life="1ba"),
    "sam": lambda: composer.algorithms.SAM(interval=1),
    "swa": lambda: composer.algorithms.SWA(swa_start="0.3dur", update_interval="1ba"),
}
MAKERS = {name: case.make for name, case in ALGORITHMS.items()} | COMPOSERS
NAMES = {name: case.make().name for name, case in ALGORITHMS.items()}
PAIRS = [
    (one, other)
    for one, other in itertools.combinations(MAKERS, 2)
    if one in NAMES and NAMES[one] != NAMES.get(other)
]

# What cannot be, and why. A CPU only gains from norms that follow an addition.
REFUSED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("parallel_residual", "fused_layernorm"): (NoEffectError, "parallel residual has none"),
    ("parallel_residual", "fused_block"): (ValueError, "blocks of another kind"),
    ("fused_gelu", "fused_block"): (ValueError, "has GELU in one kernel"),
    ("fused_block", "fused_layernorm"): (ValueError, "has its LayerNorms in one kernel"),
    ("skip_loss_spikes", "sam"): (ValueError, "computes gradients twice"),
    ("skip_nonfinite", "sam"): (ValueError, "computes gradients twice"),
}


def make(name: str) -> Algorithm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWA's about several GPUs
        return MAKERS[name]()


def test_every_usable_name_is_in_a_pair():
    only_on_gpus = {"low_precision_layernorm"}
    ours = {case.make().name for case in ALGORITHMS.values()}
    assert ours | set(COMPOSERS) | only_on_gpus == set(registry.names("algorithms"))


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_a_pair_trains_three_steps_in_either_order(pair: tuple[str, str]):
    precisions = {ALGORITHMS[name].cpu_precision for name in pair if name in ALGORITHMS}
    precision = "amp_bf16" if "amp_bf16" in precisions else "fp32"
    if not all(runs_here(ALGORITHMS[name]) for name in pair if name in ALGORITHMS):
        pytest.skip("the CPU has no AVX512-BF16, or there is no C++ compiler")
    ends = []
    for names in (pair, pair[::-1]):
        algorithms = [make(name) for name in names]
        if isinstance(algorithms[0], composer.algorithms.SWA):
            # It copies the model when the Trainer is built.
            with pytest.raises(ValueError, match="SWA must be listed after"):
                train(build_network(precision), algorithms)
            continue
        if pair in REFUSED:
            error, reason = REFUSED[pair]
            with pytest.raises(error, match=reason):
                train(build_network(precision), algorithms)
            continue
        run, losses = train(build_network(precision), algorithms)
        assert len(losses.of_batches) == 3
        assert all(loss < 6 for loss in losses.of_batches)  # ln(101) = 4.6
        n_ours = sum(isinstance(algorithm, SpeedupAlgorithm) for algorithm in algorithms)
        found = receipts(run.state.algorithms)
        assert len(found) == n_ours
        assert all(receipt["count"] > 0 for receipt in found)
        ends.append(weights(run.state.model))
    for end in ends[1:]:
        for name, value in ends[0].items():
            assert torch.equal(value, end[name]), name


@pytest.mark.parametrize("name", [name for name in COMPOSERS if name != "sam"])
def test_composers_own_resume_beside_ours(name: str, tmp_path):
    """SAM is not resumable, with ours or without; recipes refuse it."""

    def run(**arguments):
        algorithms = [ALiBi(), PadVocabulary(16), ParallelResidual(), make(name)]
        return train(build_network(), algorithms, max_duration="4ba", **arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SWA's about several GPUs
        whole, losses = run(save_folder=str(tmp_path / "whole"), save_interval="1ba")
        checkpoint = str(tmp_path / "whole" / "ep0-ba2-rank0.pt")
        part, others = run(
            load_path=checkpoint, save_folder=str(tmp_path / "part"), save_interval="1ba"
        )
    assert others.of_batches == losses.of_batches[2:]
    end = weights(whole.state.model)
    for parameter, value in weights(part.state.model).items():
        assert torch.equal(value, end[parameter]), parameter

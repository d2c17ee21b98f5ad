"""skip_nonfinite: samples that really make a NaN, in real runs; and the samples that it names."""

from __future__ import annotations

import itertools
import json
import logging
import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer import Algorithm, Callback, Trainer
from composer.algorithms import SAM, GradientClipping
from composer.core import DataSpec, Precision
from composer.optim import DecoupledAdamW
from composer.utils import dist
from streaming import MDSWriter
from torch import nn
from training import N_TOKENS, TOKENS, build_network, trainer, weights

from algorithms.skip_loss_spikes import SkipLossSpikes
from algorithms.skip_nonfinite import SkipNonfinite, drop_nonfinite_gradients
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import NoEffectError
from composer_gpt2.data.batch_samples import SampleLocation, describe_samples, samples_of_batch
from composer_gpt2.data.streaming import StreamingTokens, build_token_dataloader
from composer_gpt2.update_skipping import NonfiniteError, Update, measure_effect

SECOND, THIRD = 1, 2  # batches of four sequences
BAD = [100, 100]  # no other sequence begins so


def with_bad_samples(batches: Sequence[int], tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """One sequence of each of these batches is marked."""
    tokens = tokens.clone()
    for batch in batches:
        tokens[4 * batch + 1, :2] = torch.tensor(BAD)
    return tokens


def network_that_breaks(value: float = math.nan) -> GPT2Model:
    """In training, the first embedding of a marked sequence is multiplied by this."""
    model = build_network()

    def break_marked(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        (tokens,) = arguments
        marked = (tokens[:, :2] == torch.tensor(BAD)).all(1)
        factor = torch.ones(output.shape[:2]).masked_fill(
            marked[:, None] & (torch.arange(output.shape[1]) == 0), value
        )
        return output * factor[..., None] if marked.any() and module.training else output

    model.model.transformer.wte.register_forward_hook(break_marked)
    return model


class WithoutStep(Callback):
    """The optimizer makes no step in these batches."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def batch_start(self, state, logger):
        (optimizer,) = state.optimizers
        if state.timestamp.batch.value in self.batches:
            optimizer.step = lambda closure: closure()  # all but the step itself

    def batch_end(self, state, logger):
        state.optimizers[0].__dict__.pop("step", None)


def fit(model: GPT2Model, algorithms: Sequence[Algorithm] = (), **arguments: Any) -> Trainer:
    run = trainer(model, algorithms, max_duration="6ba", **arguments)
    run.fit()
    run.close()
    return run


def assert_same_end(one: Trainer, other: Trainer) -> None:
    """Bitwise: weights, moments, counts of steps."""
    assert one.state.timestamp.batch == other.state.timestamp.batch
    end = weights(other.state.model)
    for name, value in weights(one.state.model).items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, end[name]), name
    mine, theirs = (run.state.optimizers[0].state_dict()["state"] for run in (one, other))
    assert len(mine) == len(end)
    for key, remembered in mine.items():
        for name, value in remembered.items():
            assert torch.equal(value, theirs[key][name]), (key, name)


def bad_gradient(model: GPT2Model, value: float, batch: int) -> GPT2Model:
    """One number of one gradient is replaced in one batch; its loss is fine."""
    seen = []

    def replace(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(True)  # once in each of two micro-batches
        gradient = gradient.clone()
        if len(seen) == 2 * batch + 2:
            gradient[3] = value
        return gradient

    model.model.transformer.ln_f.bias.register_hook(replace)
    return model


# What is skipped


def test_without_it_one_sample_ruins_all_weights():
    run = fit(network_that_breaks(), tokens=with_bad_samples([SECOND]))
    assert not any(torch.isfinite(value).all() for value in weights(run.state.model).values())


def test_a_bad_sample_costs_the_update_of_its_batch_and_nothing_else(caplog):
    tokens = with_bad_samples([SECOND])
    algorithm = SkipNonfinite()
    with caplog.at_level(logging.WARNING):
        run = fit(network_that_breaks(), [algorithm], tokens=tokens)
    assert (algorithm.n_skipped, algorithm.n_skipped_in_a_row) == (1, 0)
    (said,) = [r.message for r in caplog.records if "skipped" in r.message]
    assert said == (
        "skip_nonfinite: skipped the update of batch 2, loss nan, gradient norm nan "
        "(1 in a row, 1 in all); samples unknown, since the data loader is not one of streaming's"
    )
    without_step = fit(build_network(), callbacks=[WithoutStep(SECOND)], tokens=tokens)
    assert_same_end(run, without_step)
    assert run.state.timestamp.token == 6 * 4 * N_TOKENS
    assert not torch.equal(*(weights(r.state.model)["model.transformer.h.0.attn.c_attn.weight"]
                             for r in (run, fit(build_network(), tokens=tokens))))  # fmt: skip


CLIPPINGS = {
    "no clipping": None,
    "by norm": ("norm", 1.0),
    "by value": ("value", 0.1),  # would make an infinity finite
    "adaptive": ("adaptive", 0.01),
}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("kind", CLIPPINGS)
def test_a_bad_gradient_is_seen_before_clipping_whatever_the_order(kind, value):
    """1e30 is finite; the square in the norm is not."""
    arguments = CLIPPINGS[kind]
    clipping = [] if arguments is None else [GradientClipping(*arguments)]
    expected = fit(build_network(), clipping, callbacks=[WithoutStep(THIRD)])
    for algorithms in ([SkipNonfinite(), *clipping], [*clipping, SkipNonfinite()]):
        run = fit(bad_gradient(build_network(), value, THIRD), algorithms)
        assert_same_end(run, expected)


def test_a_loss_that_alone_is_bad_is_skipped_too(monkeypatch):
    """Its gradients are finite: the model adds an infinity that depends on nothing."""
    model, seen = build_network(), []
    loss = model.loss

    def with_infinity(outputs: Any, batch: Any) -> torch.Tensor:
        seen.append(True)
        return loss(outputs, batch) + (math.inf if len(seen) == 3 else 0.0)

    monkeypatch.setattr(model, "loss", with_infinity)
    run = fit(model, [SkipNonfinite()])
    assert_same_end(run, fit(build_network(), callbacks=[WithoutStep(SECOND)]))


def test_a_healthy_run_is_bitwise_the_same_with_it():
    clipping = [GradientClipping("norm", 0.1)]
    algorithm = SkipNonfinite()
    assert_same_end(fit(build_network(), [algorithm, *clipping]), fit(build_network(), clipping))
    assert algorithm.n_skipped == 0


def test_schedules_go_on_through_a_skipped_batch():
    from composer.optim import LinearScheduler

    tokens = with_bad_samples([SECOND])
    rates = []
    for model, algorithms, callbacks in (
        (network_that_breaks(), [SkipNonfinite()], []),
        (build_network(), [], [WithoutStep(SECOND)]),
    ):
        schedulers = [LinearScheduler(alpha_f=0.1)]
        run = fit(model, algorithms, tokens=tokens, schedulers=schedulers, callbacks=callbacks)
        rates.append(run.state.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == rates[1] == pytest.approx(1e-2 * (1 - 0.9 * 5 / 6))


def test_a_fp16_scaler_keeps_its_own_business():
    """It finds its scale by infinite gradients, and skips those updates itself."""
    algorithm = SkipNonfinite()
    scaled: Any = SimpleNamespace(precision=Precision.AMP_FP16)
    plain: Any = SimpleNamespace(precision=Precision.AMP_BF16)
    assert algorithm.reason_to_skip(Update(3.0, math.inf), scaled) is None
    assert algorithm.reason_to_skip(Update(3.0, math.inf), plain) is not None
    assert algorithm.reason_to_skip(Update(math.nan, 1.0), scaled) is not None


# Counting, resuming, stopping


def test_a_resumed_run_counts_on_and_ends_as_one_never_stopped(tmp_path):
    tokens = with_bad_samples([0, SECOND, 3])

    def run(folder: str, **arguments):
        algorithm = SkipNonfinite()
        save = {"save_folder": str(tmp_path / folder), "save_interval": "1ba"}
        return fit(
            network_that_breaks(), [algorithm], tokens=tokens, **save, **arguments
        ), algorithm

    whole, counted = run("whole")
    assert (counted.n_skipped, counted.n_skipped_in_a_row) == (3, 0)
    for n_batches in (1, 2):  # after a skipped one, and between two
        checkpoint = str(tmp_path / "whole" / f"ep0-ba{n_batches}-rank0.pt")
        part, counted = run(f"from-{n_batches}", load_path=checkpoint)
        assert (counted.n_skipped, counted.n_skipped_in_a_row) == (3, 0)
        assert_same_end(part, whole)
    saved = torch.load(checkpoint, weights_only=False)["state"]
    ((_, kept),) = saved["algorithms"]
    assert (kept["n_skipped"], kept["n_skipped_in_a_row"]) == (2, 2)


def test_more_in_a_row_than_tolerated_end_the_run_with_good_weights_and_checkpoints(tmp_path):
    tokens = with_bad_samples([SECOND, THIRD, 3])
    save = {"save_folder": str(tmp_path), "save_interval": "1ba"}
    run = trainer(network_that_breaks(), [SkipNonfinite(max_skipped=2)], tokens=tokens,
                  max_duration="6ba", **save)  # fmt: skip
    with pytest.raises(
        NonfiniteError, match=r"batch 4 are not .* 2 updates in a row .* as batch 1 left"
    ):
        run.fit()
    run.close()
    good = fit(build_network(), callbacks=[WithoutStep(1, 2, 3, 4, 5)], tokens=tokens)
    for model in (run.state.model, good.state.model):
        assert weights(model).keys() == weights(good.state.model).keys()
    checkpoints = sorted(path.name for path in tmp_path.glob("ep*.pt"))
    assert checkpoints == [f"ep0-ba{n}-rank0.pt" for n in (1, 2, 3)]
    last = torch.load(tmp_path / checkpoints[-1], weights_only=False)["state"]
    for name, value in weights(good.state.model).items():
        assert torch.equal(value, weights(run.state.model)[name])
        assert torch.equal(value, last["model"][name])
    # Started again, it comes to the same end: the count is in the checkpoint.
    with pytest.raises(NonfiniteError, match="batch 4 are not"):
        fit(network_that_breaks(), [SkipNonfinite(max_skipped=2)], tokens=tokens,
            load_path=str(tmp_path / checkpoints[-1]))  # fmt: skip


def test_more_in_all_than_tolerated_end_the_run_too():
    tokens = with_bad_samples([0, 2, 4])
    algorithm = SkipNonfinite(max_skipped=1, max_skipped_in_all=2)
    run = trainer(network_that_breaks(), [algorithm], tokens=tokens, max_duration="6ba")
    with pytest.raises(NonfiniteError, match=r"batch 5 are not .*and 2 in all .*in_all 2"):
        run.fit()
    run.close()
    with pytest.raises(NonfiniteError, match="batch 1 are not"):
        fit(network_that_breaks(), [SkipNonfinite(max_skipped=0)], tokens=tokens)
    with pytest.raises(ValueError, match="from 0 to max_skipped_in_all, got 3 and 2"):
        SkipNonfinite(max_skipped=3, max_skipped_in_all=2)


class RuinedWeight(Callback):
    """As an update with too high a learning rate leaves it, after the second batch."""

    @torch.no_grad()
    def batch_end(self, state, logger):
        if state.timestamp.batch == 2:
            state.model.model.transformer.ln_f.weight[0] = math.inf


def test_weights_that_are_bad_themselves_end_the_run_at_once():
    """No batch could be good any more."""
    run = trainer(
        build_network(), [SkipNonfinite()], max_duration="6ba", callbacks=[RuinedWeight()]
    )
    with pytest.raises(
        NonfiniteError, match=r"batch 3 are not .* 1 parameters have not been finite since batch 2 "
    ):
        run.fit()
    run.close()


# The function, the receipt, what cannot be


@pytest.mark.parametrize("loss", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("gradient", [1.0, 0.0, math.nan, math.inf, 1e30])
def test_the_function_drops_all_gradients_or_none(loss, gradient):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter()]
    parameters[0].grad = torch.ones(3)
    parameters[1].grad = torch.full((2, 2), gradient)
    bad = not (loss == 1.0 and gradient in (1.0, 0.0))
    assert drop_nonfinite_gradients(iter(parameters), torch.tensor(loss)) is bad
    assert [parameter.grad is None for parameter in parameters] == [bad, bad, True]


@pytest.mark.parametrize(
    "build",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
        lambda groups: torch.optim.SGD(groups, lr=1e-3),
        lambda groups: torch.optim.Adafactor(groups, lr=1e-3),
        lambda groups: DecoupledAdamW(groups, lr=1e-3),
    ],
)
def test_the_probe_finds_the_fault_and_touches_nothing_of_the_run(build):
    model = build_network()
    first, *rest = model.parameters()
    optimizer = build([{"params": [first], "lr": 0.1}, {"params": []}, {"params": rest}])
    optimizer.step = lambda: pytest.fail("it must not step")  # a scheduler's wrapper is one, too
    before, rng = weights(model), torch.get_rng_state()
    receipt = SkipNonfinite().apply_to_model(model.model, [optimizer])
    assert receipt.probe["numbers changed by a bad gradient"] == 0
    assert receipt.probe["without it"] >= 2  # a number of each group
    assert receipt.count == len([first, *rest])
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name])
    with pytest.raises(NoEffectError, match="must keep a bad gradient out"):
        measure_effect("skip_nonfinite", [optimizer], math.nan, lambda parameters: None)


def test_an_optimizer_that_computes_its_own_gradients_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAM's, that it cannot be resumed
        sam = SAM(interval=1)
    with pytest.raises(ValueError, match="SkipNonfinite cannot be used with SAM: it computes"):
        trainer(build_network(), [SkipNonfinite(), sam])
    parameters = list(build_network().parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    optimizer._step_supports_amp_closure = True  # type: ignore[attr-defined]
    with pytest.raises(NoEffectError, match="takes the gradients it is given, got SGD"):
        SkipNonfinite().apply_to_model(build_network().model, [optimizer])


def test_two_that_skip_updates_measure_once(monkeypatch):
    calls = []
    total_norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(
        torch.nn.utils, "get_total_norm", lambda *a: calls.append(True) or total_norm(*a)
    )
    run = trainer(build_network(), [SkipLossSpikes(3.0, 3.0), SkipNonfinite()], max_duration="6ba")
    calls.clear()  # those of the probes
    run.fit()
    run.close()
    assert len(calls) == 6


# The samples of a batch. Sequence n of a stream begins with n and the number of the stream.

T = 8


def write_stream(folder: Path, number: int, n_samples: int = 40) -> str:
    options = {"hashes": ["xxh64"], "size_limit": 400}  # 12 sequences in a shard
    columns = {"tokens": f"ndarray:uint16:{T}"}
    with MDSWriter(out=str(folder / "train"), columns=columns, **options) as writer:
        for n in range(n_samples):
            tokens = np.arange(T, dtype=np.uint16)
            tokens[:2] = n, number
            writer.write({"tokens": tokens})
    return str(folder)


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("streams")
    return [write_stream(folder / f"stream-{number}", number) for number in range(2)]


def content(location: SampleLocation) -> tuple[int, int]:
    """What the sequence at this place begins with, read from the file."""
    index = json.loads(Path(location.stream, "index.json").read_text())
    names = [shard["raw_data"]["basename"] for shard in index["shards"]]
    before = index["shards"][: names.index(location.shard)]
    n = sum(shard["samples"] for shard in before) + location.index
    assert location.index < index["shards"][names.index(location.shard)]["samples"]
    return n, int(Path(location.stream).parent.name[-1])


class SeenAndNamed(Callback):
    """What was in each batch, and what is said of it while it is trained and once it is."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, ...]]] = []
        self.named: list[list[tuple[int, ...]]] = []

    def batch_start(self, state, logger):
        self.seen.append(sorted(tuple(row[:2].tolist()) for row in state.batch["input_ids"]))

    def after_train_batch(self, state, logger):
        self.named.append(sorted(content(location) for location in samples_of_batch(state)))

    def batch_end(self, state, logger):
        assert self.named[-1] == sorted(map(content, samples_of_batch(state)))


def stream_trainer(
    options: dict[str, Any], *, num_workers: int = 0, drop_last: bool = False, **arguments: Any
) -> Trainer:
    dist.initialize_dist("cpu")
    options = {"batch_size": 4, "sequence_length": T, "check_tokenizer": False, **options}
    loader = build_token_dataloader(
        StreamingTokens(**options), num_workers=num_workers, drop_last=drop_last
    )
    model = arguments.pop("model", None) or build_network()
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        train_dataloader=DataSpec(loader, split_batch=lambda batch, size: [batch]),
        device="cpu",
        progress_bar=False,
        log_to_console=False,
        **arguments,
    )


ORDERS = {
    "in order, with a last batch that is not full": {"batch_size": 3},
    "shuffled": {"shuffle": True},
    "shuffled, several canonical nodes": {"shuffle": True, "num_canonical_nodes": 4},
    "shuffled in blocks": {"shuffle": True, "shuffle_block_size": 20},
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_samples_named_are_those_of_the_batch(order, streams, tmp_path):
    seen = SeenAndNamed()
    run = stream_trainer(
        {"remote": streams[0], **ORDERS[order]}, max_duration="2ep", callbacks=[seen]
    )
    run.fit()
    run.close()
    assert len(seen.seen) >= 20
    assert seen.named == seen.seen
    assert sorted(itertools.chain(*seen.seen)) == sorted(2 * [(n, 0) for n in range(40)])


MIXTURES = {
    "by proportion": [{"proportion": 0.7}, {"proportion": 0.3}],
    "by repeats": [{"repeat": 1.5}, {"repeat": 0.5}],
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_they_are_in_a_mixture_and_after_a_resume_in_mid_epoch(
    mixture, num_workers, streams, tmp_path
):
    parts = zip(streams, MIXTURES[mixture], strict=True)
    mixed = {
        "streams": {str(i): {"remote": remote, **part} for i, (remote, part) in enumerate(parts)},
        "shuffle": True,
        "num_canonical_nodes": 2,
    }

    def run(**arguments) -> SeenAndNamed:
        seen = SeenAndNamed()
        run = stream_trainer(
            mixed, num_workers=num_workers, max_duration="30ba", callbacks=[seen], **arguments
        )
        run.fit()
        run.close()
        assert seen.named == seen.seen
        return seen

    save = {"save_folder": str(tmp_path / "run"), "save_interval": "7ba"}
    whole = run(**save)
    assert {number for batch in whole.seen for _, number in batch} == {0, 1}
    for checkpoint, n_batches in (("ep0-ba7", 7), ("ep1-ba28", 28)):
        part = run(load_path=str(tmp_path / "run" / f"{checkpoint}-rank0.pt"))
        assert part.seen == whole.seen[n_batches:]


def test_the_error_names_the_samples_of_the_last_batch(streams):
    options = {"remote": streams[0], "shuffle": True, "batch_size": 8}
    seen = SeenAndNamed()
    run = stream_trainer(options, max_duration="1ep", callbacks=[seen])
    run.fit()
    run.close()
    (bad,) = {samples[3] for samples in seen.seen[2:3]}
    model = build_network()
    model.model.transformer.wte.register_forward_hook(
        lambda module, arguments, output: (
            output * math.nan if bad[0] in arguments[0][:, 0] else output
        )
    )
    run = stream_trainer(
        options, model=model, algorithms=[SkipNonfinite(max_skipped=0)], max_duration="1ep"
    )
    with pytest.raises(NonfiniteError) as error:
        run.fit()
    run.close()
    named = describe_samples(samples_of_batch(run.state))
    assert "batch 3 are not (loss nan, gradient norm nan)" in str(error.value)
    assert str(error.value).endswith(f"Samples of the batch: {named}.")
    assert named.startswith(f"{streams[0]}/train: shard.0000")


def test_the_line_of_samples_is_short():
    places = [SampleLocation("s3://b/c", "shard.00002.mds", n) for n in (5, 3, 4, 9, 3)]
    places += [SampleLocation("s3://b/c", "shard.00000.mds", 7)]
    places += [SampleLocation("s3://b/d", "shard.00000.mds", 0)]
    assert describe_samples(places) == (
        "s3://b/c: shard.00000.mds 7; shard.00002.mds 3-5, 9 | s3://b/d: shard.00000.mds 0"
    )


# Two ranks

TWO_RANKS = """
import json, logging, math, sys
import torch
from composer.utils import dist
from algorithms.skip_nonfinite import SkipNonfinite
from test_skip_nonfinite import SeenAndNamed, WithoutStep, stream_trainer
from training import build_network, weights

folder, remote = sys.argv[1:]
torch.set_num_threads(1)
logging.basicConfig(filename=f"{folder}/{dist.get_global_rank()}.log")
BAD_BATCHES = (2, 4)

def run(breaks):
    model, calls = build_network(), []
    if breaks and dist.get_global_rank() == 1:  # on one rank only
        loss = model.loss
        def broken(outputs, batch):
            calls.append(True)
            return loss(outputs, batch) * (math.nan if len(calls) - 1 in BAD_BATCHES else 1.0)
        model.loss = broken
    algorithm, seen = SkipNonfinite(), SeenAndNamed()
    options = {"remote": remote, "batch_size": 2, "shuffle": True}
    trainer = stream_trainer(
        options, model=model, max_duration="6ba", algorithms=[algorithm] if breaks else [],
        callbacks=[seen] + ([] if breaks else [WithoutStep(*BAD_BATCHES)]),
    )
    trainer.fit()
    trainer.close()
    return algorithm.n_skipped, seen.seen, seen.named, weights(trainer.state.model)

n_skipped, seen, named, broken = run(True)
whole = run(False)[-1]
assert all(torch.equal(broken[name], value) for name, value in whole.items())
with open(f"{folder}/{dist.get_global_rank()}.json", "w") as file:
    json.dump([n_skipped, seen, named, sum(v.double().sum().item() for v in broken.values())], file)
"""


def test_ranks_skip_together_what_is_bad_on_one_of_them(streams, tmp_path):
    script = tmp_path / "two_ranks.py"
    here = Path(__file__).parent
    script.write_text(f"import sys\nsys.path[:0] = [{str(here)!r}]\n{TWO_RANKS}")
    subprocess.run(
        [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(script), str(tmp_path),
         streams[0]],
        check=True, timeout=300, cwd=here.parents[1],
    )  # fmt: skip
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == second[0] == 2
    assert first[3] == second[3]
    # Each rank names the samples of both.
    of_both = [sorted(one + other) for one, other in zip(first[1], second[1], strict=True)]
    assert first[2] == second[2] == of_both
    log = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert log[0].count("skip_nonfinite: skipped the update of batch") == 2
    assert "batch 3, loss nan" in log[0]
    assert "skipped" not in log[1]

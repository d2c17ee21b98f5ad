"""What every algorithm must pass: the ten questions of the project's style, asked of each one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Event
from composer.algorithms import GradientClipping
from composer.utils import dist
from settings import ALGORITHMS, Case, runs_here
from torch import nn
from training import N_TOKENS, VOCAB_SIZE, build_network, train, trainer, weights

import algorithms as package
from composer_gpt2.contract import (
    ArchitectureMismatchError,
    NoEffectError,
    Receipt,
    SpeedupAlgorithm,
    receipts,
)
from composer_gpt2.optimizer_groups import parameters_held

each_case = pytest.mark.parametrize("case", ALGORITHMS.values(), ids=ALGORITHMS)
each_function = pytest.mark.parametrize(
    "case",
    [case for case in ALGORITHMS.values() if case.function],
    ids=[name for name, case in ALGORITHMS.items() if case.function],
)


@pytest.fixture(autouse=True)
def _only_where_it_runs(request):
    callspec = getattr(request.node, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    if case is not None and not runs_here(case):
        pytest.skip("the CPU has no AVX512-BF16, or there is no C++ compiler")


def assert_equal(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.shape == right[name].shape, name
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)


def test_every_folder_is_under_test():
    folders = {path.parent.name for path in Path(package.__path__[0]).glob("*/__init__.py")}
    assert folders == {case.make().name for case in ALGORITHMS.values()}


# 1. Does it do something, and only what it says?


@each_case
def test_it_changes_the_loss_if_and_only_if_it_says_so(case: Case):
    _, without = train(build_network(case.cpu_precision))
    run, with_it = train(build_network(case.cpu_precision), [case.make()])
    pairs = zip(with_it.of_batches, without.of_batches, strict=True)
    differences = [abs(one - other) for one, other in pairs]
    if case.changes_loss:
        assert max(differences) > 3e-4
    else:
        # The same function in another form: rounding of the precision, 8 bits of bfloat16.
        assert max(differences) < (1e-4 if case.cpu_precision == "fp32" else 2e-2)
        assert with_it.shapes == without.shapes
    (receipt,) = receipts(run.state.algorithms)
    assert receipt["count"] > 0
    assert receipt["probe"]
    assert receipt["settings"] == case.make().settings
    json.dumps(receipt, allow_nan=False)


# 3. Neutral is neutral.


@pytest.mark.parametrize(
    "case",
    [case for case in ALGORITHMS.values() if case.neutral],
    ids=[name for name, case in ALGORITHMS.items() if case.neutral],
)
def test_neutral_settings_change_no_bit(case: Case):
    assert case.neutral is not None
    with_it, _ = train(build_network(case.cpu_precision), [case.neutral()])
    without, _ = train(build_network(case.cpu_precision))
    assert_equal(with_it.state.model, without.state.model)
    assert receipts(with_it.state.algorithms)[0]["count"] == 0


# 4. No silent no-op.


@each_function
def test_the_function_refuses_a_model_that_it_does_not_know(case: Case):
    assert case.function is not None
    with pytest.raises(NoEffectError, match="GPT2LMHeadModel"):
        case.function(nn.Linear(2, 2))


@each_function
def test_the_function_refuses_a_model_that_ddp_has_wrapped(case: Case):
    """DDP would go on reducing the gradients of the parameters that were there before."""
    assert case.function is not None
    dist.initialize_dist("cpu")
    model = build_network(case.cpu_precision)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(),
                                             rank=0, world_size=1)  # fmt: skip
    with pytest.raises(NoEffectError, match="before a model is wrapped"):
        case.function(nn.parallel.DistributedDataParallel(model))


@each_case
def test_a_batch_that_it_does_not_know_is_refused(case: Case):
    algorithm = case.make()
    run = trainer(build_network(case.cpu_precision), [algorithm])
    run.close()
    if not algorithm.acts_on_batch(run.state):
        pytest.skip("it does not act on batches")
    for batch in (torch.zeros(2, N_TOKENS), {"tokens": 1}, {"input_ids": torch.zeros(4)}):
        with pytest.raises(NoEffectError, match=f"{algorithm.name} needs batches"):
            algorithm.apply_to_batch(batch, run.state)


# 5. Function equals class.


@each_function
def test_function_and_class_end_in_the_same_weights(case: Case):
    assert case.function is not None
    changed_before = build_network(case.cpu_precision)
    receipt = case.function(changed_before.model)
    assert isinstance(receipt, Receipt)
    assert receipt.count > 0
    by_function, _ = train(changed_before)
    by_class, _ = train(build_network(case.cpu_precision), [case.make()])
    assert_equal(by_function.state.model, by_class.state.model)


def test_an_algorithm_can_be_built_again_from_its_text():
    for case in ALGORITHMS.values():
        algorithm = case.make()
        again = eval(repr(algorithm), {type(algorithm).__name__: type(algorithm)})
        assert again == algorithm
        assert type(algorithm)(**algorithm.settings) == algorithm


# 6. Twice is once, or refused.


@each_function
def test_the_function_twice_is_once_or_refused(case: Case):
    assert case.function is not None
    model = build_network(case.cpu_precision).eval()
    batch = {"input_ids": torch.arange(N_TOKENS)[None], "labels": torch.arange(N_TOKENS)[None]}
    case.function(model.model)
    with torch.no_grad():
        once = model(batch)["loss"]
    refusals = []
    try:
        case.function(model.model)
    except (NoEffectError, ValueError) as error:
        refusals.append(str(error))
    assert all(case.make().name in refusal for refusal in refusals)
    with torch.no_grad():
        assert torch.equal(model(batch)["loss"], once)


@each_case
def test_the_same_algorithm_twice_in_a_trainer_is_refused(case: Case):
    with pytest.raises(ValueError, match="once, got it 2 times"):
        trainer(build_network(case.cpu_precision), [case.make(), case.make()])


# 7. The optimizer sees it.


@each_case
def test_every_parameter_is_in_one_group_and_moves(case: Case):
    run = trainer(build_network(case.cpu_precision), [case.make(), GradientClipping("norm", 1.0)])
    model = run.state.model
    held = parameters_held(run.state.optimizers)  # raises if one is there twice
    assert held == {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert len(run.state.optimizers[0].param_groups) == 2
    undecayed = run.state.optimizers[0].param_groups[1]["params"]
    assert all(parameter.ndim == 1 for parameter in undecayed)
    before = weights(model)
    run.fit()
    run.close()
    after = weights(model)
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]


# 8. Stop and resume.


@each_case
def test_a_resumed_run_ends_as_one_never_stopped(case: Case, tmp_path):
    def run(folder: str, max_duration: str = "6ba", **arguments):
        return train(
            build_network(case.cpu_precision),
            [case.make()],
            max_duration=max_duration,
            save_folder=str(tmp_path / folder),
            save_interval="1ba",
            **arguments,
        )

    whole, losses = run("whole")
    part, others = run("part", load_path=str(tmp_path / "whole" / "ep0-ba2-rank0.pt"))
    assert others.of_batches == losses.of_batches[2:]
    assert others.shapes == losses.shapes[-len(others.shapes) :]
    assert_equal(part.state.model, whole.state.model)
    assert part.state.timestamp.token == whole.state.timestamp.token
    saved = torch.load(tmp_path / "part" / "ep0-ba6-rank0.pt", weights_only=False)["state"]
    (kept,) = [s["receipt"] for n, s in saved["algorithms"] if n == type(case.make()).__name__]
    assert Receipt(**kept) == next(iter(part.state.algorithms)).receipt


ARCHITECTURAL = {name: case for name, case in ALGORITHMS.items() if case.make().architectural}


@pytest.mark.parametrize("case", ARCHITECTURAL.values(), ids=ARCHITECTURAL)
def test_a_checkpoint_of_another_architecture_is_refused(case: Case, tmp_path):
    def run(*algorithms: SpeedupAlgorithm, **arguments):
        return train(build_network(), algorithms, max_duration="1ba", **arguments)

    name = case.make().name
    save = {"save_folder": str(tmp_path), "save_interval": "1ba", "save_overwrite": True}
    for saved, resumed in [((case.make(),), ()), ((), (case.make(),))]:
        run(*saved, **save)
        with pytest.raises(ArchitectureMismatchError, match=rf"{name}.*none|none.*{name}"):
            run(*resumed, load_path=str(tmp_path / "ep0-ba1-rank0.pt"))


# 9. Two ranks equal one.


def test_two_ranks_end_as_one(tmp_path):
    """All algorithms in one launch, for starting two processes takes longer than training."""
    script = Path(__file__).with_name("two_ranks.py")
    subprocess.run(
        [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(script), str(tmp_path)],
        check=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    for name, case in ALGORITHMS.items():
        if not runs_here(case):
            continue
        ours = torch.load(tmp_path / f"{name}.pt")
        one, _ = train(build_network(case.cpu_precision), [case.make()])
        assert ours["token"] == one.state.timestamp.token.value, name
        # Sums over ranks come in another order. AdamW's first steps have one size whatever the
        # gradient: where rounding to bfloat16 decides its sign, single weights go another way.
        for key, value in weights(one.state.model).items():
            difference = (ours["weights"][key] - value).abs()
            if case.cpu_precision == "fp32":
                assert difference.max() <= 2e-4, (name, key)
            else:
                assert difference.mean() <= 5e-3, (name, key)


# 10. It learns.


@each_case
def test_the_loss_of_a_fixed_batch_falls(case: Case):
    batch = torch.arange(4 * N_TOKENS).reshape(4, N_TOKENS) % VOCAB_SIZE
    _, losses = train(
        build_network(case.cpu_precision),
        [case.make()],
        tokens=batch.repeat(30, 1),
        max_duration="30ba",
    )
    assert losses.of_batches[-1] < 0.6 * losses.of_batches[0]


# A broken algorithm never trains.


@each_case
@pytest.mark.parametrize("method", ["apply", "apply_to_model", "apply_to_batch"])
def test_one_that_returns_early_ends_the_run_before_the_first_batch(
    case: Case, method: str, monkeypatch
):
    algorithm = case.make()
    if method == "apply_to_batch":
        probe = trainer(build_network(case.cpu_precision), [case.make()])
        acts = probe.state.algorithms[0].acts_on_batch(probe.state)  # type: ignore[attr-defined]
        probe.close()
        if not acts:
            pytest.skip("it does not act on batches")
        monkeypatch.setattr(type(algorithm), method, lambda self, batch, state: batch)
    else:
        monkeypatch.setattr(type(algorithm), method, lambda *arguments: None)
    model = build_network(case.cpu_precision)
    trained = []
    model.register_forward_hook(lambda *_: trained.append(True))
    with pytest.raises(NoEffectError, match=algorithm.name):
        train(model, [algorithm])
    assert not trained


@each_case
def test_batches_that_it_never_reached_end_the_run(case: Case, monkeypatch):
    """As if Composer no longer ran it when a batch arrives."""
    algorithm = case.make()
    run = trainer(build_network(case.cpu_precision), [algorithm])
    if not algorithm.acts_on_batch(run.state):
        run.close()
        pytest.skip("it does not act on batches")
    whole = type(algorithm).apply
    monkeypatch.setattr(
        type(algorithm),
        "apply",
        lambda self, event, *rest: event is Event.AFTER_DATALOADER or whole(self, event, *rest),
    )
    with pytest.raises(NoEffectError, match=algorithm.name):
        run.fit()
    run.close()


# It survives what users do with a model.


@each_case
def test_it_trains_under_torch_compile(case: Case):
    _, plain = train(build_network(case.cpu_precision), [case.make()], max_duration="2ba")
    _, compiled = train(
        build_network(case.cpu_precision),
        [case.make()],
        max_duration="2ba",
        compile_config={"backend": "aot_eager"},
    )
    tolerance = 1e-4 if case.cpu_precision == "fp32" else 5e-2
    assert compiled.of_batches == pytest.approx(plain.of_batches, abs=tolerance)


@each_case
def test_a_trained_model_generates_the_same_with_and_without_a_cache(case: Case):
    run, _ = train(build_network(case.cpu_precision), [case.make()])
    model = run.state.model.model.eval()  # type: ignore[union-attr]
    prompt = torch.arange(5)[None].repeat(2, 1)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **arguments)
    uncached = model.generate(prompt, attention_mask=mask, use_cache=False, **arguments)
    assert torch.equal(cached, uncached)
    assert cached.max() < VOCAB_SIZE

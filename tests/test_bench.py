"""The benchmark of a training step: it runs, says what it did, and its arithmetic is right."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_gpt2 import cli
from composer_gpt2.algorithms import PadVocabulary
from composer_gpt2.bench.ceiling import Ceiling, products, rate
from composer_gpt2.bench.contestants import SharedNetwork, contestants, hugging_face_loop, our_loop
from composer_gpt2.bench.loss_overlay import distances, run_loss_overlay
from composer_gpt2.bench.program import in_turn
from composer_gpt2.bench.settings import read_settings
from composer_gpt2.bench.tokens import random_batch, text_batches
from composer_gpt2.bench.worker import Worker
from composer_gpt2.configs import get_config
from composer_gpt2.scaling import flops_per_token, parameter_count

COMMAND = str(Path(sys.executable).with_name("composer-gpt2"))
RECIPE = """\
model: {name: gpt-nano}
data: {remote: nowhere, sequence_length: 32}
train_batch_size: 2
max_duration: 10ba
optimizer:
  adamw: {lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}
algorithms:
  gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}
  fused_cross_entropy: {}
"""
SMALL = {"batch_size": 2, "sequence_length": 32, "rounds": 2, "threads": 1}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text(RECIPE)
    return str(path)


def bench(recipe, out, *options):
    arguments = ["bench", "-f", recipe, "--batch-size", "2", "--sequence-length", "32"]
    arguments += ["--rounds", "2", "--threads", "1", "--out", str(out), *options]
    finished = subprocess.run(
        [COMMAND, *arguments], cwd=out, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    path = Path(finished.stdout.strip().splitlines()[-1])
    return path, path.read_text(), json.loads(path.with_suffix(".json").read_text())


def test_the_program_reports_every_contestant_and_divides_rightly(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # a Trainer in this process leaves such things
    path, report, results = bench(recipe, tmp_path, "--no-memory", "--no-overhead")
    assert path.name.startswith("train_step_gpt-nano_1cpu_")
    assert path.with_suffix(".svg").read_text().count("<svg") == 1
    by_key = {c["key"]: c for c in results["contestants"]}
    expected = {"hf_fp32", "hf_bf16", "composer", "default_memory", "start", "line_0", "trainer"}
    assert expected <= by_key.keys()
    assert ("hf_trainer" in by_key) != ("accelerate" in report)  # there, or the reason
    for contestant in by_key.values():
        assert contestant["label"] in report
        assert len(contestant["seconds"]) == 2
        assert all(seconds > 0 for seconds in contestant["seconds"])
        assert ", ".join(f"{value:.5g}" for value in contestant["seconds"]) in report
    assert {by_key[k]["process"] for k in ("hf_fp32", "composer", "default_memory")} == {"peers"}
    assert {by_key[k]["process"] for k in ("start", "line_0", "trainer")} == {"ours"}

    n_parameters = parameter_count("gpt-nano")
    flops = 6 * n_parameters + 12 * 3 * 48 * 32
    assert results["flops_per_token"] == flops
    # scaling.flops_per_token leaves out what is no matrix: positions, biases and norms.
    config = get_config("gpt-nano")
    vectors = n_parameters - 12 * 3 * 48**2 - config.vocab_size * 48
    assert flops - flops_per_token("gpt-nano", 32) == 6 * vectors

    ours, theirs = by_key["trainer"]["seconds"], by_key["hf_bf16"]["seconds"]
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    assert f"under bf16 autocast: **{ratio:.2f} (" in report
    shares = []
    for seconds, products_seconds in zip(ours, results["ceiling"]["bfloat16"], strict=True):
        total = sum(2 * p.m * p.k * p.n * p.count for p in products(config, 64))
        time = sum(products_seconds[p.name] * p.count for p in products(config, 64))
        shares.append(64 / seconds * flops / (total / time))
    assert f"matrix ceiling: **{statistics.median(shares):.1%} (" in report
    assert len(results["ceiling"]["float32"]) == 1
    assert "--batch-size 2 --sequence-length 32 --rounds 2 --threads 1" in report
    assert results["versions"]["commit"] in report


def test_a_fresh_process_tells_its_peak_its_start_and_its_loss(recipe):
    settings = read_settings([recipe], **SMALL)
    with Worker(settings, "peers", ["hf_fp32"]) as worker:
        answer = worker.ask(run="hf_fp32", n=2, in_all=True)
    assert len(answer["seconds"]) == 2
    assert 1e8 < answer["peak_bytes"] < 1e10
    assert answer["first_batch_end"] > 0
    torch.manual_seed(17)
    network, tokens = SharedNetwork(get_config("gpt-nano", dropout=0.0)), random_batch(2, 32)
    with torch.no_grad():
        loss = network.module()(tokens, labels=tokens).loss.item()
    assert answer["first_loss"] == pytest.approx(loss, rel=1e-4)


def test_contestants_share_weights_and_moments_but_no_gradients(recipe):
    settings = read_settings([recipe], **SMALL)
    network = SharedNetwork(get_config("gpt-nano", dropout=0.0))
    first, second = network.module(), network.module()
    loops = [
        hugging_face_loop(settings, first, autocast=False),
        our_loop(settings, second, {"fused_cross_entropy": {}}),
    ]
    for loop in loops:
        network.share_moments(loop.optimizer)
    tokens = random_batch(2, 32)
    before = first.transformer.wte.weight.detach().clone()
    loops[1].step({"input_ids": tokens, "labels": tokens})
    mine, theirs = first.transformer.wte.weight, second.transformer.wte.weight
    assert mine is not theirs
    assert not torch.equal(mine, before)  # trained by the other
    assert mine.grad is None
    assert torch.equal(
        loops[0].optimizer.state[mine]["exp_avg"], loops[1].optimizer.state[theirs]["exp_avg"]
    )
    assert loops[0].optimizer.state[mine]["exp_avg"].abs().max() > 0
    assert not torch.equal(network.separate_module().lm_head.weight, before)


def test_products_of_a_step_are_those_of_its_matrices():
    config = get_config("gpt2-125m")
    found = products(config, 4096)
    assert len(found) == 15
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert sum(p.flops * p.count for p in found) == 6 * matrices * 4096
    small = get_config("gpt-nano", vocab_size=256)
    seconds = Ceiling(small, 64, torch.float32).measure()
    assert seconds.keys() == {p.name for p in products(small, 64)}
    assert rate(products(small, 64), dict.fromkeys(seconds, 1.0)) == pytest.approx(
        sum(p.flops * p.count for p in products(small, 64))
        / sum(p.count for p in products(small, 64))
    )


def test_every_round_has_everybody_once_in_another_order(recipe):
    present, _ = contestants(read_settings([recipe], **SMALL))
    orders = [[c.key for c in in_turn(present, number)] for number in range(4)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[1] == orders[0][::-1]
    assert len({tuple(order) for order in orders}) == 4


def test_steps_add_to_one_another_and_drop_what_cannot_stand_beside_them(recipe, monkeypatch):
    replaces = dict.fromkeys(("FusedGELU", "FusedLayerNorm"), "a test says so")
    monkeypatch.setattr(PadVocabulary, "conflicts_with", replaces)
    settings = read_settings(
        [recipe],
        steps="fused_gelu,fused_layernorm; fused_cross_entropy; pad_vocabulary",
        **SMALL,
    )
    assert [list(line.algorithms) for line in settings.lines] == [
        ["fused_gelu", "fused_layernorm"],
        ["fused_gelu", "fused_layernorm", "fused_cross_entropy"],
        ["fused_cross_entropy", "pad_vocabulary"],
    ]
    assert settings.lines[2].label == "pad_vocabulary instead of fused_gelu + fused_layernorm"
    assert [line.label for line in read_settings([recipe], **SMALL).lines] == [
        "fused_cross_entropy"
    ]


def test_algorithms_that_change_the_batch_are_left_out_with_the_reason(recipe):
    shorter = "algorithms.alibi={train_sequence_length_scaling: 0.25}"
    settings = read_settings([recipe], [shorter], **SMALL)
    assert [line.label for line in settings.lines] == ["fused_cross_entropy"]
    assert "changes the batch" in settings.left_out["alibi"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt-nan"], "did you mean 'gpt-nano'"),
        (["--steps", "fused_gel"], "did you mean 'fused_gelu'"),
        (["--steps", "fused_gelu;;"], "lines separated by ';'"),
        (["--steps", "gradient_clipping"], "must be speedup algorithms"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--data", "no-such-file.txt"], "data must be a text file, got no-such-file.txt"),
        (["precision=fp32"], "precision must be amp_bf16"),
    ],
)
def test_a_mistake_is_one_message(recipe, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["composer-gpt2", "bench", "-f", recipe, *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_the_loss_overlay_trains_three_times_from_one_start(recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the loss must not move. " * 400)
    settings = read_settings([recipe], data=str(text), **SMALL)
    report = run_loss_overlay(settings, 6, out=tmp_path)
    results = json.loads(report.with_suffix(".json").read_text())
    losses = results["losses"]
    assert {len(values) for values in losses.values()} == {6}
    assert losses["hf_fp32"][-1] < losses["hf_fp32"][0]
    for key in ("hf_bf16", "ours"):
        assert results["distances"][key] == distances(losses[key], losses["hf_fp32"])
        assert 0 < results["distances"][key]["max"] < 0.02
        assert f"{results['distances'][key]['max']:.2e}" in report.read_text()
    assert report.with_suffix(".svg").exists()


def test_distances_are_absolute():
    assert distances([1.0, 2.0, 3.0], [1.5, 2.0, 2.0]) == {"mean": 0.5, "max": 1.0}


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="must have 1,024 tokens"):
        text_batches(["too short"], 4, 8, 32)
    assert text_batches(["one two three four"], 1, 1, 4).shape == (1, 1, 4)


@pytest.mark.slow
def test_memory_and_overhead_are_in_the_report(recipe, tmp_path):
    _, report, results = bench(recipe, tmp_path, "--no-peers")
    assert results["fresh"].keys() == {"start", "line_0", "trainer"}
    assert all(f["seconds_to_first_step"] > 0 for f in results["fresh"].values())
    losses = [results["fresh"][key]["first_loss"] for key in ("start", "line_0")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "ms a step" in report
    assert "Peak memory" in report

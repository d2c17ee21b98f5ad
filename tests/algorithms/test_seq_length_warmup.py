from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from composer import Callback, Evaluator, Trainer
from composer.callbacks import SpeedMonitor
from composer.optim import LinearScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader
from transformers import GPT2Config

from algorithms.alibi import ALiBi
from algorithms.seq_length_warmup import (
    SequenceLengthWarmup,
    distinct_lengths,
    sequence_length_at,
    set_batch_sequence_length,
)
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import NoEffectError, Plan

ROOT = Path(__file__).parents[2]
T, V = 32, 64  # tokens of a sequence, vocabulary


def make_model(**overrides) -> GPT2Model:
    torch.manual_seed(1)
    config = GPT2Config(
        **{"vocab_size": V, "n_positions": T, "n_embd": 16, "n_layer": 1, "n_head": 2, **overrides},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return GPT2Model(config=config, tokenizer_name=None)


def make_loader(n_sequences=64, batch_size=4, n_tokens=T, sampler=None) -> DataLoader:
    tokens = torch.randint(V, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return DataLoader(rows, batch_size=batch_size, sampler=sampler)  # type: ignore[arg-type]


class Recorder(Callback):
    """What was really fed to the network in training, and the clock before and after each batch."""

    def __init__(self, model):
        self.shapes, self.fed, self.before, self.after, self.rates = [], [0], [], [], []
        self.microbatches = []
        model.register_forward_pre_hook(self._see)

    def _see(self, model, arguments):
        if model.training:
            self.fed[-1] += arguments[0]["input_ids"].numel()
            self.microbatches.append(tuple(arguments[0]["input_ids"].shape))

    def batch_start(self, state, logger):
        self.shapes.append(tuple(state.batch["input_ids"].shape))
        assert state.batch["labels"].shape == state.batch["input_ids"].shape
        self.before.append(state.timestamp)
        self.rates.append(state.optimizers[0].param_groups[0]["lr"])
        if len(self.shapes) > 1:
            self.fed.append(0)

    def batch_end(self, state, logger):
        self.after.append(state.timestamp)

    @property
    def lengths(self):
        return [shape[1] for shape in self.shapes]


def make_trainer(algorithms, max_duration="10ba", model=None, **arguments):
    model = model or make_model()
    recorder = Recorder(model)
    trainer = Trainer(
        model=model,
        algorithms=algorithms,
        optimizers=arguments.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), 1e-3),
        train_dataloader=arguments.pop("loader", None) or make_loader(),
        max_duration=max_duration,
        precision="fp32",
        device="cpu",
        progress_bar=False,
        callbacks=[recorder, *arguments.pop("callbacks", [])],
        **arguments,
    )
    return trainer, recorder


def train(*arguments, **keywords) -> tuple[Trainer, Recorder]:
    trainer, recorder = make_trainer(*arguments, **keywords)
    trainer.fit()
    trainer.close()
    assert sum(recorder.fed) == trainer.state.timestamp.token.value
    assert list(itertools.accumulate(recorder.fed)) == [t.token.value for t in recorder.after]
    return trainer, recorder


# The schedule.

ranges = st.tuples(st.integers(1, 300), st.integers(0, 300), st.integers(1, 400)).map(
    lambda drawn: {
        "min_seq_length": drawn[0],
        "max_seq_length": drawn[0] + drawn[1],
        "step_size": drawn[2],
    }
)


@settings(deadline=None, max_examples=200)
@given(
    span=ranges,
    schedule=st.sampled_from(["linear", "step"]),
    progress=st.lists(st.floats(0, 2), min_size=2, max_size=8),
    multiple=st.sampled_from([None, 1, 2, 6]),
)
def test_the_schedule_grows_within_its_bounds_and_ends_at_the_maximum(
    span, schedule, progress, multiple
):
    dividing = multiple and multiple * span["max_seq_length"]
    arguments = {**span, "schedule": schedule, "dividing": dividing}
    lengths = [sequence_length_at(p, **arguments) for p in sorted(progress)]
    assert lengths == sorted(lengths)
    ends = (span["min_seq_length"], span["max_seq_length"])
    for length in lengths:
        assert ends[0] <= length <= ends[1]
        assert length % span["step_size"] == 0 or length in ends
        assert length in distinct_lengths(**arguments)
        assert dividing is None or dividing % length == 0
    assert sequence_length_at(1, **arguments) == ends[1]
    first = distinct_lengths(**arguments)[0]
    assert sequence_length_at(0, **arguments) == first
    assert first == ends[0] or dividing


@settings(deadline=None, max_examples=100)
@given(span=ranges, schedule=st.sampled_from(["linear", "step"]))
def test_the_distinct_lengths_are_all_those_and_only_those_that_come(span, schedule):
    points = [Fraction(k, 600) for k in range(601)]  # finer than any step: at most 300 tokens
    came = {sequence_length_at(p, **span, schedule=schedule) for p in points}
    assert sorted(came) == distinct_lengths(**span, schedule=schedule)


def test_linear_is_the_formula_rounded_down():
    for batch in range(127):
        naive = 8 + Fraction(batch, 127) * (1024 - 8)
        length = sequence_length_at(Fraction(batch, 127), min_seq_length=8, max_seq_length=1024)
        assert length == int(naive) // 8 * 8
    assert sequence_length_at(0.999, min_seq_length=8, max_seq_length=1024) == 1016
    assert sequence_length_at(5.0, min_seq_length=8, max_seq_length=1000) == 1000


def test_step_doubles_with_an_equal_part_for_each_length():
    arguments = {"min_seq_length": 8, "max_seq_length": 64, "schedule": "step"}
    lengths = [sequence_length_at(Fraction(k, 6), **arguments) for k in range(7)]
    assert lengths == [8, 8, 16, 16, 32, 32, 64]


def test_how_many_shapes_a_compiler_meets():
    full = {"min_seq_length": 8, "max_seq_length": 1024}
    assert len(distinct_lengths(**full)) == 128  # truncating, the default
    doubling = [8, 16, 32, 64, 128, 256, 512, 1024]
    assert distinct_lengths(**full, dividing=1024) == doubling
    assert distinct_lengths(**full, schedule="step") == doubling
    assert distinct_lengths(**full, step_size=256) == [8, 256, 512, 768, 1024]
    assert distinct_lengths(min_seq_length=10, max_seq_length=20, step_size=100) == [10, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_seq_length": 9, "max_seq_length": 8}, "from 1 to max_seq_length, got 9 and 8"),
        ({"min_seq_length": 0, "max_seq_length": 8}, "got 0 and 8"),
        ({"min_seq_length": 1, "max_seq_length": 8, "step_size": 0}, "at least 1 token, got 0"),
        ({"min_seq_length": 1, "max_seq_length": 8, "schedule": "cosine"}, "'linear' or 'step'"),
        ({"min_seq_length": 1, "max_seq_length": 8, "dividing": 20}, "got 8 of 20"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_length_at(0.5, **arguments)


# Batches.


def test_truncating_keeps_the_first_tokens_of_every_tensor():
    batch = {key: torch.randint(9, (3, 10)) for key in ("input_ids", "labels", "attention_mask")}
    for length in range(1, 11):
        cut = set_batch_sequence_length(batch, length)
        assert list(cut) == list(batch)
        for key, tensor in cut.items():
            assert tensor.tolist() == [row[:length] for row in batch[key].tolist()]
    assert batch["input_ids"].shape == (3, 10)


def test_reshaping_keeps_every_token_in_its_place():
    batch = {key: torch.arange(3 * 12).view(3, 12) for key in ("input_ids", "labels")}
    for length in (1, 2, 3, 4, 6, 12):
        cut = set_batch_sequence_length(batch, length, truncate=False)
        for tensor in cut.values():
            assert tensor.shape == (36 // length, length)
            assert tensor.flatten().tolist() == list(range(36))


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 8),
        {"tokens": torch.zeros(2, 8)},
        {"input_ids": torch.zeros(2, 8), "sample": torch.zeros(2)},
        {"input_ids": torch.zeros(2, 8), "labels": torch.zeros(2, 7)},
        {"input_ids": torch.zeros(2, 8, 1)},
        {"input_ids": torch.zeros(2, 8), "mode": "icl_task"},
    ],
)
def test_an_unknown_batch_is_refused(batch):
    with pytest.raises(NoEffectError, match="seq_length_warmup needs batches"):
        set_batch_sequence_length(batch, 4)


def test_a_length_that_cannot_be_is_refused():
    batch = {"input_ids": torch.zeros(2, 8)}
    for length in (0, 9):
        with pytest.raises(ValueError, match=f"from 1 to the 8 tokens .* got {length}"):
            set_batch_sequence_length(batch, length)
    with pytest.raises(ValueError, match=r"must divide the 8 tokens .* got 3"):
        set_batch_sequence_length(batch, 3, truncate=False)


# Settings, plans and receipts.


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"duration must be a number with a unit.*got '0.3'"):
        SequenceLengthWarmup(duration="0.3")
    with pytest.raises(ValueError, match=r"got '1\.5dur'"):
        SequenceLengthWarmup(duration="1.5dur")
    with pytest.raises(ValueError, match="at least 2"):
        SequenceLengthWarmup(min_seq_length=1)
    with pytest.raises(ValueError, match="got 16 and 8"):
        SequenceLengthWarmup(min_seq_length=16, max_seq_length=8)
    with pytest.raises(ValueError, match="'linear' or 'step'"):
        SequenceLengthWarmup(schedule="cosine")  # type: ignore[arg-type]


def make_plan(sequence_length) -> Plan:
    return Plan(sequence_length, True, "fp32", {})


@pytest.mark.parametrize(
    ("arguments", "sequence_length", "message"),
    [
        ({"max_seq_length": 2048}, 1024, "at most the corpus's sequence_length 1024, got 2048"),
        ({"min_seq_length": 64}, 32, "at most the 32 tokens of a sequence, got 64"),
        ({"truncate": False}, 1021, "below 1021, divides the sequences' 1021 tokens"),
        ({"truncate": False, "max_seq_length": 100}, 1024, "must divide the sequences' 1024"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, sequence_length, message):
    with pytest.raises(ValueError, match=message):
        SequenceLengthWarmup(**arguments).check_plan(make_plan(sequence_length))


@pytest.mark.parametrize("sequence_length", [9, 64, 1000, 1023, 1024])
def test_truncating_takes_any_length(sequence_length):
    for algorithm in (
        SequenceLengthWarmup(),
        SequenceLengthWarmup(truncate=False, step_size=1, min_seq_length=3),
    ):
        algorithm.check_plan(make_plan(sequence_length))
        lengths = algorithm._lengths(sequence_length)
        assert len(lengths) > 1
        assert lengths[-1] == sequence_length


def test_the_receipt_has_the_schedule():
    module = make_model().model
    receipt = SequenceLengthWarmup().apply_to_model(module, [])
    assert "linear over 0.3dur; sequences of 32 tokens would have 4 distinct lengths" in str(
        receipt
    )
    assert receipt.count == 3  # 8, 16, 24; the last one is the full length
    assert receipt.probe == {"shortest": 8, "longest": 32, "distinct lengths": 4}
    assert SequenceLengthWarmup(duration="0dur").apply_to_model(module, []).count == 0
    for truncate in (True, False):
        constant = SequenceLengthWarmup(duration="0dur", max_seq_length=16, truncate=truncate)
        assert constant.apply_to_model(module, []).count == 1


def test_a_function_that_cuts_wrongly_leaves_no_receipt(monkeypatch):
    monkeypatch.setattr(
        "algorithms.seq_length_warmup.seq_length_warmup.set_batch_sequence_length",
        lambda batch, length, truncate: {key: value[:, -length:] for key, value in batch.items()},
    )
    with pytest.raises(NoEffectError, match="must give sequences of 8 tokens"):
        make_trainer([SequenceLengthWarmup()])


# Whole runs.


@pytest.mark.parametrize("truncate", [True, False])
def test_a_run_has_the_lengths_of_the_schedule_and_counts_what_it_trains(truncate):
    warmup = SequenceLengthWarmup("0.5dur", truncate=truncate)
    speed = SpeedMonitor(window_size=100)
    trainer, recorder = train([warmup], callbacks=[speed], device_train_microbatch_size=3)
    grown = [8, 8, 16, 16, 24] if truncate else [8, 8, 16, 16, 16]
    assert recorder.lengths == [*grown, 32, 32, 32, 32, 32]
    assert recorder.fed == [4 * n for n in recorder.lengths] if truncate else [128] * 10
    clock = trainer.state.timestamp
    assert clock.token == clock.token_in_epoch == clock.token_in_iteration == sum(recorder.fed)
    assert clock.sample.value == clock.sample_in_epoch.value == 40  # of the data set
    assert clock.batch.value == 10
    seen = list(speed.history_tokens)
    assert [b - a for a, b in itertools.pairwise(seen)] == recorder.fed[1:]
    assert seen[0] == recorder.fed[0]


def test_counts_survive_the_end_of_an_epoch():
    trainer, recorder = train([SequenceLengthWarmup()], "2ep", loader=make_loader(16))
    # 0.3 of 8 batches: 2.4; the full length comes with the third.
    assert recorder.lengths == [8, 16, 24] + [32] * 5
    assert trainer.state.timestamp.token.value == 4 * (8 + 16 + 24 + 5 * 32)
    assert recorder.after[4].token_in_epoch.value == 4 * 32
    assert recorder.after[4].token.value == 4 * (8 + 16 + 24 + 2 * 32)


@pytest.mark.parametrize("max_duration", ["1ba", "2ba", "1ep", "40tok", "5sp"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"step_size": 1000},
        {"min_seq_length": T},
        {"min_seq_length": 16, "max_seq_length": 16},
        {"min_seq_length": 5, "max_seq_length": 29, "step_size": 7, "schedule": "step"},
        {"truncate": False, "min_seq_length": 3, "step_size": 3},
    ],
)
def test_any_length_of_run_and_any_range_works(max_duration, arguments):
    refused = {"step_size=1": arguments.get("step_size") == 3,  # no multiple of 3 divides 32
               "nothing would grow": arguments.get("min_seq_length") == T}  # fmt: skip
    for reason, is_refused in refused.items():
        if is_refused:
            with pytest.raises(NoEffectError, match=reason):
                train([SequenceLengthWarmup(**arguments)], max_duration, loader=make_loader(8))
    if any(refused.values()):
        return
    _, recorder = train([SequenceLengthWarmup(**arguments)], max_duration, loader=make_loader(8))
    assert recorder.lengths[0] == arguments.get("min_seq_length", 8)


@pytest.mark.parametrize(
    ("duration", "lengths"),
    [
        ("4ba", [8, 14, 20, 26, 32]),
        ("16sp", [8, 14, 20, 26, 32]),
        ("1ep", [8, 14, 20, 26, 32]),  # of 4 batches
        ("320tok", [8, 10, 13, 17, 22, 29, 32]),  # 32, 72, 124, 192, 280, 396 tokens are over
        ("0sec", [32]),
    ],
)
def test_the_duration_may_have_any_unit(duration, lengths):
    warmup = SequenceLengthWarmup(duration, step_size=1)
    _, recorder = train([warmup], "8ba", loader=make_loader(16))
    assert recorder.lengths == (lengths + [32] * 8)[:8]


def test_seconds_are_those_of_training():
    trainer, recorder = make_trainer([warmup := SequenceLengthWarmup("100sec", step_size=1)], "1ba")
    trainer.fit()
    assert recorder.lengths == [8]
    half = trainer.state.timestamp.copy(total_wct=50 * trainer.state.timestamp.total_wct.resolution)
    trainer.state.timestamp = half.copy(total_wct=half.total_wct * 1_000_000)
    batch = warmup.apply_to_batch(next(iter(make_loader())), trainer.state)
    assert batch["input_ids"].shape == (4, 20)


def test_epochs_need_a_loader_with_a_length():
    trainer, recorder = make_trainer(
        [SequenceLengthWarmup("1ep")],
        "2ba",
        loader=(row for row in make_loader()),
        device_train_microbatch_size=4,
    )
    with pytest.raises(ValueError, match="a data loader that knows its length"):
        trainer.fit()
    assert not recorder.shapes


def test_a_run_measured_in_tokens_trains_that_many():
    trainer, recorder = train([SequenceLengthWarmup("0.5dur", step_size=1)], "640tok")
    # Half of the run is 320 tokens; what is over decides the length, in tokens really trained.
    over = 0
    for length in recorder.lengths:
        assert length == min(32, int(8 + Fraction(over, 320) * 24))
        over += 4 * length
    assert over - 4 * recorder.lengths[-1] < 640 <= over
    assert trainer.state.timestamp.token.value == over


def test_a_schedule_in_tokens_follows_the_trained_tokens():
    scheduler = LinearScheduler(alpha_i=1.0, alpha_f=0.0, t_max="2000tok")
    _, recorder = train([SequenceLengthWarmup("0.8dur")], schedulers=scheduler)
    # Composer steps schedulers before it counts a batch: the rate of a batch is that of the tokens
    # before the one before it.
    seen = [0, 0, *(clock.token.value for clock in recorder.before[1:-1])]
    assert seen[2] == recorder.fed[0] < 4 * T
    assert recorder.rates == pytest.approx([1e-3 * (1 - tokens / 2000) for tokens in seen])


def test_evaluation_every_so_many_tokens_comes_then():
    fired = []

    class SeeEvaluation(Callback):
        def eval_start(self, state, logger):
            fired.append(state.timestamp.token.value)
            assert state.dataloader_label == "eval"

    evaluator = Evaluator(
        label="eval", dataloader=make_loader(4), metric_names=["LanguageCrossEntropy"]
    )
    trainer, recorder = train(
        [SequenceLengthWarmup("0.8dur")],
        callbacks=[SeeEvaluation()],
        eval_dataloader=evaluator,
        eval_interval="200tok",
    )
    counts = [0, *(clock.token.value for clock in recorder.after)]
    due = [b for a, b in itertools.pairwise(counts) if a // 200 != b // 200]
    assert fired == sorted({*due, counts[-1]})
    assert len(due) == 3
    # Evaluation keeps the full length.
    metric = trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"]
    assert metric.total_items == 4 * (T - 1)


@pytest.mark.parametrize("truncate", [True, False])
def test_training_metrics_count_the_targets_there_are(truncate):
    trainer, recorder = train(
        [SequenceLengthWarmup(truncate=truncate)], "1ba", device_train_microbatch_size=2
    )
    B, length = recorder.shapes[0]
    assert (B, length) == ((4, 8) if truncate else (16, 8))
    assert trainer.state.train_metrics["LanguageCrossEntropy"].total_items == B * (length - 1)


def test_the_last_batch_may_be_smaller():
    _, recorder = train(
        [SequenceLengthWarmup(truncate=False)],
        "1ep",
        loader=make_loader(7),
        device_train_microbatch_size=1,
    )
    assert recorder.shapes == [(16, 8), (3, 32)]


@pytest.mark.parametrize("truncate", [True, False])
def test_a_run_resumed_in_mid_warm_up_is_the_run_that_did_not_stop(truncate, tmp_path):
    def warmups():
        return [SequenceLengthWarmup("400tok", step_size=4, truncate=truncate)]

    whole_trainer, whole = train(warmups(), loader=make_loader(24))
    train(
        warmups(),
        "10ba",
        loader=make_loader(24),
        save_folder=str(tmp_path),
        save_interval="2ba",
    )
    resumed_trainer, resumed = make_trainer(
        warmups(), loader=make_loader(24), load_path=str(tmp_path / "ep0-ba2-rank0.pt")
    )
    resumed_trainer.fit()
    assert resumed.lengths == whole.lengths[2:]
    assert resumed.lengths[0] < T
    assert [t.token for t in resumed.after] == [t.token for t in whole.after[2:]]
    for ours, theirs in zip(
        resumed_trainer.state.model.parameters(),
        whole_trainer.state.model.parameters(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_reshaping_keeps_the_tokens_of_a_micro_batch():
    trainer, recorder = train(
        [SequenceLengthWarmup("0.5dur", truncate=False)], "4ba", device_train_microbatch_size=2
    )
    assert recorder.shapes == [(16, 8), (8, 16), (4, 32), (4, 32)]
    assert recorder.microbatches == [(8, 8)] * 2 + [(4, 16)] * 2 + [(2, 32)] * 4
    assert trainer.state.device_train_microbatch_size == 2


def test_a_micro_batch_size_that_was_halved_in_between_stays_halved():
    class Halve(Callback):  # as Composer does with 'auto' when a GPU runs out of memory
        def before_train_batch(self, state, logger):
            if state.timestamp.batch == 0:
                assert state.device_train_microbatch_size == 4 * 4
                state.device_train_microbatch_size //= 2

    trainer, _ = train(
        [SequenceLengthWarmup(truncate=False)],
        "4ba",
        callbacks=[Halve()],
        device_train_microbatch_size=4,
    )
    assert trainer.state.device_train_microbatch_size == 2


def test_an_interrupted_batch_leaves_no_larger_micro_batches():
    class Interrupt(Callback):
        def before_train_batch(self, state, logger):
            if not hasattr(self, "done"):
                self.done = True
                raise KeyboardInterrupt

    trainer, recorder = make_trainer(
        [SequenceLengthWarmup(truncate=False)],
        "4ba",
        callbacks=[Interrupt()],
        device_train_microbatch_size=2,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.fit()
    assert recorder.microbatches[:2] == [(8, 8)] * 2
    assert trainer.state.device_train_microbatch_size == 2


def test_it_is_over_when_it_is_over():
    _, recorder = train([warmup := SequenceLengthWarmup("2ba")], "4ba")
    assert recorder.lengths == [8, 16, 32, 32]
    trainer, recorder = make_trainer([warmup], "4ba")
    assert warmup.acts_on_batch(trainer.state)
    trainer.fit()
    assert not warmup.acts_on_batch(trainer.state)


def test_a_maximum_holds_to_the_end_of_the_run():
    _, recorder = train([SequenceLengthWarmup("2ba", max_seq_length=16)], "4ba")
    assert recorder.lengths == [8, 8, 16, 16]
    # A batch that is shorter than it sets the maximum itself.
    _, recorder = train([SequenceLengthWarmup("2ba", max_seq_length=64)], "4ba")
    assert recorder.lengths == [8, 16, 32, 32]


@pytest.mark.parametrize("broken", ["apply_to_batch", "the function"])
def test_a_batch_that_was_not_cut_is_not_trained(broken, monkeypatch):
    trainer, recorder = make_trainer([SequenceLengthWarmup()])
    message = "must change the shape of its batch"  # the base class measures it
    if broken == "apply_to_batch":
        monkeypatch.setattr(
            SequenceLengthWarmup, "apply_to_batch", lambda self, batch, state: batch
        )
    else:
        monkeypatch.setattr(
            "algorithms.seq_length_warmup.seq_length_warmup.set_batch_sequence_length",
            lambda batch, length, truncate: batch,
        )
    with pytest.raises(NoEffectError, match=message):
        trainer.fit()
    assert not recorder.microbatches


def test_a_batch_of_another_length_than_planned_is_not_trained(monkeypatch):
    trainer, recorder = make_trainer([SequenceLengthWarmup()])
    monkeypatch.setattr(
        "algorithms.seq_length_warmup.seq_length_warmup.set_batch_sequence_length",
        lambda batch, length, truncate: {key: value[:, :9] for key, value in batch.items()},
    )
    with pytest.raises(NoEffectError, match=r"shape of batch 0 to \(4, 8\), got \(4, 9\)"):
        trainer.fit()
    assert not recorder.microbatches


def test_sequences_that_are_too_short_are_refused_before_they_are_trained():
    trainer, recorder = make_trainer([SequenceLengthWarmup()], loader=make_loader(n_tokens=6))
    with pytest.raises(NoEffectError, match="at most the 6 tokens of a sequence, got 8"):
        trainer.fit()
    assert not recorder.microbatches


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("alibi_first", [True, False])
def test_alibi_splits_before_whatever_the_order_of_lines(truncate, alibi_first):
    pair = [
        ALiBi(train_sequence_length_scaling=0.5),
        SequenceLengthWarmup("2ba", truncate=truncate),
    ]
    trainer, recorder = train(
        pair if alibi_first else pair[::-1], "3ba", device_train_microbatch_size=2
    )
    # ALiBi makes 8 sequences of 16 tokens of 4 of 32.
    assert recorder.shapes == [(8, 8) if truncate else (16, 8)] * 2 + [(8, 16)]
    assert recorder.microbatches[:2] == [(4, 8) if truncate else (8, 8)] * 2
    assert trainer.state.device_train_microbatch_size == 2


def test_a_compiler_compiles_twice_for_all_lengths():
    """The first length is compiled for itself; with the second one, lengths become variable."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = make_model()
    compiled = torch.compile(model.forward, backend=counter)
    batch = next(iter(make_loader()))
    for truncate in (True, False):
        for length in (8, 16, 24, 32) if truncate else (8, 16, 32):
            cut = set_batch_sequence_length(batch, length, truncate=truncate)
            assert compiled(cut).logits.shape[1] == length
    # Once more when the number of sequences changes, too.
    assert counter.frame_count == 3
    torch._dynamo.reset()


TWO_RANKS = """
import json, sys
import torch
from composer import Trainer
from composer.utils import dist
from algorithms.seq_length_warmup import SequenceLengthWarmup
from tests.algorithms.test_seq_length_warmup import Recorder, make_loader, make_model

torch.set_num_threads(1)
dist.initialize_dist("cpu", timeout=60)
rank = dist.get_global_rank()
sampler = torch.utils.data.DistributedSampler(range(64))
model = make_model()
recorder = Recorder(model)
trainer = Trainer(
    model=model,
    algorithms=[SequenceLengthWarmup("200tok")],
    optimizers=torch.optim.AdamW(model.parameters(), 1e-3),
    train_dataloader=make_loader(batch_size=4 - 2 * rank, sampler=sampler),
    max_duration="6ba", precision="fp32", device="cpu", progress_bar=False, callbacks=[recorder],
)
trainer.fit()
clock = trainer.state.timestamp
mine = [recorder.lengths, recorder.fed, [t.token.value for t in recorder.after], clock.sample.value]
everybody = dist.all_gather_object(mine)
if rank == 0:
    open(sys.argv[1], "w").write(json.dumps(everybody))
"""


@pytest.mark.slow
def test_two_ranks_count_the_tokens_of_both(tmp_path):
    program, result = tmp_path / "two.py", tmp_path / "result.json"
    program.write_text(TWO_RANKS)
    finished = subprocess.run(
        [Path(sys.executable).with_name("composer"), "-n", "2", program, result],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (lengths, fed, counted, samples), (lengths_1, fed_1, counted_1, _) = json.loads(
        result.read_text()
    )
    assert lengths == lengths_1 == [8, 8, 16, 24, 32, 32]
    assert fed == [4 * n for n in lengths]
    assert fed_1 == [2 * n for n in lengths]
    assert counted == counted_1 == list(itertools.accumulate(6 * n for n in lengths))
    assert samples == 6 * 6

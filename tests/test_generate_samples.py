"""Texts of a model while it trains."""

from __future__ import annotations

import pytest
import torch
from composer import Trainer
from composer.loggers import FileLogger, InMemoryLogger, TensorboardLogger
from torch.utils.data import DataLoader

from composer_gpt2 import registry
from composer_gpt2.algorithms import apply_alibi, apply_pad_vocabulary
from composer_gpt2.generation import generate
from composer_gpt2.generation.callback import GenerateSamples
from composer_gpt2.model import GPT2Model


def train(*callbacks, loggers=(), cpu_precision="fp32", algorithms=()) -> Trainer:
    torch.manual_seed(17)
    model = GPT2Model.from_name(
        "gpt2-tiny", n_embd=32, n_positions=64, dropout=0.1, cpu_precision=cpu_precision
    )
    for apply in algorithms:
        apply(model)
    tokens = torch.randint(50257, (16, 16), generator=torch.Generator().manual_seed(1))
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(samples, batch_size=2),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration="5ba",
        callbacks=list(callbacks),
        loggers=list(loggers),
        progress_bar=False,
        seed=17,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("cpu_precision", "algorithms"),
    [("fp32", ()), ("amp_bf16", (apply_alibi, apply_pad_vocabulary))],
)
def test_training_ends_with_the_same_weights_to_the_bit(cpu_precision, algorithms, capsys):
    kind = {"cpu_precision": cpu_precision, "algorithms": algorithms}
    plain = train(**kind)
    written = train(GenerateSamples(["a", "b c"], "2ba", max_new_tokens=4, n_samples=2), **kind)
    said = capsys.readouterr().err
    assert [said.count(f"sample at batch {n} |") for n in range(1, 6)] == [0, 4, 0, 4, 4]
    expected = plain.state.model.state_dict()
    for name, weight in written.state.model.state_dict().items():
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, expected[name]), name
    assert written.state.model.training == plain.state.model.training


def test_texts_are_those_of_the_model_and_reach_the_loggers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    memory = InMemoryLogger()
    board = TensorboardLogger(log_dir=str(tmp_path / "board"))
    file = FileLogger(filename=str(tmp_path / "log.txt"), capture_stdout=False)
    callback = registry.get("callbacks", "generate_samples").load()(
        prompts=["a", ""], interval="3ba", max_new_tokens=6, top_k=40, seed=2
    )
    trainer = train(callback, loggers=[memory, board, file])
    table = memory.tables["samples"]  # the last one, of the trained model
    model = trainer.state.model
    for prompt in ("a", ""):
        (text,) = generate(model, prompt, max_new_tokens=6, top_k=40, seed=2)
        assert text.removeprefix(prompt) in [row[1] for row in table_rows(table)]
    trainer.close()
    assert "[table]: samples" in (tmp_path / "log.txt").read_text()
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tag = "samples/text_summary"
    assert [event.step for event in accumulator.Tensors(tag)] == [3, 5]


def table_rows(table) -> list:
    import json

    return json.loads(table)["data"]


def test_a_diverged_model_goes_on_without_texts(capsys):
    class Diverge(GenerateSamples):
        def batch_end(self, state, logger):
            with torch.no_grad():
                state.model.model.transformer.ln_f.weight.fill_(torch.nan)
            super().batch_end(state, logger)

    train(Diverge(["a"], "5ba", max_new_tokens=4))
    assert "no samples at batch 5: a model must predict numbers" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_training():
    with pytest.raises(ValueError, match="64 positions, got 2 \\+ 64"):
        train(GenerateSamples(["a"]))
    with pytest.raises(ValueError, match="list of at least one text"):
        GenerateSamples([])
    entry = registry.get("callbacks", "generate_samples")
    wrong = {"prompts": ["a"], "top_p": 2.0, "interval": "3 batches"}
    mistakes = {mistake.argument for mistake in entry.check_arguments(wrong)}
    assert mistakes == {"top_p", "interval"}

"""The callback ``evaluate_tasks``: what it measures in training, and what it refuses before it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from test_evaluation import CONTEXT, write_examples
from torch.utils.data import DataLoader

from composer_gpt2.evaluation.callback import EvaluateTasks
from composer_gpt2.evaluation.evaluations import evaluate, find_evaluations
from composer_gpt2.evaluation.likelihood import Scorer
from composer_gpt2.model import GPT2Model
from composer_gpt2.progress import ProgressLines
from composer_gpt2.small_tokenizers import character_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"))


def train(callbacks, max_duration="4ba", tokenizer_name="gpt2"):
    torch.manual_seed(5)
    model = GPT2Model.from_name(
        "gpt2-tiny", n_embd=32, n_positions=CONTEXT, dropout=0.1, tokenizer_name=tokenizer_name
    )
    tokens = torch.randint(0, 50257, (8, 16), generator=torch.Generator().manual_seed(3))

    def collate(rows):
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(tokens, batch_size=2, collate_fn=collate),  # type: ignore
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
        max_duration=max_duration,
        callbacks=callbacks,
        loggers=[log],
        device="cpu",
        precision="fp32",
        progress_bar=False,
        seed=3,
    )
    trainer.fit()
    trainer.close()
    return model, log


def test_training_logs_a_curve_and_is_not_changed(files, capsys):
    data = {name: files[name] for name in ("hellaswag", "times")}
    callback = EvaluateTasks(data=data, interval="2ba", limit=3, batch_tokens=64, stride=8)
    model, log = train([ProgressLines("1ba"), callback])
    plain, _ = train([])
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert model.training == plain.training
    curve = log.data["metrics/hellaswag/acc_norm"]
    assert [int(time.batch) for time, _ in curve] == [2, 4]
    losses = [value for _, value in log.data["metrics/times/loss"]]
    assert len(losses) == 2
    last = evaluate(
        Scorer(model.eval(), progress=False), find_evaluations([], data, limit=3), stride=8
    )
    assert losses[-1] == pytest.approx(
        next(each.value for each in last if each.log_name == "metrics/times/loss"), rel=1e-5
    )
    assert "tasks at batch 2 | hellaswag acc" in capsys.readouterr().err


@pytest.mark.parametrize(("interval", "batches"), [("1ep", [4, 8]), ("0.5dur", [4, 8])])
def test_intervals_of_epochs_and_the_end_of_training(interval, batches, files):
    callback = EvaluateTasks(data={"hellaswag": files["hellaswag"]}, interval=interval, limit=2)
    _, log = train([callback], max_duration="2ep")
    assert [int(time.batch) for time, _ in log.data["metrics/hellaswag/acc"]] == batches


@pytest.mark.parametrize("options", [{"num_fewshot": 5}, {"include_path": "somewhere"}])
def test_what_is_for_the_harness_is_refused_without_it(options, files):
    with pytest.raises(ValueError, match="is for tasks of the lm-evaluation-harness"):
        EvaluateTasks(data={"hellaswag": files["hellaswag"]}, **options)


def test_the_callback_refuses_a_text_longer_than_the_model_at_the_start(files):
    callback = EvaluateTasks(data={"times": files["times"]}, context_length=CONTEXT + 1)
    with pytest.raises(ValueError, match="learned positions"):
        train([callback])


def test_the_callback_refuses_at_the_start_what_the_tokenizer_cannot_spell(files, tmp_path, capsys):
    character_tokenizer("abc").save_pretrained(tmp_path)
    callback = EvaluateTasks(data={"lambada": files["lambada"]}, interval="1ep")
    with pytest.raises(ValueError, match="of the 3 characters that the model knows"):
        train([ProgressLines("1ba"), callback], tokenizer_name=str(tmp_path))
    assert "batch 1 " not in capsys.readouterr().err


def test_two_ranks_share_the_work_and_log_the_same(files, tmp_path):
    data = {name: files[name] for name in ("hellaswag", "lambada", "times")}
    script = Path(__file__).with_name("evaluation_two_ranks.py")
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(script)]
    subprocess.run([*command, str(tmp_path), json.dumps(data)], check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first == second
    assert all(len(values) == 2 for values in first.values())
    model = GPT2Model.from_pretrained(tmp_path / "model", tokenizer_name="gpt2")
    alone = evaluate(Scorer(model, progress=False), find_evaluations([], data))
    assert {each.log_name for each in alone} == set(first)
    for each in alone:
        assert first[each.log_name][-1] == pytest.approx(each.value, rel=1e-4), each.log_name

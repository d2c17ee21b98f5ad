from __future__ import annotations

import json
import math
import re
import shlex
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from composer_gpt2.data.streaming import StreamingTokens
from composer_gpt2.data.verification import verify
from composer_gpt2.documentation import read_summaries
from composer_gpt2.model import GPT2Model
from composer_gpt2.projects.adder import adder_problems, check_adder
from composer_gpt2.projects.characters import write_characters
from composer_gpt2.projects.dialogue import (
    encode_dialogue,
    format_prompt,
    read_dialogues,
    write_dialogues,
)
from composer_gpt2.projects.exact_answers import check_answers
from composer_gpt2.projects.program import PROJECTS, run_project
from composer_gpt2.projects.sorter import sorter_problems
from composer_gpt2.tokenizer import get_encoding
from composer_gpt2.trained_model import load_trained_model

CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize("n_digits", [1, 2])
def test_every_addition_is_there_once_and_right(n_digits):
    train, test = adder_problems(n_digits)
    problems = np.concatenate([train, test])
    assert len(np.unique(problems, axis=0)) == len(problems) == 100**n_digits
    for row in problems.tolist():
        spelled = "".join(map(str, row))
        first, second, total = (
            spelled[:n_digits],
            spelled[n_digits : 2 * n_digits],
            spelled[2 * n_digits :],
        )
        assert int(first) + int(second) == int(total[::-1])


def test_every_row_is_there_once_and_sorted():
    train, test = sorter_problems()
    problems = np.concatenate([train, test])
    assert len(np.unique(problems, axis=0)) == len(problems) == 3**6
    assert all(sorted(row[:6]) == row[6:] for row in problems.tolist())
    with pytest.raises(ValueError, match="from 4 to a million"):
        sorter_problems(length=1)


class _Oracle(torch.nn.Module):
    """Knows that a sum's digits are what they are, but takes 85 + 50 for 136."""

    tokenizer_name = "gpt2"
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=10))

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        rows = []
        for row in batch["input_ids"].tolist():
            total = row[0] * 10 + row[1] + row[2] * 10 + row[3]
            total += row[:4] == [8, 5, 5, 0]
            rows.append(int(f"{total:03}"[::-1][len(row) - 4]))
        logits = torch.nn.functional.one_hot(torch.tensor(rows), 10)[:, None].float()
        return type("Outputs", (), {"logits": logits})


def test_answers_are_counted_and_mistakes_shown():
    problems = torch.tensor([[8, 5, 5, 0, 5, 3, 1], [9, 9, 9, 9, 8, 9, 1], [0, 1, 0, 2, 3, 0, 0]])
    answers = check_answers(_Oracle(), problems, n_given=4, batch_size=2)  # type: ignore[arg-type]
    assert (answers.n_right, answers.n_problems) == (2, 3)
    assert answers.accuracy == pytest.approx(2 / 3)
    decode = get_encoding().decode
    assert answers.mistakes == (
        f"{decode([8, 5, 5, 0])} -> {decode([6, 3, 1])}, not {decode([5, 3, 1])}",
    )


def test_windows_overlap_in_training_alone(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "text").write_text(text)
    write_characters(tmp_path / "text", tmp_path / "c", sequence_length=20, stride=7)
    corpus = verify(str(tmp_path / "c"), progress=False)
    assert corpus["splits"]["train"]["samples"] == len(range(0, 900 - 20 + 1, 7))
    assert corpus["splits"]["validation"]["samples"] == 5
    tokenizer = str(tmp_path / "c" / "tokenizer")
    dataset = StreamingTokens(
        remote=str(tmp_path / "c"), sequence_length=20, batch_size=1, tokenizer=tokenizer
    )
    expected = [ord(character) - 97 for character in text[7:27]]
    assert dataset.get_item(1)["input_ids"].tolist() == expected


def test_bytes_and_three_splits(tmp_path):
    data = bytes(range(256)) * 8
    (tmp_path / "text").write_bytes(data)
    shares = (0.9, 0.05, 0.05)
    with pytest.raises(ValueError, match=r"must be UTF-8.*read it by bytes"):
        write_characters(tmp_path / "text", tmp_path / "c", shares=shares)
    write_characters(
        tmp_path / "text", tmp_path / "c", sequence_length=32, shares=shares, unit="byte"
    )
    corpus = verify(str(tmp_path / "c"), progress=False)
    assert list(corpus["splits"]) == ["train", "validation", "test"]
    assert corpus["tokenizer"]["vocab_size"] == 256


def test_a_text_too_short_for_a_window_is_refused(tmp_path):
    (tmp_path / "text").write_text("abc" * 100)
    with pytest.raises(ValueError, match="validation split must have a window of 256 characters"):
        write_characters(tmp_path / "text", tmp_path / "c")


def test_a_damaged_archive_is_refused(tmp_path):
    (tmp_path / "text.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"must be a readable \.zip archive"):
        write_characters(tmp_path / "text.zip", tmp_path / "c")


def test_only_the_assistants_words_are_targets():
    tokens, targets = encode_dialogue(CHAT)
    encoding = get_encoding()
    said = [token for token, target in zip(tokens, targets, strict=True) if target]
    assert encoding.decode(said) == " 2.<|endoftext|> Yes.<|endoftext|>"
    assert encoding.decode(tokens) == (
        "User: What is 1 + 1?\nAssistant: 2.<|endoftext|>User: Sure?\nAssistant: Yes.<|endoftext|>"
    )


def test_a_prompt_begins_as_the_dialogue_was_trained():
    tokens, targets = encode_dialogue(CHAT[:2])
    prompt = get_encoding().encode_ordinary(format_prompt(CHAT[:1]))
    assert tokens[: len(prompt)] == prompt
    assert targets.index(1) == len(prompt)
    with pytest.raises(ValueError, match="must end with a message of the user"):
        format_prompt(CHAT[:2])


def test_dialogues_are_packed_whole(tmp_path):
    file = tmp_path / "chat.jsonl"
    chats = [[{"role": "user", "content": f"{i}?"}, CHAT[1]] for i in range(200)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    write_dialogues(tmp_path / "c", file, sequence_length=32)
    verify(str(tmp_path / "c"), progress=False)
    dataset = StreamingTokens(remote=str(tmp_path / "c"), sequence_length=32, batch_size=1)
    found = []
    for i in range(dataset.size):
        sample = dataset.get_item(i)
        text = get_encoding().decode(sample["input_ids"].tolist())
        turns = [turn for turn in text.split("<|endoftext|>") if turn]
        assert all(turn.startswith("User: ") and turn.endswith("2.") for turn in turns)
        n_targets = int((sample["labels"] >= 0).sum())
        assert n_targets == len(turns) * 3  # " 2", "." and the end
        found += turns
    corpus = json.loads((tmp_path / "c" / "corpus.json").read_text())
    assert len(found) == len(set(found)) <= 200
    assert corpus["splits"].keys() == {"train", "validation"}


def test_a_line_that_is_no_dialogue_is_named(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=r"line 1, must be .*role of system, user, assistant"):
        list(read_dialogues(file))
    good = json.dumps({"messages": CHAT})
    for bad in (["hi"], "hi", {"role": "user", "content": "x"}):
        file.write_text(f"{good}\n{json.dumps({'messages': bad})}\n")
        with pytest.raises(ValueError, match=r"line 2, must be .*a role of .* got '"):
            list(read_dialogues(file))


def test_summaries_are_sentences():
    pairs = [pair for pair, _ in zip(read_summaries(), range(50), strict=False)]
    assert all(summary.endswith(".") and "\n" not in summary for _, summary in pairs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("ader",), ValueError, "did you mean 'adder'"),
        (("characters",), ValueError, "needs a file with its text"),
        (("adder", "x.txt"), ValueError, "computes its data"),
        (("text8", "none.txt"), FileNotFoundError, "must be a file"),
    ],
)
def test_wrong_projects_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        run_project(*arguments)


def test_another_text_of_the_same_size_is_another_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = set()
    for text in ("abc cab " * 400, "cab abc " * 400, "abc cab " * 400):
        Path("text.txt").write_text(text)
        assert run_project("characters", "text.txt", data_only=True) == 0
        names.add(re.search(r"run_name=\S+", capsys.readouterr().out)[0])
    assert len(names) == 2


@pytest.mark.parametrize("name", ["adder", "sorter", "text8", "enwik8", "dialogue"])
def test_a_sample_is_asked_for_with_tokens_of_the_project(name):
    """What the command says at its end can be run."""
    options = dict(zip(*[iter(shlex.split(PROJECTS[name].try_with))] * 2, strict=True))
    assert set(options) <= {"-p", "-m", "--temperature"}
    if name in ("adder", "sorter"):
        assert set(options["-p"]) <= set("0123456789" if name == "adder" else "012")


def test_a_project_from_data_to_test(tmp_path, monkeypatch, capfd):
    """Written, trained through the launcher, loaded with its own tokenizer, tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_project("sorter", overrides=["max_duration=20ba", "eval_interval=20ba"]) == 0
    said = capfd.readouterr().out
    assert "of 182 right" in said
    (run,) = (tmp_path / "runs").glob("sorter-*")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["eval"]["LanguageCrossEntropy"] < math.log(3)
    model = load_trained_model(str(run), device="cpu")
    assert model.tokenizer.decode([2, 0, 1]) == "201"
    (weights,) = (run / "checkpoints").glob("*.safetensors")
    assert GPT2Model.from_pretrained(weights).tokenizer.decode([2, 0, 1]) == "201"
    with pytest.raises(ValueError, match="tokens of the problems must be below the model's 3"):
        check_adder(model)

"""Texts, tasks and the command, on models and examples that are made up here."""

from __future__ import annotations

import gzip
import json
import math
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from composer_gpt2.algorithms import apply_alibi
from composer_gpt2.cli import app
from composer_gpt2.evaluation.evaluations import evaluate, find_evaluations
from composer_gpt2.evaluation.likelihood import Likelihood, Scorer
from composer_gpt2.evaluation.perplexity import measure_perplexity, windows
from composer_gpt2.evaluation.tasks import encode_request, load_task
from composer_gpt2.evaluation.texts import TokenStream, detokenize_wikitext, open_text
from composer_gpt2.model import GPT2Model
from composer_gpt2.small_tokenizers import character_tokenizer
from composer_gpt2.text_codec import TextCodec, text_codec
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding

CONTEXT = 48
LETTERS = TextCodec(
    lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)), 256, None
)


@pytest.fixture(scope="module")
def model() -> GPT2Model:
    torch.manual_seed(17)
    return GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=CONTEXT, dropout=0.0).eval()


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer(model, progress=False)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# --- Perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "context", "stride"), [(100, 10, 10), (101, 10, 3), (7, 10, 5)])
def test_windows_score_each_token_once_with_enough_before_it(n, context, stride):
    scored = []
    for begin, start, end in windows(n, context, stride):
        scored += range(start, end)
        assert end - 1 - begin <= context
        if begin > 0:
            assert start - begin >= context - stride
    assert scored == list(range(1, n))


@pytest.mark.parametrize("stride", [None, 5, 16])
def test_perplexity_is_that_of_the_formula(model, stride):
    generator = np.random.default_rng(1)
    streams = [
        TokenStream(generator.integers(0, 50257, n), n_bytes=3 * n, n_characters=n, n_words=n // 2)
        for n in (50, 2, 37)
    ]
    scorer = Scorer(model, context_length=16, progress=False)
    found = measure_perplexity(scorer, streams, stride=stride)
    nats = 0.0
    for stream in streams:
        tokens = torch.tensor(stream.tokens)
        for position in range(1, len(tokens)):  # each by itself, with what its window gives it
            begin = next(
                b for b, s, e in windows(len(tokens), 16, stride or 16) if s <= position < e
            )
            with torch.no_grad():
                logits = model({"input_ids": tokens[None, begin:position]}).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[tokens[position]])
    metrics = found.metrics
    assert found.n_tokens == 49 + 1 + 36
    assert metrics["loss"] == pytest.approx(nats / 86, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 86), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / (3 * 89), rel=1e-5)
    assert metrics["bits_per_character"] == pytest.approx(nats / math.log(2) / 89, rel=1e-5)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / 44), rel=1e-4)


def test_perplexity_refuses_a_stride_that_skips(scorer):
    stream = TokenStream(np.arange(9), 9, 9, 9)
    with pytest.raises(ValueError, match="from 1 to the context length"):
        measure_perplexity(scorer, [stream], stride=CONTEXT + 1)


# --- Texts ---------------------------------------------------------------------------------------


def test_a_prepared_corpus_is_read_in_order(model, tiny_corpus):
    (stream,) = open_text("numbers", tiny_corpus).read(text_codec(model), None)
    text = get_encoding().decode(stream.tokens.tolist())
    assert stream.n_bytes == len(text.encode()) - 13 * text.count("<|endoftext|>") - len(
        get_encoding().decode([int(stream.tokens[0])])
    )
    (first,) = open_text("numbers", f"{tiny_corpus}/validation").read(text_codec(model), 70)
    assert first.tokens.tolist() == stream.tokens[:71].tolist()


def test_tokens_of_another_tokenizer_are_refused(tiny_corpus, tmp_path):
    torch.manual_seed(1)
    folder = str(tmp_path / "tokenizer")
    character_tokenizer("abc ").save_pretrained(folder)
    letters = GPT2Model.from_name(
        "gpt2-tiny", n_embd=32, n_positions=16, vocab_size=16, tokenizer_name=folder
    )
    scorer = Scorer(letters, progress=False)
    with pytest.raises(ValueError, match="prepared with the model's tokenizer"):
        evaluate(scorer, find_evaluations([], {"numbers": tiny_corpus}))
    text = tmp_path / "text8"
    text.write_text("abc cab bca " * 9)
    found = {
        each.metric: each.value
        for each in evaluate(scorer, find_evaluations([], {"text8": str(text)}))
    }
    assert found["bits_per_character"] == pytest.approx(found["loss"] / math.log(2))


def test_documents_are_parted_as_in_training(tmp_path, model):
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"text": "One two"}\n{"text": "caf\\u00e9"}\n')
    (stream,) = open_text("corpus", str(path)).read(text_codec(model), None)
    encode = get_encoding().encode_ordinary
    ends = [END_OF_TEXT]
    assert stream.tokens.tolist() == [*ends, *encode("One two"), *ends, *encode("café"), *ends]
    assert (stream.n_bytes, stream.n_characters, stream.n_words) == (12, 11, 3)
    (cut,) = open_text("corpus", str(path)).read(text_codec(model), 2)
    assert (cut.tokens.tolist(), cut.n_bytes) == (stream.tokens[:3].tolist(), 7)


def test_wikitext_is_what_its_authors_wrote(tmp_path, model):
    text = (
        ' \n = Robert <unk> = \n \n Robert \'s " best " role ( 2 @.@ 5 @,@ 3 , or so ) :'
        " well @-@ known ; yes . \n \n = = Career = = \n \n He left . \n \n = Du Fu = \n \n A poet"
        " . \n"
    )
    path = tmp_path / "wiki.txt"
    path.write_text(text)
    streams = open_text("wikitext", str(path)).read(text_codec(model), None)
    first, second = (get_encoding().decode(stream.tokens.tolist()[1:]) for stream in streams)
    assert first.startswith("\n= Robert <unk> =\n")
    assert 'Robert\'s "best" role (2.5,3, or so): well-known; yes.' in first
    assert "==Career==" in first.replace(" ", "")
    assert "= Du Fu =" in second
    assert sum(stream.n_bytes for stream in streams) == len(text)
    # Words of the original, as re.split(r"\s+") counts them.
    assert streams[1].n_words == len(["", "=", "Du", "Fu", "=", "A", "poet", ".", ""])


def test_wikitext_rules_are_the_harness_s():
    preprocessing = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="needs the [eval] extra"
    )
    generator = random.Random(4)
    signs = [*"abN01 =@-,.:;!?()[]{}\"'\n°", " @-@ ", " @,@ ", " @.@ ", " 's", "s '", "= =", " \n "]
    for _ in range(300):
        text = "".join(generator.choice(signs) for _ in range(60))
        assert detokenize_wikitext(text) == preprocessing.wikitext_detokenizer({"page": text})


def test_characters_of_text8(tmp_path):
    path = tmp_path / "text8"
    path.write_text("anarchism originated")
    (stream,) = open_text("text8", str(path)).read(LETTERS, None)
    assert (len(stream.tokens), stream.n_bytes, stream.n_characters) == (20, 19, 19)


def test_enwik8_is_its_last_five_million_bytes(tmp_path):
    path = tmp_path / "enwik8"
    with open(path, "wb") as file:
        file.truncate(95_000_000)
        file.seek(95_000_000)
        file.write(b"ab" * 2_500_000)
    text = open_text("enwik8", str(path))
    assert text.note == "the last 5,000,000 bytes"
    (stream,) = text.read(LETTERS, 10)
    assert "".join(map(chr, stream.tokens)) == "ababababaab"[:9] + "ba"[::1]
    assert stream.n_bytes == 10


def test_packed_text8_is_unpacked(tmp_path):
    content = b"anarchism originated"
    with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
        archive.writestr("text8", content)
    (tmp_path / "text8.gz").write_bytes(gzip.compress(content))
    for name in ("text8.zip", "text8.gz"):
        (stream,) = open_text("text8", str(tmp_path / name)).read(LETTERS, None)
        assert bytes(stream.tokens.tolist()) == content
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"must be a readable \.(zip|gz) archive"):
            open_text("text8", str(tmp_path / name))


def test_as_many_tokens_are_read_as_are_wanted(tmp_path, model):
    path, codec = tmp_path / "text8", text_codec(model)
    path.write_text(" international responsibilities" * 100)
    (whole,) = open_text("text8", str(path)).read(codec, None)
    (part,) = open_text("text8", str(path)).read(codec, 150)
    assert part.tokens.tolist() == whole.tokens.tolist()[:151]
    assert part.n_bytes == len(codec.decode(part.tokens.tolist()))


# --- Tasks ---------------------------------------------------------------------------------------

LAYOUTS = {
    "lambada": (
        [
            {"text": "the cat sat on the mat"},
            {"context": "the cat sat on the", "continuation": "mat"},
        ],
        (("the cat sat on the",), (" mat",), 0),
    ),
    "piqa": (
        [
            {"goal": "Boil eggs", "sol1": "heat", "sol2": "cool", "label": 1},
            {"query": "Question: Boil eggs\n", "choices": ["heat", "cool"], "gold": 1},
        ],
        (("Question: Boil eggs\nAnswer:",) * 2, (" heat", " cool"), 1),
    ),
    "hellaswag": (
        [
            {
                "activity_label": "Running",
                "ctx_a": "A man [substeps] runs.",
                "ctx_b": "he",
                "endings": ["falls [title] He cries.", "flies", "sits", "stops"],
                "label": "2",
            },
            {
                "query": "Running: A man runs. He",
                "choices": ["falls.  He cries.".replace("  ", " "), "flies", "sits", "stops"],
                "gold": 2,
            },
        ],
        (
            ("Running: A man runs. He",) * 4,
            (" falls. He cries.", " flies", " sits", " stops"),
            2,
        ),
    ),
    "winogrande": (
        [
            {
                "sentence": "Ann told Bea that _ was late.",
                "option1": "Ann",
                "option2": "Bea",
                "answer": "2",
            },
            {
                "context_options": ["Ann told Bea that Ann", "Ann told Bea that Bea"],
                "continuation": "was late.",
                "gold": 1,
            },
        ],
        (("Ann told Bea that Ann", "Ann told Bea that Bea"), (" was late.",) * 2, 1),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_hub_and_of_llm_foundry_are_one(name, tmp_path):
    records, expected = LAYOUTS[name]
    task = load_task(name, write_lines(tmp_path / "examples.jsonl", records))
    for example in task.examples:
        assert (example.contexts, example.continuations, example.gold) == expected


def test_metrics_are_counted_as_the_harness_counts(tmp_path):
    records = [
        {"query": "Question: a\n", "choices": ["bb", "cccccc"], "gold": gold} for gold in (0, 1, 1)
    ]
    task = load_task("piqa", write_lines(tmp_path / "piqa.jsonl", records))
    requests = task.requests(LETTERS)
    found = task.measure(requests, [Likelihood(-2.0, False), Likelihood(-3.0, False)] * 3)
    # The first is likelier, the second by character: -1 against -0.5.
    assert found["acc"].value == pytest.approx(1 / 3)
    assert found["acc_norm"].value == pytest.approx(2 / 3)
    assert found["acc"].stderr == pytest.approx(math.sqrt(2 / 9 * 3 / 2 / 3))

    words = load_task("lambada", write_lines(tmp_path / "l.jsonl", LAYOUTS["lambada"][0]))
    diverged = words.measure(words.requests(LETTERS), [Likelihood(-800.0, False)] * 2)
    assert diverged["perplexity"].value == math.inf
    likelihoods = [Likelihood(-1.0, True), Likelihood(-3.0, False)]
    found = words.measure(words.requests(LETTERS), likelihoods)
    assert (found["acc"].value, found["perplexity"].value) == (0.5, pytest.approx(math.exp(2)))


def test_tokens_of_a_continuation_begin_with_its_space(model):
    codec = text_codec(model)
    encode = get_encoding().encode_ordinary
    request = encode_request(codec, "Hello there ", "friend")
    assert (request.context, request.continuation) == (encode("Hello there"), encode(" friend"))
    assert encode_request(codec, "", "friend").context == [END_OF_TEXT]
    with pytest.raises(ValueError, match="must have a context"):
        encode_request(LETTERS, "", "friend")


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        ([], {}, "got no name"),
        (["wikitext"], {}, "wikitext must have its file"),
        (["piqa"], {"piqa": "none.jsonl"}, "none.jsonl"),
        (["corpus"], {"corpus": "none.jsonl"}, "none.jsonl"),
        (["piqa"], {"piqa": "{bad}"}, "record 1 must be an example of piqa"),
        (["piqa"], {"piqa": "{unlabelled}"}, "record 1 must be .* with its answer"),
        (["lambada"], {"piqa": "{bad}"}, "got also piqa"),
    ],
)
def test_bad_input_is_one_error(names, data, message, tmp_path):
    record = {"goal": "a", "sol1": "b", "sol2": "c"}
    files = {
        "bad": write_lines(tmp_path / "bad.jsonl", [record]),
        "unlabelled": write_lines(tmp_path / "test.jsonl", [{**record, "label": -1}]),
    }
    data = {name: path.format(**files) for name, path in data.items()}
    with pytest.raises((ValueError, OSError), match=message):
        find_evaluations(names, data)


def test_an_unknown_task_has_its_nearest_name(monkeypatch):
    monkeypatch.setattr("composer_gpt2.evaluation.evaluations.is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"did you mean 'hellaswag'\?.*\[eval\]"):
        find_evaluations(["helaswag"])
    module = "composer_gpt2.evaluation.evaluations"
    monkeypatch.setattr(f"{module}.is_installed", lambda: True)
    monkeypatch.setattr(f"{module}.known_tasks", lambda *_: {"arc_easy", "boolq"})
    with pytest.raises(ValueError, match=r"ark_easy is no task \(did you mean 'arc_easy'\?\)"):
        find_evaluations(["ark_easy"])


# --- The command ---------------------------------------------------------------------------------


def write_examples(folder: Path) -> dict[str, str]:
    """Files of all tasks and of a text, by name."""
    data = {
        name: write_lines(folder / f"{name}.jsonl", records * 4)
        for name, (records, _) in LAYOUTS.items()
    }
    text = folder / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 6)
    return {**data, "times": str(text)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model.model.save_pretrained(folder)
    return str(folder)


def test_the_command_measures_prints_and_writes(exported, files, tmp_path, model):
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    arguments = ["evaluate", exported, "--contexts", "16,48", "--stride", "8", "--limit", "3"]
    arguments += [word for pair in files.items() for word in ("--data", "=".join(pair))]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    values = {
        (each["task"], each["metric"], each["context_length"]): each["value"]
        for each in report["measurements"]
    }
    assert ("lambada", "acc", 48) in values
    assert ("hellaswag", "acc_norm", 48) in values
    assert values["times", "perplexity", 16] != values["times", "perplexity", 48]
    for task, metric, _ in values:
        assert any(line.split()[:2] == [task, metric] for line in result.output.splitlines())
    assert "<svg" in plot.read_text()
    same = evaluate(
        Scorer(model, progress=False), find_evaluations([], files, limit=3), contexts=[48], stride=8
    )
    for each in same:
        if (each.task, each.metric, 48) in values:
            assert each.value == pytest.approx(values[each.task, each.metric, 48], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "piqa"], "must be NAME=PATH"),
        (["--contexts", "1k"], "whole numbers"),
        (["--precision", "int8"], "must be fp32 or amp_bf16"),
        (["--data", "x=none.txt"], "none.txt"),
        (["--data", "piqa={piqa}", "--stride", "3"], "are of texts"),
    ],
)
def test_the_command_refuses_before_it_loads_a_model(options, message, files):
    options = [option.format(**files) for option in options]
    result = CliRunner().invoke(app, ["evaluate", "no-such-model-here", *options])
    assert message in str(result.exception)


def test_contexts_beyond_the_positions_are_refused(model, files):
    evaluations = find_evaluations([], {"times": files["times"]})
    with pytest.raises(ValueError, match=f"at most the model's {CONTEXT} learned positions"):
        evaluate(Scorer(model, progress=False), evaluations, contexts=[16, 2 * CONTEXT])
    torch.manual_seed(1)
    longer = GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=CONTEXT, dropout=0.0).eval()
    apply_alibi(longer)
    found = evaluate(Scorer(longer, progress=False), evaluations, contexts=[CONTEXT, 2 * CONTEXT])
    assert {each.context_length for each in found} == {CONTEXT, 2 * CONTEXT}

"""Exported models: what was trained, loaded by others, without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, fake_hub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from algorithms.pad_vocabulary import PadVocabulary
from composer_gpt2.algorithms import (
    apply_alibi,
    apply_fused_gelu,
    apply_pad_vocabulary,
    apply_parallel_residual,
)
from composer_gpt2.build import build_dataloader
from composer_gpt2.cli import app
from composer_gpt2.export import (
    LogitsDifferError,
    NotExportableError,
    checking,
    export_model,
    remote_code,
)
from composer_gpt2.export.remote.modeling_composer_gpt2 import (
    ComposerGPT2Config,
    ComposerGPT2LMHeadModel,
)
from composer_gpt2.export.source import load_source
from composer_gpt2.model import GPT2Model
from composer_gpt2.recipe import load_recipe
from composer_gpt2.stop_signals import StopSignals
from composer_gpt2.tokenizer import get_tokenizer
from composer_gpt2.train import train

RECIPE = """
model: {name: gpt2-tiny, n_embd: 32, n_positions: 64, dropout: 0.0}
data: {sequence_length: 64}
train_batch_size: 4
eval_batch_size: 4
max_duration: 4ba
optimizer: {adamw: {lr: 1.0e-2, weight_decay: 0.1}}
algorithms: {ema: {half_life: 2ba}, pad_vocabulary: {}, fused_gelu: {}}
precision: fp32
eval_interval: 4ba
eval_subset_num_batches: 4
save_interval: 2ba
run_name: test
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_corpus) -> Path:
    """A run folder of four batches with averaged weights and a padded vocabulary."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(
        [folder / "recipe.yaml"], [f"data.remote={tiny_corpus}", f"run_folder={folder / 'run'}"]
    )
    with StopSignals() as signals:
        train(recipe, signals)
    return folder / "run"


def spread_out(model: GPT2Model) -> GPT2Model:
    """Weights with which every part matters, unlike those at the start of training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """Weights of a network with everything that changes an architecture."""
    folder = tmp_path_factory.mktemp("changed") / "model"
    model = GPT2Model.from_name("gpt2-tiny", n_embd=48, n_head=3, n_positions=32)
    apply_pad_vocabulary(model)
    apply_alibi(model)
    apply_parallel_residual(model)
    spread_out(model).model.transformer.wte.weight.data[50257:] = 0
    model.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def remote(changed, tmp_path_factory) -> Path:
    """Its export, in a folder whose name has a dot."""
    out = tmp_path_factory.mktemp("remote") / "gpt2-1.3b"
    exported = export_model(str(changed), out)
    assert exported.changes == ("alibi", "parallel_residual")
    assert exported.difference < 1e-4
    return out


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory) -> Path:
    """The export of that run, in bfloat16."""
    out = tmp_path_factory.mktemp("plain") / "out"
    exported = export_model(str(run), out, dtype="bfloat16")
    assert not exported.changes
    assert 0 < exported.rounding < 1
    return out


def test_a_run_becomes_a_plain_gpt2(run, plain):
    out = plain
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is GPT2LMHeadModel
    assert model.config.vocab_size == 50257
    assert "composer_gpt2" not in json.loads((out / "config.json").read_text())
    tokens = torch.randint(50257, (2, 64))
    trained = GPT2Model.from_pretrained(run / "checkpoints" / "latest-rank0.pt")
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = trained({"input_ids": tokens}).logits[..., :50257]
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("Hello, I'm a language model,").input_ids[:3] == [15496, 11, 314]


def test_the_card_says_how_it_was_trained(run, plain):
    card = (plain / "README.md").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert (
        f"| eval | LanguageCrossEntropy | {metrics['eval']['LanguageCrossEntropy']:.4f} |" in card
    )
    for text in (
        "library_name: transformers",
        "# test\n",
        "4 batches, 1,024 tokens; the weights are exponential moving averages",
        "- pad_vocabulary: padded the vocabulary from 50,257 to 50,304 rows",
        "half_life: 2ba",
        "| torch |",
        "parameters in bfloat16",
    ):
        assert text in card
    assert str(run) not in card  # whose folders are nobody else's business


def test_averages_are_exported_as_they_were_evaluated(run):
    recipe = load_recipe([run / "recipe.yaml"])
    loader = build_dataloader(recipe, "validation").dataloader
    losses = {}
    for weights in ("evaluated", "trained"):
        with load_source(str(run), weights) as (model, origin), torch.no_grad():
            assert ("moving averages" in origin.weights) == (weights == "evaluated")
            batches = list(loader)[:4]
            losses[weights] = sum(float(model(batch).loss) for batch in batches) / len(batches)
    measured = json.loads((run / "metrics.json").read_text())["eval"]["LanguageCrossEntropy"]
    assert losses["evaluated"] == pytest.approx(measured, abs=1e-4)
    assert abs(losses["trained"] - measured) > 1e-2


def test_a_changed_network_runs_where_nothing_of_ours_is_installed(remote, tmp_path):
    code = (remote / "modeling_composer_gpt2.py").read_text()
    assert "composer_gpt2." not in code.replace("modeling_composer_gpt2.", "")
    program = f"""
import runpy, sys
blocked = runpy.run_path({str(Path(remote_code.__file__).parent / "isolated.py")!r})["Blocked"]
sys.meta_path.insert(0, blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path = {str(remote)!r}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
tokens = tokenizer("Hello there", return_tensors="pt")
greedy = dict(do_sample=False, min_new_tokens=60, max_new_tokens=60)  # the configuration says 32
cached = model.generate(**tokens, **greedy)
assert cached.shape == (1, 62)
assert torch.equal(cached, model.generate(**tokens, **greedy, use_cache=False))
assert torch.equal(cached[0, 2:], model(cached).logits[0, 1:-1].argmax(-1))
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
several = tokenizer(["Hello there", "one two three four five"], return_tensors="pt", padding=True)
padded = model.generate(**several, **greedy)
assert torch.equal(padded[0, -60:], cached[0, 2:]), "left padding changes the text"
model.train()
model(cached, labels=cached).loss.backward()
assert all(p.grad is not None for p in model.parameters())
model.eval().save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert torch.equal(again(cached).logits, model(cached).logits)
assert not [name for name in sys.modules if name.split(".")[0] in ("composer_gpt2", "composer")]
print("well")
"""
    finished = subprocess.run(
        [sys.executable, "-I", "-c", program],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stdout.strip().endswith("well"), finished.stderr


def test_accumulated_gradients_are_those_of_one_batch(tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    # A Composer Trainer of another test has left it, and this one would believe that it is a rank.
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(100, (4, 8), generator=generator)
    texts = [{"input_ids": text, "labels": text} for text in tokens]
    after = []
    for n_accumulated in (1, 4):
        torch.manual_seed(0)
        model = ComposerGPT2LMHeadModel(
            ComposerGPT2Config(
                vocab_size=100,
                n_positions=8,
                n_embd=16,
                n_layer=1,
                n_head=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        Trainer(
            model,
            TrainingArguments(
                str(tmp_path / "out"),
                per_device_train_batch_size=4 // n_accumulated,
                gradient_accumulation_steps=n_accumulated,
                max_steps=1,
                optim="sgd",
                learning_rate=0.1,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
            ),
            train_dataset=texts,  # type: ignore[arg-type]
        ).train()
        after.append(model.transformer.ln_f.bias.detach())
    torch.testing.assert_close(*after)


def test_a_model_that_computes_something_else_leaves_nothing(changed, tmp_path, monkeypatch):
    from composer_gpt2.export import program

    right = program.write_folder

    def wrong(model, *arguments, **options):
        model.model.transformer.h[1].mlp.c_fc.bias.data[0] += 1
        right(model, *arguments, **options)

    monkeypatch.setattr(program, "write_folder", wrong)
    plain = tmp_path / "plain"
    spread_out(GPT2Model.from_name("gpt2-tiny", n_embd=32)).model.save_pretrained(plain)
    with pytest.raises(LogitsDifferError, match="must have the logits of the trained one"):
        export_model(str(plain), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [plain]


def test_code_that_computes_something_else_leaves_nothing(changed, tmp_path, monkeypatch):
    from composer_gpt2.export import folder

    right = folder.remote_code
    monkeypatch.setattr(
        folder, "remote_code", lambda names: right(names).replace("slope.to(", "-slope.to(")
    )
    with pytest.raises(LogitsDifferError, match="must have the logits"):
        export_model(str(changed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; sys.exit(3)", "got exit status 3;"),
        ("import os; os.kill(os.getpid(), 9)", "got a process that SIGKILL ended;"),
        ("raise ValueError('no')", r"got ValueError: no \(exit status 1\);"),
    ],
)
def test_a_check_that_dies_says_how(code, problem, tmp_path, monkeypatch):
    (tmp_path / "modeling_composer_gpt2.py").touch()
    (tmp_path / "dies.py").write_text(code)
    monkeypatch.setattr(checking.isolated, "__file__", str(tmp_path / "dies.py"))
    with pytest.raises(LogitsDifferError, match=problem):
        checking.check_logits(tmp_path, tmp_path / "probes", 1.0)


def test_the_check_finds_modules_where_we_found_them(changed, tmp_path, monkeypatch):
    # As with `pip install --user` or PYTHONPATH, which an isolated process does not see.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "only_there.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    isolated = Path(checking.isolated.__file__).read_text()
    imports = "    import torch\n"
    assert imports in isolated
    isolated = isolated.replace(imports, f"    import only_there\n{imports}")
    (tmp_path / "check.py").write_text(isolated)
    monkeypatch.setattr(checking.isolated, "__file__", str(tmp_path / "check.py"))
    export_model(str(changed), tmp_path / "out")
    assert (tmp_path / "out" / "modeling_composer_gpt2.py").exists()


def test_an_existing_folder_is_refused_or_replaced(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    GPT2Model.from_name("gpt2-tiny", n_embd=32).model.save_pretrained(source)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for overwrite in (False, True):  # refused before anything is read
        with pytest.raises(FileExistsError, match=r"must be new or empty.* is no earlier export"):
            export_model("no-such-checkpoint.pt", out, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="replace it with --overwrite"):
        export_model("no-such-checkpoint.pt", out)
    (tmp_path / "link").symlink_to(out)
    export_model(str(source), tmp_path / "link", overwrite=True)
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "source"]


def test_what_is_exported_is_never_replaced(run, plain, tmp_path, monkeypatch):
    def unreached(*_):
        raise AssertionError("checked too late")

    monkeypatch.setattr("composer_gpt2.export.program.load_source", unreached)
    monkeypatch.chdir(plain)
    latest = run / "checkpoints" / "latest-rank0.pt"
    for source, out in (
        (run, run),
        (run, run.parent),
        (latest, run / "checkpoints"),
        (latest.resolve(), run),
        (plain, plain),
        (plain / "model.safetensors", Path(".")),
    ):
        with pytest.raises(FileExistsError, match="is the folder of what is exported"):
            export_model(str(source), out, overwrite=True)
    another = tmp_path / "another"  # a run that is not the source, with a model's configuration
    (another / "checkpoints").mkdir(parents=True)
    (another / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is no earlier export"):
        export_model(str(run), another, overwrite=True)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError])
def test_what_is_replaced_comes_back_if_the_new_one_does_not(problem, tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    GPT2Model.from_name("gpt2-tiny", n_embd=32).model.save_pretrained(source)
    out.mkdir()
    (out / "config.json").write_text("{}")
    rename = Path.rename

    def fails(path, target):
        if path.name == "model":
            raise problem("between the two")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(problem, match="between the two"):
        export_model(str(source), out, overwrite=True)
    assert (out / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_algorithm_without_exported_form_is_refused(tmp_path, monkeypatch):
    model = GPT2Model.from_name("gpt2-tiny", n_embd=32)
    apply_pad_vocabulary(model, multiple_of=16)
    model.model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(PadVocabulary, "take_out", lambda module: False)
    with pytest.raises(NotExportableError, match="got pad_vocabulary, whose class PadVocabulary"):
        export_model(str(tmp_path / "source"), tmp_path / "out")
    for name, source, problem in (
        ("imports", "import numpy\ndef apply(network): pass\n", "alone, got numpy"),
        ("clashes", "class Block: pass\ndef apply(network): pass\n", "once, got Block"),
        ("lacks", "x = 1\n", "must name a function of lacks"),
        ("gone", None, "must name a module"),
    ):
        if source is not None:
            (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(PadVocabulary, "exported_as", f"{name}:apply")
        with pytest.raises(NotExportableError, match=problem):
            remote_code.remote_code(["pad_vocabulary"])


def test_kernels_leave_no_trace_and_untied_heads_stay(tmp_path):
    model = spread_out(GPT2Model.from_name("gpt2-tiny", n_embd=32, tie_word_embeddings=False))
    apply_fused_gelu(model)
    model.model.save_pretrained(tmp_path / "source")
    export_model(str(tmp_path / "source"), tmp_path / "out")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert torch.equal(loaded.lm_head.weight, model.model.lm_head.weight)


def test_a_model_brings_its_own_tokenizer(tmp_path):
    letters = get_tokenizer().train_new_from_iterator(["first citizen: before we proceed"], 270)
    source, out = tmp_path / "source", tmp_path / "out"
    letters.save_pretrained(source)
    model = spread_out(
        GPT2Model.from_name(
            "gpt2-tiny", n_embd=32, vocab_size=len(letters), tokenizer_name=str(source)
        )
    )
    model.model.save_pretrained(source)
    export_model(str(source), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == letters.get_vocab()
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.vocab_size == len(letters)
    assert config.eos_token_id == letters.eos_token_id  # and not GPT-2's 50256
    assert (out / "model.safetensors").stat().st_mode & 0o777 == out.stat().st_mode & 0o666


def test_onnx_has_the_same_logits(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    model = spread_out(GPT2Model.from_name("gpt2-tiny", n_embd=32, n_positions=24))
    model.model.save_pretrained(tmp_path / "source")
    exported = export_model(str(tmp_path / "source"), tmp_path / "out", onnx=True)
    assert exported.onnx_difference is not None
    assert exported.onnx_difference < 1e-3
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    tokens = torch.randint(50257, (3, 11))
    (logits,) = session.run(None, {"input_ids": tokens.numpy()})
    with torch.no_grad():
        expected = model.eval()({"input_ids": tokens}).logits
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)


def test_options_that_cannot_be_are_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match="--onnx is for float32"):
        export_model("nothing.pt", tmp_path / "out", onnx=True, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        export_model("nothing.pt", tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
    GPT2Model.from_name("gpt2-tiny", n_embd=32).model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="weights must be 'evaluated' where there is one set"):
        export_model(str(tmp_path / "source"), tmp_path / "out", weights="trained")


def command(*arguments):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_flag_uploads_to_the_hub(tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    GPT2Model.from_name("gpt2-tiny", n_embd=32).model.save_pretrained(source)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with fake_hub(monkeypatch) as hub:
        result = command("export", source, out, "--push-to-hub", "owner/mine")
        assert result.exit_code == 0, result.output
        assert "uploaded to" in result.output
        assert hub.repositories["owner/mine"]["private"] is True
        for path in out.iterdir():
            assert hub.files[f"owner/mine/{path.name}"] == path.read_bytes()


@pytest.mark.parametrize(
    ("token", "name", "problem"),
    [
        ("hf_wrong", "owner/mine", "HF_TOKEN"),
        (None, "owner/mine", "got none; set HF_TOKEN"),
        (TOKEN, "mine", "add the owner"),
        (TOKEN, "a//b", "must be OWNER/NAME"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_work(
    token, name, problem, tmp_path, monkeypatch
):
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with fake_hub(monkeypatch):
        result = command("export", "nothing.pt", tmp_path / "out", "--push-to-hub", name)
    assert result.exit_code == 1
    assert problem in str(result.exception)

"""Trained on short sequences, read at long ones: ALiBi beside learned positions.

gpt2-tiny trains on OpenWebText text in sequences of 128 tokens, once with ALiBi and once without,
for each seed. Both are then asked for the perplexity of one and the same validation text, cut into
sequences of 128, 256, 512 and 1024 tokens. Learned positions from 128 on have never been trained.

    python benchmarks/alibi_length.py --text openwebtext/ --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

from algorithms_loss import prepare_corpus

TRAINED = 128
LENGTHS = (128, 256, 512, 1024)
CONTESTANTS = {"ALiBi": ("algorithms.alibi={}",), "learned positions": ()}
BOTH = ("algorithms.fused_cross_entropy={}", "algorithms.fused_gelu={}")  # the same loss, sooner


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="folder with train.jsonl, validation.jsonl")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=120)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare_corpus(Path(arguments.text), Path(folder), TRAINED)
        validation = str(Path(arguments.text) / "validation.jsonl")
        tasks = [
            (corpus, validation, name, seed, arguments.batches)
            for seed in range(17, 17 + arguments.seeds)
            for name in CONTESTANTS
        ]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            results = []
            for result in pool.map(run, tasks):
                results.append(result)
                print(f"{len(results)} of {len(tasks)}: {result}", file=sys.stderr, flush=True)
    path = Path(__file__).with_name(f"alibi_length_{arguments.hardware}_{date.today():%Y%m}.md")
    plot(results, path.with_suffix(".svg"))
    path.write_text(report(arguments, results, path.with_suffix(".svg").name), encoding="utf-8")
    print(path)


def run(task: tuple[str, str, str, int, int]) -> dict:
    """Trains one contestant; its perplexity at each length."""
    import torch

    from composer_gpt2.build import build_trainer
    from composer_gpt2.recipe import load_recipe
    from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding

    torch.set_num_threads(1)
    corpus, validation, name, seed, batches = task
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            ["gpt2-tiny.yaml"],
            [
                *CONTESTANTS[name],
                *BOTH,
                f"seed={seed}",
                f"max_duration={batches}ba",
                f"data.remote={corpus}",
                f"data.sequence_length={TRAINED}",
                "train_batch_size=32",  # x 128 = 4,096 tokens a batch
                "data.validation_split=null",
                "eval_interval=null",
                "save_interval=null",
                f"run_folder={folder}",
            ],
        )
        trainer = build_trainer(recipe)
        trainer.fit()
        model = trainer._original_model.eval()
        trained_tokens = trainer.state.timestamp.token.value
        trainer.close()
    encoding = get_encoding()
    tokens: list[int] = []
    for line in Path(validation).read_text(encoding="utf-8").splitlines():
        tokens += [*encoding.encode_ordinary(json.loads(line)["text"]), END_OF_TEXT]
    whole = len(tokens) // max(LENGTHS) * max(LENGTHS)
    text = torch.tensor(tokens[:whole])
    perplexities = {}
    for length in LENGTHS:
        losses = []
        for sequences in text.reshape(-1, length).split(4096 // length):
            with torch.no_grad():
                loss = model({"input_ids": sequences, "labels": sequences})["loss"]
            losses.append(loss.item() * len(sequences) * (length - 1))
        perplexities[length] = math.exp(sum(losses) / (whole // length * (length - 1)))
    return {
        "contestant": name,
        "seed": seed,
        "trained_tokens": trained_tokens,
        "validation_tokens": whole,
        "perplexity": perplexities,
    }


def of(results: list[dict], name: str, length: int) -> list[float]:
    return [r["perplexity"][length] for r in results if r["contestant"] == name]


def plot(results: list[dict], path: Path) -> None:
    """Perplexity over context length, mean and range of the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fixed"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name in CONTESTANTS:
        values = [of(results, name, length) for length in LENGTHS]
        means = [statistics.mean(v) for v in values]
        (line,) = axes.plot(LENGTHS, means, marker="o", label=name)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(LENGTHS, low, high, alpha=0.2, color=line.get_color())
    axes.axvline(TRAINED, color="grey", linestyle=":", label=f"trained at {TRAINED} tokens")
    axes.set(xscale="log", xlabel="tokens of context", ylabel="validation perplexity")
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def report(arguments: argparse.Namespace, results: list[dict], picture: str) -> str:
    """The Markdown file."""
    from composer_gpt2.run_folder import versions

    lines = []
    for name in CONTESTANTS:
        cells = [name]
        for length in LENGTHS:
            values = of(results, name, length)
            cells.append(f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}")
        ratios = [
            a / b for a, b in zip(of(results, name, 512), of(results, name, 128), strict=True)
        ]
        cells.append(f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    raw = "\n".join(f"- {json.dumps(result)}" for result in results)
    header = " | ".join(f"{length} tokens" for length in LENGTHS)
    table = "\n".join(lines)
    first = results[0]
    when = f"{arguments.hardware}, {date.today():%B %Y}"
    return f"""# ALiBi at longer contexts than it trained on: {when}

`{" ".join(["python", "benchmarks/alibi_length.py", *sys.argv[1:]])}`

gpt2-tiny on real OpenWebText text, {first["trained_tokens"]:,} tokens in sequences of {TRAINED},
{arguments.seeds} seeds. Validation perplexity of one text of {first["validation_tokens"]:,} tokens,
cut into sequences of each length; mean and standard deviation over seeds. A sequence's first token
is predicted by nothing and not counted.

| | {header} | 512 over 128 |
| --- |{" --- |" * len(LENGTHS)} --- |
{table}

![perplexity over context length]({picture})

Raw values:

{raw}

Versions: {json.dumps(versions())}
"""


if __name__ == "__main__":
    main()

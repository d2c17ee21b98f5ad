"""What the algorithms do to the loss: at equal trained tokens, and at equal time.

Every contestant trains gpt2-tiny on OpenWebText text from the shipped recipe, with its algorithms
and nothing else changed, once for each seed; each seed has its own weights and order of data. Then
each trains again for as many tokens as the baseline's time allows at the speed that it showed. Two
runs are in progress at a time, each on one core. A loss is that of the whole validation text.

    python benchmarks/algorithms_loss.py --text openwebtext/ --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

SEQUENCE_LENGTH, BATCH_SIZE = 256, 8  # 2,048 tokens a batch
CONTESTANTS = {
    "baseline": (),
    "alibi": ("algorithms.alibi={}",),
    "seq_length_warmup": ("algorithms.seq_length_warmup={duration: 0.3dur, min_seq_length: 32, "
                          "step_size: 32}",),
    "fused_cross_entropy": ("algorithms.fused_cross_entropy={}",),
}  # fmt: skip
TOGETHER = ("alibi", "seq_length_warmup", "fused_cross_entropy")
CONTESTANTS["the three together"] = tuple(o for n in TOGETHER for o in CONTESTANTS[n])
CONTESTANTS["and parallel_residual, fused_gelu, pad_vocabulary"] = (
    *CONTESTANTS["the three together"],
    "algorithms.parallel_residual={}",
    "algorithms.fused_gelu={}",
    "algorithms.pad_vocabulary={}",
)


class Task(NamedTuple):
    """One run."""

    corpus: str
    contestant: str
    seed: int
    n_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, help="folder with train.jsonl, validation.jsonl")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60 * BATCH_SIZE * SEQUENCE_LENGTH)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare_corpus(Path(arguments.text), Path(folder), SEQUENCE_LENGTH)
        seeds = range(17, 17 + arguments.seeds)
        tasks = [
            Task(corpus, name, seed, arguments.tokens) for seed in seeds for name in CONTESTANTS
        ]
        equal_tokens = run_all(tasks)
        seconds = {
            name: statistics.median(r["seconds"] for r in rows(equal_tokens, name))
            for name in CONTESTANTS
        }
        share = {name: seconds["baseline"] / seconds[name] for name in CONTESTANTS}
        tasks = [t._replace(n_tokens=round(t.n_tokens * share[t.contestant])) for t in tasks]
        equal_time = run_all([t for t in tasks if t.contestant != "baseline"])
    path = Path(__file__).with_name(f"algorithms_loss_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text(report(arguments, equal_tokens, equal_time), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps([equal_tokens, equal_time], indent=1) + "\n")
    print(path)


def prepare_corpus(text: Path, folder: Path, sequence_length: int) -> str:
    """The two files as the two splits of a corpus, each with its own documents."""
    from composer_gpt2.data import prepare

    corpus = folder / f"corpus-{sequence_length}"
    for split in ("train", "validation"):
        prepare(
            [str(text / f"{split}.jsonl")],
            str(folder / split),
            sequence_length=sequence_length,
            validation_fraction=0.0,
        )
        corpus.mkdir(exist_ok=True)
        (folder / split / "train").rename(corpus / split)
    (folder / "train" / "corpus.json").rename(corpus / "corpus.json")
    return str(corpus)


def run_all(tasks: list[Task]) -> list[dict]:
    """All runs, two at a time."""
    results = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for number, result in enumerate(pool.map(run, tasks), 1):
            results.append(result)
            print(f"{number} of {len(tasks)}: {result}", file=sys.stderr, flush=True)
    return results


def run(task: Task) -> dict:
    """Trains one contestant and evaluates it once, at the end."""
    import torch

    from composer_gpt2.build import build_trainer
    from composer_gpt2.recipe import load_recipe

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            ["gpt2-tiny.yaml"],
            [
                *CONTESTANTS[task.contestant],
                f"seed={task.seed}",
                f"max_duration={task.n_tokens}tok",
                f"data.remote={task.corpus}",
                f"data.sequence_length={SEQUENCE_LENGTH}",
                f"train_batch_size={BATCH_SIZE}",
                "eval_interval=1dur",
                "save_interval=null",
                "precision=amp_bf16",
                f"run_folder={folder}",
            ],
        )
        trainer = build_trainer(recipe)
        trainer.fit()
        state = trainer.state
        result = {
            **task._asdict(),
            "corpus": None,
            "trained_tokens": state.timestamp.token.value,
            "batches": state.timestamp.batch.value,
            "seconds": state.timestamp.total_wct.total_seconds(),
            "loss": float(state.eval_metric_values["LanguageCrossEntropy"]),
        }
        trainer.close()
    return result


def rows(results: list[dict], name: str) -> list[dict]:
    return [result for result in results if result["contestant"] == name]


def report(arguments: argparse.Namespace, equal_tokens: list[dict], equal_time: list[dict]) -> str:
    """The Markdown file."""
    from composer_gpt2.run_folder import versions

    baseline = rows(equal_tokens, "baseline")
    lines = []
    for name in CONTESTANTS:
        mine, longer = rows(equal_tokens, name), rows(equal_time, name) or rows(equal_tokens, name)
        ratios = [b["seconds"] / m["seconds"] for b, m in zip(baseline, mine, strict=True)]
        cells = [name, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        for results in (mine, longer):
            differences = [r["loss"] - b["loss"] for r, b in zip(results, baseline, strict=True)]
            losses = [r["loss"] for r in results]
            cells.append(f"{statistics.mean(losses):.3f} +- {statistics.stdev(losses):.3f}")
            spread = statistics.stdev(differences)
            cells.append(f"{statistics.mean(differences):+.3f} +- {spread:.3f}")
        took = statistics.median(r["seconds"] for r in longer)
        trained = statistics.median(r["trained_tokens"] for r in longer)
        cells.insert(4, f"{trained:,.0f} in {took:.0f} s")
        lines.append("| " + " | ".join(cells) + " |")
    tokens = statistics.median(r["trained_tokens"] for r in baseline)
    seconds = statistics.median(r["seconds"] for r in baseline)
    table = "\n".join(lines)
    header = (
        "| contestant | speed | loss, equal tokens | difference | tokens in equal time "
        "| loss, equal time | difference |"
    )
    used = "\n".join(f"- {name}: `{' '.join(o) or 'nothing'}`" for name, o in CONTESTANTS.items())
    return f"""# Loss with and without the algorithms: {arguments.hardware}, {date.today():%B %Y}

`{" ".join(["python", "benchmarks/algorithms_loss.py", *sys.argv[1:]])}`

gpt2-tiny (`yamls/gpt2-tiny.yaml` in batches of {BATCH_SIZE} x {SEQUENCE_LENGTH} tokens, bfloat16
autocast) on real OpenWebText text, {arguments.seeds} seeds, two runs in progress at a time on one
core each. Equal tokens: {tokens:,.0f}, the very beginning of training (the baseline: {seconds:.0f}
s). Equal time: as many tokens as the baseline's median time allows at the contestant's median
speed; the time that it then took stands beside them. Validation loss in nats a token, mean and
standard deviation over seeds; differences are from the baseline of the same seed. Speed: the
baseline's seconds over the contestant's, median and range over seeds.

{header}
{"| --- " * header.count(" |")}|
{table}

{used}

Raw values: the JSON file beside this one. Versions: {json.dumps(versions())}
"""


if __name__ == "__main__":
    main()

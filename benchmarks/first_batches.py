"""The whole way on real text, timed step by step: prepare, verify, upload, stream, train, evaluate.

A run on a CPU of a recipe that is meant for GPUs: a few batches show that its loss begins where it
must (ln 50257 = 10.82 for a model that knows nothing) and falls, not how fast it trains.

    python benchmarks/first_batches.py DOCUMENTS.jsonl ... --hardware 2cpu
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from composer_gpt2.data.local_s3 import local_s3_server
from composer_gpt2.data.preparation import prepare, summarize
from composer_gpt2.data.verification import verify
from composer_gpt2.run_folder import versions

ROOT = Path(__file__).parent.parent
BUCKET = "openwebtext"
OVERRIDES = (
    "train_batch_size=8",  # x 1024 = 8,192 tokens
    "device_train_microbatch_size=1",
    "max_duration=12ba",
    "schedulers.cosine_decay_with_warmup.t_warmup=3ba",
    "eval_batch_size=8",
    "eval_subset_num_batches=2",
    "eval_interval=null",
    "log_interval=1ba",
    "save_interval=null",
    "run_name=first-batches",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="+")
    parser.add_argument("--recipe", default="yamls/gpt2-52m.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, local_s3_server() as server:
        corpus = Path(folder) / "corpus"
        start = time.perf_counter()
        description = prepare(arguments.documents, str(corpus), validation_fraction=0.05)
        seconds["prepare"] = time.perf_counter() - start
        start = time.perf_counter()
        verify(str(corpus))
        seconds["verify"] = time.perf_counter() - start
        start = time.perf_counter()
        server.create_bucket(BUCKET)
        for file in sorted(path for path in corpus.rglob("*") if path.is_file()):
            server.client().upload_file(str(file), BUCKET, file.relative_to(corpus).as_posix())
        seconds["upload"] = time.perf_counter() - start

        start = time.perf_counter()
        command = [
            *(str(Path(sys.executable).with_name("composer")), "-n", str(arguments.ranks)),
            *("run.py", "-f", arguments.recipe, f"run_folder={folder}/run", *OVERRIDES),
        ]
        remote = f"s3://{BUCKET}"
        own = {"OPENWEBTEXT_REMOTE": remote, "COMPOSER_GPT2_CACHE": f"{folder}/cache"}
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **server.environment, **own},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds["train and evaluate"] = time.perf_counter() - start
    print(finished.stderr, file=sys.stderr)
    finished.check_returncode()
    path = Path(__file__).with_name(f"first_batches_{arguments.hardware}_{date.today():%Y%m}.md")
    text = report(arguments, summarize(description), seconds, finished.stderr)
    path.write_text(text, encoding="utf-8")
    print(path)


def report(arguments: argparse.Namespace, corpus: str, seconds: dict[str, float], said: str) -> str:
    batches = re.findall(r"^batch (\d+) .*?loss ([\d.]+) .*?([\d,]+) tokens/s", said, re.M)
    evaluation = re.findall(r"^evaluation at batch .*$", said, re.M)[-1]
    found = versions()
    lines = [
        f"# First batches of {arguments.recipe} on real text: {arguments.hardware}",
        "",
        f"The loss falls from {batches[0][1]} to {batches[-1][1]} in {len(batches)} batches "
        "(one observation).",
        "",
        f"- Command: `python benchmarks/first_batches.py ... --recipe {arguments.recipe} "
        f"--ranks {arguments.ranks} --hardware {arguments.hardware}`, {date.today()}",
        f"- Launched as `composer -n {arguments.ranks} run.py -f {arguments.recipe} "
        f"{' '.join(OVERRIDES)}`, shards from a local S3 server",
        f"- commit {found['commit']}, torch {found['torch']}, mosaicml {found['mosaicml']}, "
        f"transformers {found['transformers']}, Python {found['python']}; bfloat16 autocast",
        "",
        "Corpus:",
        "",
        *(f"- {line}" for line in corpus.splitlines()),
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in seconds.items()),
        "",
        "| batch | loss, nats a token | tokens/s |",
        "|---|---|---|",
        *(f"| {number} | {loss} | {rate} |" for number, loss, rate in batches),
        "",
        f"At the end: {evaluation}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

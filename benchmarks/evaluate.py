"""Whether tasks are measured as the lm-evaluation-harness's own adapter does, and how much faster.

One model (random weights unless ``--model`` is a folder), exported for Hugging Face, and the same
examples for both. The answers are compared through the harness, example by example: ours is
``HarnessModel``, theirs ``lm_eval.models.huggingface.HFLM``. Then both are timed on the same
requests, tokenized beforehand, in processes of their own (ours with the memory settings of
``composer-gpt2 evaluate``) that take turns in random order. Prints Markdown.

    python benchmarks/evaluate.py --data ../shared/data/eval

The folder has ``lambada_openai.jsonl``, ``piqa.jsonl``, ``winogrande.jsonl`` and, where it is at
hand, ``hellaswag.jsonl``.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

FILES = {
    "lambada": "lambada_openai.jsonl",
    "piqa": "piqa.jsonl",
    "winogrande": "winogrande.jsonl",
    "hellaswag": "hellaswag.jsonl",
}
Requests = list[tuple[list[int], list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="gpt2-52m", help="a name of the family, or a checkpoint")
    parser.add_argument("--examples", type=int, default=200, help="to compare answers")
    parser.add_argument("--timed-examples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--hardware", default="2cpu")
    arguments = parser.parse_args()

    import torch

    from composer_gpt2.run_folder import versions

    found = versions()
    command = (
        f"python benchmarks/evaluate.py --data DATA --model {arguments.model} --examples "
        f"{arguments.examples} --timed-examples {arguments.timed_examples} --rounds "
        f"{arguments.rounds} --batch-sizes {' '.join(map(str, arguments.batch_sizes))}"
    )
    import lm_eval

    print(f"# Tasks, against the lm-evaluation-harness's adapter: {arguments.hardware}")
    print()
    print(f"- Command: `OMP_NUM_THREADS={torch.get_num_threads()} {command}`")
    print(
        f"- {datetime.date.today()}, commit {found['commit']}, torch {found['torch']}, lm-eval "
        f"{lm_eval.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} "
        f"thread(s), load {os.getloadavg()[0]:.1f}"
    )
    print(f"- Model: {arguments.model}, float32; tasks from local files, without the network")
    print()
    with tempfile.TemporaryDirectory() as folder:
        export(arguments.model, folder)
        paths = {n: arguments.data / file for n, file in FILES.items()}
        paths = {name: path for name, path in paths.items() if path.is_file()}
        if arguments.examples:
            compare(folder, paths, arguments.examples)
        if arguments.rounds:
            measure(folder, paths, arguments)


def export(model: str, folder: str) -> None:
    import torch

    from composer_gpt2.configs import family
    from composer_gpt2.model import GPT2Model
    from composer_gpt2.tokenizer import get_tokenizer
    from composer_gpt2.trained_model import load_trained_model

    torch.manual_seed(17)
    loaded = GPT2Model.from_name(model) if model in family() else load_trained_model(model)
    loaded.model.save_pretrained(folder)
    get_tokenizer().save_pretrained(folder)


# --- The same answers ----------------------------------------------------------------------------


def compare(folder: str, paths: dict[str, Path], n_examples: int) -> None:
    import torch

    from composer_gpt2.evaluation.harness import harness_results
    from composer_gpt2.evaluation.tasks import load_task

    tasks = [load_task(name, path, limit=n_examples) for name, path in paths.items()]
    ours = harness_results(lambda: our_model(folder), tasks=tasks, samples=True)
    theirs = harness_results(lambda: their_model(folder, 4), tasks=tasks, samples=True)
    exact = harness_results(
        lambda: their_model(folder, 4, softmax_dtype=torch.float64), tasks=tasks, samples=True
    )
    print("## The same answers")
    print()
    print(
        "The largest difference of a log-likelihood from the adapter's, whose softmax is float32, "
        "and from the adapter's with `softmax_dtype=float64`: it adds up a continuation in the "
        "type of the softmax, and float32 has steps of 6e-5 from 512 nats on. Ours adds up in "
        "float64."
    )
    print()
    print(
        "| task | examples | requests | float32 | float64 | longest, nats | greedy differs | both |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        mine, its, best = (flat(each["samples"][task.name]) for each in (ours, theirs, exact))
        plain, wide = (
            max(abs(a[0] - b[0]) for a, b in zip(mine, other, strict=True)) for other in (its, best)
        )
        flags = sum(a[1] != b[1] for a, b in zip(mine, its, strict=True))
        metrics = []
        for metric in task.metrics:
            values = [each["results"][task.name].get(f"{metric},none") for each in (ours, theirs)]
            if values[0] is not None:
                metrics.append(f"{metric} {values[0]:.6g} = {values[1]:.6g}")
        print(
            f"| {task.name} | {len(task.examples)} | {len(mine)} | {plain:.1e} | {wide:.1e} | "
            f"{max(-each[0] for each in mine):.0f} | {flags} | {', '.join(metrics)} |",
            flush=True,
        )
    print()


def flat(samples: Sequence[Any]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = []

    def collect(answer: Any) -> None:
        if isinstance(answer[0], tuple | list):
            for each in answer:
                collect(each)
        else:
            found.append((float(answer[0]), str(answer[1]) == "True"))

    for sample in sorted(samples, key=lambda each: each["doc_id"]):
        collect(sample["resps"])
    return found


def our_model(folder: str) -> Any:
    from composer_gpt2.evaluation.harness_model import HarnessModel
    from composer_gpt2.evaluation.likelihood import Scorer
    from composer_gpt2.trained_model import load_trained_model

    return HarnessModel(Scorer(load_trained_model(folder, device="cpu"), progress=False))


def their_model(folder: str, batch_size: int, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    adapter: Any = HFLM  # its decorator hides its arguments
    return adapter(
        pretrained=folder, device="cpu", dtype="float32", batch_size=batch_size, **settings
    )


# --- Their time ----------------------------------------------------------------------------------


def measure(folder: str, paths: dict[str, Path], arguments: argparse.Namespace) -> None:
    from composer_gpt2.evaluation.tasks import load_task
    from composer_gpt2.text_codec import text_codec

    codec = text_codec(our_model(folder).scorer.model)
    requests: dict[str, Requests] = {}
    for name, path in paths.items():
        task = load_task(name, path, limit=arguments.timed_examples)
        requests[name] = [(list(r.context), list(r.continuation)) for r in task.requests(codec)]
    contestants = {"ours": 0} | {f"HFLM, batch size {size}": size for size in arguments.batch_sizes}
    workers = {
        "ours": Worker(folder, requests, [0]),
        "theirs": Worker(folder, requests, arguments.batch_sizes),
    }
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    generator = random.Random(1)
    for number in range(arguments.rounds + 1):  # the first is a short one, to warm up
        for name in requests:
            for contestant in generator.sample(list(contestants), len(contestants)):
                size = contestants[contestant]
                worker = workers["theirs" if size else "ours"]
                found = worker.run(name, size, 8 if number == 0 else None)
                if number:
                    seconds.setdefault((name, contestant), []).append(found)
    for worker in workers.values():
        worker.stop()
    print("## Time")
    print()
    print(
        f"Log-likelihoods of {arguments.timed_examples} examples of each task, tokenized "
        f"beforehand; medians of {arguments.rounds} rounds in random order. CPU seconds count what "
        "the process used, wall seconds also what other programs on the machine took."
    )
    print()
    print("| task | who | CPU seconds | x ours | wall seconds | CPU seconds of each round |")
    print("|---|---|---|---|---|---|")
    totals: dict[str, float] = dict.fromkeys(contestants, 0.0)
    for name in requests:
        base = statistics.median(cpu for cpu, _ in seconds[name, "ours"])
        for contestant in contestants:
            cpu = statistics.median(each[0] for each in seconds[name, contestant])
            wall = statistics.median(each[1] for each in seconds[name, contestant])
            each = ", ".join(f"{c:.2f}" for c, _ in seconds[name, contestant])
            totals[contestant] += cpu
            print(f"| {name} | {contestant} | {cpu:.2f} | {cpu / base:.2f} | {wall:.2f} | {each} |")
    for contestant, total in totals.items():
        print(
            f"| all | {contestant} | {total:.2f} | {total / totals['ours']:.2f} | | |", flush=True
        )


class Worker:
    """A process with a model, which answers requests and says how long it took."""

    def __init__(self, folder: str, requests: dict[str, Requests], sizes: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, folder, requests, sizes))
        self.process.start()

    def run(self, task: str, size: int, n_requests: int | None) -> tuple[float, float]:
        """CPU and wall seconds of the first requests of a task; ``None`` for all."""
        self.pipe.send((task, size, n_requests))
        return self.pipe.recv()

    def stop(self) -> None:
        """Ends the process."""
        self.pipe.send(None)
        self.process.join()


def work(pipe: Any, folder: str, requests: dict[str, Requests], sizes: Sequence[int]) -> None:
    from composer_gpt2.memory import keep_freed_memory

    if 0 in sizes:
        keep_freed_memory()  # as the command does
    models = {size: their_model(folder, size) if size else our_model(folder) for size in sizes}
    while (order := pipe.recv()) is not None:
        task, size, n_requests = order
        asked = [(("", ""), *request) for request in requests[task][:n_requests]]
        cpu, wall = time.process_time(), time.perf_counter()
        models[size]._loglikelihood_tokens(asked, disable_tqdm=True)
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall))


if __name__ == "__main__":
    main()

"""Seconds to write new tokens: ours, Hugging Face's ``generate``, and without a cache.

All sample from the same randomly initialised network with the same prompt, number of tokens and
settings (temperature 1, top-k 50). "No cache" is the loop that minGPT and nanoGPT have: the whole
text through the network for each token, logits at the last position alone. Contestants take turns
in every round; the first round is not reported. Beside the time on the clock stands that of the
processor: on one thread it says what a program costs also where others run. What a text says does
not matter, only its length; no text ends early.

    OMP_NUM_THREADS=1 python benchmarks/generate.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from composer_gpt2.generation.cache import KeyValueCache
from composer_gpt2.generation.network import Batch, Network
from composer_gpt2.generation.sampling import Sampling, draw, restrict
from composer_gpt2.model import GPT2Model

PROMPT = [50256, 15496, 11, 314, 1101, 257, 3303, 2746, 11]  # "Hello, I'm a language model,"
SAMPLING = Sampling(top_k=50)
Seconds = dict[tuple[str, int], list[tuple[float, float]]]  # of processor and clock


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2-125m")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 5], help="written together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()
    torch.manual_seed(17)
    network = GPT2Model.from_name(arguments.model).eval().model
    assert isinstance(network, GPT2LMHeadModel)
    rounded = copy.deepcopy(network)  # in bfloat16 as Hugging Face has it
    rounded.to(dtype=torch.bfloat16)  # type: ignore[call-arg]  # transformers wraps it
    contestants: dict[str, Callable[[int, int], None]] = {
        "no cache (minGPT), fp32": lambda n, m: without_cache(network, n, m),
        "Hugging Face, fp32": lambda n, m: hugging_face(network, n, m),
        "Hugging Face, bfloat16 weights": lambda n, m: hugging_face(rounded, n, m),
        "ours through the network, fp32": lambda n, m: ours(network, "fp32", n, m, fast=False),
        "ours with a growing cache, fp32": lambda n, m: with_growing_cache(network, n, m),
        "ours, fp32": lambda n, m: ours(network, "fp32", n, m),
        "ours, amp_bf16": lambda n, m: ours(network, "amp_bf16", n, m),
    }
    seconds: Seconds = {(name, n): [] for n in arguments.texts for name in contestants}
    for number in range(arguments.rounds + 1):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        for n_texts in arguments.texts:
            for name in names:
                # The first round warms up: fewer tokens do.
                n_tokens = arguments.new_tokens if number else 8
                began, used = time.perf_counter(), time.process_time()
                with torch.random.fork_rng():
                    contestants[name](n_texts, n_tokens)
                took = time.process_time() - used, time.perf_counter() - began
                if number:
                    seconds[name, n_texts].append(took)
                    said = f"{took[0]:.1f} s of the processor, {took[1]:.1f} s"
                    print(f"round {number}, {n_texts} texts, {name}: {said}", flush=True)
    path = Path(__file__).with_name(f"generate_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text(report(arguments, seconds), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


@torch.inference_mode()
def ours(
    network: GPT2LMHeadModel, precision: str, n_texts: int, n_tokens: int, *, fast: bool = True
) -> None:
    """The loop of TextGenerator without its text; weights are copied anew for bfloat16."""
    asked = Network(network, "amp_bf16" if precision == "amp_bf16" else "fp32", 50257)
    if not fast:
        asked.fast_step = None
    batch = Batch(asked, [PROMPT] * n_texts, n_tokens)
    for _ in range(n_tokens - 1):
        uniform = torch.rand(n_texts, dtype=torch.float64)
        batch.step(draw(restrict(batch.logits, SAMPLING), uniform).tolist())
    assert fast == (asked.fast_step is not None)


def with_growing_cache(network: GPT2LMHeadModel, n_texts: int, n_tokens: int) -> None:
    with mock.patch("composer_gpt2.generation.network.KeyValueCache", GrowingCache):
        ours(network, "fp32", n_texts, n_tokens)


class GrowingCache(KeyValueCache):
    """Keys and values as transformers' DynamicCache has them: each token makes new tensors."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: object = None
    ) -> tuple[Tensor, Tensor]:
        """As the base; of a prompt, rows in the order of ``sources``."""
        if self._filling is not None:
            _, sources = self._filling
            self._keys.append(key_states[sources])
            self._values.append(value_states[sources])
            return key_states, value_states
        n = self.n_columns  # the first token is computed twice, to be compared
        for states, new in ((self._keys, key_states), (self._values, value_states)):
            states[layer_idx] = torch.cat([states[layer_idx][:, :, :n], new], dim=2)
        return self._keys[layer_idx], self._values[layer_idx]


@torch.inference_mode()
def without_cache(network: PreTrainedModel, n_texts: int, n_tokens: int) -> None:
    ids = torch.tensor([PROMPT] * n_texts)
    for _ in range(n_tokens):
        logits = network(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        logits = logits.masked_fill(logits < logits.topk(50).values[:, -1:], -torch.inf)
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)


@torch.inference_mode()
def hugging_face(network: GPT2LMHeadModel, n_texts: int, n_tokens: int) -> None:
    ids = torch.tensor([PROMPT] * n_texts)
    network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=50,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        pad_token_id=50256,
    )


def report(arguments: argparse.Namespace, seconds: Seconds) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    lines = [
        f"# Writing {arguments.new_tokens} new tokens: {arguments.hardware}",
        "",
        f"{arguments.model} with random weights, a prompt of {len(PROMPT)} tokens, temperature 1, "
        "top-k 50.",
        "",
        f"- Command: `OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/generate.py "
        f"--model {arguments.model} --new-tokens {arguments.new_tokens} "
        f"--texts {' '.join(map(str, arguments.texts))} --rounds {arguments.rounds} "
        f"--hardware {arguments.hardware}`",
        f"- {date.today()}, commit {commit}, {versions}, {torch.get_num_threads()} threads, load "
        f"average {os.getloadavg()[1]:.1f} at the end"
        + (", other programs ran at the same time" if os.getloadavg()[1] > 3 else ""),
        f"- Medians of {arguments.rounds} rounds in turns, a short one before them discarded",
    ]
    for n_texts in arguments.texts:
        results = {name: values for (name, n), values in seconds.items() if n == n_texts}
        used, took = (
            {name: statistics.median(pair[i] for pair in pairs) for name, pairs in results.items()}
            for i in (0, 1)
        )
        slowest = used["no cache (minGPT), fp32"]
        lines += [
            "",
            f"## {n_texts} text{'s' if n_texts > 1 else ''} at a time",
            "",
            "| | processor, s | clock, s | times no cache | all rounds: processor; clock |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {used[name]:.1f} | {took[name]:.1f} | {slowest / used[name]:.1f} | "
            f"{_each(pairs, 0)}; {_each(pairs, 1)} |"
            for name, pairs in results.items()
        ]
    return "\n".join(lines) + "\n"


def _each(pairs: list[tuple[float, float]], i: int) -> str:
    return ", ".join(f"{pair[i]:.1f}" for pair in pairs)


if __name__ == "__main__":
    main()

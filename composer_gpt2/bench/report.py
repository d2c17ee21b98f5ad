"""Measurements as Markdown, with every raw value and the arithmetic stated."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

from composer_gpt2.bench.ceiling import Product, products, rate

__all__ = ["ceiling_rates", "command", "report", "spread", "tokens_per_second"]

Results = dict[str, Any]
Form = str | Callable[[float], str]


def tokens_per_second(results: Results, contestant: Results) -> list[float]:
    """Of each round."""
    settings = results["settings"]
    n_tokens = settings["batch_size"] * settings["sequence_length"]
    return [n_tokens / seconds for seconds in contestant["seconds"]]


def ceiling_rates(results: Results, dtype: str = "bfloat16") -> list[float]:
    """FLOP/s of matrix products alone, in each round that measured it."""
    return [rate(_products(results), seconds) for seconds in results["ceiling"][dtype]]


def spread(values: Sequence[float], form: str) -> str:
    """Median, with the extremes."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def command(settings: Results, *extra: str) -> str:
    """What repeats the measurement."""
    words = ["composer-gpt2", "bench"]
    for file in settings["files"]:
        words += ["-f", file]
    for name in ("model", "batch_size", "sequence_length", "rounds", "threads"):
        words += [f"--{name.replace('_', '-')}", str(settings[name])]
    for name in ("steps", "data"):
        if settings[name] is not None:
            words += [f"--{name}", settings[name]]
    if not settings["peers"]:
        words.append("--no-peers")
    if settings["peer_adamw"] != "fused":
        words += ["--peer-adamw", settings["peer_adamw"]]
    return shlex.join([*words, *extra, *settings["overrides"]])


def report(results: Results, picture: str) -> str:
    """The Markdown file."""
    settings = results["settings"]
    by_key = {c["key"]: c for c in results["contestants"]}
    skipped = ["--no-memory"] * ("fresh" not in results)
    skipped += ["--no-overhead"] * ("overhead" not in results)
    parts = [
        f"# A training step of {settings['model']}: {_hardware(results)}",
        "\n".join(_conclusions(results, by_key)),
        f"![tokens a second of each step]({picture})",
        "## How",
        f"`{command(settings, *skipped)}`",
        "\n".join(_method(results)),
        "## Contestants",
        _contestant_table(results, by_key),
        "## The ceiling",
        _ceiling_text(results),
    ]
    if "fresh" in results:
        parts += ["## Memory and start", _fresh_table(results, by_key)]
    parts += ["## Composer's own overhead", "\n".join(_overhead(results, by_key))]
    parts += ["## Raw values", _raw(results)]
    return "\n\n".join(parts) + "\n"


# --- Sections ----------------------------------------------------------------------------------


def _conclusions(results: Results, by_key: dict[str, Results]) -> list[str]:
    last, said = by_key["trainer"], []
    speed = tokens_per_second(results, last)
    shares = _shares(results, last)
    said.append(f"- All together, in our Trainer: **{spread(speed, ',.0f')} tokens/s**.")
    for key, name in (
        ("hf_bf16", "Hugging Face's GPT-2 under bf16 autocast"),
        ("hf_fp32", "Hugging Face's GPT-2 in fp32"),
        ("composer", "it in stock Composer's Trainer, bf16 autocast"),
        ("hf_trainer", "it in Hugging Face's Trainer, bf16"),
    ):
        if key in by_key:
            ratios = _ratios(last, by_key[key])
            said.append(f"- Against {name}: **{spread(ratios, '.2f')} x**.")
    said.append(f"- Share of the bf16 matrix ceiling: **{spread(shares, '.1%')}**.")
    if "fresh" in results:
        ours = results["fresh"]["trainer"]
        line = f"- Peak memory: **{ours['peak_bytes'] / 1e9:.2f} GB**"
        if "hf_bf16" in by_key:
            line += f" (Hugging Face, bf16: {results['fresh']['hf_bf16']['peak_bytes'] / 1e9:.2f})"
        said.append(f"{line}; first step done after {ours['seconds_to_first_step']:.1f} s.")
    if "default_memory" in by_key:
        ratios = _ratios(by_key["start"], by_key["default_memory"])
        said.append(f"- Reusing memory alone: {spread(ratios, '.2f')} x.")
    return said


def _method(results: Results) -> list[str]:
    settings, found = results["settings"], results["versions"]
    machine = results["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in found.items() if k != "commit")
    data = settings["data"] or "random tokens, frequencies 1/rank, seed 17"
    clip = settings["recipe"]["algorithms"].get("gradient_clipping")
    clipping = "no clipping" if clip is None else f"norm clipped at {clip['clipping_threshold']}"
    lines = [
        f"- {results['date']}, commit {found['commit']}",
        f"- {packages}",
        f"- {machine.get('cpu', machine['architecture'])}, {machine['n_cores']} cores, "
        f"{settings['threads']} threads; {' '.join(machine.get('flags', []))}",
        f"- The same for all: {settings['batch_size']} x {settings['sequence_length']} tokens a "
        f"step ({data}), initial weights, SDPA attention, no dropout, {clipping}, AdamW with the "
        "numbers of the recipe and a learning rate of 1e-6.",
        f"- AdamW of peers: {settings['peer_adamw']}"
        f"{' (one kernel), as ours' if settings['peer_adamw'] == 'fused' else ''}.",
        f"- One step that does not count, then {settings['rounds']} rounds. A round runs one step "
        "of each contestant; its order moves on and turns round. Peers share a process with "
        "glibc's memory settings, ours one that reuses memory; while one runs, the other waits. "
        "Contestants of a process share weights and moments.",
        "- Ratios and shares compare values of the same round. Everywhere: median (extremes).",
        "- A step of a Trainer is the time between the beginnings of two batches, all that its "
        "loop does included; it runs one batch before, which is not counted.",
        "- Stock Composer is `HuggingFaceModel` in `composer.Trainer`, without metrics. It refuses "
        "amp_bf16 on CPUs, so the forward pass is wrapped in torch.autocast.",
    ]
    lines.append("- seq_length_warmup, if the recipe has it, is off: it changes the batch.")
    for name, reason in results["missing"].items():
        lines.append(f"- Not measured: {name}: {reason}.")
    for name, reason in settings["left_out"].items():
        lines.append(f"- {name} of the recipe is left out: it {reason}.")
    return lines


def _contestant_table(results: Results, by_key: dict[str, Results]) -> str:
    base = by_key.get("hf_bf16")
    against = "against HF bf16" if base else "against the first"
    rows = [
        f"| | seconds a step | tokens/s | GFLOP/s | {against} | share of the bf16 ceiling |",
        "|---|---|---|---|---|---|",
    ]
    base = base or results["contestants"][0]
    for contestant in results["contestants"]:
        speed = tokens_per_second(results, contestant)
        gigaflops = [s * results["flops_per_token"] / 1e9 for s in speed]
        rows.append(
            f"| {contestant['label']} | {spread(contestant['seconds'], '.4g')} | "
            f"{spread(speed, ',.0f')} | {statistics.median(gigaflops):,.1f} | "
            f"{spread(_ratios(contestant, base), '.2f')} | "
            f"{spread(_shares(results, contestant), '.1%')} |"
        )
    n, total = results["n_parameters"], results["flops_per_token"]
    shape = results["architecture"]
    length = results["settings"]["sequence_length"]
    rows += [
        "",
        f"FLOPs a token: 6 N + 12 L d T = 6 x {n:,} + 12 x {shape['n_layer']} x "
        f"{shape['n_embd']} x {length} = {total:,}; N are all parameters. The attention part "
        "counts the full square, as is usual (Chowdhery et al., 2022, PaLM, appendix B); causal "
        "kernels do about half of it.",
    ]
    return "\n".join(rows)


def _ceiling_text(results: Results) -> str:
    dtypes = ("bfloat16", "float32")
    rates = {dtype: [r / 1e9 for r in ceiling_rates(results, dtype)] for dtype in dtypes}
    tokens = statistics.median(rates["bfloat16"]) * 1e9 / results["flops_per_token"]
    plain = ""
    for contestant in results["contestants"]:
        if contestant["key"] == "hf_fp32":
            speed = statistics.median(tokens_per_second(results, contestant))
            achieved = speed * results["flops_per_token"] / 1e9
            share = achieved / statistics.median(rates["float32"])
            plain = f", of which Hugging Face in fp32 reaches {share:.1%}"
    lines = [
        "`torch.mm` alone at the shapes and memory layouts of this training step, each as often as "
        "a step has it: all FLOPs over all seconds. Measured once a round in the process of ours "
        "(fp32: in one round).",
        "",
        f"- bf16: **{spread(rates['bfloat16'], ',.0f')} GFLOP/s**, which is {tokens:,.0f} tokens/s",
        f"- fp32: {spread(rates['float32'], ',.0f')} GFLOP/s{plain}",
        "",
        "| product | m x k x n | times a step | bf16, GFLOP/s | fp32, GFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for product in _products(results):
        each = {
            dtype: [product.flops / s[product.name] / 1e9 for s in results["ceiling"][dtype]]
            for dtype in dtypes
        }
        lines.append(
            f"| {product.name} | {product.m} x {product.k} x {product.n} | {product.count:g} | "
            f"{spread(each['bfloat16'], ',.0f')} | {statistics.median(each['float32']):,.0f} |"
        )
    return "\n".join(lines)


def _fresh_table(results: Results, by_key: dict[str, Results]) -> str:
    lines = [
        "Each in a process of its own, two batches, once. Start: from the start of the process to "
        "the end of the first step, imports and initialisation included. The loss is that of the "
        "first batch; bare loops report it. Networks of another architecture have another one.",
        "",
        "| | peak resident memory, GB | seconds to the first step | first loss |",
        "|---|---|---|---|",
    ]
    for key, fresh in results["fresh"].items():
        loss = "" if fresh["first_loss"] is None else f"{fresh['first_loss']:.4f}"
        lines.append(
            f"| {by_key[key]['label']} | {fresh['peak_bytes'] / 1e9:.2f} | "
            f"{fresh['seconds_to_first_step']:.1f} | {loss} |"
        )
    return "\n".join(lines)


def _overhead(results: Results, by_key: dict[str, Results]) -> list[str]:
    trainer = by_key["trainer"]
    bare = [c for c in results["contestants"] if c["kind"] == "loop" and c["process"] == "ours"][-1]
    ratios = [1 / r - 1 for r in _ratios(trainer, bare)]
    lines = [
        f"- Our Trainer against the bare loop of the same algorithms, in the rounds above: "
        f"{spread(ratios, '+.1%')} a step. The noise of the machine is larger than what is sought."
    ]
    if "overhead" in results:
        found = results["overhead"]
        each = [1e3 * (t - b) for t, b in zip(found["trainer"], found["bare"], strict=True)]
        step = statistics.median(bare["seconds"])
        lines.append(
            f"- Where the model costs next to nothing ({found['model']}, {found['shape'][0]} x "
            f"{found['shape'][1]} tokens, {len(each)} pairs of blocks of "
            f"{found['steps_a_block']} steps in turns): **{spread(each, '.2f')} ms a step**, which "
            f"is **{statistics.median(each) / 1e3 / step:.2%}** of this model's step of "
            f"{step:.4g} s. Gradients are clipped and algorithms run in both."
        )
    return lines


def _raw(results: Results) -> str:
    lines = ["Seconds a step, in the order of the rounds:", ""]
    for contestant in results["contestants"]:
        values = ", ".join(f"{value:.5g}" for value in contestant["seconds"])
        lines.append(f"- {contestant['label']}: {values}")
    rates = ", ".join(f"{r / 1e9:.1f}" for r in ceiling_rates(results))
    lines.append(f"- bf16 ceiling, GFLOP/s: {rates}")
    if "overhead" in results:
        for name in ("bare", "trainer"):
            values = ", ".join(f"{1e3 * value:.3f}" for value in results["overhead"][name])
            lines.append(f"- overhead, ms a step, {name}: {values}")
    lines += ["", "Seconds of each matrix product and the resolved recipe are in the JSON file."]
    return "\n".join(lines)


# --- Arithmetic --------------------------------------------------------------------------------


def _ratios(contestant: Results, base: Results) -> list[float]:
    """How many times as fast, round by round."""
    pairs = zip(base["seconds"], contestant["seconds"], strict=True)
    return [theirs / own for theirs, own in pairs]


def _shares(results: Results, contestant: Results) -> list[float]:
    """Achieved FLOP/s over those of matrix products alone, round by round."""
    speed = tokens_per_second(results, contestant)
    rates = ceiling_rates(results)
    return [s * results["flops_per_token"] / r for s, r in zip(speed, rates, strict=True)]


def _products(results: Results) -> list[Product]:
    settings = results["settings"]
    config = SimpleNamespace(**results["architecture"], n_inner=None)
    n_tokens = settings["batch_size"] * settings["sequence_length"]
    return products(cast("Any", config), n_tokens)


def _hardware(results: Results) -> str:
    settings = results["settings"]
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return f"CPU, {threads}, {results['date']}"

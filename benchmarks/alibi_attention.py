"""What ALiBi's bias costs in attention on a CPU: as two more dimensions, and as a matrix.

Forward and backward of one attention layer without its projections, in alternating rounds: causal
attention without biases, ALiBi as this package has it, and a stored matrix of biases and mask.

    python benchmarks/alibi_attention.py --hardware 2cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel

from algorithms.alibi import alibi_bias, apply_alibi
from algorithms.alibi.alibi import _sdpa
from composer_gpt2.configs import get_config
from composer_gpt2.run_folder import versions

MODELS, N_SEQUENCES, N_TOKENS = ("gpt2-52m", "gpt2-125m"), 4, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()
    lines = []
    for model in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            rounds = measure(model, dtype, arguments.rounds)
            cells = [model, str(dtype).removeprefix("torch.")]
            cells.append(f"{1000 * statistics.median(r['causal'] for r in rounds):.0f} ms")
            for name in ("two dimensions", "matrix"):
                ratios = [r[name] / r["causal"] for r in rounds]
                low, high = min(ratios), max(ratios)
                cells.append(f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    table = "\n".join(lines)
    path = Path(__file__).with_name(f"alibi_attention_{arguments.hardware}_{date.today():%Y%m}.md")
    path.write_text(
        f"""# The cost of ALiBi in attention: {arguments.hardware}, {date.today():%B %Y}

`python benchmarks/alibi_attention.py --rounds {arguments.rounds} --hardware {arguments.hardware}`

Forward and backward of attention alone, {N_SEQUENCES} x {N_TOKENS} tokens, {arguments.rounds}
rounds in alternating order after one that is discarded, {torch.get_num_threads()} threads. Time
over that of causal attention without biases in the same round: median and range.

| heads of | type | causal, no biases | ALiBi, two more dimensions | ALiBi, a matrix |
| --- | --- | --- | --- | --- |
{table}

Versions: {json.dumps(versions())}
""",
        encoding="utf-8",
    )
    print(path)


def measure(model: str, dtype: torch.dtype, n_rounds: int) -> list[dict[str, float]]:
    config = get_config(model, n_layer=1, vocab_size=64)
    module = GPT2LMHeadModel(config)
    apply_alibi(module)
    layer, H, D = module.transformer.h[0].attn, config.n_head, config.n_embd // config.n_head
    shape = (N_SEQUENCES, H, N_TOKENS, D)
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)
    future = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).triu(1)
    matrix = alibi_bias(H, N_TOKENS, N_TOKENS).masked_fill(future, -torch.inf).to(dtype)[None]
    contestants: dict[str, Callable[[], Tensor]] = {
        "causal": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "two dimensions": lambda: _sdpa(layer, query, key, value, None, is_causal=True)[
            0
        ].transpose(1, 2),
        "matrix": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=matrix),
    }
    rounds = []
    for number in range(n_rounds + 1):
        names = list(contestants) if number % 2 else list(reversed(contestants))
        seconds = {}
        for name in names:
            start = time.perf_counter()
            contestants[name]().backward(gradient)
            seconds[name] = time.perf_counter() - start
        rounds.append(seconds)
    return rounds[1:]


if __name__ == "__main__":
    main()

"""Is what was written the model that was trained? Logits decide, before anything is in place.

Shapes: ``B`` batch, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from composer_gpt2.export import isolated
from composer_gpt2.model import GPT2Model

__all__ = ["LogitsDifferError", "check_logits", "probe_logits", "write_probes"]

_TOLERANCE = 1e-4  # float32 sums in another order, relative to the largest logit
_SHORT, _BEYOND = 48, 64  # tokens of a probe; how far one goes past the length of training


class LogitsDifferError(RuntimeError):
    """What was written does not compute what was trained; nothing is left of it."""


def write_probes(model: GPT2Model, path: Path) -> float:
    """Writes tokens and the logits that the model has for them; returns the largest logit.

    One batch of short texts, and one text as long as the model reads (past the length of its
    configuration, if it has no learned positions), with the logits of its last tokens.
    """
    vocabulary = _n_real_tokens(model)
    longest = model.context_length or model.model.config.n_positions + _BEYOND
    generator = torch.Generator().manual_seed(17)
    tensors, largest = {}, 0.0
    for n, (n_texts, n_tokens) in enumerate(((2, min(_SHORT, longest)), (1, longest))):
        tokens = torch.randint(vocabulary, (n_texts, n_tokens), generator=generator)
        logits = probe_logits(model, tokens, vocabulary)
        largest = max(largest, float(logits.abs().max()))
        tensors |= {f"tokens.{n}": tokens, f"logits.{n}": logits}
    save_file(tensors, path)
    return largest


@torch.no_grad()
def probe_logits(model: GPT2Model, tokens: Tensor, vocabulary: int) -> Tensor:
    """Logits of the last tokens, (B, at most 48, V), float32, contiguous."""
    logits = model.model(tokens, use_cache=False).logits[:, -_SHORT:, :vocabulary]
    return logits.float().contiguous()


def check_logits(folder: Path, probes: Path, largest_logit: float) -> float:
    """The largest difference between the logits of what is in ``folder`` and those expected.

    Remote code is run in a process of its own, which finds torch and transformers but none of the
    packages that trained the model.

    Raises:
        LogitsDifferError: It is above rounding, or the folder cannot be loaded.
    """
    if (folder / "modeling_composer_gpt2.py").exists():
        difference = _in_isolation(folder, probes)
    else:
        difference = _or_say(lambda: isolated.largest_difference(folder, probes))
    if not difference <= _TOLERANCE * max(largest_logit, 1.0):
        raise LogitsDifferError(
            "the exported model must have the logits of the trained one, up to rounding "
            f"({_TOLERANCE * max(largest_logit, 1.0):.2g}), got a difference of {difference:.3g}; "
            "nothing has been written."
        )
    return difference


def _in_isolation(folder: Path, probes: Path) -> float:
    # torch may be where only we look: PYTHONPATH, the user's own site-packages.
    arguments = [isolated.__file__, str(folder), str(probes), *filter(None, sys.path)]
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, "-I", *arguments],
            env={**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        raise LogitsDifferError(
            "the exported model must load where this project is not installed, got "
            f"{_how_it_ended(result)}; nothing has been written."
        )
    return json.loads(result.stdout.splitlines()[-1])["difference"]


def _how_it_ended(result: subprocess.CompletedProcess[str]) -> str:
    status = f"exit status {result.returncode}"
    if result.returncode < 0:
        with contextlib.suppress(ValueError):  # a signal without a name
            status = f"a process that {signal.Signals(-result.returncode).name} ended"
    lines = result.stderr.strip().splitlines()  # none, if the system ended it (out of memory)
    return f"{lines[-1]} ({status})" if lines else status


def _or_say(compare: Callable[[], float]) -> float:
    try:
        return compare()
    except (RuntimeError, ValueError, OSError) as error:
        raise LogitsDifferError(
            f"the exported model must load with transformers, got {type(error).__name__}: {error}; "
            "nothing has been written."
        ) from error


def _n_real_tokens(model: GPT2Model) -> int:
    """The vocabulary without padding, whose logits are minus infinity."""
    head: Any = model.model.lm_head
    return getattr(head, "n_real", head.out_features)

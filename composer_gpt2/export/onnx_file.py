"""``model.onnx``: a plain GPT-2 for runtimes without Python.

torch's exporter through ``torch.export`` (``dynamo=True``). Shapes: ``B`` batch and ``T`` tokens
are free, ``T`` up to the model's positions.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from composer_gpt2.export.checking import LogitsDifferError

__all__ = ["check_onnx_options", "write_onnx"]

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_TOLERANCE = 1e-4  # relative to the largest logit
_LARGEST_FILE = 2**31 - 2**26  # a protobuf ends at 2 GiB; larger weights get a file of their own


def check_onnx_options(dtype: str) -> None:
    """Refuses what could not be written, before any work.

    Raises:
        ValueError: A package is missing, or the type is not float32.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--onnx needs {', '.join(missing)}; run: pip install 'composer-gpt2[onnx]'"
        )
    if dtype != "float32":
        raise ValueError(
            f"--onnx is for float32, got {dtype}: runtimes convert the file themselves; leave one "
            "out."
        )


def write_onnx(folder: Path) -> float:
    """Adds ``model.onnx`` to a folder with a plain GPT-2; returns the largest difference of logits.

    Input ``input_ids``, int64, (B, T); output ``logits``, float32, (B, T, V). There is no cache.

    Raises:
        LogitsDifferError: onnxruntime computes something else with it.
    """
    model = GPT2LMHeadModel.from_pretrained(
        folder, local_files_only=True, torch_dtype=torch.float32, attn_implementation="sdpa"
    )
    network = _Logits(model).eval()
    n_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
    batch = torch.export.Dim("batch", min=1, max=4096)
    tokens = torch.export.Dim("tokens", min=1, max=model.config.n_positions)
    logging.getLogger("torch.onnx._internal.exporter._schemas").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's and onnxscript's own insides
        torch.onnx.export(
            network,
            (torch.zeros(2, min(16, model.config.n_positions), dtype=torch.int64),),
            str(folder / "model.onnx"),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=({0: batch, 1: tokens},),
            dynamo=True,
            external_data=n_bytes > _LARGEST_FILE,
            verbose=False,
        )
    return _compare(folder / "model.onnx", network, model.config.n_positions)


class _Logits(nn.Module):
    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


@torch.no_grad()
def _compare(path: Path, network: _Logits, n_positions: int) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(17)
    vocabulary, largest = network.model.config.vocab_size, 0.0
    for shape in ((3, min(7, n_positions)), (1, n_positions), (1, 1)):
        tokens = torch.randint(vocabulary, shape, generator=generator)
        expected = network(tokens).numpy()
        (logits,) = session.run(None, {"input_ids": tokens.numpy()})
        difference = float(np.abs(logits - expected).max())
        largest = max(largest, difference)
        if not difference <= _TOLERANCE * max(float(np.abs(expected).max()), 1.0):
            raise LogitsDifferError(
                "model.onnx must have the logits of the exported model, up to rounding, got a "
                f"difference of {difference:.3g} for {shape[0]} x {shape[1]} tokens; nothing has "
                "been written."
            )
    return largest

"""Who takes part in the GPU suite: Hugging Face's network, then ours, algorithm by algorithm."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

PADDED = 50304  # the vocabulary as a multiple of 64: 786 x 64

Build = Callable[[Any], tuple[Any, torch.optim.Optimizer]]

# As they are applied to a model, whatever the order of a contestant's list.
ORDER = ("pad_vocabulary", "alibi", "fused_gelu", "fused_layernorm", "fused_cross_entropy")


def contestants(device: torch.device, backend: str) -> dict[str, Build]:
    """Each makes a network and an optimizer of a configuration; the most telling come first."""
    on_gpu = device.type == "cuda"

    def plain(config: Any, *, fused: bool = False) -> tuple[Any, Any]:
        from transformers import GPT2LMHeadModel

        network: Any = GPT2LMHeadModel(config)
        network.to(device)
        network.loss_type = "ForCausalLM"  # its class name does not tell transformers
        return network, torch.optim.AdamW(network.parameters(), lr=6e-4, fused=fused or None)

    def tuned(config: Any) -> tuple[Any, Any]:
        config.vocab_size, config.activation_function = PADDED, "gelu_pytorch_tanh"
        return plain(config, fused=True)

    def ours(*names: str, fused: bool = True, liger_loss: bool = True, kernel: str = "sdpa") -> Any:
        def build(config: Any) -> tuple[Any, Any]:
            network, optimizer = plain(config, fused=fused)
            network.without_liger = not liger_loss
            for name in sorted(names, key=ORDER.index):
                # Without mosaicml this import fails, and says so.
                module = importlib.import_module(f"algorithms.{name}.{name}")
                settings = {"kernel": kernel} if name == "alibi" else {}
                with chunked_loss(not liger_loss):
                    getattr(module, f"apply_{name}")(network, optimizers=[optimizer], **settings)
            return network, optimizer

        return build

    def compiled(build: Build) -> Build:
        def build_and_compile(config: Any) -> tuple[Any, Any]:
            network, optimizer = build(config)
            network.compile(backend=backend)
            return network, optimizer

        return build_and_compile

    def flash(build: Build) -> Build:
        def build_with_flash(config: Any) -> tuple[Any, Any]:
            network, optimizer = build(config)
            forward = network.forward

            def forward_with_flash(*arguments: Any, **named: Any) -> Any:
                from torch.nn.attention import SDPBackend, sdpa_kernel

                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or an error
                    return forward(*arguments, **named)

            network.forward = forward_with_flash
            return network, optimizer

        return build_with_flash

    padded = ("pad_vocabulary",)
    loss = (*padded, "fused_cross_entropy")
    gelu = (*loss, "fused_gelu")
    everything = (*gelu, "fused_layernorm") if on_gpu else gelu  # on a CPU it compiles for long
    alibi = ("alibi", *everything)
    return {
        "Hugging Face, compiled": compiled(plain),
        "Hugging Face": plain,
        "ours: all, compiled": compiled(ours(*everything)),
        "Hugging Face, tuned by configuration, compiled": compiled(tuned),
        "ours: padded vocabulary": ours(*padded, fused=False),
        "+ flash attention enforced": flash(ours(*padded, fused=False)),
        "+ fused AdamW": ours(*padded),
        "+ fused cross entropy (ours, in chunks)": ours(*loss, liger_loss=False),
        "+ fused cross entropy (Liger)": needs("liger_kernel", ours(*loss)),
        "+ fused GELU": ours(*gelu),
        "+ fused LayerNorm (Liger)": needs("liger_kernel", ours(*gelu, "fused_layernorm")),
        "+ ALiBi by SDPA": ours(*alibi),
        "+ ALiBi by FlexAttention": ours(*alibi, kernel="flex"),
        "ours: pad, AdamW, cross entropy, compiled": compiled(ours(*loss)),
        "ours: all and ALiBi by FlexAttention, compiled": compiled(ours(*alibi, kernel="flex")),
        "ours: all and ALiBi by SDPA, compiled": compiled(ours(*alibi)),
    }


def needs(package: str, build: Build) -> Build:
    def build_if_there(config: Any) -> tuple[Any, Any]:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed; left out")
        return build(config)

    return build_if_there


@contextlib.contextmanager
def chunked_loss(enforced: bool) -> Iterator[None]:
    """Our loss in chunks where Liger's would be taken."""
    if not enforced:
        yield
        return
    module: Any = importlib.import_module("algorithms.fused_cross_entropy.fused_cross_entropy")
    finder, module._liger_loss = module._liger_loss, lambda: None
    try:
        yield
    finally:
        module._liger_loss = finder

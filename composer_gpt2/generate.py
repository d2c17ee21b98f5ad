"""Text from a trained model."""

from __future__ import annotations

import torch

from composer_gpt2.model import GPT2Model
from composer_gpt2.tokenizer import END_OF_TEXT, get_encoding, get_tokenizer

__all__ = ["generate"]


def generate(
    model: GPT2Model,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    n_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
) -> list[str]:
    """Continues a prompt by sampling; a sample ends early where the model ends its document.

    Args:
        model: On any device, with the GPT-2 tokenizer.
        prompt: Plain text; empty to begin a document.
        max_new_tokens: At least 1.
        n_samples: Continuations, drawn independently.
        temperature: Logits are divided by it; 0 takes the likeliest token each time.
        top_k: Only the ``k`` likeliest tokens are drawn; ``None`` for all.
        seed: Makes the samples repeatable on one machine; torch's generators are left as they were.

    Returns:
        ``n_samples`` texts, each with the prompt in front.

    Raises:
        ValueError: A number out of range, or a prompt that leaves no room in the context.
    """
    if max_new_tokens < 1 or n_samples < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            "max_new_tokens, n_samples and top_k must be at least 1 and temperature at least 0, "
            f"got {max_new_tokens}, {n_samples}, {top_k} and {temperature}."
        )
    # GPT-2 never saw an empty context: a document begins after the separator.
    ids = [END_OF_TEXT, *get_encoding().encode_ordinary(prompt)]
    context_length = model.context_length
    if context_length is not None and len(ids) + max_new_tokens > context_length:
        raise ValueError(
            f"prompt and new tokens must fit the model's {context_length} positions, got "
            f"{len(ids)} + {max_new_tokens}; shorten one of them."
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
    device = next(model.parameters()).device
    was_training = model.training
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(forked), torch.inference_mode():
            if seed is not None:
                torch.manual_seed(seed)
            outputs = model.eval().generate(
                torch.tensor([ids] * n_samples, device=device),
                max_new_tokens=max_new_tokens,
                **(sampling if temperature > 0 else {"do_sample": False}),
            )
    finally:
        model.train(was_training)
    return get_tokenizer().batch_decode(outputs[:, 1:], skip_special_tokens=True)

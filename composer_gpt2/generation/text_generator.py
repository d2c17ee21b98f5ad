"""Text from a trained model: prompts in, texts out, all at once or while they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from composer_gpt2.generation.network import Batch, Network, Precision, check_precision
from composer_gpt2.generation.sampling import Sampling, draw, restrict
from composer_gpt2.generation.text_stream import Fragment, TextStream, Token
from composer_gpt2.model import GPT2Model
from composer_gpt2.text_codec import text_codec

__all__ = ["DivergedModelError", "Ending", "Piece", "Sample", "TextGenerator", "generate"]

Ending = Literal["document end", "stop string", "length"]
_DEFAULT_SAMPLES, _DEFAULT_TOKENS = 1, 100


class DivergedModelError(ValueError):
    """A model predicts NaN or infinity."""


@dataclass(frozen=True)
class Piece:
    """What a text goes on with."""

    prompt: int
    """Which prompt, from 0."""
    sample: int
    """Which of the prompt's texts, from 0."""
    text: str
    """Whole characters; empty where a text ends without any, or with a token that has none."""
    tokens: tuple[Token, ...]
    """What the text came from."""
    ending: Ending | None = None
    """Why nothing follows, in the last piece of a text."""


@dataclass(frozen=True)
class Sample:
    """A text that is finished."""

    prompt: str
    text: str
    """What follows the prompt."""
    tokens: tuple[Token, ...]
    """Those of the text: without the one that ends a document, and none after a stop string."""
    ending: Ending


def generate(
    model: GPT2Model,
    prompt: str,
    *,
    max_new_tokens: int = _DEFAULT_TOKENS,
    n_samples: int = _DEFAULT_SAMPLES,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[str]:
    r"""Texts that begin with ``prompt``; more settings has :class:`TextGenerator`.

    Example::

        model = load_trained_model("runs/first")
        print(*generate(model, "The government", top_k=50, n_samples=3), sep="\n---\n")

    Args:
        model: With a tokenizer, on any device.
        prompt: Plain text; empty to begin a document.
        max_new_tokens: As in :meth:`TextGenerator.stream`.
        n_samples: As in :meth:`TextGenerator.stream`.
        temperature: As in :class:`~composer_gpt2.generation.sampling.Sampling`.
        top_k: As ``temperature``.
        top_p: As ``temperature``.
        seed: As in :meth:`TextGenerator.stream`.

    Raises:
        ValueError: A number out of range, or a prompt that leaves no room in the context.
    """
    samples = TextGenerator(model).generate(
        [prompt],
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
    )
    return [sample.prompt + sample.text for sample in samples]


class TextGenerator:
    """Writes on from prompts, many texts at a time.

    No generator of torch, NumPy or Python is used or changed. A model in training mode is in
    evaluation mode while it writes.

    Args:
        model: With a tokenizer. Its weights are read here: build another after training on.
        precision: ``"amp_bf16"`` runs matrix products in bfloat16. Default: what the model has on a
            CPU, else ``"fp32"``.

    Raises:
        ValueError: The model has no tokenizer, or the precision is neither.
    """

    def __init__(self, model: GPT2Model, precision: Precision | None = None) -> None:
        on_cpu = next(model.parameters()).is_cpu
        if precision is None:
            precision = cast(Precision, model.cpu_precision) if on_cpu else "fp32"
        check_precision(precision)
        self.codec = text_codec(model)
        self.context_length = model.context_length
        """Tokens of prompt and text together; ``None`` for any number."""
        self._model = model
        module = cast(GPT2LMHeadModel, model.model)
        self._network = Network(module, precision, self.codec.n_tokens)

    def generate(
        self, prompts: Sequence[str], *, progress: bool = False, **settings: Any
    ) -> list[Sample]:
        """All texts, those of the first prompt first.

        Args:
            prompts: As in :meth:`stream`.
            progress: Whether a bar on stderr counts tokens.
            **settings: As in :meth:`stream`.

        Raises:
            ValueError: As in :meth:`stream`.
            DivergedModelError: As in :meth:`stream`.
        """
        pieces = self.stream(prompts, **settings)
        n_samples = settings.get("n_samples", _DEFAULT_SAMPLES)
        max_new_tokens = settings.get("max_new_tokens", _DEFAULT_TOKENS)
        collected: dict[tuple[int, int], list[Piece]] = {
            (prompt, sample): [] for prompt in range(len(prompts)) for sample in range(n_samples)
        }
        total = len(collected) * max_new_tokens
        with tqdm(total=total, unit=" tokens", disable=not progress, leave=False) as bar:
            for piece in pieces:
                of_text = collected[piece.prompt, piece.sample]
                of_text.append(piece)
                bar.update(len(piece.tokens))
                if piece.ending is not None:
                    bar.update(max_new_tokens - sum(len(p.tokens) for p in of_text))
        return [_sample(prompts[prompt], of_text) for (prompt, _), of_text in collected.items()]

    def stream(
        self,
        prompts: Sequence[str],
        *,
        n_samples: int = _DEFAULT_SAMPLES,
        max_new_tokens: int = _DEFAULT_TOKENS,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int | None = None,
        stop: Sequence[str] = (),
        batch_size: int = 32,
        n_alternatives: int | None = None,
    ) -> Iterator[Piece]:
        """Pieces of all texts as they come, in whole characters, the prompts not among them.

        A text depends on the model, its prompt, the settings, the seed and its number among the
        prompt's texts, and on nothing beside it: not on the other prompts, how many texts there
        are, or the batch size, but for the rounding of matrix products with other numbers of rows.

        Args:
            prompts: Plain texts; an empty one begins a document.
            n_samples: Texts for each prompt, drawn independently.
            max_new_tokens: At least 1; a text is shorter where the model ends its document.
            sampling: How tokens are drawn.
            seed: Makes the texts repeatable.
            stop: A text ends before the first of these strings.
            batch_size: Texts that are written at the same time.
            n_alternatives: How many of the likeliest tokens come with each token and its
                log-probability; ``None`` for neither.

        Raises:
            ValueError: A number out of range, or a prompt that leaves no room in the context.
            DivergedModelError: The model predicts no numbers.
        """
        _check(n_samples, max_new_tokens, batch_size, seed, stop, n_alternatives)
        ids = self._encode(prompts, max_new_tokens)
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        texts = [
            _Text(prompt, sample, prompt_ids, TextStream(self.codec.decode, stop), seed)
            for prompt, prompt_ids in enumerate(ids)
            for sample in range(n_samples)
        ]

        def write() -> Iterator[Piece]:  # so that mistakes are raised by the call itself
            with _evaluating(self._model):
                for start in range(0, len(texts), batch_size):
                    together = texts[start : start + batch_size]
                    yield from self._write(together, max_new_tokens, sampling, n_alternatives)

        return write()

    def _write(
        self,
        texts: list[_Text],
        max_new_tokens: int,
        sampling: Sampling,
        n_alternatives: int | None,
    ) -> Iterator[Piece]:
        # No inference mode around this: while a piece is out, it would be the caller's, too.
        batch = Batch(self._network, [text.prompt_ids for text in texts], max_new_tokens)
        for n_before in range(max_new_tokens):
            tokens = _choose(batch.logits, texts, sampling, n_alternatives)
            for row in reversed(range(len(texts))):  # the last first: it may move into a gap
                pieces = texts[row].take(
                    tokens[row], self.codec.document_start, is_last=n_before + 1 == max_new_tokens
                )
                if pieces and pieces[-1].ending is not None:
                    batch.end(row)
                    texts[row], tokens[row] = texts[-1], tokens[-1]
                    del texts[-1], tokens[-1]
                yield from pieces
            if not texts:
                return
            batch.step([token.id for token in tokens])

    def _encode(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Prompts as tokens, behind the token after which documents begin, if there is one."""
        if not prompts:
            raise ValueError(
                "prompts must be at least one, got none; pass [''] for a new document."
            )
        start, length = self.codec.document_start, self.context_length
        before = [] if start is None else [start]
        all_ids, problems = [], []
        for number, prompt in enumerate(prompts, 1):
            ids = [*before, *self.codec.encode(prompt)]
            which = f"prompt {number}: " if len(prompts) > 1 else ""
            if not ids:
                problems.append(
                    f"{which}a prompt must have a token where the model knows no beginning of a "
                    "document, got an empty one; begin the text"
                )
            elif length is not None and len(ids) + max_new_tokens > length:
                problems.append(
                    f"{which}prompt and new tokens must fit the model's {length} positions, got "
                    f"{len(ids)} + {max_new_tokens}; shorten one of them"
                )
            all_ids.append(ids)
        if problems:
            raise ValueError("\n".join(problems) + ".")
        return all_ids


@dataclass
class _Text:
    """A text that is being written."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    stream: TextStream
    seed: int
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        # One stream of random numbers for each number of a text; the same for every prompt.
        self.rng = np.random.default_rng([self.seed, self.sample])

    def take(self, token: Token, document_end: int | None, *, is_last: bool) -> list[Piece]:
        """The next token; what can be shown of the text, with its ending if this is one."""
        ending: Ending | None = None
        if token.id == document_end:
            fragments, ending = self.stream.finish(), "document end"
        else:
            fragments = self.stream.push(token)
            if is_last and not self.stream.stopped:
                fragments, ending = fragments + self.stream.finish(), "length"
        if self.stream.stopped:
            ending = "stop string"
        if ending is not None and not fragments:
            fragments = [Fragment("")]
        pieces = [Piece(self.prompt, self.sample, f.text, f.tokens) for f in fragments]
        if ending is not None:
            last = pieces[-1]
            pieces[-1] = Piece(last.prompt, last.sample, last.text, last.tokens, ending)
        return pieces


@torch.inference_mode()
def _choose(
    logits: Tensor, texts: Sequence[_Text], sampling: Sampling, n_alternatives: int | None
) -> list[Token]:
    """The next token of each text, from logits (R, V)."""
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise DivergedModelError(
            "a model must predict numbers to write text, got NaN or infinity: its weights have "
            "diverged; use an earlier checkpoint."
        )
    if sampling.is_greedy:
        chosen = logits.argmax(dim=-1)
    else:
        numbers = torch.tensor([text.rng.random() for text in texts], dtype=torch.float64)
        chosen = draw(restrict(logits, sampling), numbers.to(logits.device))
    ids: list[int] = chosen.tolist()
    if n_alternatives is None:
        return [Token(token) for token in ids]
    logs = logits.float().log_softmax(dim=-1)
    of_chosen: list[float] = logs.gather(-1, chosen[:, None])[:, 0].tolist()
    best = logs.topk(min(n_alternatives, logs.shape[-1]), dim=-1)
    best_ids, best_logs = best.indices.tolist(), best.values.tolist()
    return [
        Token(token, log, tuple(zip(others, their_logs, strict=True)))
        for token, log, others, their_logs in zip(ids, of_chosen, best_ids, best_logs, strict=True)
    ]


def _sample(prompt: str, pieces: Sequence[Piece]) -> Sample:
    ending = pieces[-1].ending
    assert ending is not None
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Sample(prompt, "".join(piece.text for piece in pieces), tokens, ending)


def _check(
    n_samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int | None,
    stop: Sequence[str],
    n_alternatives: int | None,
) -> None:
    problems = [
        f"{name} must be at least 1, got {value}"
        for name, value in (
            ("n_samples", n_samples),
            ("max_new_tokens", max_new_tokens),
            ("batch_size", batch_size),
        )
        if value < 1
    ]
    if seed is not None and seed < 0:
        problems.append(f"seed must be at least 0, got {seed}")
    if isinstance(stop, str) or not all(stop):
        problems.append(f"stop must be strings that are not empty, got {stop!r}")
    if n_alternatives is not None and n_alternatives < 0:
        problems.append(f"n_alternatives must be at least 0, got {n_alternatives}")
    if problems:
        raise ValueError("; ".join(problems) + ".")


@contextlib.contextmanager
def _evaluating(model: GPT2Model) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

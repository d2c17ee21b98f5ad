"""Our model as the ``LM`` of EleutherAI's lm-evaluation-harness (``[eval]`` extra).

Importing this module imports the harness; :mod:`composer_gpt2.evaluation.harness` does so when it
is needed. Harness: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.utils import dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList
from typing_extensions import override

from composer_gpt2.evaluation.harness import check_document_start
from composer_gpt2.evaluation.likelihood import Request, Scorer
from composer_gpt2.evaluation.perplexity import windows
from composer_gpt2.text_codec import text_codec

__all__ = ["HarnessModel"]


class HarnessModel(TemplateLM):
    """Answers the three kinds of requests that the harness knows.

    All ranks get all requests and all answers; each computes a share if the scorer says so.

    Example:
        >>> model = HarnessModel(Scorer(GPT2Model.from_pretrained("openai-community/gpt2")))
        >>> lm_eval.simple_evaluate(model, tasks=["arc_easy"])

    Args:
        scorer: The model with its context and batches.

    Raises:
        ValueError: The model has no tokenizer, or one without a token that begins documents.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer
        self.codec = text_codec(scorer.model)
        check_document_start(self.codec, scorer.model)
        self._device = scorer.device

    @property
    @override
    def eot_token_id(self) -> int:
        assert self.codec.document_start is not None
        return self.codec.document_start

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self.scorer.context_length

    @property
    @override
    def tokenizer_name(self) -> str:
        return str(self.scorer.model.tokenizer_name)

    @override
    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.codec.encode(string)

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self.scorer.log_likelihoods(
            [Request(context, continuation) for _, context, continuation in requests],
            "log-likelihoods",
        )
        for (texts, _, _), each in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(each))
        return [(each.log_likelihood, each.is_greedy) for each in found]

    @override
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        asked, of_text = [], []
        for number, instance in enumerate(requests):
            tokens = [self.eot_token_id, *self.codec.encode(instance.args[0])]
            for begin, start, end in windows(len(tokens), self.max_length, self.max_length):
                asked.append(Request(tokens[begin:start], tokens[start:end]))
                of_text.append(number)
        sums = [0.0] * len(requests)
        for number, each in zip(
            of_text, self.scorer.log_likelihoods(asked, "whole texts"), strict=True
        ):
            sums[number] += each.log_likelihood
        for instance, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, value)
        return sums

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        rank, n_ranks = 0, 1
        if self.scorer.shared_by_ranks:
            rank, n_ranks = dist.get_global_rank(), dist.get_world_size()
        mine = range(rank, len(requests), n_ranks)
        hidden = disable_tqdm or not self.scorer.progress or rank > 0
        found = {}
        for number in tqdm(mine, desc="texts", leave=False, disable=hidden):
            arguments: Any = requests[number].args
            context, settings = arguments
            found[number] = self._continue(context, dict(settings))
            self.cache_hook.add_partial("generate_until", (context, settings), found[number])
        if n_ranks > 1:
            for share in dist.all_gather_object(found):
                found.update(share)
        return [found[number] for number in range(len(requests))]

    def _continue(self, context: str, settings: dict[str, Any]) -> str:
        """The text after ``context`` up to the first of the stop strings."""
        stops = settings.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        n_new = settings.pop("max_gen_toks", 256)
        n_new = settings.pop("max_new_tokens", n_new)
        if n_new >= self.max_length:
            raise ValueError(
                f"a continuation must be shorter than the context of {self.max_length} tokens, got "
                f"max_gen_toks {n_new}; lower it (gen_kwargs)."
            )
        # The harness says temperature 0 where it means greedy.
        settings.setdefault("do_sample", settings.get("temperature", 0) > 0)
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        tokens = (self.codec.encode(context) or [self.eot_token_id])[-(self.max_length - n_new) :]
        model, inputs = self.scorer.model, torch.tensor([tokens], device=self.scorer.device)
        stopping = StoppingCriteriaList([_StopStrings(self.codec.decode, len(tokens), stops)])
        was_training = model.training
        try:
            with torch.inference_mode(), self.scorer.autocast():
                output = model.eval().generate(
                    inputs, max_new_tokens=n_new, stopping_criteria=stopping, **settings
                )
        finally:
            model.train(was_training)
        text = self.codec.decode(output[0, len(tokens) :].tolist())
        return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


class _StopStrings(StoppingCriteria):
    """Ends a text (one sequence) that has one of the strings after its context."""

    def __init__(self, decode: Any, n_context: int, stops: Sequence[str]) -> None:
        self.decode, self.n_context, self.stops = decode, n_context, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether it ends, shape ``(1,)``."""
        text = self.decode(input_ids[0, self.n_context :].tolist())
        ends = any(stop in text for stop in self.stops)
        return torch.tensor([ends], device=input_ids.device)

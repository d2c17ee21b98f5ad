"""GPT-2, written out, and whatever training changed in it.

Parameters have the names and shapes of transformers' GPT-2. The functions that make the changes
stand at the end.

Shapes: ``B`` batch, ``T`` new tokens, ``K`` all tokens (those in the cache too), ``H`` heads, ``D``
width of a head, ``E`` = ``H * D``, ``V`` vocabulary.

Source: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

__all__ = ["ComposerGPT2Config", "ComposerGPT2LMHeadModel"]


class ComposerGPT2Config(PretrainedConfig):
    """GPT-2's settings under GPT-2's names, and the changes of its architecture.

    Args:
        vocab_size: Tokens.
        n_positions: Learned positions; under a change that takes them away, GPT-2's default or the
            length that the network was built for, and no limit.
        n_embd: Width.
        n_layer: Blocks.
        n_head: Attention heads.
        n_inner: Width of the MLP; ``None`` for four times ``n_embd``.
        activation_function: Of the MLP, by its name in transformers.
        resid_pdrop: Dropout of what attention and MLP add.
        embd_pdrop: Dropout of the embedding.
        attn_pdrop: Dropout of attention weights.
        layer_norm_epsilon: Added to variances.
        initializer_range: Standard deviation of new weights.
        scale_attn_weights: Whether scores are divided by the square root of the head's width.
        scale_attn_by_inverse_layer_idx: Whether they are also divided by the block's number.
        use_cache: Whether keys and values are returned.
        changes: Name of each change to its settings, in the order of application.
        bos_token_id: Begins a document.
        eos_token_id: Ends one.
        tie_word_embeddings: Whether the head is the embedding.
        **others: Those of every configuration.
    """

    model_type = "composer_gpt2"
    attribute_map = {  # noqa: RUF012 (transformers' own)
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        scale_attn_weights: bool = True,
        scale_attn_by_inverse_layer_idx: bool = False,
        use_cache: bool = True,
        changes: dict[str, dict[str, Any]] | None = None,
        bos_token_id: int | None = 50256,
        eos_token_id: int | None = 50256,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.scale_attn_weights = scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.use_cache = use_cache
        self.changes = changes or {}
        # Not all versions of transformers have these in every configuration.
        special = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**special, **others)
        for name, value in special.items():
            setattr(self, name, value)


class Attention(nn.Module):
    """Causal self-attention; ``attend`` is what a change of attention overrides."""

    def __init__(self, config: ComposerGPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.dropout = layer, config.n_head, config.attn_pdrop
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden: Tensor, cache: DynamicCache | None, mask: Tensor | None) -> Tensor:
        """(B, T, E) to the same; the cache gets the new keys and values."""
        query, key, value = (
            states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for states in self.c_attn(hidden).chunk(3, dim=-1)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer)  # (B, H, K, D)
        attended = self.attend(query, key, value, mask)
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).flatten(-2)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, D) from queries of that shape; without a mask, T is K or 1."""
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and query.shape[-2] > 1
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal, scale=self.scale
        )


class MLP(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, config: ComposerGPT2Config) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_inner)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, E) to the same."""
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden))))


class Block(nn.Module):
    """Attention, then the MLP, each added to what it read."""

    def __init__(self, config: ComposerGPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, cache: DynamicCache | None, mask: Tensor | None) -> Tensor:
        """(B, T, E) to the same."""
        hidden = hidden + self.attn(self.ln_1(hidden), cache, mask)
        return hidden + self.mlp(self.ln_2(hidden))


class Transformer(nn.Module):
    """Everything but the head, under the names that GPT-2's weights have."""

    def __init__(self, config: ComposerGPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class ComposerGPT2LMHeadModel(PreTrainedModel, GenerationMixin):
    """A language model to load with ``AutoModelForCausalLM``, to generate with, and to finetune."""

    config_class = ComposerGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own)
    _supports_sdpa = True
    _supports_cache_class = True
    # transformers' Trainer would take **_ in forward for a loss that counts the tokens of all
    # accumulated batches (num_items_in_batch), and no longer divide by their number itself.
    accepts_loss_kwargs = False

    def __init__(self, config: ComposerGPT2Config) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        # A head that is tied to the embedding has no parameter of its own.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, settings in config.changes.items():
            CHANGES[name](self, **settings)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, shape (B, T, V), and with labels the mean loss in nats a token.

        Args:
            input_ids: (B, T), or ``inputs_embeds`` of shape (B, T, E).
            attention_mask: (B, K), 0 at padding; or (B, 1, T, K), true where a query may look.
            position_ids: (B, T); counted from the cache's end if left out.
            past_key_values: The cache, which grows by T.
            inputs_embeds: In the place of ``input_ids``.
            labels: (B, T), shifted inside; -100 is not counted.
            use_cache: Whether to make a cache. Default: the configuration's, outside of training.
            output_attentions: Not to be had: the kernel keeps none.
            output_hidden_states: Whether to return what each block reads, and the end.
            return_dict: Whether the result has names.
            logits_to_keep: Only those of so many last tokens; 0 for all.
        """
        if output_attentions:
            raise ValueError("output_attentions must be false: attention weights are not kept.")
        embedded: Tensor = (
            self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        n_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        n_new, device = embedded.shape[1], embedded.device
        if position_ids is None:
            position_ids = torch.arange(n_past, n_past + n_new, device=device)[None]

        mask = _mask(attention_mask, n_past, n_new, device)
        hidden = self.transformer.drop(embedded + self.transformer.wpe(position_ids))
        seen = []
        for block in self.transformer.h:
            seen.append(hidden)
            hidden = block(hidden, past_key_values, mask)
        hidden = self.transformer.ln_f(hidden)

        head = self.transformer.wte if self.lm_head is None else self.lm_head
        logits = F.linear(hidden[:, -logits_to_keep:], head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*seen, hidden) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Another token embedding."""
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head, if it has weights of its own."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Another head."""
        self.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.data.zero_()
            elif isinstance(module, nn.LayerNorm):
                parameter.data.fill_(1.0)
            else:
                parameter.data.normal_(0.0, self.config.initializer_range)


def _mask(
    attention_mask: Tensor | None, n_past: int, n_new: int, device: torch.device
) -> Tensor | None:
    """Where queries may look, true or false, (B or 1, 1, T, K); ``None`` if causal says it all."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and (n_past == 0 or n_new == 1):
        return None
    n_keys = n_past + n_new
    everything = torch.ones(n_new, n_keys, dtype=torch.bool, device=device)
    mask = everything.tril(n_past)[None, None]
    if attention_mask is not None:
        # Padding looks at itself, or its softmax, over nothing, would be NaN.
        itself = everything.tril(n_past).triu(n_past)
        mask = mask & (attention_mask[:, None, None, :].bool() | itself)
    return mask


# --- What training has changed: each function takes the network and the change's settings ---------

CHANGES: dict[str, Callable[..., None]] = {}

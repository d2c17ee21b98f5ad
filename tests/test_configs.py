from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel

from composer_gpt2.configs import family, get_config
from composer_gpt2.scaling import parameter_count

# Counted once by hand for gpt2-125m: (50257 + 1024) x 768 embeddings, 12 blocks of 7,087,872, a
# final norm of 1,536. The others follow from the same sum; they are pinned so that no edit moves
# them.
PARAMETERS = {
    "gpt2-52m": 51_475_968,
    "gpt2-83m": 82_056_320,
    "gpt2-125m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-760m": 758_727_168,
    "gpt2-1.3b": 1_313_626_112,
    "gpt2-2.7b": 2_648_931_840,
    "gpt2-6.7b": 6_654_210_048,
    "gpt2-13b": 12_848_143_360,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gptstar-127m": 128_091_136,
    "gptstar-303m": 305_422_848,
    "gpt-mini": 12_515_520,
    "gpt-micro": 7_357_312,
    "gpt-nano": 2_546_400,
    "gpt2-tiny": 6_960_768,
}


def test_the_table_lists_the_whole_family():
    assert set(family()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        module = GPT2LMHeadModel(get_config(name))
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]
    assert parameter_count(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_everything_else_is_gpt2s(name):
    config = get_config(name)
    gpt3 = name.startswith("gpt3")
    assert config.n_positions == (2048 if gpt3 else 1024)
    dropout = 0.0 if name.startswith(("gpt3", "gptstar")) else 0.1
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (dropout,) * 3
    assert config.vocab_size == 50257
    assert config.activation_function == "gelu_new"
    assert config.layer_norm_epsilon == 1e-5
    assert config.initializer_range == 0.02
    assert config.bos_token_id == config.eos_token_id == 50256
    assert config.tie_word_embeddings


def test_overrides_change_what_they_name_and_nothing_else():
    plain, changed = get_config("gpt2-125m"), get_config("gpt2-125m", n_positions=2048)
    assert changed.n_positions == 2048
    assert {**changed.to_dict(), "n_positions": 1024} == plain.to_dict()
    config = get_config("gpt2-125m", dropout=0.3, attn_pdrop=0.0)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.0, 0.3, 0.3)


def test_a_wrong_name_is_told_the_nearest_one():
    with pytest.raises(ValueError, match=r"got 'gpt2-124m' \(did you mean 'gpt2-125m'\?\)"):
        get_config("gpt2-124m")


def test_a_wrong_setting_is_told_the_nearest_one():
    with pytest.raises(ValueError, match=r"got 'n_layers' \(did you mean 'n_layer'\?\)"):
        get_config("gpt2-125m", n_layers=3)


def test_what_gpt2_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="must be one of sdpa, eager, flash_attention_2, got 'spda'"
    ):
        get_config("gpt2-125m", attn_implementation="spda")
    with pytest.raises(ValueError, match="decoder alone"):
        get_config("gpt2-125m", add_cross_attention=True)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd=768 and n_head=7"):
        get_config("gpt2-125m", n_head=7)

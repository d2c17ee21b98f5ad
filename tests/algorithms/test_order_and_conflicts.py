"""What the contract does for all algorithms together: order, conflicts, groups, the record."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from composer.algorithms import LowPrecisionLayerNorm
from torch import nn
from torch.optim import Optimizer
from training import build_network, train, trainer, weights
from transformers import GPT2LMHeadModel
from typing_extensions import override

from algorithms.alibi import ALiBi, apply_alibi
from algorithms.fused_layernorm import FusedLayerNorm
from algorithms.pad_vocabulary import PadVocabulary, apply_pad_vocabulary, trim_vocabulary
from algorithms.parallel_residual import ParallelResidual
from algorithms.seq_length_warmup import SequenceLengthWarmup
from composer_gpt2 import GPT2Model
from composer_gpt2.contract import (
    NoEffectError,
    Receipt,
    SpeedupAlgorithm,
    Stage,
    architecture,
    conflicts,
    installation_order,
    plain_configuration,
    receipts,
)
from composer_gpt2.plan import algorithm_order


@dataclass(eq=False)
class Widen(SpeedupAlgorithm):
    """Somebody else's algorithm: gives the network one more parameter, in no group."""

    forget_the_optimizer: bool = True

    name = "widen"
    stage = Stage.KERNEL

    @override
    def apply_to_model(self, module: GPT2LMHeadModel, optimizers: Sequence[Optimizer]) -> Receipt:
        module.transformer.extra = nn.Parameter(torch.zeros(1))
        if not self.forget_the_optimizer:
            optimizers[0].param_groups[0]["params"].append(module.transformer.extra)
        return Receipt(self.name, self.settings, "added 1 parameter", 1, {"parameters": 1.0})


def test_any_order_of_lines_is_one_order():
    def make() -> list[SpeedupAlgorithm]:
        return [
            ALiBi(0.5),
            SequenceLengthWarmup("1dur", truncate=False),
            PadVocabulary(16),
            ParallelResidual(),
        ]

    ends, shapes, orders = [], [], []
    for permutation in itertools.permutations(range(4)):
        algorithms = make()
        run, losses = train(build_network(), [algorithms[i] for i in permutation])
        ends.append(weights(run.state.model))
        shapes.append(losses.shapes)
        orders.append(algorithm_order(run))
        assert [r["algorithm"] for r in receipts(run.state.algorithms)] == [
            "pad_vocabulary",
            "alibi",
            "parallel_residual",
            "seq_length_warmup",
        ]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(order == orders[0] for order in orders)
    for end in ends:
        assert all(torch.equal(value, ends[0][name]) for name, value in end.items())
    assert orders[0]["at init"] == "PadVocabulary, ALiBi, ParallelResidual, SequenceLengthWarmup"
    # The warm-up's lengths end at ALiBi's half: 16 of 32 tokens.
    assert max(length for _, length in shapes[0]) <= 16


def test_the_printed_order_at_a_batch_is_the_order_of_the_stages():
    run = trainer(build_network(), [SequenceLengthWarmup("1dur"), ALiBi(0.5)])
    assert algorithm_order(run)["at after_dataloader"] == "ALiBi, SequenceLengthWarmup"
    run.close()


def test_conflicts_name_both_and_the_reason():
    found = conflicts([FusedLayerNorm(), LowPrecisionLayerNorm(), ALiBi(), ALiBi()])
    assert found == [
        "FusedLayerNorm cannot be used with LowPrecisionLayerNorm: both exchange the LayerNorms",
        "ALiBi must be there once, got it 2 times",
    ]
    assert conflicts([ALiBi(), PadVocabulary()]) == []
    with pytest.raises(ValueError, match="both exchange the LayerNorms"):
        trainer(build_network("amp_bf16"), [FusedLayerNorm(), LowPrecisionLayerNorm()])


def test_a_new_parameter_that_would_not_train_is_an_error():
    with pytest.raises(RuntimeError, match=r"transformer\.extra would not train"):
        trainer(build_network(), [Widen()])
    trainer(build_network(), [Widen(forget_the_optimizer=False)]).close()


def test_each_trainer_measures_anew():
    """A receipt of an earlier Trainer must not stand for a model that it never saw."""
    algorithm = PadVocabulary(16)
    trainer(build_network(), [algorithm]).close()
    first = algorithm.receipt
    second = build_network()
    trainer(second, [algorithm]).close()
    assert algorithm.receipt is not first
    assert second.model.config.vocab_size == 112
    assert len(installation_order([algorithm])) == 1


def test_the_record_of_an_architecture_rebuilds_it(tmp_path):
    run, _ = train(
        build_network(),
        [PadVocabulary(16), ALiBi(), ParallelResidual()],
        save_folder=str(tmp_path),
    )
    model: GPT2Model = run.state.model  # type: ignore[assignment]
    module: GPT2LMHeadModel = model.model  # type: ignore[assignment]
    assert list(architecture(module)) == ["pad_vocabulary", "alibi", "parallel_residual"]
    plain, algorithms = plain_configuration(module.config)
    assert plain.vocab_size == 101
    assert "composer_gpt2" not in plain.to_dict()
    assert algorithms == {
        "pad_vocabulary": {"multiple_of": 16},
        "alibi": {},
        "parallel_residual": {},
    }
    model.eval()
    again = GPT2Model.from_pretrained(tmp_path / "latest-rank0.pt", tokenizer_name=None)
    batch = {"input_ids": torch.arange(90)[None]}  # longer than any position
    with torch.no_grad():
        wanted = model(batch)["logits"]
        assert torch.equal(again(batch)["logits"], wanted)
        # What is loaded trains on with the same algorithms.
        more, _ = train(again.train(), [PadVocabulary(16), ALiBi(), ParallelResidual()])
    assert len(receipts(more.state.algorithms)) == 3


def test_settings_of_an_architecture_cannot_change_on_one_model():
    module = build_network().model
    apply_pad_vocabulary(module, multiple_of=16)
    with pytest.raises(ValueError, match=r"already has it with \{'multiple_of': 16\}"):
        apply_pad_vocabulary(module, multiple_of=64)
    apply_alibi(module)
    assert architecture(module) == {"pad_vocabulary": {"multiple_of": 16}, "alibi": {}}


def test_trimming_leaves_a_plain_network(tmp_path):
    model = build_network().eval()
    module: GPT2LMHeadModel = model.model  # type: ignore[assignment]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted = module(tokens).logits
        apply_pad_vocabulary(module, multiple_of=64)
        padded = module(tokens).logits
        assert padded.shape[-1] == 128
        assert torch.equal(padded[..., :101], wanted)
        assert (padded[..., 101:] == -torch.inf).all()
        trim_vocabulary(module)
        module.save_pretrained(tmp_path)
        again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        assert torch.equal(again(tokens).logits, wanted)
    assert again.config.vocab_size == 101
    with pytest.raises(NoEffectError, match="found none"):
        trim_vocabulary(module)


def test_padding_keeps_its_zeros_through_training_with_weight_decay():
    run, _ = train(build_network(), [PadVocabulary(64)], max_duration="6ba")
    weight = run.state.model.model.lm_head.weight  # type: ignore[union-attr]
    assert weight.shape[0] == 128
    assert not weight[101:].any()
    assert weight[:101].any()


@pytest.mark.parametrize("multiple_of", [0, -64])
def test_a_multiple_below_one_is_refused(multiple_of):
    with pytest.raises(ValueError, match="at least 1"):
        PadVocabulary(multiple_of)


def test_a_vocabulary_that_fits_already_is_refused():
    with pytest.raises(NoEffectError, match="not a multiple of 64, got 128"):
        apply_pad_vocabulary(build_network(vocab_size=128), multiple_of=64)

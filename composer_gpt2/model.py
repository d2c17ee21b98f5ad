"""GPT-2 as a Composer model: the Hugging Face network, our tokenizer, metrics and precision.

The network is ``transformers.GPT2LMHeadModel``, so that weights, exports and generation are
everybody's unless an architectural algorithm changes it; this file decides how Composer feeds and
measures it.

Shapes: ``B`` batch, ``T`` tokens of a sequence, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from composer.models import HuggingFaceModel, huggingface
from composer.utils import get_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_safetensors
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig
from transformers.modeling_utils import load_sharded_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from composer_gpt2 import registry
from composer_gpt2.checkpoints.safe_loading import load_safely, safe_loading
from composer_gpt2.configs import get_config
from composer_gpt2.contract import (
    ArchitectureMismatchError,
    architecture,
    plain_configuration,
)
from composer_gpt2.importing import import_weights
from composer_gpt2.metrics import BitsPerByte, LanguageCrossEntropy, LanguagePerplexity
from composer_gpt2.tokenizer import END_OF_TEXT, VOCAB_SIZE
from composer_gpt2.tokenizer_by_name import (
    fetch_tokenizer,
    is_gpt2_tokenizer,
    load_tokenizer,
    read_tokenizer_folder,
    saved_tokenizer,
)

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    from composer_gpt2.tokenizer_by_name import TokenizerFiles

__all__ = ["GPT2Model", "build_network", "is_hub_id"]

CPUPrecision = Literal["fp32", "amp_bf16"]


class GPT2Model(HuggingFaceModel):
    """GPT-2 with a language-model head, ready for ``composer.Trainer``.

    Batches are mappings with ``input_ids`` and, to train, ``labels``: int64, shape ``(B, T)``,
    equal to each other; the loss shifts them by one and is the mean cross entropy in nats a token.
    Train and eval metrics are ``LanguageCrossEntropy``, ``LanguagePerplexity`` and ``BitsPerByte``;
    they reuse the loss and cost no second softmax.

    An ``attention_mask`` in a batch whose tokens are all real is dropped: without one, scaled dot
    product attention takes its causal kernel.

    Example::

        from composer import Trainer
        from composer_gpt2 import GPT2Model

        model = GPT2Model.from_name("gpt2-125m")
        Trainer(model=model, train_dataloader=..., optimizers=..., max_duration="14000ba").fit()

    Args:
        module: The network to wrap. Default: a new one, initialised as GPT-2 is, from ``config``.
        config: The network's configuration. Default: that of ``module``, else OpenAI's GPT-2 small.
        tokenizer_name: ``"gpt2"`` for the tokenizer of this package; a folder with a saved Hugging
            Face tokenizer; ``None`` for none, and then no bits per byte. It is saved in checkpoints
            and used by ``generate``.
        cpu_precision: ``"amp_bf16"`` runs the forward pass under bfloat16 autocast when the model
            is on a CPU, where Composer's own ``precision="amp_bf16"`` is refused; give the Trainer
            ``precision="fp32"`` then. Other devices follow the Trainer's precision.

    Raises:
        ValueError: ``config`` is not that of ``module``, the tokenizer is unknown, or it has more
            tokens than the model.

    Source: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners", 2.3.
    """

    def __init__(
        self,
        module: GPT2LMHeadModel | None = None,
        config: GPT2Config | None = None,
        tokenizer_name: str | None = "gpt2",
        cpu_precision: CPUPrecision = "fp32",
    ) -> None:
        if cpu_precision not in ("fp32", "amp_bf16"):
            raise ValueError(
                f"cpu_precision must be 'fp32' or 'amp_bf16', got {cpu_precision!r}; on other "
                "devices the Trainer's precision decides."
            )
        if module is None:
            module = GPT2LMHeadModel(config if config is not None else GPT2Config())
        elif config is not None and config.to_dict() != module.config.to_dict():
            theirs, ours = module.config.to_dict(), config.to_dict()
            differing = sorted(k for k in theirs | ours if theirs.get(k) != ours.get(k))
            raise ValueError(
                "config must describe module, got a different value of "
                f"{', '.join(differing)}; pass one of the two."
            )
        # The class name of GPT-2's network does not tell transformers which loss it has.
        module.loss_type = "ForCausalLM"
        tokenizer = None if tokenizer_name is None else load_tokenizer(tokenizer_name)
        if tokenizer is not None and len(tokenizer) > module.config.vocab_size:
            raise ValueError(
                f"vocab_size must be at least the tokenizer's {len(tokenizer)} tokens, got "
                f"{module.config.vocab_size}; enlarge it or pass tokenizer_name=None."
            )
        metrics: list[Metric] = [LanguageCrossEntropy(), LanguagePerplexity()]
        if tokenizer_name == "gpt2":
            metrics.append(BitsPerByte())
        with _known_to_be_causal():
            super().__init__(model=module, tokenizer=tokenizer, metrics=metrics, shift_labels=True)
        self.register_load_state_dict_pre_hook(_without_extra_state)
        self.tokenizer_name = tokenizer_name
        self.cpu_precision = cpu_precision

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        tokenizer_name: str | None = "gpt2",
        cpu_precision: CPUPrecision = "fp32",
        **config_overrides: Any,
    ) -> GPT2Model:
        """A freshly initialised model of the family.

        ``GPT2Model.from_name("gpt2-125m", n_positions=2048, dropout=0.0)`` changes single settings.

        Args:
            name: One of :func:`composer_gpt2.configs.family`.
            tokenizer_name: As in the constructor.
            cpu_precision: As in the constructor.
            **config_overrides: As in :func:`composer_gpt2.configs.get_config`.

        Raises:
            ValueError: An unknown name or setting; the message names the nearest known one.
        """
        config = get_config(name, **config_overrides)
        return cls(config=config, tokenizer_name=tokenizer_name, cpu_precision=cpu_precision)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        tokenizer_name: str | None = "saved",
        cpu_precision: CPUPrecision = "fp32",
        n_head: int | None = None,
    ) -> GPT2Model:
        """A model with trained weights, in evaluation mode.

        What exists on disk is read from disk, and the network is not asked. Only a name that is no
        path, nor a path into a folder that is there, goes to the Hugging Face hub (or, with
        ``HF_HUB_OFFLINE=1``, to its cache).

        Args:
            path_or_hub_id: A checkpoint (its ``.pt`` or ``.safetensors`` file, here or at an
                ``s3://`` address), a folder that Hugging Face's ``save_pretrained`` wrote, a hub
                id such as ``openai-community/gpt2``, or a file of nanoGPT's or minGPT's
                (:func:`composer_gpt2.importing.import_weights`). No code is run from any of them.
            tokenizer_name: As in the constructor; ``"saved"`` for the one saved beside the weights,
                and GPT-2's where there is none (on the hub: and the vocabulary is as large).
            cpu_precision: As in the constructor.
            n_head: Attention heads of a state dict of minGPT's, which does not say them.

        Raises:
            FileNotFoundError: It looks like a path and nothing is there.
            ValueError: The file or folder holds no GPT-2, or its tokenizer cannot be read or told.
            CheckpointError: The file is no checkpoint, or would run code.
        """
        source = str(path_or_hub_id)
        tokenizer: TokenizerFiles = {}
        if "://" in source:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / f"checkpoint{Path(source).suffix}"
                get_file(source, str(local))
                module, tokenizer = _load_file(local, n_head)
        elif Path(source).is_file():
            module, tokenizer = _load_file(Path(source), n_head)
        elif Path(source).is_dir():
            module = _load_hugging_face(source, local_files_only=True)
            if tokenizer_name == "saved":
                tokenizer = read_tokenizer_folder(Path(source))
        elif is_hub_id(source):
            module = _load_hugging_face(source, local_files_only=False)
            if tokenizer_name == "saved":
                tokenizer = _fetch_tokenizer(source, module.config)
        else:
            raise FileNotFoundError(
                "trained weights must be a Composer .pt file, a Hugging Face folder or a hub id "
                f"(openai-community/gpt2), got {source!r}, which does not exist; check the path."
            )
        with contextlib.ExitStack() as stack:
            if tokenizer_name == "saved":
                is_gpt2s = not tokenizer or is_gpt2_tokenizer(tokenizer)
                tokenizer_name = (
                    "gpt2" if is_gpt2s else stack.enter_context(saved_tokenizer(tokenizer))
                )
            model = cls(module, tokenizer_name=tokenizer_name, cpu_precision=cpu_precision)
        return model.eval()

    def forward(
        self, batch: Mapping[str, Tensor], **options: bool
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits, shape ``(B, T, V)``, and, if the batch has labels, the mean loss (a scalar).

        With ``fused_cross_entropy`` the logits are ``None`` where the network only has to train.

        Args:
            batch: As in the class.
            **options: Arguments of the network that are no part of a batch.
        """
        inputs = {name: batch[name] for name in batch if name in self.model_forward_args}
        mask = inputs.get("attention_mask")
        if mask is not None and bool(mask.all()):
            del inputs["attention_mask"]
        with self._autocast(inputs["input_ids"].device):
            return self.model(**inputs, use_cache=False, **options)

    def eval_forward(self, batch: MutableMapping[str, Any], outputs: Any | None = None) -> Any:
        """Outputs for the metrics: those of the forward pass if given, else of a new one.

        Composer's in-context-learning and generation batches (``mode: icl_task | generate``) are
        Composer's own business.
        """
        if "mode" in batch:
            return super().eval_forward(batch, outputs)
        if outputs is not None:
            return outputs
        metrics = self.get_metrics(is_train=False).values()
        only_the_loss = all(isinstance(metric, LanguageCrossEntropy) for metric in metrics)
        # Networks that need no logits to compute a loss say so by this argument.
        if only_the_loss and "return_logits" in inspect.signature(self.model.forward).parameters:
            return self(batch, return_logits=False)
        return self(batch)

    def update_metric(self, batch: Mapping[str, Any], outputs: Any, metric: Metric) -> dict:
        """Adds a batch to a metric: ours take the loss, any other the logits and shifted labels."""
        if "mode" in batch:
            return super().update_metric(batch, outputs, metric)
        labels = batch["labels"]
        if isinstance(metric, LanguageCrossEntropy):
            metric.update(outputs["loss"], labels)
        elif outputs.get("logits") is None:
            raise ValueError(
                "metrics must be LanguageCrossEntropy, LanguagePerplexity or BitsPerByte where "
                f"fused_cross_entropy makes no logits, got {type(metric).__name__}; leave the "
                "metric or the algorithm out."
            )
        else:
            metric.update(outputs["logits"][:, :-1], labels[:, 1:])
        return {}

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Continues ``input_ids``, shape ``(B, T)``, as ``transformers.GPT2LMHeadModel.generate``.

        Sequences that end early are padded with ``<|endoftext|>``; all of ``input_ids`` is taken as
        text unless an ``attention_mask`` says otherwise.
        """
        kwargs.setdefault("pad_token_id", END_OF_TEXT)
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        with self._autocast(input_ids.device):
            return super().generate(input_ids, **kwargs)

    @property
    def context_length(self) -> int | None:
        """Tokens that it can read at once; ``None``, any number, without learned positions."""
        has_positions = any(True for _ in self.model.get_submodule("transformer.wpe").parameters())
        return self.model.config.n_positions if has_positions else None

    def get_extra_state(self) -> dict[str, Any]:
        """The architectural algorithms of the network; saved beside its weights."""
        return {"architecture": architecture(self.model)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuses the weights of a network that other algorithms have built.

        Raises:
            ArchitectureMismatchError: With the algorithms of both.
        """
        theirs, ours = state["architecture"], architecture(self.model)
        if theirs != ours:
            raise ArchitectureMismatchError(
                "a checkpoint must be loaded with the architectural algorithms it was trained with:"
                f" it has {_spelled(theirs)}, this run has {_spelled(ours)}; give the run the "
                "former."
            )

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.cpu_precision == "amp_bf16" and device.type == "cpu":
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()


def build_network(
    config: PretrainedConfig, algorithms: Mapping[str, Mapping[str, Any]]
) -> GPT2LMHeadModel:
    """A network with architectural algorithms, its weights yet to come.

    Args:
        config: The network's before any algorithm.
        algorithms: Names to settings, in the order of application.
    """
    module = GPT2LMHeadModel(config)
    for name, settings in algorithms.items():
        algorithm = registry.get("algorithms", name).load()(**settings)
        algorithm.apply_to_model(module, ())
    return module


def is_hub_id(name: str) -> bool:
    """Whether a name that is nothing on this disk may be on the Hugging Face hub.

    It has one or two words; in a folder that is here, the second is a mistyped file.
    """
    return bool(_HUB_ID.fullmatch(name)) and not ("/" in name and Path(name).parent.is_dir())


@contextlib.contextmanager
def _known_to_be_causal() -> Iterator[None]:
    """Spares Composer a question for which it imports every causal model of transformers.

    That takes seconds, and with ``shift_labels`` given the answer decides nothing.
    """
    ask = huggingface._is_registered_causal_lm
    huggingface._is_registered_causal_lm = lambda model: True
    try:
        yield
    finally:
        huggingface._is_registered_causal_lm = ask


def _spelled(algorithms: Mapping[str, Mapping[str, Any]]) -> str:
    each = [f"{name} {dict(settings)}" for name, settings in algorithms.items()]
    return " and ".join(each) or "none"


def _without_extra_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints from before there were architectural algorithms are those of a plain network."""
    state.setdefault(f"{prefix}_extra_state", {"architecture": {}})


# One or two words, as the hub has them; what looks like this and exists on disk is read from disk.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(?<!\.pt)", re.ASCII)

_MOST_PADDING = 1024  # rows with which a vocabulary of GPT-2's may be padded


def _load_hugging_face(source: str, *, local_files_only: bool) -> GPT2LMHeadModel:
    try:
        config = GPT2Config.from_pretrained(source, local_files_only=local_files_only)
    except OSError as error:
        raise FileNotFoundError(
            f"{source!r} must be a file or folder here with trained weights, or a model on the "
            f"Hugging Face hub, got neither ({str(error).splitlines()[0]}); check the path."
        ) from error
    if config.model_type != "gpt2":
        raise ValueError(f"{source} must hold a GPT-2, got model_type {config.model_type!r}.")
    plain, algorithms = plain_configuration(config)
    if not algorithms:
        with safe_loading(source):  # of pytorch_model.bin
            try:
                return GPT2LMHeadModel.from_pretrained(
                    source, config=config, local_files_only=local_files_only
                )
            except OSError as error:  # transformers says that such a file is TensorFlow's
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, pickle.UnpicklingError):
                    cause = cause.__context__
                raise cause or error from error
    if not Path(source).is_dir():
        raise ValueError(
            f"{source} must be a folder here to be loaded, got the hub id of a network with "
            f"{_spelled(algorithms)}; download it first."
        )
    module = build_network(plain, algorithms)
    weights = Path(source) / SAFE_WEIGHTS_NAME
    if weights.exists():
        load_safetensors(module, weights)
    else:
        load_sharded_checkpoint(module, source)
    return module


def _fetch_tokenizer(hub_id: str, config: PretrainedConfig) -> TokenizerFiles:
    tokenizer = fetch_tokenizer(hub_id, getattr(config, "_commit_hash", None))
    if not tokenizer and not VOCAB_SIZE <= config.vocab_size < VOCAB_SIZE + _MOST_PADDING:
        raise ValueError(
            f"{hub_id} must have a tokenizer (tokenizer.json, or vocab.json and merges.txt) or "
            f"GPT-2's {VOCAB_SIZE} tokens, got no tokenizer and {config.vocab_size} tokens; pass "
            "tokenizer_name, a folder or None."
        )
    return tokenizer


def _load_file(path: Path, n_head: int | None) -> tuple[GPT2LMHeadModel, TokenizerFiles]:
    """A network and the tokenizer saved with it, if any."""
    if path.suffix == ".safetensors":
        return _load_safetensors_file(path)
    content = load_safely(path)
    if "state" in content:
        return _load_composer_checkpoint(path, content["state"])
    return import_weights(content, source=str(path), n_head=n_head), {}


def _load_safetensors_file(path: Path) -> tuple[GPT2LMHeadModel, TokenizerFiles]:
    """The network of a checkpoint's weights, whose metadata hold its configuration."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        config = json.loads(about["config"])
    except (KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path} must be the weights of a checkpoint of ours, with the network's configuration "
            f"in its metadata, got {error!r}; a Hugging Face folder is loaded by its path."
        ) from error
    module = build_network(*plain_configuration(GPT2Config.from_dict(config)))
    load_safetensors(module, path)
    return module, json.loads(about.get("tokenizer", "{}"))


def _load_composer_checkpoint(
    path: Path, state: Mapping[str, Any]
) -> tuple[GPT2LMHeadModel, TokenizerFiles]:
    """The network of a Composer checkpoint, which holds its configuration beside its weights."""
    try:
        saved = state["integrations"]["huggingface"]["model"]["config"]["content"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a checkpoint that a Trainer saved of a GPT2Model, got a file without "
            f"its configuration ({error!r}); check the path."
        ) from error
    module = build_network(*plain_configuration(GPT2Config.from_dict(saved)))
    module.load_state_dict(
        {
            name.removeprefix("model."): weight
            for name, weight in state["model"].items()
            if name.startswith("model.")
        }
    )
    return module, state["integrations"]["huggingface"].get("tokenizer") or {}

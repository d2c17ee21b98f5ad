"""The names that a recipe may use for optimizers, schedulers, algorithms, callbacks and loggers.

Names are data: each points to a class by its import path and is imported only when asked for. What
Composer has and cannot work on GPT-2 is listed too, with the reason, so that asking for it is an
error and never a silent no-op.

Other packages add names with entry points in the groups ``composer_gpt2.optimizers``,
``composer_gpt2.schedulers``, ``composer_gpt2.algorithms``, ``composer_gpt2.callbacks`` and
``composer_gpt2.loggers``::

    [project.entry-points."composer_gpt2.algorithms"]
    my_method = "my_package.my_method:MyMethod"
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from importlib import metadata

from composer_gpt2.arguments import (
    BELOW_ONE,
    BETAS,
    NOT_NEGATIVE,
    POSITIVE,
    Limit,
    each,
    limit,
    nearest,
    one_of,
    time,
)
from composer_gpt2.registry_entry import KINDS, ArgumentMistake, Entry, Kind

__all__ = ["KINDS", "ArgumentMistake", "Entry", "Kind", "get", "names", "refused"]


def names(kind: Kind) -> tuple[str, ...]:
    """Every name that a recipe may use, ours first, then those of other packages."""
    return tuple(_claims(kind))


def refused(kind: Kind) -> Mapping[str, str]:
    """Names that people know from Composer and that cannot be used here, with the reason."""
    return types.MappingProxyType(_REFUSED[kind])


def get(kind: Kind, name: str) -> Entry:
    """What a name stands for.

    Raises:
        ValueError: The name is unknown (the message has the nearest one), is refused (it has the
            reason), or belongs to two packages (it has both).
    """
    claims = _claims(kind).get(name, [])
    if len(claims) == 1:
        return claims[0]
    if claims:
        owners = " and ".join(entry.distribution for entry in claims)
        raise ValueError(
            f"{name} must come from one package, got {owners}; uninstall one of them or rename its "
            f"entry point in composer_gpt2.{kind}"
        )
    if name in _REFUSED[kind]:
        raise ValueError(f"{name} cannot be used: {_REFUSED[kind][name]}")
    there_are = names(kind)
    raise ValueError(
        f"{name} is not one of the {kind}{nearest(name, there_are)}; there are "
        f"{', '.join(there_are)}"
    )


@functools.cache
def _claims(kind: Kind) -> dict[str, list[Entry]]:
    """Each name with everything that claims it; two claims are an error for whoever asks."""
    claims = {entry.name: [entry] for entry in _BUILT_IN[kind]}
    for point in metadata.entry_points(group=f"composer_gpt2.{kind}"):
        owner = point.dist.name if point.dist is not None else point.value
        claims.setdefault(point.name, []).append(
            Entry(kind, point.name, point.value, distribution=owner)
        )
    return claims


# --- Composer's and torch's --------------------------------------------------------------------


def _optimizer(name: str, path: str, *required: str) -> Entry:
    limits = {
        "lr": POSITIVE,
        "betas": BETAS,
        "weight_decay": NOT_NEGATIVE,
        "momentum": BELOW_ONE,
    }
    if name != "adafactor":  # Its eps is a pair.
        limits["eps"] = POSITIVE
    return Entry("optimizers", name, path, required=("lr", *required), limits=limits)


# Composer's schedulers refuse seconds.
_SCHEDULE_TIME = time("ba", "tok", "sp", "ep", "dur")


def _scheduler(name: str, class_name: str) -> Entry:
    times = dict.fromkeys(("t_warmup", "t_max", "t_0", "step_size", "decay_period"), _SCHEDULE_TIME)
    factors = dict.fromkeys(("alpha", "alpha_i", "alpha_f", "gamma"), NOT_NEGATIVE)
    limits = {
        **times,
        **factors,
        "milestones": each(_SCHEDULE_TIME),
        "power": POSITIVE,
        "t_mult": POSITIVE,
    }
    return Entry("schedulers", name, f"composer.optim:{class_name}", limits=limits)


def _algorithm(name: str, class_name: str, **limits: Limit) -> Entry:
    return Entry("algorithms", name, f"composer.algorithms:{class_name}", limits=limits)


def _ours(name: str, class_name: str, **limits: Limit) -> Entry:
    return Entry("algorithms", name, f"algorithms.{name}:{class_name}", limits=limits)


def _callback(name: str, class_name: str, **limits: Limit) -> Entry:
    return Entry("callbacks", name, f"composer.callbacks:{class_name}", limits=limits)


def _logger(name: str, class_name: str, requires: str | None = None) -> Entry:
    return Entry("loggers", name, f"composer.loggers:{class_name}", requires=requires)


# Three spellings of a few schedulers: the class's, that of Composer's recipes of 2022, and
# llm-foundry's.
_SCHEDULERS = {
    "constant": "ConstantScheduler",
    "constant_with_warmup": "ConstantWithWarmupScheduler",
    "cosine_annealing": "CosineAnnealingScheduler",
    "cosine_decay": "CosineAnnealingScheduler",
    "cosine_annealing_with_warmup": "CosineAnnealingWithWarmupScheduler",
    "cosine_decay_with_warmup": "CosineAnnealingWithWarmupScheduler",
    "cosine_with_warmup": "CosineAnnealingWithWarmupScheduler",
    "cosine_annealing_warm_restarts": "CosineAnnealingWarmRestartsScheduler",
    "cosine_warmrestart": "CosineAnnealingWarmRestartsScheduler",
    "exponential": "ExponentialScheduler",
    "linear": "LinearScheduler",
    "linear_decay": "LinearScheduler",
    "linear_with_warmup": "LinearWithWarmupScheduler",
    "linear_decay_with_warmup": "LinearWithWarmupScheduler",
    "multi_step": "MultiStepScheduler",
    "multistep": "MultiStepScheduler",
    "multi_step_with_warmup": "MultiStepWithWarmupScheduler",
    "multistep_with_warmup": "MultiStepWithWarmupScheduler",
    "polynomial": "PolynomialScheduler",
    "polynomial_with_warmup": "PolynomialWithWarmupScheduler",
    "step": "StepScheduler",
}

_PROBABILITY = limit(lambda x: 0 < x <= 1, "above 0 and at most 1")

_BUILT_IN: dict[Kind, tuple[Entry, ...]] = {
    "optimizers": (
        # Where a class decays weights unasked, the recipe has to say how much.
        _optimizer("adamw", "torch.optim:AdamW", "weight_decay"),
        _optimizer(
            "decoupled_adamw",
            "composer_gpt2.decoupled_adamw:FusedDecoupledAdamW",
            "weight_decay",
        ),
        _optimizer("decoupled_sgdw", "composer.optim:DecoupledSGDW"),
        _optimizer("adam", "torch.optim:Adam"),
        _optimizer("nadam", "torch.optim:NAdam"),
        _optimizer("radam", "torch.optim:RAdam"),
        _optimizer("adafactor", "torch.optim:Adafactor"),
        _optimizer("sgd", "torch.optim:SGD"),
    ),
    "schedulers": (
        *(_scheduler(name, path) for name, path in _SCHEDULERS.items()),
        Entry(
            "schedulers",
            "cosine_decay_to_floor_with_warmup",
            "composer_gpt2.schedulers:CosineDecayToFloorScheduler",
            limits={
                "t_warmup": _SCHEDULE_TIME,
                "t_decay": _SCHEDULE_TIME,
                "alpha_f": NOT_NEGATIVE,
            },
        ),
    ),
    "algorithms": (
        _ours("activation_checkpointing", "ActivationCheckpointing", every=POSITIVE),
        _ours("alibi", "ALiBi"),
        _ours("fused_block", "FusedBlock"),
        _ours("fused_cross_entropy", "FusedCrossEntropy"),
        _ours("fused_gelu", "FusedGELU"),
        _ours("fused_layernorm", "FusedLayerNorm"),
        _ours("pad_vocabulary", "PadVocabulary", multiple_of=POSITIVE),
        _ours("parallel_residual", "ParallelResidual"),
        _ours("seq_length_warmup", "SequenceLengthWarmup"),
        _ours("skip_loss_spikes", "SkipLossSpikes", window=POSITIVE),
        _ours(
            "skip_nonfinite",
            "SkipNonfinite",
            max_skipped=NOT_NEGATIVE,
            max_skipped_in_all=NOT_NEGATIVE,
        ),
        _algorithm(
            "gradient_clipping",
            "GradientClipping",
            clipping_type=one_of("norm", "value", "adaptive"),
            clipping_threshold=limit(lambda x: x > 0, "above 0"),  # .inf is neutral.
        ),
        _algorithm(
            "ema",
            "EMA",
            half_life=time("ba", "ep"),
            smoothing=limit(lambda x: 0 < x < 1, "between 0 and 1"),
            ema_start=time("ba", "ep", "dur"),
            update_interval=time("ba", "ep"),
        ),
        # Nothing in fp32 and nothing on a CPU; recipe_checks.py sees to both.
        _algorithm("low_precision_layernorm", "LowPrecisionLayerNorm"),
        # Resumes to other weights than it left; recipe_checks.py sees to it.
        _algorithm("sam", "SAM", rho=NOT_NEGATIVE, epsilon=POSITIVE, interval=POSITIVE),
        _algorithm(
            "swa",
            "SWA",
            swa_start=time("ep", "dur"),
            swa_end=time("ep", "dur"),
            update_interval=time("ba", "ep"),
            anneal_strategy=one_of("linear", "cos"),
            anneal_steps=POSITIVE,
            swa_lr=POSITIVE,
        ),
    ),
    "callbacks": (
        _callback("speed_monitor", "SpeedMonitor", window_size=POSITIVE),
        _callback("memory_monitor", "MemoryMonitor"),
        _callback("lr_monitor", "LRMonitor"),
        _callback("optimizer_monitor", "OptimizerMonitor", batch_log_interval=POSITIVE),
        _callback("runtime_estimator", "RuntimeEstimator", skip_batches=NOT_NEGATIVE),
        _callback("nan_monitor", "NaNMonitor"),
        _callback("activation_monitor", "ActivationMonitor"),
        _callback("early_stopper", "EarlyStopper"),
        _callback("threshold_stopper", "ThresholdStopper"),
        _callback("generate", "Generate", batch_size=POSITIVE),
        Entry(
            "callbacks",
            "generate_samples",
            "composer_gpt2.generation.callback:GenerateSamples",
            limits={
                "interval": time("ba", "ep", "tok", "sp", "dur"),
                "max_new_tokens": POSITIVE,
                "n_samples": POSITIVE,
                "temperature": NOT_NEGATIVE,
                "top_k": POSITIVE,
                "top_p": _PROBABILITY,
                "typical_p": _PROBABILITY,
                "seed": NOT_NEGATIVE,
            },
        ),
        _callback("memory_snapshot", "MemorySnapshot"),
        _callback("oom_observer", "OOMObserver"),
        _callback("system_metrics_monitor", "SystemMetricsMonitor"),
        Entry(
            "callbacks",
            "evaluate_tasks",
            "composer_gpt2.evaluation.callback:EvaluateTasks",
            limits={
                "interval": time("ba", "ep", "tok", "sp", "dur"),
                "limit": POSITIVE,
                "max_tokens": POSITIVE,
                "context_length": POSITIVE,
                "stride": POSITIVE,
                "batch_tokens": POSITIVE,
                "num_fewshot": NOT_NEGATIVE,
            },
        ),
    ),
    "loggers": (
        _logger("tensorboard", "TensorboardLogger", "tensorboard"),
        _logger("wandb", "WandBLogger", "wandb"),
        _logger("mlflow", "MLFlowLogger", "mlflow"),
        _logger("comet_ml", "CometMLLogger", "comet_ml"),
        _logger("neptune", "NeptuneLogger", "neptune"),
        _logger("file", "FileLogger"),
    ),
}

_VISION = "it is for images, and GPT-2 reads tokens"
_CONVOLUTIONS = "it changes convolutional networks, and GPT-2 has no such layer"

_REFUSED: dict[Kind, dict[str, str]] = {
    "optimizers": {
        "lbfgs": "Composer's Trainer does not give it the closure that it needs",
        "sparse_adam": "it needs sparse gradients, and GPT-2's are dense",
        "muon": "torch 2.7 has none; register one through composer_gpt2.optimizers",
    },
    "schedulers": {},
    "algorithms": {
        "augmix": _VISION,
        "blurpool": _CONVOLUTIONS,
        "channels_last": _VISION,
        "colout": _VISION,
        "cutmix": _VISION,
        "cutout": _VISION,
        "factorize": "it does not know transformers' Conv1D, of which GPT-2 is made; all it finds "
        "is the head, which it would cut loose from the token embedding",
        "gated_linear_units": "Composer's knows BERT only",
        "ghost_batchnorm": "it changes batch normalization, and GPT-2 has none",
        "gyro_dropout": "its masks are for two dimensions, GPT-2 has three, and it divides by zero "
        "where an epoch is long",
        "label_smoothing": "it smooths targets for a loss outside the model, and a Hugging Face "
        "model computes its loss inside",
        "layer_freezing": "it acts at the ends of epochs only, so that most runs never see it, and "
        "it cannot freeze GPT-2's first layer without the last, which shares its weights",
        "low_precision_groupnorm": "it changes group normalization, and GPT-2 has none",
        "mixup": _VISION,
        "no_op_model": "it exchanges the model for a classifier that does nothing",
        "progressive_resizing": _VISION,
        "randaugment": _VISION,
        "selective_backprop": "it needs batches of (input, target) and a loss outside the model",
        "squeeze_excite": _CONVOLUTIONS,
        "stochastic_depth": "Composer's knows the blocks of ResNets only",
        "weight_standardization": _CONVOLUTIONS,
    },
    "callbacks": {
        "checkpoint_saver": "the recipe has save_folder, save_interval and "
        "save_num_checkpoints_to_keep for that",
        "export_for_inference": "it traces the model to TorchScript or ONNX, which GPT2Model is "
        "not for; the Hugging Face module in it has save_pretrained",
        "free_outputs": "the training metrics need the outputs that it frees",
        "image_visualizer": _VISION,
        "load_checkpoint": "the recipe has load_path for that",
        "mlperf": "it is for the ResNet benchmark",
    },
    "loggers": {
        "console": "the recipe has log_interval for that",
        "in_memory": "a recipe cannot read it back; pass it to the Trainer in Python",
        "mosaicml": "it logs to the MosaicML platform only",
        "progress_bar": "the recipe has progress_bar for that",
        "remote_uploader_downloader": "checkpoints go to an object store with save_folder: s3://...",
        "slack": "it needs a Python function that writes the message",
    },
}

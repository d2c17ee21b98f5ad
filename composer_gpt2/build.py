"""Recipe to Trainer: every part of a run, built in the order in which it is needed.

By now the recipe is known to be sound (``recipe.py``); nothing here chooses, it only constructs. A
name in the recipe becomes a class through ``registry.py``.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from composer import Algorithm, Callback, Trainer
from composer.algorithms import EMA
from composer.core import Batch, DataSpec, Evaluator, State
from composer.utils import collect_env, dist, get_device, reproducibility
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from composer_gpt2 import registry
from composer_gpt2.checkpoints.exact_resume import ExactResume
from composer_gpt2.checkpoints.manifest import CheckpointError, Manifest
from composer_gpt2.checkpoints.resume import (
    RecipeChangedError,
    newest_batch,
    recipe_fingerprint,
    refuse_changes,
    resume_path_for_all_ranks,
)
from composer_gpt2.checkpoints.safe_loading import safe_loading
from composer_gpt2.checkpoints.saver import VerifiedCheckpointSaver
from composer_gpt2.configs import get_config
from composer_gpt2.contract import SpeedupAlgorithm
from composer_gpt2.data.streaming import StreamingTokens, build_token_dataloader
from composer_gpt2.memory import ReturnUnusedMemory, keep_freed_memory
from composer_gpt2.model import GPT2Model
from composer_gpt2.pretrained import load_pretrained, problems
from composer_gpt2.progress import ProgressLines
from composer_gpt2.recipe import Recipe, RecipeError
from composer_gpt2.recipe_files import Mistake
from composer_gpt2.run_folder import run_lock
from composer_gpt2.tokenizer_by_name import load_tokenizer

__all__ = [
    "build_dataloader",
    "build_model",
    "build_optimizer",
    "build_trainer",
    "check_for_this_machine",
    "name_run",
    "parameter_groups",
]


_SPECIAL = ("bos", "eos", "pad")  # tokens


def build_trainer(recipe: Recipe) -> Trainer:
    """A Trainer that is ready to ``fit``, on this rank of however many there are.

    It goes on from the newest checkpoint of its save folder that verifies, unless the recipe says
    ``autoresume: false``. A recipe without ``run_name`` gets that of :func:`name_run`.

    Raises:
        RecipeError: A batch size that this number of ranks does not divide, a GPU-only setting on a
            CPU, or shards that are missing or not what the recipe says.
        RecipeChangedError: The checkpoint to go on from was made with another recipe.
        CheckpointError: No checkpoint of several is whole, or one would run code.
        BlockingIOError: Another process trains in the run folder (rank 0).
    """
    # The Trainer asks for the name of the processor, which another program takes a second to find;
    # Composer keeps the answer.
    threading.Thread(target=collect_env.get_cpu_model, daemon=True).start()
    device = get_device(recipe.device)
    on_cpu = device.name == "cpu"
    if on_cpu:
        _share_cores()
        keep_freed_memory()
    check_for_this_machine(recipe, n_ranks=dist.get_world_size(), on_cpu=on_cpu)
    dist.initialize_dist(device, recipe.dist_timeout)
    recipe = name_run(recipe)

    # The corpus first: what is wrong with it is known in seconds, a model can take minutes.
    train_dataloader = build_dataloader(recipe, recipe.data.train_split)
    evaluator = _build_evaluator(recipe)
    reproducibility.seed_all(recipe.seed)  # so that all ranks begin with one model
    model = build_model(recipe, on_cpu=on_cpu)
    progress_bar = recipe.progress_bar and sys.stderr.isatty()
    saver = _build_saver(recipe)
    with contextlib.ExitStack() as held:
        if saver is not None and dist.get_global_rank() == 0:
            held.enter_context(run_lock(recipe))
        with _checkpoint_to_load(recipe) as (load_path, resumes):
            if recipe.model.pretrained is not None and not resumes:
                model = build_model(recipe, on_cpu=on_cpu, pretrained=True)
            trainer = Trainer(
                model=model,
                train_dataloader=train_dataloader,
                optimizers=build_optimizer(recipe, model),
                schedulers=_build_all("schedulers", recipe.schedulers),
                algorithms=_build_algorithms(recipe),
                max_duration=recipe.max_duration,
                eval_dataloader=evaluator,
                callbacks=cast(
                    "list[Callback]",
                    [
                        ProgressLines(None if progress_bar else recipe.log_interval),
                        *([ReturnUnusedMemory()] if on_cpu else []),
                        *_build_all("callbacks", recipe.callbacks),
                        *([] if saver is None else [saver]),
                    ],
                ),
                loggers=_build_all("loggers", recipe.loggers),
                run_name=recipe.run_name,
                progress_bar=progress_bar,
                load_path=load_path,
                load_weights_only=recipe.load_weights_only and not resumes,
                device=device,
                precision="fp32" if on_cpu else recipe.precision,
                device_train_microbatch_size=recipe.device_train_microbatch_size,
                seed=recipe.seed,
                deterministic_mode=recipe.deterministic_mode,
                dist_timeout=recipe.dist_timeout,
                compile_config={} if recipe.compile else None,
            )
        if saver is not None:
            saver.closing.push(held.pop_all())
    if trainer._rng_state is not None:
        # Composer would restore it at the beginning of an epoch only.
        trainer.state.callbacks.append(ExactResume(trainer._rng_state))
        trainer._rng_state = None
    _rename_averages(trainer.state)
    return trainer


def name_run(recipe: Recipe) -> Recipe:
    """The recipe with a run name: its own, or the model's and a fingerprint of what is trained.

    So the same command is the same run, and goes on where it was.
    """
    if recipe.run_name is not None:
        return recipe
    fingerprint = recipe_fingerprint(recipe.model_dump(mode="json"))
    return recipe.with_run_name(f"{recipe.model.name}-{fingerprint}")


def build_model(recipe: Recipe, *, on_cpu: bool, pretrained: bool = False) -> GPT2Model:
    """The recipe's model; on a CPU it brings its own bfloat16 autocast.

    Args:
        recipe: A checked recipe.
        on_cpu: Whether it will be trained on a CPU.
        pretrained: Whether to load ``model.pretrained``; freshly initialised otherwise.

    Raises:
        RecipeError: The pretrained weights are not there, or not what the recipe says.
    """
    data = recipe.data
    overrides = recipe.model.config_overrides
    if data.tokenizer != "gpt2":  # what begins and ends a document is the tokenizer's to say
        tokenizer = load_tokenizer(data.tokenizer)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
        overrides = {**special, **overrides}
    config = get_config(recipe.model.name, **overrides)
    network = _pretrained_network(recipe, config) if pretrained else None
    return GPT2Model(
        network,
        None if pretrained else config,
        # Unchecked shards may have another tokenizer, and bits per byte would be wrong then.
        tokenizer_name=data.tokenizer if data.check_tokenizer else None,
        cpu_precision="amp_bf16" if on_cpu and recipe.precision == "amp_bf16" else "fp32",
    )


def _pretrained_network(recipe: Recipe, config: GPT2Config) -> GPT2LMHeadModel:
    assert recipe.model.pretrained is not None
    try:
        network = load_pretrained(recipe.model.pretrained, config)
    except (ValueError, OSError, CheckpointError) as error:
        raise RecipeError([Mistake(None, "model.pretrained", str(error))]) from error
    # What was not here when the recipe was checked can be looked at now.
    wrong = problems(
        network.config,
        config,
        recipe.algorithms,
        allow_changes=recipe.model.allow_destructive_algorithms,
    )
    if wrong:
        raise RecipeError([Mistake(None, ".".join(key), message) for key, message in wrong])
    return network


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the groups of :func:`parameter_groups`.

    AdamW, Adam and SGD run as one fused kernel unless the recipe chooses another implementation.
    """
    arguments = recipe.optimizer_arguments
    if recipe.optimizer_name in ("adamw", "adam", "sgd") and not arguments.keys() & {
        "capturable",
        "differentiable",
        "foreach",
        "fused",
    }:
        arguments["fused"] = True
    groups = parameter_groups(
        model, arguments.get("weight_decay"), exclude=recipe.weight_decay_exclude
    )
    return registry.get("optimizers", recipe.optimizer_name).load()(groups, **arguments)


def parameter_groups(
    model: nn.Module, weight_decay: float | None, *, exclude: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Every trainable parameter once: those that decay, then those that do not.

    Args:
        model: Any model; a tied parameter counts once.
        weight_decay: The recipe's, ``None`` for the optimizer's own; 0 gives one group, for then
            there is nothing to tell apart.
        exclude: Kinds that do not decay: ``bias`` (parameters of that name), ``norm`` (those of
            normalization layers), ``embedding`` (those of embedding layers, a tied head included).

    Returns:
        Groups for a torch optimizer; an empty one is left out.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters}]
    undecayed: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kinds = {
                "bias": name == "bias",
                "norm": isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm),
                "embedding": isinstance(module, nn.Embedding),
            }
            if any(kinds[kind] for kind in exclude):
                undecayed.add(parameter)
    groups = [
        {"params": [p for p in parameters if p not in undecayed]},
        {"params": [p for p in parameters if p in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_dataloader(recipe: Recipe, split: str) -> DataSpec:
    """This rank's batches of a split: ``input_ids`` and ``labels``, int64, shape ``(B, T)``.

    The training split is shuffled if the recipe says so and drops its last, incomplete batch; the
    validation split is read in order, to its end.

    Raises:
        RecipeError: The shards are missing or not what the recipe says.
    """
    training = split == recipe.data.train_split
    batch_size = recipe.train_batch_size if training else recipe.eval_batch_size
    assert batch_size is not None  # filled in by the recipe
    data = recipe.data
    streams = {name: s.model_dump(exclude_none=True) for name, s in data.streams.items()}
    try:
        dataset = StreamingTokens(
            remote=data.remote,
            local=data.local,
            streams=streams or None,
            split=split,
            sequence_length=data.sequence_length,
            batch_size=batch_size // dist.get_world_size(),
            shuffle=data.shuffle and training,
            shuffle_seed=recipe.seed,
            num_canonical_nodes=data.num_canonical_nodes,
            # A validation that took another part of a mixture each time could not be compared.
            sampling_method="balanced" if training else "fixed",
            cache_limit=data.cache_limit,
            download_retry=data.download_retry,
            download_timeout=data.download_timeout,
            drop_last=training,
            tokenizer=data.tokenizer,
            check_tokenizer=data.check_tokenizer,
        )
    except (ValueError, OSError) as error:
        raise RecipeError([Mistake(None, "data:", str(error))]) from error
    loader = build_token_dataloader(dataset, num_workers=data.num_workers, drop_last=training)
    return DataSpec(loader, split_batch=_split_batch)


def _has_checkpoints(recipe: Recipe) -> bool:
    return recipe.save_folder is not None and newest_batch(recipe.save_folder) is not None


@contextlib.contextmanager
def _checkpoint_to_load(recipe: Recipe) -> Iterator[tuple[str | None, bool]]:
    """What to load, if anything, and whether it is the run's own newest checkpoint."""
    path = None
    with contextlib.ExitStack() as stack:
        if recipe.autoresume and recipe.save_interval is not None:
            path = stack.enter_context(
                resume_path_for_all_ranks(
                    str(recipe.save_folder),
                    _staging(recipe),
                    lambda manifest: _check_resume(manifest, recipe),
                )
            )
        source = path or recipe.load_path
        stack.enter_context(safe_loading(source))
        yield source, path is not None


def _check_resume(manifest: Manifest, recipe: Recipe) -> None:
    refuse_changes(manifest, recipe.model_dump(mode="json"))
    if "sam" in recipe.algorithms:
        raise RecipeChangedError(
            "a run with sam cannot go on from a checkpoint (Composer's loads other weights than it "
            f"saved), got {manifest.name}; start anew (save_overwrite=true autoresume=false)."
        )


def _build_saver(recipe: Recipe) -> VerifiedCheckpointSaver | None:
    if recipe.save_interval is None:
        return None
    return VerifiedCheckpointSaver(
        str(recipe.save_folder),
        staging=_staging(recipe),
        recipe=recipe.model_dump(mode="json"),
        save_interval=recipe.save_interval,
        n_to_keep=recipe.save_num_checkpoints_to_keep,
        keep_every=recipe.save_keep_every,
        replace=recipe.save_overwrite and not recipe.autoresume,
    )


def _staging(recipe: Recipe) -> str:
    """Where checkpoints wait for their upload."""
    return f"{recipe.run_folder}/uploading"


def _split_batch(batch: Batch, size: int | float) -> Sequence[Batch]:
    """Micro-batches of ``size`` sequences; Composer's own splitter warns at a smaller last one."""
    parts = {name: tensor.split(int(size)) for name, tensor in batch.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def _build_evaluator(recipe: Recipe) -> Evaluator | None:
    if recipe.data.validation_split is None:
        return None
    metric_names = ["LanguageCrossEntropy", "LanguagePerplexity"]
    if recipe.data.check_tokenizer and recipe.data.tokenizer == "gpt2":
        metric_names.append("BitsPerByte")
    microbatch_size = recipe.device_train_microbatch_size  # what fits in training fits here
    if isinstance(microbatch_size, int):
        assert recipe.eval_batch_size is not None
        microbatch_size = min(microbatch_size, recipe.eval_batch_size // dist.get_world_size())
    return Evaluator(
        label="eval",
        dataloader=build_dataloader(recipe, recipe.data.validation_split),
        metric_names=metric_names,
        eval_interval=recipe.eval_interval or "1dur",
        subset_num_batches=recipe.eval_subset_num_batches,
        device_eval_microbatch_size=microbatch_size,
    )


def _build_all(kind: registry.Kind, chosen: dict[str, dict[str, Any]]) -> list[Any]:
    return [registry.get(kind, name).load()(**arguments) for name, arguments in chosen.items()]


def _build_algorithms(recipe: Recipe) -> list[Algorithm]:
    """Ours first: those of Composer that keep a copy of the model copy it as it will be trained."""
    algorithms = _build_all("algorithms", recipe.algorithms)
    return sorted(algorithms, key=lambda a: not isinstance(a, SpeedupAlgorithm))


def check_for_this_machine(recipe: Recipe, *, n_ranks: int, on_cpu: bool) -> None:
    """Refuses what a recipe alone cannot know to be wrong, before anything is built.

    Args:
        recipe: A checked recipe.
        n_ranks: Processes that train together.
        on_cpu: Whether they have no GPU.

    Raises:
        RecipeError: A batch size that the ranks do not divide, a setting that needs a GPU, or the
            name of a run that has checkpoints already.
    """
    mistakes = []

    def fail(key: str, message: str) -> None:
        mistakes.append(Mistake(None, key, message))

    for key in ("train_batch_size", "eval_batch_size"):
        size = getattr(recipe, key)
        if size % n_ranks:
            nearby = max(size // n_ranks, 1) * n_ranks
            fail(key, f"must be a multiple of the {n_ranks} ranks, got {size}; try {nearby}")
    microbatch_size = recipe.device_train_microbatch_size
    share = recipe.train_batch_size // n_ranks
    if isinstance(microbatch_size, int) and not mistakes and share % microbatch_size:
        fail(
            "device_train_microbatch_size",
            f"must divide a rank's share of the batch, {recipe.train_batch_size} / {n_ranks} = "
            f"{share} sequences, got {microbatch_size}; try {math.gcd(share, microbatch_size)}",
        )
    if recipe.data.tokenizer != "gpt2":
        try:
            load_tokenizer(recipe.data.tokenizer)
        except ValueError as error:
            fail("data.tokenizer", str(error).removesuffix("."))
    if on_cpu and microbatch_size == "auto":
        fail("device_train_microbatch_size", "'auto' needs a GPU; give a number of sequences")
    if on_cpu and recipe.precision == "amp_fp16":
        fail("precision", "amp_fp16 needs a GPU; use amp_bf16 or fp32")
    starts_anew = not (recipe.autoresume or recipe.save_overwrite)
    if recipe.save_interval is not None and starts_anew and _has_checkpoints(recipe):
        fail(
            "run_name",
            f"must be new, but {recipe.save_folder} holds checkpoints of a run of that name; go on "
            "with it (autoresume=true), choose another name, or replace it (save_overwrite=true)",
        )
    if mistakes:
        raise RecipeError(mistakes)


def _rename_averages(state: State) -> None:
    """Gives what Composer's EMA has loaded the names of this model, which it ignores otherwise.

    It saves them as they are on several ranks, where the model is wrapped, or on one.
    """
    prefix = "module." if isinstance(state.model, DistributedDataParallel) else ""
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.ema_model is not None:
            average = algorithm.ema_model
            for kind in ("named_parameters_dict", "named_buffers_dict"):
                tensors = getattr(average, kind).items()
                renamed = {prefix + name.removeprefix("module."): t for name, t in tensors}
                setattr(average, kind, renamed)


def _share_cores() -> None:
    """One thread for each core of this rank's share, unless ``OMP_NUM_THREADS`` says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        n_cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, n_cores // dist.get_local_world_size()))

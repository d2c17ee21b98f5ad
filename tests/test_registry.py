"""The registry: every name works, every refusal is deserved, and other packages can add names."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from importlib import metadata

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import pytest
import torch
from composer import Algorithm, Callback, Trainer
from composer.algorithms.alibi import apply_alibi
from composer.algorithms.factorize import apply_factorization
from composer.core import Precision
from composer.loggers import InMemoryLogger, LoggerDestination
from torch.utils.data import DataLoader

from composer_gpt2 import registry
from composer_gpt2.configs import get_config
from composer_gpt2.model import GPT2Model

N_BATCHES = 8
TOKENS = torch.randint(0, 200, (4 * N_BATCHES, 16), generator=torch.Generator().manual_seed(3))


def build_model(dropout: float = 0.0) -> GPT2Model:
    torch.manual_seed(1)
    config = get_config("gpt2-tiny", n_embd=16, n_positions=16, vocab_size=256, dropout=dropout)
    return GPT2Model(config=config, tokenizer_name=None)


def build_loader() -> DataLoader:
    def collate(rows):
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    return DataLoader(TOKENS, batch_size=4, collate_fn=collate)  # pyright: ignore[reportArgumentType]


def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with decay and no-decay groups, as recipes have it."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def train(
    algorithms=(),
    *,
    callbacks=(),
    loggers=(),
    schedulers=(),
    optimizer=None,
    model=None,
    max_duration=f"{N_BATCHES}ba",
) -> Trainer:
    """Eight batches of a tiny GPT-2, all else equal; gives the closed Trainer."""
    model = model if model is not None else build_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Composer's, about the settings of this test.
        trainer = Trainer(
            model=model,
            train_dataloader=build_loader(),
            eval_dataloader=build_loader(),
            eval_interval="1dur",
            optimizers=optimizer if optimizer is not None else build_optimizer(model),
            schedulers=list(schedulers),
            algorithms=list(algorithms),
            callbacks=list(callbacks),
            loggers=list(loggers),
            max_duration=max_duration,
            device="cpu",
            precision="fp32",
            seed=3,
            progress_bar=False,
        )
        trainer.fit()
        trainer.close()
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    parameters = [p.detach().flatten() for p in trainer.state.model.parameters()]
    return torch.cat(parameters)


def eval_loss(trainer: Trainer) -> float:
    return float(trainer.state.eval_metrics["eval"]["LanguageCrossEntropy"].compute())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small take longer with more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def plain() -> Trainer:
    return train()


def build(kind: registry.Kind, name: str, **arguments):
    entry = registry.get(kind, name)
    assert entry.check_arguments(arguments) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SAM's about resuming, which recipes refuse.
        return entry.load()(**arguments)


# --- The tables --------------------------------------------------------------------------------

ALL = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_name_can_be_imported_and_has_known_types(kind, name):
    entry = registry.get(kind, name)
    assert inspect.isclass(entry.load())
    for parameter in entry.parameters().values():
        assert not isinstance(parameter.annotation, str)
    if kind not in ("optimizers", "schedulers"):  # These share their limits.
        assert set(entry.limits) <= set(entry.parameters()), "a limit that would never be seen"


BASES = {
    "algorithms": (composer.algorithms, Algorithm),
    "callbacks": (composer.callbacks, Callback),
    "loggers": (composer.loggers, LoggerDestination),
    "schedulers": (composer.optim, composer.optim.ComposerScheduler),
}
# The name stands for ours; Composer's cannot be used.
OF_OUR_OWN = {"alibi", "seq_length_warmup"}

# Transforms of images, modules of SqueezeExcite, and the base class.
PARTS = {"SqueezeExcite2d", "SqueezeExciteConv2d", "LoggerDestination", "ComposerScheduler"}


@pytest.mark.parametrize("kind", BASES)
def test_everything_of_composers_is_either_there_or_refused(kind):
    """A new Composer with a new algorithm must make us look at it."""
    module, base = BASES[kind]
    theirs = {
        name
        for name in module.__all__
        if inspect.isclass(getattr(module, name))
        and (name.endswith("Scheduler") or kind != "schedulers")
        and (kind == "schedulers" or issubclass(getattr(module, name), base))
    } - PARTS
    ours = {registry.get(kind, name).path.split(":")[1] for name in registry.names(kind)}
    for name in theirs - ours:
        squeezed = name.lower().removesuffix("callback").removesuffix("logger")
        answered = {*registry.refused(kind), *OF_OUR_OWN}
        assert squeezed in {name.replace("_", "") for name in answered}, name


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_refusal_gives_its_reason(kind):
    for name, reason in registry.refused(kind).items():
        with pytest.raises(ValueError, match="cannot be used") as caught:
            registry.get(kind, name)
        assert str(caught.value) == f"{name} cannot be used: {reason}"
        assert name not in registry.names(kind)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"one of the optimizers \(did you mean 'adamw'\?\)"):
        registry.get("optimizers", "adam_w")


# --- Algorithms that are accepted do something -------------------------------------------------

EFFECTIVE = {
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1e-3},
    "sam": {},
    "swa": {"swa_start": "0.25dur", "swa_end": "0.75dur", "update_interval": "1ba"},
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_algorithms_that_change_the_weights(plain, name):
    changed = train([build("algorithms", name, **EFFECTIVE[name])])
    assert weights(changed).shape == weights(plain).shape
    assert not torch.allclose(weights(changed), weights(plain))


def test_the_comparison_is_exact(plain):
    """Without an algorithm two runs are equal to the bit, or the tests above show nothing."""
    assert torch.equal(weights(train()), weights(plain))


@pytest.mark.parametrize("clipping_type", ["norm", "value", "adaptive"])
def test_gradient_clipping_clips(clipping_type):
    """Gradients after clipping are within the threshold, and without it they are not."""
    threshold = {"norm": 0.5, "value": 0.01, "adaptive": 0.01}[clipping_type]
    largest = []

    class Watch(Callback):
        def after_train_batch(self, state, logger):
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            if clipping_type == "norm":
                largest.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
            else:
                largest.append(max(float(g.abs().max()) for g in gradients))

    train(callbacks=[Watch()])
    unclipped = largest.copy()
    largest.clear()
    clipping = build(
        "algorithms",
        "gradient_clipping",
        clipping_type=clipping_type,
        clipping_threshold=threshold,
    )
    train([clipping], callbacks=[Watch()])
    if clipping_type == "adaptive":  # Relative to the weights, row by row: smaller is all we say.
        assert max(largest) < max(unclipped)
    else:
        assert max(largest) <= threshold * 1.001 < max(unclipped)


def test_ema_evaluates_averaged_weights_and_trains_the_same(plain):
    averaged = train([build("algorithms", "ema", half_life="2ba")])
    assert torch.equal(weights(averaged), weights(plain))
    assert abs(eval_loss(averaged) - eval_loss(plain)) > 1e-3


def test_low_precision_layernorm_replaces_every_norm_and_the_optimizer_sees_it():
    """It acts under CUDA autocast only (recipes require device: gpu); the surgery runs anywhere."""
    model = build_model()
    optimizer = build_optimizer(model)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    algorithm = build("algorithms", "low_precision_layernorm")
    module = importlib.import_module(type(algorithm).__module__)
    module.apply_low_precision_layernorm(model, Precision.AMP_BF16, optimizer)
    replaced = [m for m in model.modules() if isinstance(m, module.LPLayerNorm)]
    assert len(replaced) == len(norms) == 2 * 2 + 1
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_low_precision_layernorm_changes_logits_on_a_gpu():
    model = build_model().cuda().eval()
    batch = {"input_ids": TOKENS[:2].cuda()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before = model(batch)["logits"]
        module = importlib.import_module(
            type(build("algorithms", "low_precision_layernorm")).__module__
        )
        module.apply_low_precision_layernorm(model, Precision.AMP_BF16)
        after = model.cuda()(batch)["logits"]
    assert not torch.equal(before, after)


def test_every_accepted_algorithm_is_shown_to_work():
    shown = {*EFFECTIVE, "ema", "low_precision_layernorm"}
    assert {entry for entry in registry.names("algorithms") if _is_composers(entry)} == shown


def _is_composers(name: str) -> bool:
    return registry.get("algorithms", name).path.startswith("composer.")


# --- Algorithms that are refused deserve it ----------------------------------------------------

# What they are built with, and whether Composer raises or trains on as if they were not there.
REFUSALS = {
    "augmix": ({}, "raises"),
    "blurpool": ({}, "no effect"),
    "channels_last": ({}, "no effect"),
    "colout": ({"input_key": "input_ids", "target_key": "labels"}, "raises"),
    "cutmix": ({"input_key": "input_ids", "target_key": "labels"}, "raises"),
    "gated_linear_units": ({}, "raises"),
    "ghost_batchnorm": ({}, "no effect"),
    "gyro_dropout": ({}, "raises"),
    "label_smoothing": ({"target_key": "labels"}, "raises"),
    "layer_freezing": ({"freeze_start": 0.0}, "no effect"),
    "low_precision_groupnorm": ({}, "no effect"),
    "mixup": ({"input_key": "input_ids", "target_key": "labels"}, "raises"),
    "no_op_model": ({}, "raises"),
    "progressive_resizing": ({"input_key": "input_ids", "target_key": "labels"}, "raises"),
    "randaugment": ({}, "raises"),
    "selective_backprop": (
        {"start": 0.0, "input_key": "input_ids", "target_key": "labels"},
        "raises",
    ),
    "seq_length_warmup": ({"duration": 0.1, "max_seq_length": 16}, "raises"),
    "squeeze_excite": ({}, "no effect"),
    "stochastic_depth": ({"target_layer_name": "GPT2Block"}, "raises"),
    "weight_standardization": ({}, "no effect"),
}


def test_every_refusal_is_shown_to_be_deserved():
    elsewhere = {"factorize", "cutout"}  # What cutout cuts out of tokens has no meaning.
    assert set(registry.refused("algorithms")) == {*REFUSALS, *elsewhere} - OF_OUR_OWN


CLASSES = {cls.lower(): cls for cls in composer.algorithms.__all__}


@pytest.mark.parametrize("name", REFUSALS)
def test_composers_own_fails_or_does_nothing(plain, name):
    arguments, fate = REFUSALS[name]
    cls = getattr(composer.algorithms, CLASSES[_class_name(name)])
    model = build_model(dropout=0.1 if name == "gyro_dropout" else 0.0)

    def attempt() -> Trainer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            algorithm = cls(**arguments)
        return train([algorithm], model=model)

    if fate == "raises":
        with pytest.raises(Exception):  # noqa: B017, PT011 - each has its own
            attempt()
    else:
        assert torch.equal(weights(attempt()), weights(plain))


def _class_name(name: str) -> str:
    return {"seq_length_warmup": "seqlengthwarmup"}.get(name, name.replace("_", ""))


def test_composers_alibi_leaves_attention_as_it_was():
    """The logits are those of the model with its position embeddings zeroed, and nothing else."""
    tokens = {"input_ids": TOKENS[:2]}
    model = build_model().eval()
    with_alibi = build_model().eval()
    apply_alibi(with_alibi, max_sequence_length=16)
    with torch.no_grad():
        model.get_submodule("model.transformer.wpe").get_parameter("weight").zero_()
        assert torch.equal(with_alibi(tokens)["logits"], model(tokens)["logits"])


def test_composers_factorize_only_unties_the_head():
    model = build_model()
    apply_factorization(model, min_features=8, latent_features=4)
    factorized = [n for n, m in model.named_modules() if type(m).__name__ == "FactorizedLinear"]
    assert factorized == ["model.lm_head"]


# --- Optimizers, schedulers, callbacks, loggers ------------------------------------------------


@pytest.mark.parametrize("name", registry.names("optimizers"))
def test_every_optimizer_moves_every_parameter(name):
    entry = registry.get("optimizers", name)
    arguments = {"lr": 1e-2, **({"weight_decay": 0.1} if "weight_decay" in entry.required else {})}
    assert entry.check_arguments(arguments) == []
    model = build_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(optimizer=entry.load()(model.parameters(), **arguments), model=model)
    for parameter_name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name


# A warm-up over the first four of eight batches. Composer steps its schedules before it advances
# time, so that each batch has the rate of the one before it.
HALF_WARM = [0, 0, 0.25, 0.5, 0.75, 1]

SCHEDULES = {
    "exponential": {"gamma": 0.5, "decay_period": "2ba"},
    "step": {"step_size": "2ba"},
    "cosine_annealing_warm_restarts": {"t_0": "4ba"},
    "polynomial": {"power": 2.0},
    "multi_step": {"milestones": ["2ba", "0.5dur"]},
    "constant": {"alpha": 0.5, "t_max": "4ba"},
}
ALIASES = {"multistep": "multi_step", "cosine_warmrestart": "cosine_annealing_warm_restarts"}


@pytest.mark.parametrize("name", registry.names("schedulers"))
def test_every_schedule_moves_the_learning_rate(name):
    arguments = SCHEDULES.get(ALIASES.get(name) or name, {})
    if "with_warmup" in name:
        milestones = {"milestones": ["0.75dur"]} if name.startswith("multi") else {}
        arguments = {"t_warmup": "0.5dur", **milestones}
    rates = learning_rates(build("schedulers", name, **arguments))
    assert len(rates) == N_BATCHES
    assert len({round(rate, 6) for rate in rates}) > 1
    if "with_warmup" in name:
        assert rates[:6] == pytest.approx(HALF_WARM)
    if name in ("cosine_annealing_with_warmup", "cosine_decay_with_warmup", "cosine_with_warmup"):
        assert rates[6:] == pytest.approx([(1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2)])


def learning_rates(scheduler, max_duration: str = f"{N_BATCHES}ba") -> list[float]:
    """The factor on the learning rate that each batch is trained with."""
    rates = []

    class Watch(Callback):
        def batch_start(self, state, logger):
            rates.append(state.optimizers[0].param_groups[0]["lr"] / 1e-2)

    train(schedulers=[scheduler], callbacks=[Watch()], max_duration=max_duration)
    return rates


@pytest.mark.parametrize(
    ("t_warmup", "max_duration"),
    [
        ("4ba", "8ba"),
        ("16sp", "32sp"),
        ("256tok", "512tok"),
        ("0.5dur", "8ba"),
        ("0.5dur", "512tok"),
        ("4ba", "1ep"),
    ],
)
def test_a_schedule_takes_any_unit(t_warmup, max_duration):
    """Half of eight batches of 4 sequences of 16 tokens, which are one epoch."""
    scheduler = build("schedulers", "cosine_decay_with_warmup", t_warmup=t_warmup)
    rates = learning_rates(scheduler, max_duration)
    assert rates[:6] == pytest.approx(HALF_WARM)
    assert len(rates) == N_BATCHES


def test_callbacks_run_and_measure():
    """All that run on a CPU, together."""
    arguments = {
        "speed_monitor": {"window_size": 2},
        "optimizer_monitor": {"batch_log_interval": 1},
        "activation_monitor": {"interval": "10ba", "only_log_wandb": False},
        "early_stopper": {
            "monitor": "LanguageCrossEntropy",
            "dataloader_label": "eval",
            "patience": "1ep",
        },
        "threshold_stopper": {
            "monitor": "LanguageCrossEntropy",
            "dataloader_label": "eval",
            "threshold": 0.1,
        },
        "system_metrics_monitor": {},
        "lr_monitor": {},
        "runtime_estimator": {},
        "nan_monitor": {},
        "memory_monitor": {},
    }
    memory = InMemoryLogger()
    train(
        callbacks=[build("callbacks", name, **given) for name, given in arguments.items()],
        loggers=[memory],
    )
    logged = " ".join(memory.data)
    for metric in ("throughput/", "lr-AdamW", "l2_norm/grad", "time/remaining"):
        assert metric in logged
    needs_more = {
        "evaluate_tasks",
        "generate",
        "generate_samples",
        "memory_snapshot",
        "oom_observer",
    }
    assert {*arguments, *needs_more} == {
        name for name in registry.names("callbacks") if registry.get("callbacks", name)
    }


def test_the_training_metrics_need_what_free_outputs_frees(plain):
    assert "train" not in plain.state.eval_metrics
    with pytest.raises(Exception):  # noqa: B017, PT011
        train(callbacks=[composer.callbacks.FreeOutputs()])


def test_file_and_tensorboard_write(tmp_path):
    file = build("loggers", "file", filename=str(tmp_path / "log.txt"), capture_stdout=False)
    board = build("loggers", "tensorboard", log_dir=str(tmp_path / "board"))
    train(loggers=[file, board])
    assert (tmp_path / "log.txt").read_text()
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", ["wandb", "mlflow", "comet_ml", "neptune"])
def test_a_logger_without_its_package_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (mistake,) = registry.get("loggers", name).check_arguments({})
    assert mistake.message == f"needs the package {name}; run: pip install 'mosaicml[{name}]'"
    assert name.replace("_", "-") in {
        extra.replace("_", "-") for extra in metadata.metadata("mosaicml").get_all("Provides-Extra")
    }


# --- Other packages ----------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs distributions with entry points: real files that importlib.metadata finds."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, group: str, entry_points: dict[str, str], source: str = ""):
        (tmp_path / f"{distribution}_module.py").write_text(source)
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[composer_gpt2.{group}]\n{lines}\n")
        importlib.invalidate_caches()
        registry._claims.cache_clear()

    yield install
    registry._claims.cache_clear()


SHRINK = """
from composer import Algorithm, Event

class Shrink(Algorithm):
    def __init__(self, factor: float = 0.5):
        self.factor = factor
    def match(self, event, state):
        return event == Event.BATCH_END
    def apply(self, event, state, logger):
        for parameter in state.model.parameters():
            parameter.data *= self.factor
"""


def test_another_package_adds_an_algorithm(installed, plain):
    installed("shrinkers", "algorithms", {"shrink": "shrinkers_module:Shrink"}, SHRINK)
    assert registry.names("algorithms")[-1] == "shrink"
    entry = registry.get("algorithms", "shrink")
    assert entry.distribution == "shrinkers"
    (mistake,) = entry.check_arguments({"factor": "big"})
    assert mistake == ("factor", "must be a number, got 'big'")
    shrunk = train([build("algorithms", "shrink", factor=0.9)])
    assert weights(shrunk).norm() < weights(plain).norm()


def test_a_package_may_bring_what_composers_cannot_do(installed):
    installed("smoothers", "algorithms", {"label_smoothing": "smoothers_module:Shrink"}, SHRINK)
    assert registry.get("algorithms", "label_smoothing").distribution == "smoothers"


def test_a_broken_package_is_named(installed):
    installed("broken", "callbacks", {"oops": "broken_module:Oops"}, "raise RuntimeError('no GPU')")
    (mistake,) = registry.get("callbacks", "oops").check_arguments({})
    assert "package broken" in mistake.message
    assert "RuntimeError: no GPU" in mistake.message
    installed("empty", "loggers", {"gone": "empty_module:Gone"})
    (mistake,) = registry.get("loggers", "gone").check_arguments({})
    assert "package empty" in mistake.message


def test_two_packages_cannot_have_one_name(installed):
    installed("mine", "optimizers", {"adamw": "mine_module:AdamW"})
    with pytest.raises(ValueError, match="got composer-gpt2 and mine; uninstall one"):
        registry.get("optimizers", "adamw")
    assert registry.get("optimizers", "sgd").distribution == "composer-gpt2"  # unharmed


def test_what_a_constructor_refuses_is_reported():
    (mistake,) = registry.get("optimizers", "adamw").check_arguments(
        {"lr": 1e-3, "weight_decay": 0.0, "fused": True, "foreach": True}
    )
    assert mistake.argument is None
    assert "refuses its arguments: RuntimeError" in mistake.message

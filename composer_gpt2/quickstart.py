"""``make train``: from nothing but an installation to a trained GPT-2 and a sample of its text.

The text is what every machine with this package has: the documentation inside Python's standard
library and some installed packages (``documentation.py``). The way is that of a real run: prepare,
upload to an object store (a local S3 server), train through the Composer launcher from ``s3://``,
evaluate, generate.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from streaming import LocalDataset

from composer_gpt2.build import check_for_this_machine
from composer_gpt2.data.local_s3 import LocalS3, local_s3_server
from composer_gpt2.data.preparation import prepare, summarize
from composer_gpt2.documentation import write_documentation
from composer_gpt2.generation import generate
from composer_gpt2.recipe import Recipe, RecipeError, load_recipe
from composer_gpt2.tokenizer import VOCAB_SIZE
from composer_gpt2.trained_model import load_trained_model

__all__ = ["quickstart", "unigram_entropy"]

_FOLDER = Path("runs/quickstart")
_REMOTE = "s3://quickstart/corpus"
_PROMPT = "Returns a new"
_SAMPLE_TOKENS = 120


def quickstart(
    recipe_file: str,
    data: str | None,
    overrides: Sequence[str],
    *,
    split_on: str | None = None,
    validation_fraction: float = 0.03,
) -> int:
    """Trains a recipe on text at hand and says what came of it.

    Args:
        recipe_file: A recipe; its ``data.remote`` is replaced.
        data: A corpus to prepare (a file, folder, glob or ``hf://``), a prepared one (a folder with
            ``corpus.json``, or an address in an object store), or ``None`` for the documentation on
            this machine.
        overrides: As for ``run.py``.
        split_on: As for :func:`composer_gpt2.data.preparation.prepare`.
        validation_fraction: The same. The default leaves enough of the documentation to evaluate on
            for a loss with two sure digits.

    Returns:
        The exit status of the training run.

    Raises:
        RecipeError: The recipe has mistakes.
        ValueError: The corpus cannot be prepared.
        OSError: The corpus cannot be read.
    """
    remote = data if data is not None and "://" in data and not data.startswith("hf://") else None
    # Mistakes in the recipe are told before minutes of work.
    address = f"data.remote={remote or _REMOTE}"
    recipe = load_recipe([recipe_file], [address, *overrides])
    addresses = {
        "save_folder": recipe.save_folder,
        "load_path": recipe.load_path,
        "model.pretrained": recipe.model.pretrained,
    }
    for key, address_given in addresses.items():
        if remote is None and "://" in (address_given or ""):
            raise ValueError(
                f"{key} must be a folder when the text comes from a local S3 server, which takes "
                f"the place of any other for the run, got {address_given}; prepare the text "
                "yourself (composer-gpt2 prepare) and give its address as data."
            )
    run_name = recipe.run_name or f"{recipe.model.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    command = [
        *_launcher(recipe),
        *("-f", recipe_file, address, *overrides, f"run_name={run_name}"),
    ]
    run_folder = Path(recipe.with_run_name(run_name).run_folder or "")

    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        corpus = (
            None
            if remote is not None
            else _local_corpus(data, recipe, split_on, validation_fraction)
        )
        if corpus is not None:
            server = stack.enter_context(local_s3_server())
            _upload(corpus, server)
            environment |= server.environment
        _say(f"Training: {shlex.join(command)}")
        status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        return status

    metrics = json.loads((run_folder / "metrics.json").read_text())
    if "eval" in metrics:
        _say(f"Validation loss {metrics['eval']['LanguageCrossEntropy']:.3f} nats a token")
    if corpus is not None:
        entropy = unigram_entropy(corpus / recipe.data.train_split)
        _say(f"Unigram entropy {entropy:.3f} nats a token: a model that knows no context")
    model = load_trained_model(str(run_folder))
    n_tokens = min(_SAMPLE_TOKENS, recipe.data.sequence_length // 2)
    (text,) = generate(model, _PROMPT, max_new_tokens=n_tokens, top_k=50, seed=recipe.seed)
    _say(f"A sample:\n\n{text}\n")
    _say(
        f"The run is in {run_folder}; more text: "
        f"composer-gpt2 generate {run_folder} -p {shlex.quote(_PROMPT)} -m {n_tokens}"
    )
    return 0


def unigram_entropy(split_folder: Path) -> float:
    """Entropy of the distribution of tokens in a prepared split, in nats a token.

    It is the least loss of a model that ignores the context; a trained one must be well below.

    Args:
        split_folder: A local folder with ``index.json`` and shards.
    """
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for sample in LocalDataset(local=str(split_folder)):
        counts += np.bincount(sample["tokens"], minlength=VOCAB_SIZE)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _local_corpus(
    data: str | None, recipe: Recipe, split_on: str | None, validation_fraction: float
) -> Path:
    """A folder with a prepared corpus: ``data`` itself, or what is prepared from it."""
    if data is not None and (Path(data) / "corpus.json").is_file():
        return Path(data)
    source = data or str(write_documentation(_FOLDER / "documentation.jsonl"))
    corpus = _FOLDER / "corpus"
    _say(f"Preparing {source} in {corpus}")
    description = prepare(
        [source],
        str(corpus),
        sequence_length=recipe.data.sequence_length,
        split_on=split_on,
        validation_fraction=validation_fraction,
        overwrite=True,
    )
    _say(summarize(description))
    return corpus


def _upload(corpus: Path, server: LocalS3) -> None:
    _say(f"Uploading to {_REMOTE} on a local S3 server, {server.endpoint_url}")
    bucket, prefix = _REMOTE.removeprefix("s3://").split("/")
    server.create_bucket(bucket)
    client = server.client()
    for file in sorted(path for path in corpus.rglob("*") if path.is_file()):
        client.upload_file(str(file), bucket, f"{prefix}/{file.relative_to(corpus).as_posix()}")


def _launcher(recipe: Recipe) -> list[str]:
    """``composer -n N run.py``: a rank for each GPU, without one for each of up to two cores.

    Fewer, where the batches cannot be shared out evenly among so many.
    """
    n_gpus = 0 if recipe.device == "cpu" else torch.cuda.device_count()
    most = n_gpus or min(2, len(os.sched_getaffinity(0)))
    n_ranks = max(n for n in range(1, most + 1) if _fits(recipe, n, on_cpu=not n_gpus))
    script = Path(__file__).parent.with_name("run.py")
    program = [str(script)] if script.exists() else ["-m", "composer_gpt2.train"]
    return [str(Path(sys.executable).with_name("composer")), "-n", str(n_ranks), *program]


def _fits(recipe: Recipe, n_ranks: int, *, on_cpu: bool) -> bool:
    if n_ranks == 1:
        return True  # what is wrong with one rank, the run itself will say
    try:
        check_for_this_machine(recipe, n_ranks=n_ranks, on_cpu=on_cpu)
    except RecipeError:
        return False
    return True


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)

"""``composer-gpt2 project``: writes the data of a small task, trains, says what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_gpt2.arguments import nearest
from composer_gpt2.checkpoints.resume import recipe_fingerprint
from composer_gpt2.model import GPT2Model
from composer_gpt2.projects.adder import check_adder, write_adder
from composer_gpt2.projects.characters import write_characters
from composer_gpt2.projects.dialogue import format_prompt, write_dialogues
from composer_gpt2.projects.sorter import check_sorter, write_sorter
from composer_gpt2.recipe import Recipe, load_recipe
from composer_gpt2.restarts import train_with_restarts
from composer_gpt2.trained_model import load_trained_model

__all__ = ["PROJECTS", "Project", "run_project"]

_BENCHMARK_SHARES = (0.9, 0.05, 0.05)


@dataclass(frozen=True)
class Project:
    """A small task."""

    about: str
    """In a line."""
    recipe: str
    """Its recipe among those of this package."""
    write: Callable[[Recipe, str | None], None]
    """Writes the corpus to the recipe's ``data.remote``, from a text if it takes one."""
    needs_text: bool = False
    """Whether there is no data without a file."""
    takes_text: bool = False
    """Whether a file may be given."""
    check: Callable[[GPT2Model], object] | None = None
    """What is printed of the trained model."""
    unit: str | None = None
    """Of a token, where bits are counted in it."""
    try_with: str = ""
    """Options of ``composer-gpt2 generate`` for a sample."""


def _write_characters(recipe: Recipe, text: str | None) -> None:
    assert text is not None
    length = recipe.data.sequence_length
    write_characters(text, _out(recipe), sequence_length=length, stride=max(1, length // 16))


def _write_text8(recipe: Recipe, text: str | None) -> None:
    assert text is not None
    length = recipe.data.sequence_length
    write_characters(text, _out(recipe), sequence_length=length, shares=_BENCHMARK_SHARES)


def _write_enwik8(recipe: Recipe, text: str | None) -> None:
    assert text is not None
    length = recipe.data.sequence_length
    write_characters(
        text, _out(recipe), sequence_length=length, shares=_BENCHMARK_SHARES, unit="byte"
    )


def _write_dialogues(recipe: Recipe, text: str | None) -> None:
    write_dialogues(_out(recipe), text, sequence_length=recipe.data.sequence_length)


PROJECTS = {
    "adder": Project(
        "adds numbers of two digits",
        "adder.yaml",
        lambda recipe, text: write_adder(_out(recipe)),
        check=check_adder,
        try_with="-p 8550 -m 3 --temperature 0",
    ),
    "sorter": Project(
        "sorts six digits",
        "sorter.yaml",
        lambda recipe, text: write_sorter(_out(recipe)),
        check=check_sorter,
        try_with="-p 201102 -m 6 --temperature 0",
    ),
    "characters": Project(
        "writes like a text, character by character",
        "characters-cpu.yaml",
        _write_characters,
        needs_text=True,
        takes_text=True,
        unit="character",
        try_with=r"-p '\n'",
    ),
    "text8": Project(
        "the benchmark of 100 million characters of Wikipedia",
        "text8.yaml",
        _write_text8,
        needs_text=True,
        takes_text=True,
        unit="character",
        try_with="-p ' the '",
    ),
    "enwik8": Project(
        "the benchmark of 100 million bytes of Wikipedia",
        "enwik8.yaml",
        _write_enwik8,
        needs_text=True,
        takes_text=True,
        unit="byte",
        try_with="-p 'The '",
    ),
    "dialogue": Project(
        "answers questions in a chat format",
        "dialogue.yaml",
        _write_dialogues,
        takes_text=True,
        try_with="-p "
        + shlex.quote(format_prompt([{"role": "user", "content": "What does json.loads do?"}])),
    ),
}
"""The projects by name."""


def run_project(
    name: str,
    text: str | None = None,
    *,
    recipe_file: str | None = None,
    overrides: Sequence[str] = (),
    data_only: bool = False,
) -> int:
    """Writes the data of a project, trains its recipe, and says what came of it.

    Args:
        name: One of ``PROJECTS``.
        text: A file with text, where the project takes one.
        recipe_file: In place of the project's own; its ``data`` decides where the corpus lies.
        overrides: As for :func:`composer_gpt2.recipe.load_recipe`.
        data_only: Only the data.

    Returns:
        The exit status of the training.

    Raises:
        RecipeError: The recipe has mistakes.
        ValueError: There is no such project, or a text where none is taken, or none where one is
            needed.
        OSError: The text cannot be read, or the corpus not written.
    """
    project = _find(name, text)
    file = recipe_file or project.recipe
    recipe = load_recipe([file], overrides)
    _say(f"{name}: {project.about}; writing its data to {_out(recipe)}")
    project.write(recipe, text)
    recipe = load_recipe([file], overrides)  # which now knows the size of the vocabulary
    if recipe.run_name is None:
        settings = recipe.model_dump(mode="json")
        # Another text is another run, also where the recipe is the same.
        fingerprint = recipe_fingerprint({**settings, "corpus": _digest(Path(_out(recipe)))})
        overrides = [f"run_name={name}-{fingerprint}", *overrides]
        recipe = load_recipe([file], overrides)
    command = shlex.join(["composer-gpt2", "train", "-f", file, *overrides])
    if data_only:
        _say(f"To train on it: {command}")
        return 0
    _say(f"Training: {command}")
    status = train_with_restarts([file], overrides)
    run_folder = Path(recipe.run_folder or "")
    if status != 0 or not (run_folder / "metrics.json").is_file():
        return status
    _report(project, run_folder)
    return 0


def _find(name: str, text: str | None) -> Project:
    if name not in PROJECTS:
        raise ValueError(
            f"a project must be one of {', '.join(PROJECTS)}, got {name!r}"
            f"{nearest(name, PROJECTS)}."
        )
    project = PROJECTS[name]
    if project.needs_text and text is None:
        raise ValueError(f"{name} needs a file with its text, got none; write --text FILE.")
    if text is not None and not project.takes_text:
        raise ValueError(f"{name} computes its data, got --text {text}; leave it out.")
    if text is not None and not Path(text).is_file():
        raise FileNotFoundError(f"--text must be a file, got {text!r}, which is none.")
    return project


def _report(project: Project, run_folder: Path) -> None:
    loss = json.loads((run_folder / "metrics.json").read_text())["eval"]["LanguageCrossEntropy"]
    bits = f" = {loss / math.log(2):.3f} bits a {project.unit}" if project.unit else ""
    _say(f"Validation loss {loss:.4f} nats a token{bits}")
    if project.check is not None:
        _say(str(project.check(load_trained_model(str(run_folder)))))
    _say(f"The run is in {run_folder}; try composer-gpt2 generate {run_folder} {project.try_with}")


def _out(recipe: Recipe) -> str:
    """Where the corpus goes.

    Raises:
        ValueError: To no folder.
    """
    remote = recipe.data.remote
    if remote is None or "://" in remote:
        raise ValueError(
            f"data.remote of a project's recipe must be a folder to write to, got {remote}."
        )
    return remote


def _digest(corpus: Path) -> str:
    """SHA-256 of all that says what a corpus holds: the hashes of its shards, its tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([*corpus.glob("*/index.json"), *corpus.glob("tokenizer/*.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)

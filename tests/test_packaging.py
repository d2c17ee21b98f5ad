"""The package works from the checkout, from a wheel, and from both kinds of editable install."""

from __future__ import annotations

import ast
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRACKED = ("composer_gpt2", "algorithms", "yamls", "tests")
FILES = ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE", "run.py")

# What every way of installing must give: the names of DESIGN, the assets and the recipes.
PROBE = """
import composer_gpt2, algorithms
import composer_gpt2.algorithms
from composer_gpt2.configs import family
from composer_gpt2.recipe import load_recipe
from composer_gpt2.tokenizer import get_encoding
assert get_encoding().encode_ordinary("Hello, I'm") == [15496, 11, 314, 1101]
assert "gpt2-125m" in family()
print(load_recipe(["smoke.yaml"]).model.name)
print(composer_gpt2.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, so that building leaves nothing in ours."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in TRACKED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path):
    """An empty virtual environment that sees our dependencies but no installation of us."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain path: the .pth file of our own editable installation in there is not read.
    dependencies = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command, cwd=tmp_path):
        finished = subprocess.run(
            [str(python), *command], cwd=cwd, env=clean, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    run.python, run.packages = python, packages
    return run


def pip(*arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        check=True,
        capture_output=True,
    )


def test_every_package_that_is_imported_is_declared():
    declared = {
        re.split(r"[ \[<>=!;~]", requirement)[0].lower().replace("_", "-")
        for requirement in metadata.requires("composer-gpt2") or []
    }
    owners = metadata.packages_distributions()
    indirect = {"werkzeug", "starlette"}  # moto[server] and gradio are one
    imported = set()
    for file in (ROOT / "composer_gpt2").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    others = imported - sys.stdlib_module_names - {"composer_gpt2", "algorithms"} - indirect
    assert len(others) > 10
    undeclared = {
        name
        for name in others
        # What an extra brings may not be installed: then it has the name of its package.
        if not declared & {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}
    }
    assert not undeclared


def test_the_wheel_holds_what_runs_need_and_works_in_an_empty_environment(
    checkout, environment, tmp_path
):
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout))
    (wheel,) = tmp_path.glob("composer_gpt2-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "composer_gpt2/assets/r50k_base.tiktoken" in names
    assert "composer_gpt2/assets/LICENSE.md" in names
    assert "composer_gpt2/configs/family.yaml" in names
    assert "composer_gpt2/py.typed" in names
    kernels = ("attention.cpp", "pointwise.cpp", "lanes.h")  # compiled where they run
    assert {f"composer_gpt2/cpu_kernels/{name}" for name in kernels} <= names
    recipes = {f"composer_gpt2/yamls/{path.name}" for path in (ROOT / "yamls").glob("*.yaml")}
    assert len(recipes) > 15
    assert recipes <= names
    for folder in sorted(path.parent for path in (ROOT / "algorithms").glob("*/__init__.py")):
        assert {
            f"algorithms/{folder.name}/{name}" for name in ("README.md", "recipe.yaml")
        } <= names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"composer_gpt2", "algorithms"}

    pip("--python", str(environment.python), "install", "--no-deps", str(wheel))
    name, file = environment("-c", PROBE).split()
    assert name == "gpt2-tiny"
    assert Path(file).is_relative_to(environment.packages)
    script = environment.python.with_name("composer-gpt2")
    assert "prepare" in environment(str(script), "--help")
    assert "RECIPE.yaml" in environment("-m", "composer_gpt2.train", "--help")


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_works_elsewhere(checkout, environment, mode):
    pip(
        *("--python", str(environment.python), "install", "--no-deps", "--no-build-isolation"),
        *("--config-settings", f"editable_mode={mode}", "--editable", str(checkout)),
    )
    assert environment("-c", PROBE).split()[0] == "gpt2-tiny"


def test_the_checkout_works_uninstalled(checkout, environment):
    name, file = environment("-c", PROBE, cwd=checkout).split()
    assert name == "gpt2-tiny"
    assert Path(file).is_relative_to(checkout)
    assert "RECIPE.yaml" in environment("run.py", "--help", cwd=checkout)


def test_another_package_called_algorithms_is_named(checkout, environment, tmp_path):
    intruder = tmp_path / "elsewhere" / "algorithms"
    intruder.mkdir(parents=True)
    (intruder / "__init__.py").touch()
    program = (
        f"import sys; sys.path[:0] = [{str(intruder.parent)!r}, {str(checkout)!r}]\n"
        "try:\n    import composer_gpt2.algorithms\nexcept ImportError as error:\n    print(error)"
    )
    said = environment("-c", program)
    assert "must be composer-gpt2's" in said
    assert str(intruder) in said

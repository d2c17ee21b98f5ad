"""The GPU suite runs from end to end without a GPU, and what fails is a line, not the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_suite(out: Path, seconds: int, **environment: str) -> tuple[dict, str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--device", "cpu"]
    command += ["--model", "gpt-nano", "--seconds", str(seconds), "--rounds", "1"]
    command += ["--microbatch", "1", "--sequence-length", "16", "--backend", "eager"]
    finished = subprocess.run(
        [*command, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    table = (out / "gpu_suite.md").read_text()
    assert table in finished.stdout
    return json.loads((out / "gpu_suite.json").read_text()), table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_suite(tmp_path_factory.mktemp("suite"), 12)


def test_measured_rows_hold_speed_ratio_share_and_loss(results):
    found, table = results
    assert found["ceilings"]["gpt-nano"] > 0
    assert len(found["products"]) == 5
    measured = [row for row in found["rows"] if not row["error"]]
    assert measured[0]["contestant"] == "Hugging Face, compiled"
    assert measured[0]["against_reference"] == 1.0
    for row in measured:
        assert row["tokens_per_second"] > 0
        assert row["share_of_ceiling"] > 0
        assert f"| {row['contestant']} |" in table


def test_all_contestants_without_alibi_begin_with_one_loss(results):
    found, _ = results
    losses = {
        row["contestant"]: row["loss"]
        for row in found["rows"]
        if row["loss"] is not None and "ALiBi" not in row["contestant"]
    }
    reference = losses.pop("Hugging Face, compiled")
    tuned = [name for name in losses if "tuned" in name]  # other random weights
    for name in losses.keys() - set(tuned):
        assert losses[name] == pytest.approx(reference, rel=2e-3), name


def test_what_cannot_run_is_a_line_with_the_reason(results):
    found, table = results
    errors = {row["contestant"]: row["error"] for row in found["rows"] if row["error"]}
    flex = errors["+ ALiBi by FlexAttention"]
    assert "trains on GPUs only" in flex or "OutOfTime" in flex
    assert flex[:30] in table


def test_without_composer_the_rest_is_measured(tmp_path):
    absent = tmp_path / "composer"
    absent.mkdir()
    missing = "No module named 'composer'"
    (absent / "__init__.py").write_text(f'raise ModuleNotFoundError("{missing}", name="composer")')
    found, _ = run_suite(tmp_path, 5, PYTHONPATH=str(tmp_path))
    rows = {row["contestant"]: row for row in found["rows"]}
    assert rows["Hugging Face"]["tokens_per_second"] > 0
    assert missing in rows["ours: all, compiled"]["error"]
    assert found["ceilings"]["gpt-nano"] > 0

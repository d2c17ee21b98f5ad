"""The GPU suite runs from end to end without a GPU, and what fails is a line, not the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENOUGH = 900  # seconds: a slow machine must not change what is found


def run_suite(out: Path, *contestants: str, seconds: float = ENOUGH, **environment: str):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--device", "cpu"]
    command += ["--model", "gpt-nano", "--seconds", str(seconds), "--rounds", "1"]
    command += ["--microbatch", "1", "--sequence-length", "16", "--backend", "eager"]
    for name in contestants:
        command += ["--contestant", name]
    finished = subprocess.run(
        [*command, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    table = (out / "gpu_suite.md").read_text()
    assert table in finished.stdout
    found = json.loads((out / "gpu_suite.json").read_text())
    return found, {row["contestant"]: row for row in found["rows"]}, table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_suite(tmp_path_factory.mktemp("suite"))


def test_measured_rows_hold_speed_ratio_share_and_loss(results):
    found, rows, table = results
    assert found["ceilings"]["gpt-nano"] > 0
    assert len(found["products"]) == 5
    assert next(iter(rows)) == "Hugging Face, compiled"
    assert rows["Hugging Face, compiled"]["against_reference"] == 1.0
    cannot = {name for name in rows if "FlexAttention" in name or "Liger" in name}
    for name in rows.keys() - cannot:
        assert rows[name]["tokens_per_second"] > 0, rows[name]["error"]
        assert rows[name]["share_of_ceiling"] > 0
        assert f"| {name} |" in table


def test_all_contestants_without_alibi_begin_with_one_loss(results):
    _, rows, _ = results
    reference = rows["Hugging Face, compiled"]["loss"]
    alibi = {name for name in rows if "ALiBi" in name}
    tuned = {name for name in rows if "tuned" in name}  # other random weights
    same = {name for name in rows.keys() - alibi - tuned if rows[name]["loss"] is not None}
    assert len(same) >= 9
    for name in same:
        assert rows[name]["loss"] == pytest.approx(reference, rel=2e-3), name
    assert rows["+ ALiBi by SDPA"]["loss"] != pytest.approx(reference, rel=2e-3)


def test_what_cannot_run_is_a_line_with_the_reason(results):
    _, rows, table = results
    flex = rows["+ ALiBi by FlexAttention"]["error"]
    assert "trains on GPUs only" in flex
    assert flex in table


def test_without_composer_the_rest_is_measured(tmp_path):
    absent = tmp_path / "composer"
    absent.mkdir()
    missing = "No module named 'composer'"
    (absent / "__init__.py").write_text(f'raise ModuleNotFoundError("{missing}", name="composer")')
    chosen = ["Hugging Face", "ours: padded vocabulary"]
    found, rows, _ = run_suite(tmp_path, *chosen, PYTHONPATH=str(tmp_path))
    assert rows["Hugging Face"]["tokens_per_second"] > 0
    assert missing in rows["ours: padded vocabulary"]["error"]
    assert found["ceilings"]["gpt-nano"] > 0


def test_without_time_every_line_says_so(tmp_path):
    _, rows, _ = run_suite(tmp_path, seconds=0.5)
    assert rows["ours: all, compiled"]["tokens_per_second"] is None
    assert {row["error"] for row in rows.values()} == {"OutOfTime: no time was left"}


def test_a_contestant_that_is_not_there_is_refused(tmp_path):
    said = r"must be one of: Hugging Face, compiled; .* got none"
    with pytest.raises(AssertionError, match=said):
        run_suite(tmp_path, "none")

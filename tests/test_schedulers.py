"""Our own learning-rate schedules, hand-worked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from composer import Time, Timestamp

from composer_gpt2.schedulers import CosineDecayToFloorScheduler


def factor(batch: int, max_duration: str = "51000ba", **arguments) -> float:
    """What GPT*'s schedule, or another, multiplies the learning rate by at a batch."""
    scheduler = CosineDecayToFloorScheduler(
        **{"t_warmup": "4000ba", "t_decay": "45000ba", **arguments}
    )
    state = SimpleNamespace(
        max_duration=Time.from_timestring(max_duration),
        timestamp=Timestamp(batch=batch, token=1000 * batch),
        dataloader_len=None,
    )
    return scheduler(state)  # type: ignore[arg-type]


def test_gpt_stars_schedule():
    assert factor(0) == 0
    assert factor(1000) == 0.25
    assert factor(4000) == 1
    assert factor(24500) == pytest.approx(0.55)  # half-way between 1 and the floor
    assert factor(44999) > 0.1
    assert factor(45000) == factor(50999) == pytest.approx(0.1)


def test_times_in_fractions_and_tokens():
    fractions = {"t_warmup": "0.1dur", "t_decay": "0.9dur", "alpha_f": 0.0}
    assert factor(50, "1000ba", **fractions) == 0.5
    assert factor(500, "1000ba", **fractions) == pytest.approx(0.5)
    assert factor(900, "1000ba", **fractions) == pytest.approx(0, abs=1e-12)
    assert factor(5, t_warmup="10000tok", t_decay="90000tok") == 0.5


@pytest.mark.parametrize("times", [("10ba", "1000tok"), ("10ba", "10ba"), ("20ba", "10ba")])
def test_times_that_do_not_follow_each_other_are_refused(times):
    with pytest.raises(ValueError, match="t_decay must be a time after t_warmup"):
        factor(5, t_warmup=times[0], t_decay=times[1])

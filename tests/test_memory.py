"""Freed memory: kept between batches, returned when what comes after will not fit."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")

# A block of 400 MB is allocated, touched and freed; what is resident is printed after each step.
PROGRAM = """
import ctypes, sys
import torch
from composer_gpt2.memory import ReturnUnusedMemory, keep_freed_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
for _ in range(2):  # glibc raises its limits when the first one is freed
    block = torch.ones(100 * 2**20)
    last = torch.ones(10)
    del block
print(resident() - before)
callback = ReturnUnusedMemory()
for _ in range(2):
    callback.batch_end(None, None)
print(resident() - before)
block = torch.ones(100 * 2**20)
del block
callback.batch_end(None, None)
print(resident() - before)
callback.eval_end(None, None)
print(resident() - before)
"""


def megabytes(setting: str) -> list[int]:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, setting], check=True, capture_output=True, text=True
    )
    return [int(line) for line in finished.stdout.split()]


def test_kept_until_the_first_batches_and_evaluations_end():
    freed, first_batches, later, evaluated = megabytes("keep")
    assert freed > 350
    assert first_batches < 50
    assert later > 350  # the third batch is not a first one
    assert evaluated < 50


def test_glibc_returns_it_at_once():
    assert max(megabytes("default")) < 50

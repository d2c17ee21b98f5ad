"""A process that runs steps when it is told to, and is still meanwhile.

``python -m composer_gpt2.bench.worker`` reads a line of JSON, builds what it names, and answers
each further line with one of its own on standard output; everything that libraries print goes to
standard error. :class:`Worker` is the other end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from composer_gpt2.bench.settings import Line, Settings

__all__ = ["Worker"]


class Worker:
    """A process with some contestants, ready to run; a context manager.

    Args:
        settings: Of the benchmark.
        process: ``"peers"`` has glibc's memory, ``"ours"`` reuses it.
        keys: Its contestants.

    Raises:
        ValueError: A contestant cannot be built.
        RuntimeError: The process died; the message has the end of what it printed.
    """

    def __init__(self, settings: Settings, process: str, keys: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 (closed below)
        self._name = process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "composer_gpt2.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(settings.threads),
        )
        job = {
            "settings": dataclasses.asdict(settings),
            "process": process,
            "contestants": list(keys),
        }
        try:
            self.ask(**job)
        except BaseException:
            self._close(kill=True)
            raise

    def ask(self, **question: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            end = "".join(self._log.readlines()[-30:])
            raise RuntimeError(
                f"the process of {self._name} must live to the end, got status {status} (-9 is "
                f"what happens when memory is short). The end of what it said:\n{end}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(kill=error is not None)

    def _close(self, *, kill: bool) -> None:
        if kill:
            self._process.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which ends it
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


def _environment(threads: int) -> dict[str, str]:
    """Ours without what says that a process is a rank: Hugging Face's Trainer would believe it."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in of_ranks}
    return {**kept, "OMP_NUM_THREADS": str(threads)}


def main() -> None:
    """The worker's side."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    settings = _settings(job["settings"])
    if job["process"] == "ours":
        from composer_gpt2.memory import keep_freed_memory

        keep_freed_memory()
    import torch

    from composer_gpt2.bench import contestants
    from composer_gpt2.bench.ceiling import Ceiling
    from composer_gpt2.bench.tokens import random_batch, text_batches

    torch.set_num_threads(settings.threads)
    shape = (settings.batch_size, settings.sequence_length)
    loops: dict[str, contestants.Loop] = {}
    label = "the batch"
    try:
        tokens = (
            random_batch(*shape)
            if settings.data is None
            else text_batches(settings.data, 1, *shape)[0]
        )
        config = contestants.network_config(settings)
        network = contestants.SharedNetwork(config)
        for contestant in contestants.contestants(settings)[0]:
            if contestant.key in job["contestants"]:
                label = contestant.label
                loops[contestant.key] = contestants.build_loop(
                    contestant, settings, network, tokens
                )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        answer(error=f"{label}: {error}")
        return
    answer(ready=True)

    ceilings: dict[str, Ceiling] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "ceiling" in question:
            name = question["ceiling"]
            if name not in ceilings:
                ceilings[name] = Ceiling(config, settings.n_tokens, getattr(torch, name))
            answer(seconds=ceilings[name].measure())
            if question.get("forget"):
                del ceilings[name]
            continue
        loop = loops[question["run"]]
        n = question["n"] - (loop.extra_batches if question.get("in_all") else 0)
        seconds = loop.steps(n)
        answer(
            seconds=seconds,
            first_batch_end=loop.first_batch_end,
            first_loss=getattr(loop, "first_loss", None),
            peak_bytes=_peak_bytes(),
        )


def _settings(values: dict[str, Any]) -> Settings:
    lines = tuple(Line(**line) for line in values["lines"])
    return Settings(**{**values, "lines": lines})


def _peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024  # in kB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()

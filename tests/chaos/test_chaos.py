"""A run of two ranks that is killed again and again, in a world that fails, ends as if undisturbed.

``CHAOS_KILLS`` is how often (2; ``make chaos``: 12), ``CHAOS_SEED`` decides what and when (17).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_recorder import RECORDS, install, read_batches, read_events, sample_id
from chaos_run import KILLS, MOMENTS, Attempt, files_in_shared_memory, last_batch
from faulty_proxy import FaultyProxy
from safetensors.torch import load as load_safetensors
from store_faults import FAULTS, World

from composer_gpt2.checkpoints.manifest import newest_first, read_manifest
from composer_gpt2.data.preparation import prepare
from composer_gpt2.data.streaming import StreamingTokens

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3000)]

N_KILLS = int(os.environ.get("CHAOS_KILLS", 2))
SEED = int(os.environ.get("CHAOS_SEED", 17))
T = 32  # tokens of a sample
B = 4  # samples of a batch, of both ranks together
N_EPOCHS = 2
START_SECONDS = 200  # for a batch that is waited for: imports, and faults of the store
END_SECONDS = 400

RECIPE = """
model: {{name: gpt2-tiny, n_embd: 16, n_layer: 2, n_head: 2, dropout: 0.1}}
data: {{remote: "s3://{bucket}/corpus", sequence_length: {T}, download_timeout: 5}}
train_batch_size: {B}
max_duration: {N_EPOCHS}ep
precision: fp32
device: cpu
optimizer: {{adamw: {{lr: 1.0e-2, weight_decay: 0.1}}}}
schedulers: {{cosine_decay_with_warmup: {{t_warmup: 5ba}}}}
algorithms: {{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}}}
callbacks: {{batch_recorder: {{}}}}
eval_interval: 7ba
eval_subset_num_batches: 4
save_interval: 5ba
save_num_checkpoints_to_keep: 3
log_interval: 10ba
"""


@pytest.fixture
def bucket(s3_bucket, tmp_path) -> str:
    """With a corpus of several shards; no two of its samples are equal."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    n_numbers = 600 + 60 * N_KILLS  # so that there is something to train between two kills
    numbers = [" ".join(words[int(digit)] for digit in str(10_000 + n)) for n in range(n_numbers)]
    text = tmp_path / "numbers.txt"
    text.write_text("\n\n".join(". ".join(numbers[i : i + 4]) for i in range(0, n_numbers, 4)))
    prepare(
        [str(text)],
        f"s3://{s3_bucket}/corpus",
        sequence_length=T,
        split_on="\n\n",
        validation_fraction=0.1,
        shard_size_limit=2000,
        progress=False,
    )
    return s3_bucket


class Program:
    """The command under test, in its folder; each start is an attempt."""

    def __init__(self, folder: Path, name: str, bucket: str, endpoint_url: str) -> None:
        self.folder, self.name, self.bucket = folder / name, name, bucket
        self.folder.mkdir()
        (self.folder / "tmp").mkdir()
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(bucket=bucket, T=T, B=B, N_EPOCHS=N_EPOCHS))
        self.environment = {
            **os.environ,
            **install(self.folder / "package"),
            "S3_ENDPOINT_URL": endpoint_url,
            "COMPOSER_GPT2_CACHE": str(self.cache),
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
        }
        self.attempts: list[Attempt] = []
        self.records = self.folder / "records"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "chaos"

    @property
    def prefix(self) -> str:
        return f"checkpoints-{self.name}"

    def start(self) -> tuple[Attempt, Path]:
        """The attempt, and where it records its batches."""
        records = self.records / f"{len(self.attempts):02}"
        attempt = Attempt(
            [
                str(Path(sys.executable).with_name("composer-gpt2")),
                *("train", "-n", "2", "-f", "recipe.yaml", "run_name=chaos"),
                f"save_folder=s3://{self.bucket}/{self.prefix}",
            ],
            {**self.environment, RECORDS: str(records)},
            cwd=self.folder,
            log=self.folder / f"said-{len(self.attempts):02}.txt",
        )
        self.attempts.append(attempt)
        return attempt, records

    def run_to_the_end(self) -> Path:
        """Where it records its batches."""
        attempt, records = self.start()
        attempt.end(END_SECONDS)
        assert attempt.process.returncode == 0, attempt.said
        return records


def test_a_run_that_is_killed_again_and_again_ends_as_if_undisturbed(bucket, s3_server, tmp_path):
    calm = Program(tmp_path, "calm", bucket, s3_server.endpoint_url)
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        tried = Program(tmp_path, "tried", bucket, proxy.url)
        try:
            calm.run_to_the_end()
            n_batches = last_batch(calm.records)
            segments = _live_through(tried, s3_server, proxy, n_batches)
        finally:
            for attempt in (*calm.attempts, *tried.attempts):
                attempt.kill_what_is_left()

    # The same batches, and each sample exactly once in an epoch.
    batches = read_batches(tried.records)
    assert batches == read_batches(calm.records)
    assert list(batches) == list(range(1, n_batches + 1))
    corpus = _samples_of_corpus(bucket, tmp_path / "cache")
    batches_per_epoch = len(corpus) // B
    n_dropped = len(corpus) % B  # the incomplete last batch of an epoch is not trained
    assert n_batches == N_EPOCHS * batches_per_epoch
    for epoch in range(N_EPOCHS):
        trained = Counter(i for e, ids in batches.values() for i in ids if e == epoch)
        assert set(trained.values()) == {1}
        assert len(corpus - trained.keys()) == n_dropped
        assert trained.keys() <= corpus

    # The same weights and counts.
    (calm_weights, calm_times), (weights, times) = (
        _end_state(s3_server, bucket, program.prefix) for program in (calm, tried)
    )
    assert times == calm_times == {**times, "ba": n_batches, "tok": n_batches * B * T}
    assert weights.keys() == calm_weights.keys()
    difference = max((weights[n] - calm_weights[n]).abs().max().item() for n in weights)
    print(f"largest difference between weights: {difference}")
    assert difference <= 1e-6
    assert _metrics(tried) == pytest.approx(_metrics(calm), abs=1e-5)

    # Nothing is left.
    assert segments, "this test looks for them in the wrong place"
    now = files_in_shared_memory()
    assert not segments & now.keys()
    folders = "".join(now.values())
    assert str(calm.folder) not in folders
    assert str(tried.folder) not in folders
    assert not any(attempt.processes() for attempt in (*calm.attempts, *tried.attempts))
    assert not list((tried.run_folder / "uploading").glob("*.json"))  # all are in the store


def _live_through(program: Program, s3_server, proxy: FaultyProxy, n_batches: int) -> set:
    """Starts it, kills it, and so on; returns what it had in shared memory."""
    chance = random.Random(SEED)
    world = World(
        s3_server,
        proxy,
        program.bucket,
        program.prefix,
        program.run_folder,
        program.cache,
        chance,
    )
    moments, kills = _deal(MOMENTS, chance), _deal(KILLS, chance)
    faults = chance.sample(list(FAULTS), len(FAULTS))
    segments: set[tuple[str, int]] = set()
    rows = [f"seed {SEED}: {N_KILLS} kills in {n_batches} batches"]
    try:
        for n, moment, kill in zip(range(N_KILLS), moments, kills, strict=False):
            proxy.clear()
            before = _n_hits(proxy)
            fault = _make_a_fault(world, faults)
            attempt, records = program.start()
            row = f"{n + 1:2}. {kill} while {moment}; {fault}"
            rows.append(row)
            # Between the n-th and the next of N_KILLS + 1 equal parts of the run.
            target = int((n + chance.random()) * n_batches / (N_KILLS + 1)) + 1
            _wait_for(moment, target, attempt, records, program.run_folder, chance)
            segments |= {
                file
                for file, folders in files_in_shared_memory().items()
                if f"{program.cache}/" in folders
            }
            reached = last_batch(records)
            attempt.kill(kill, chance, has_trained=reached > 0)
            hits = _n_hits(proxy) - before
            row += f" ({hits} times)" if hits else ""
            rows[-1] = (
                f"{row}; {_first_batch(records)}, killed at {reached}, "
                f"{time.monotonic() - attempt.began:.0f} s"
            )
        proxy.clear()
        rows.append(f"    without a fault; {_first_batch(program.run_to_the_end())}, to the end")
    finally:
        print("\n" + "\n".join(rows))
    return segments


def _make_a_fault(world: World, faults: list[str]) -> str:
    """The first of the list that can be made now goes to its end; says what it is."""
    for name in list(faults):
        faults.remove(name)
        faults.append(name)
        if (what := FAULTS[name](world)) is not None:
            return what
    raise AssertionError("an outage can always be made")


def _n_hits(proxy: FaultyProxy) -> int:
    return sum(n for kind, n in proxy.hits().items() if kind != "none")


def _deal(kinds, chance: random.Random):
    """Without end; each kind as often as the others."""
    while True:
        yield from chance.sample(kinds, len(kinds))


def _wait_for(
    moment: str,
    batch: int,
    attempt: Attempt,
    records: Path,
    run_folder: Path,
    chance: random.Random,
) -> None:
    """Returns in such a moment, with at least so many batches trained."""
    if moment == "importing":
        time.sleep(chance.uniform(0.5, 8))
        return
    attempt.wait_for(f"batch {batch}", START_SECONDS, lambda: last_batch(records) >= batch)
    staging = run_folder / "uploading"
    is_now = {
        "training": lambda: True,
        "evaluating": lambda: last_batch(records, "evaluation") >= batch,
        "saving": lambda: any(staging.glob(".unfinished-*")),
        "uploading": lambda: any(staging.glob("*.json")),
    }
    attempt.wait_for(moment, START_SECONDS, is_now[moment])
    if moment in ("training", "evaluating"):
        time.sleep(chance.uniform(0, 0.2))


def _first_batch(records: Path) -> str:
    batches = [event["batch"] for event in read_events(records, rank=0) if event["kind"] == "batch"]
    return f"went on from batch {batches[0] - 1}" if batches else "trained nothing"


def _samples_of_corpus(bucket: str, cache: Path) -> set[int]:
    corpus = StreamingTokens(
        remote=f"s3://{bucket}/corpus", local=str(cache), sequence_length=T, batch_size=1
    )
    samples = {sample_id(sample["input_ids"]) for sample in corpus}
    assert len(samples) == corpus.num_samples
    return samples


def _end_state(s3_server, bucket: str, prefix: str):
    """Weights and counts of the newest checkpoint."""
    client = s3_server.client()

    def read(name: str) -> bytes:
        return client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()

    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    names = newest_first(item["Key"].rsplit("/", 1)[1] for item in listed)
    assert len(names) == 3  # save_num_checkpoints_to_keep
    manifest = read_manifest(read(names[0]))
    return load_safetensors(read(manifest.weights_file)), dict(manifest.times)


def _metrics(program: Program) -> dict[str, float]:
    metrics = json.loads((program.run_folder / "metrics.json").read_text())
    del metrics["seconds"]
    return {**metrics.pop("train"), **metrics.pop("eval"), **metrics}

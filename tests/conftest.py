"""What every test stands on: no network, fixed seeds, and a real S3 server on this machine."""

from __future__ import annotations

import os
import random
import resource
import uuid
from collections.abc import Iterator

import pytest

# Before any test module imports transformers or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, and so do the runs that they start; threads that wait for a core that
    # another worker has would spin on their own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for _variable in ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
    os.environ.pop(_variable, None)  # a developer's own must never be reached from a test

# streaming keeps 14 open files for each dataset until the process ends; many systems allow 1024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if _hard == resource.RLIM_INFINITY or _hard > _soft:
    _enough = 16384 if _hard == resource.RLIM_INFINITY else min(16384, _hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(_soft, _enough), _hard))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    import numpy as np
    import torch

    random.seed(17)
    np.random.seed(17)
    torch.manual_seed(17)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    """Shards streamed by a test are cached below its own folder, never in the user's."""
    monkeypatch.setenv("COMPOSER_GPT2_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator:
    """A LocalS3 shared by all tests of a session (with pytest-xdist: of a worker)."""
    from composer_gpt2.data.local_s3 import local_s3_server

    with local_s3_server() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server, monkeypatch) -> str:
    """The name of a fresh bucket; the environment of the test points to its server."""
    for variable, value in s3_server.environment.items():
        monkeypatch.setenv(variable, value)
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    s3_server.create_bucket(bucket)
    return bucket


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> str:
    """A prepared corpus that can be learned: 64-token samples of counting in words."""
    from composer_gpt2.data.preparation import prepare

    folder = tmp_path_factory.mktemp("tiny")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    documents = [
        " ".join(words[int(digit)] for number in range(start, start + 20) for digit in str(number))
        for start in range(1_000, 5_000, 10)
    ]
    source = folder / "counting.txt"
    source.write_text("\n\n".join(documents))
    prepare(
        [str(source)],
        str(folder / "corpus"),
        sequence_length=64,
        split_on="\n\n",
        validation_fraction=0.1,
        progress=False,
    )
    return str(folder / "corpus")

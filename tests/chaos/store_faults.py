"""What goes wrong around a run: in the object store, on the network, on the local disk."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faulty_proxy import FaultyProxy

from composer_gpt2.checkpoints.manifest import newest_first
from composer_gpt2.data.local_s3 import LocalS3

__all__ = ["FAULTS", "World"]


@dataclass
class World:
    """All that a run stands on.

    Attributes:
        server: The S3 server itself.
        proxy: What the run takes for it.
        bucket: Name of the bucket.
        prefix: Where in the bucket the checkpoints are.
        run_folder: On the local disk.
        cache: On the local disk, of shards.
        chance: Decides what is left to chance.
    """

    server: LocalS3
    proxy: FaultyProxy
    bucket: str
    prefix: str
    run_folder: Path
    cache: Path
    chance: random.Random

    def checkpoints(self) -> list[str]:
        """Names of the finished ones in the store, the newest first."""
        client = self.server.client()
        listed = client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        names = [item["Key"].rsplit("/", 1)[1] for item in listed.get("Contents", ())]
        return [name.removesuffix("-rank0.json") for name in newest_first(names)]


def _outage(world: World) -> str:
    after, seconds = world.chance.uniform(0, 5), world.chance.uniform(5, 15)
    n_requests = sum(world.proxy.hits().values())

    def begin_and_end() -> None:
        while sum(world.proxy.hits().values()) == n_requests:
            time.sleep(0.1)
        time.sleep(after)
        world.proxy.set("down")
        time.sleep(seconds)
        world.proxy.clear()

    threading.Thread(target=begin_and_end, daemon=True).start()
    return f"endpoint down for {seconds:.0f} s, {after:.0f} s after the first request"


def _errors(world: World) -> str:
    world.proxy.set("status", status=503, probability=0.2)
    return "every fifth request is answered 503"


def _resets(world: World) -> str:
    world.proxy.set("reset", probability=0.2)
    return "every fifth connection is reset"


def _slow(world: World) -> str:
    world.proxy.set("slow", seconds=0.5)
    return "every answer takes 0.5 s longer"


def _truncated(world: World) -> str:
    shutil.rmtree(world.cache, ignore_errors=True)
    world.proxy.set("truncate", probability=0.2)
    return "cache lost; every fifth download ends early"


def _corrupt_shard(world: World) -> str:
    shutil.rmtree(world.cache, ignore_errors=True)
    world.proxy.set("corrupt", path=r"shard\.", times=1)
    return "cache lost; a shard comes corrupt once"


def _stalled_shards(world: World) -> str:
    shutil.rmtree(world.cache, ignore_errors=True)
    world.proxy.set("stall", path=r"shard\.", times=2)
    return "cache lost; two downloads of shards stall"


def _cache_deleted(world: World) -> str:
    shutil.rmtree(world.cache, ignore_errors=True)
    return "cache lost"


def _cache_damaged(world: World) -> str | None:
    shards = sorted(world.cache.rglob("train/shard.*.mds"))
    for shard in shards[::2]:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    return f"{len(shards[::2])} of {len(shards)} cached shards damaged" if shards else None


def _new_machine(world: World) -> str:
    shutil.rmtree(world.cache, ignore_errors=True)
    shutil.rmtree(world.run_folder, ignore_errors=True)
    return "another machine: run folder and cache lost"


def _half_written(world: World) -> str | None:
    """As a run leaves them that is killed while it writes, and while it uploads."""
    checkpoints = world.checkpoints()
    staging = world.run_folder / "uploading"
    if not checkpoints or not staging.exists():
        return None
    later = checkpoints[0].split("-ba")[0] + "-ba99999"
    (staging / f".unfinished-{later}-rank0.pt").write_bytes(b"half")
    (staging / f"{later}-rank0.pt").write_bytes(b"half")
    key = f"{world.prefix}/{later}-rank0.pt"
    world.server.client().put_object(Bucket=world.bucket, Key=key, Body=b"half")
    return "half a checkpoint on the disk and in the store"


def _newest_damaged(world: World) -> str | None:
    checkpoints = world.checkpoints()
    if len(checkpoints) < 2:
        return None  # nothing would be left to go on from, and the run would rightly refuse
    client = world.server.client()
    name = world.chance.choice(("pt", "json"))
    key = f"{world.prefix}/{checkpoints[0]}-rank0.{name}"
    data = bytearray(client.get_object(Bucket=world.bucket, Key=key)["Body"].read())
    data[len(data) // 2] ^= 1
    client.put_object(Bucket=world.bucket, Key=key, Body=bytes(data))
    return f"{checkpoints[0]}-rank0.{name} damaged in the store"


FAULTS: dict[str, Callable[[World], str | None]] = {
    "outage": _outage,
    "503": _errors,
    "resets": _resets,
    "slow": _slow,
    "truncated": _truncated,
    "corrupt shard": _corrupt_shard,
    "stalled shards": _stalled_shards,
    "cache deleted": _cache_deleted,
    "cache damaged": _cache_damaged,
    "new machine": _new_machine,
    "half-written checkpoint": _half_written,
    "newest checkpoint damaged": _newest_damaged,
}
"""Name to what makes the fault before a start; it says what, or ``None`` if it cannot be yet."""

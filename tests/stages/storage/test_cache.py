from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from stages.errors import StorageError
from stages.storage.bucket import BucketFolder
from stages.storage.cache import ShardCache
from stages.storage.disk import DiskFolder
from stages.storage.folder import Folder, open_folder
from tests.support.faulty_s3 import Fault, FaultyS3

SIZE = 1000
Shard = tuple[str, str, int]  # name, SHA-256, size


def shards(folder: Folder, count: int, size: int = SIZE) -> list[Shard]:
    """Shards of different content."""
    made = []
    for i in range(count):
        content = bytes([i]) * size
        folder.write(f"shards/{i}.tar", content)
        made.append((f"shards/{i}.tar", hashlib.sha256(content).hexdigest(), size))
    return made


def content_of(cache: ShardCache, folder: Folder, shard: Shard) -> bytes:
    with cache.open(folder, *shard) as file:
        return file.read()


def kept(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.root.iterdir() if not path.name.startswith(".")}


def held_bytes(root: Path) -> int:
    total = 0
    for path in root.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # removed since it was listed
            continue
    return total


def test_a_shard_is_fetched_once_and_whole(s3: FaultyS3, tmp_path: Path) -> None:
    folder = open_folder("s3://bucket/data")
    one, other = shards(folder, 2, size=5 << 20)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    for _ in range(3):
        assert content_of(cache, folder, one) == bytes(one[2])
    assert s3.count("GET", r"shards/0\.tar") == 1
    assert content_of(cache, folder, other)[:1] == b"\x01"
    assert kept(cache) == {one[1], other[1]}
    assert not list(cache.root.glob("*.tmp"))


def test_the_least_recently_read_files_are_evicted_to_the_limit(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    made = shards(folder, 5)
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for i in (0, 1, 2, 0, 3):
        assert content_of(cache, folder, made[i]) == bytes([i]) * SIZE
        assert held_bytes(cache.root) <= 3 * SIZE
    assert kept(cache) == {made[i][1] for i in (0, 2, 3)}
    assert content_of(cache, folder, made[1]) == b"\x01" * SIZE
    assert kept(cache) == {made[i][1] for i in (0, 3, 1)}


def test_nothing_else_in_its_folder_is_touched(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    cache = ShardCache(tmp_path / "cache", SIZE)
    (cache.root / "thesis.pdf").write_bytes(bytes(10 * SIZE))
    for i, shard in enumerate(shards(folder, 3)):
        assert content_of(cache, folder, shard) == bytes([i]) * SIZE
    assert (cache.root / "thesis.pdf").stat().st_size == 10 * SIZE
    assert len(kept(cache)) == 2


def test_open_files_stay(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    made = shards(folder, 4)
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    with cache.open(folder, *made[0]) as oldest:
        content_of(cache, folder, made[1])
        content_of(cache, folder, made[2])
        assert kept(cache) == {made[0][1], made[2][1]}
        with cache.open(folder, *made[2]):
            assert content_of(cache, folder, made[3]) == b"\x03" * SIZE  # no room: read from its source
            assert kept(cache) == {made[0][1], made[2][1]}
        assert oldest.read() == bytes(SIZE)


def test_a_shard_larger_than_the_limit_is_read_from_its_source(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    (shard,) = shards(folder, 1)
    cache = ShardCache(tmp_path / "cache", SIZE - 1)
    assert content_of(cache, folder, shard) == bytes(SIZE)
    assert [path.name for path in cache.root.iterdir()] == [".lock"]


def test_a_shard_of_another_size_is_not_kept(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    (shard,) = shards(folder, 1)
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    folder.write(shard[0], b"short")
    assert content_of(cache, folder, shard) == b"short"
    assert kept(cache) == set()
    (cache.root / shard[1]).write_bytes(b"cut")
    folder.write(shard[0], bytes(SIZE))
    assert content_of(cache, folder, shard) == bytes(SIZE)
    assert (cache.root / shard[1]).stat().st_size == SIZE
    with pytest.raises(FileNotFoundError):
        cache.open(folder, "shards/9.tar", "0" * 64, 5)


def test_a_failed_fetch_leaves_nothing_behind(s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.storage.cache.FETCH_SIZE", 1 << 22)

    class Breaks(BucketFolder):
        def read_range(self, name: str, start: int, length: int) -> bytes:
            if start > 0:
                raise StorageError("injected")
            return super().read_range(name, start, length)

    folder = Breaks("s3://bucket/data")
    (shard,) = shards(folder, 1, size=9 << 20)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    with pytest.raises(StorageError, match="injected"):
        cache.open(folder, *shard)
    assert [path.name for path in cache.root.iterdir()] == [".lock"]
    assert content_of(cache, open_folder("s3://bucket/data"), shard) == bytes(shard[2])


def fetch_slowly(root: Path, data: Path, shard: Shard) -> None:
    class SlowFile(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            time.sleep(0.5)
            return super().read(100)

    class SlowFolder(DiskFolder):
        def open(self, name: str) -> BinaryIO:
            return cast(BinaryIO, SlowFile(self.path / name))

    ShardCache(root, 1 << 20).open(SlowFolder(str(data)), *shard)


def test_a_killed_fetch_is_never_used(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    (shard,) = shards(folder, 1)
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=fetch_slowly, args=(cache.root, tmp_path / "data", shard))
    process.start()
    aside = cache.root / f".{shard[1]}.tmp"
    deadline = time.monotonic() + 60
    while not (aside.exists() and aside.stat().st_size == SIZE):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert aside.exists()
    assert kept(cache) == set()
    assert content_of(cache, folder, shard) == bytes(SIZE)
    assert kept(cache) == {shard[1]}
    assert not aside.exists()


def test_concurrent_readers_of_a_shard_wait_for_one_fetch(s3: FaultyS3, tmp_path: Path) -> None:
    folder = open_folder("s3://bucket/data")
    (shard,) = shards(folder, 1)
    s3.faults = [Fault("GET", "shards", 503, seconds=0.3)]
    caches = [ShardCache(tmp_path / "cache", 1 << 20) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        read = list(threads.map(lambda cache: content_of(cache, folder, shard), caches))
    assert read == [bytes(SIZE)] * 6
    assert s3.count("GET", "shards") == 2  # the refused one and the successful one


def read_at_random(root: Path, data: Path, made: list[Shard], seed: int) -> None:
    import random

    cache, folder, order = ShardCache(root, 3 * SIZE), open_folder(data), random.Random(seed)
    for _ in range(150):
        i = order.randrange(len(made))
        with cache.open(folder, *made[i]) as file:
            assert file.read() == bytes([i]) * SIZE


def test_processes_that_share_a_small_cache_read_the_right_shards(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    made = shards(folder, 8)
    root = tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    arguments = [(root, tmp_path / "data", made, seed) for seed in range(3)]
    processes = [context.Process(target=read_at_random, args=each) for each in arguments]
    for process in processes:
        process.start()
    most, files = 0, threading.Event()
    while any(process.is_alive() for process in processes):
        if root.exists():
            most = max(most, held_bytes(root))
        files.wait(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 0 < most <= 3 * SIZE
    assert not list(root.glob("*.tmp"))


def test_a_full_cache_disk_is_one_line(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "data")
    (shard,) = shards(folder, 1, size=1 << 20)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(
            StorageError, match=rf"^{cache.root}: cannot be written: File too large: name another cache_dir, or none$"
        ):
            cache.open(folder, *shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept(cache) == set()

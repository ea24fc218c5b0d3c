from __future__ import annotations

import os
import socket
import types
from pathlib import Path
from typing import Any

import pytest
import ray

from stages import cluster
from stages.cluster import MAX_SOCKET_PATH, join
from stages.errors import UserError


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_listens_fails_at_once(address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
    with pytest.raises(UserError, match=f"ray_address={address}: no Ray cluster could be joined there: .*refused"):
        join(address, "ray_address")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A fake Ray that records the arguments of its start, or raises."""

    def init(**given: Any) -> None:
        if fake.refusal:
            raise fake.refusal
        fake.given = given

    monkeypatch.setattr(cluster, "end_on_sigterm", lambda: None)
    fake = types.SimpleNamespace(init=init, exceptions=ray.exceptions, given={}, refusal=None)
    monkeypatch.setattr(cluster, "ray", fake)
    return fake


def test_ray_gets_a_short_temporary_folder_if_tmpdir_is_long(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / "scratch" / ("a-job-of-a-cluster-" * 4)
    long.mkdir(parents=True)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(variable, str(long))
        join(None)
        place = started.given["_temp_dir"]
        assert place == f"/tmp/ray-{os.getuid()}"
        sockets = f"{place}/session_2025-12-31_23-59-59_999999_4194304/sockets/plasma_store"
        assert len(sockets) <= MAX_SOCKET_PATH
        monkeypatch.delenv(variable)
    join(None)
    assert "_temp_dir" not in started.given


def test_without_a_short_folder_the_error_names_tmpdir(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "long" * 30)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"^TMPDIR=/longlong.* a folder of at most 3\d by TMPDIR or RAY_TMPDIR$"):
        join(None)


def test_ray_starts_with_little_or_no_shared_memory(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(None, num_cpus=3)
    assert started.given["object_store_memory"] <= 128 << 20
    assert (started.given["num_cpus"], "_plasma_directory" in started.given) == (3, False)
    monkeypatch.setattr(cluster, "SHARED_MEMORY", tmp_path / "none")
    join(None)
    assert Path(started.given["_plasma_directory"]).is_dir()


def test_a_failed_start_of_ray_is_a_one_line_error(started: Any) -> None:
    started.refusal = RuntimeError("no\n room")
    with pytest.raises(UserError, match="^Ray could not be started on this machine: no room$"):
        join(None)

"""Faults of a cluster, injected into one of several real Ray nodes on this machine.

python -m tests.support.cluster_faults TEACHER FOLDER    prints the outcome as JSON

It runs in a process of its own, because it joins another Ray.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from stages.generate.driver import Driver
from stages.generate.events import Event, Failed, Loaded
from tests.conftest import generate_config
from tests.support.faulty_worker import (
    BEFORE_COMMIT,
    SAMPLING,
    SLOW,
    STOP_NODE,
    STOPPED_FILE,
    FaultyFleet,
    write_faults,
)
from tests.support.soak import until

UNITS = 8
QUICK = {f"health_check_{name}": value for name, value in {
    "initial_delay_ms": 0, "period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 3,
}.items()}  # fmt: skip


class WatchedFleet(FaultyFleet):
    """Keeps the time of each event."""

    def __init__(self, config: Any) -> None:
        self.seen: list[tuple[float, Event]] = []
        super().__init__(config)

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        self.seen += [(time.monotonic(), event) for event in events]
        return events

    def first(self, kind: type, since: float) -> float:
        """Return the seconds from a moment to the next event of a class."""
        return next(moment for moment, event in self.seen if isinstance(event, kind) and moment >= since) - since


def run(teacher: Path, folder: Path) -> dict[str, Any]:
    """Run generation on two nodes, and inject a fault into each.

    The first node stops with a shard written and not committed; the second dies in the middle of a unit. A third node
    joins and makes all units. Then the first node continues and finds its unit made elsewhere.
    """
    write_faults(folder, {SAMPLING: dict.fromkeys(range(UNITS), (SLOW, 1)), BEFORE_COMMIT: {0: (STOP_NODE, 1)}})
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    config = generate_config(teacher, folder / "data", num_trajectories=3 * UNITS, num_workers=2)
    driver, fleet = Driver(config), WatchedFleet(config)
    driver.todo = deque(sorted(driver.todo))  # the unit of the stopped node comes first, while others remain
    summary: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: summary.update(driver.run(fleet)), daemon=True)
    thread.start()
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    until((folder / STOPPED_FILE).exists)
    stopped = json.loads((folder / STOPPED_FILE).read_text())
    until(lambda: sum(isinstance(event, Loaded) for _, event in fleet.seen) == 2)
    until(lambda: fleet.states()["sampling"] > 0)
    (other,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid not in stopped]
    killed = time.monotonic()
    cluster.remove_node(other, allow_graceful=False)
    until(lambda: fleet.states()["waiting for a place"] == 2)
    joined = time.monotonic()
    cluster.add_node(num_cpus=1)
    thread.join(120)
    assert summary, "the run has not ended"

    def count_shards() -> int:
        return len(list((folder / "data" / "shards").iterdir()))

    before = count_shards()
    raylet, worker = stopped
    os.kill(worker, signal.SIGCONT)
    until(lambda: count_shards() < before, 60)
    os.kill(raylet, signal.SIGCONT)  # last: Ray has declared the node dead, and it kills its worker
    return summary | {
        "seconds_to_notice": fleet.first(Failed, killed),
        "seconds_to_use_a_node": fleet.first(Loaded, joined),
        "shards": [before, count_shards()],
    }


if __name__ == "__main__":
    print(json.dumps(run(*map(Path, sys.argv[1:]))))

"""What the tests on Ray share: a cluster of one or two nodes on this machine's loopback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STORE = 100 << 20
LOOPBACK = "127.0.0.2"  # 127.0.0.1 is taken for the address by which other machines reach this one
# Found dead within seconds, not half a minute.
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}


@contextlib.contextmanager
def loopback_cluster(nodes: int = 2, **head: Any) -> Iterator[Any]:
    """Run a cluster of nodes of one CPU each, and end it; ``head`` has further options of the first one."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        node = {"num_cpus": 1, "object_store_memory": STORE, "node_ip_address": LOOPBACK}
        settings = HEALTH
        cluster = Cluster(
            initialize_head=True,
            head_node_args={**node, "include_dashboard": False, "_system_config": settings, **head},
        )
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**node)
            yield cluster
        finally:
            cluster.shutdown()


def actors_of(node: Any, name: str) -> list[int]:
    """Return the processes of a node's actors of a class."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet and name in (directory / "cmdline").read_text():
                found.append(int(directory.name))
    return found


def kill_actor(node: Any, name: str) -> int:
    """Kill one of a node's actors, as the system does when memory is short; returns its process id."""
    process = actors_of(node, name)[0]
    os.kill(process, signal.SIGKILL)
    return process

"""The Ray cluster that a command works on: one that exists, or one of this machine alone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

ADDRESS_VARIABLE = "RAY_ADDRESS"
# Lines and answers are small: Ray would otherwise reserve 30 % of the memory for them.
OBJECT_STORE_BYTES = 200 << 20
CONNECT_SECONDS = 10.0
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"  # it says at each start that tokens are in use


class Fleet(NamedTuple):
    """The workers that a cluster shall run.

    Fields:
        workers: how many.
        gpus, cpus: what each of them takes.
        fitting: how many of them the cluster has the GPUs or CPUs for, those in use included.
    """

    workers: int
    gpus: int
    cpus: int
    fitting: int


def import_ray() -> Any:
    """Return the package Ray.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError('--ray needs the package ray: pip install "deepseek_vl2[ray]"') from error
    return ray


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Join the cluster at an address, or start one of this machine; yields the package Ray.

    Args:
        address: ``HOST:PORT``, or ``auto`` for the one that runs here. ``None``: the one that ``RAY_ADDRESS`` names,
            else one of this machine, which ends with the block.

    Raises:
        ConnectionError: there is no cluster at the address.
        ValueError: Ray is not installed, or the address is none.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get(ADDRESS_VARIABLE)
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
    check_address(address)
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run reaches nobody unless it is told to
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    else:
        join(ray, address, quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str | None) -> None:
    """Look whether anybody listens at an address: Ray itself would try again for minutes.

    Raises:
        ValueError: it is no address.
        ConnectionError: nobody does.
    """
    if address is None or address in ("auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"The address of a Ray cluster is HOST:PORT, or auto, not {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(
            f"There is no Ray cluster at {address} ({error.strerror or error}). `ray status` on its first machine says "
            "where it is; without an address this machine is used alone."
        ) from error


def join(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Join a cluster.

    Raises:
        ConnectionError: there is none.
    """
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        if address != "auto":
            raise
        raise ConnectionError(
            "No Ray cluster runs on this machine: `ray start --head` starts one; without an address one is started for "
            "this run."
        ) from error


def fleet_of(ray: Any, wanted: int | None, on_cpu: bool) -> Fleet:
    """Return which workers to start on the cluster that is joined.

    Args:
        ray: the package, connected.
        wanted: how many workers; ``None``: one for each GPU, or for each node where there are none.
        on_cpu: take no GPUs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [0 if on_cpu else int(node.get("GPU", 0)) for node in nodes]
    if any(gpus):  # a worker takes a CPU beside its GPU
        fitting = sum(min(count, int(node.get("CPU", 0))) for count, node in zip(gpus, nodes, strict=True))
        return Fleet(wanted or max(1, fitting), 1, 1, fitting)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    workers = wanted or max(1, sum(count > 0 for count in cpus))
    each = cpus_each(cpus, workers)
    return Fleet(workers, 0, each, sum(count // each for count in cpus))


def cpus_each(nodes: Sequence[int], workers: int) -> int:
    """Return the most CPUs that each worker can have on nodes with so many; 1 where they do not all fit at once."""
    for cpus in range(max(nodes, default=1), 1, -1):
        if sum(count // cpus for count in nodes) >= workers:
            return cpus
    return 1

"""CUDA graphs: a function over static buffers that is run once, captured once, and replayed from then on.

It reads and writes tensors that stay where they are, so a graph of its launches can be replayed for other contents.
It must not wait for the device, copy from the host or branch on numbers of the device.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

Run = Callable[[], None]
Capture = Callable[..., Run]


class GraphCapture:
    """Captures functions as CUDA graphs that share one memory pool.

    So only one of these graphs may run at a time, and nothing that one leaves in the pool may be needed after the
    next has started: results belong into tensors that were made outside.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None

    def __call__(self, run: Run, before: Run | None = None) -> Run:
        """Run a function once on the side, for what is set up at a first call, then capture it; returns its replay.

        ``before`` is run in its place, where running the function itself would change what must not change.
        """
        with torch.cuda.device(self.device), torch.no_grad():
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                (before or run)()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                run()
        return graph.replay


def capture_for(device: torch.device) -> Capture | None:
    """Return what captures graphs on a device; ``None`` where nothing does."""
    return GraphCapture(device) if device.type == "cuda" else None


class CapturedGraph:
    """A function over static buffers.

    Fields:
        buffers: what it reads and writes, for the caller.
        run: the function.
        replay: of the captured graph.
    """

    def __init__(self, buffers: Any, run: Run) -> None:
        self.buffers = buffers
        self.run = run
        self.replay: Run | None = None
        self.used = False

    def __call__(self, capture: Capture | None) -> str | None:
        """Run at the first use, capture at the second and replay from then on; returns why it could not be captured."""
        reason = None
        if self.used and self.replay is None and capture is not None:
            try:
                self.replay = capture(self.run)
            # Whatever a driver or a library may raise that cannot be captured: run eagerly, all works.
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                logger.warning("Running without captured graphs from now on: %s", reason)
        self.used = True
        (self.replay or self.run)()
        return reason


class GraphCache:
    """At most ``most`` captured graphs; the least recently used is evicted."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: OrderedDict[Hashable, CapturedGraph] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], CapturedGraph]) -> CapturedGraph:
        """Return the graph of a key; it is made where there is none."""
        if key not in self.held:
            while len(self.held) >= self.most:
                self.held.popitem(last=False)
            self.held[key] = make()
        self.held.move_to_end(key)
        return self.held[key]


def modes() -> tuple[Any, ...]:
    """Return the settings of PyTorch that choose kernels: a captured graph holds the choice."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )

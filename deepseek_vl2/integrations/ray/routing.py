"""Which replica of the Ray Serve application answers a request; imports Ray."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .affinity import ranked, within_bounds

IMBALANCE = 16


class StickyRouter(RequestRouter):  # type: ignore[misc]
    """Sends requests that belong together to one replica, as long as it is not much busier than the others.

    The call's keywords say what is asked for: ``affinity`` and ``replica``, see `affinity.Route`.
    """

    def initialize_state(self, imbalance: int = IMBALANCE) -> None:
        """Take the options of ``request_router_kwargs``.

        Args:
            imbalance: requests that a replica may have more than the least busy one before another one is preferred.
        """
        self.imbalance = imbalance

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas in order of preference, each alone; one that is full is passed over."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # all are named here: wait before they are named again
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        wanted: dict[str, Any] = pending_request.kwargs
        if (kept := wanted.get("replica")) in replicas:
            return [[replicas[kept]]]
        if (affinity := wanted.get("affinity")) is None:
            names = random.sample(sorted(replicas), len(replicas))
            some = [replicas[name] for name in names]
            return [some[:2], some[2:]]  # of two, the one with the shorter queue
        queued = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in replicas.items()}
        order = within_bounds(ranked(affinity, sorted(replicas)), queued, self.imbalance)
        return [[replicas[name]] for name in order]

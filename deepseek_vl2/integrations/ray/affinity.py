"""Which requests belong together: those about one picture, and else those that begin with the same message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from deepseek_vl2.serve.api.json_size import MAX_VALUES, count_values
from deepseek_vl2.serve.api.response_store import replica_of

STORED = "/v1/responses/"


class Route(NamedTuple):
    """Where a request wants to go.

    Fields:
        affinity: requests with the same go to the same replica, whose caches know the picture and the conversation;
            ``None``: any replica does.
        replica: the one that keeps the response which the request names.
    """

    affinity: str | None = None
    replica: str | None = None


def route_of(path: str, body: bytes) -> Route:
    """Return where a request wants to go; what cannot be read goes anywhere, and is refused there."""
    if path.startswith(STORED):
        return Route(replica=replica_of(path.removeprefix(STORED)))
    if not body or count_values(body, MAX_VALUES) > MAX_VALUES:
        return Route()
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return Route()
    if not isinstance(asked, dict):
        return Route()
    earlier = asked.get("previous_response_id")
    if isinstance(earlier, str) and (replica := replica_of(earlier)) is not None:
        return Route(replica=replica)
    return Route(affinity=affinity_of(asked))


def affinity_of(asked: dict[str, Any]) -> str | None:
    """Return a hash of a request's first picture, or of its first message or prompt without one."""
    messages = next((asked[name] for name in ("messages", "input", "prompt") if name in asked), None)
    if isinstance(messages, list):
        first = next(pictures(messages), None) or next((m for m in messages if not is_system(m)), None)
    else:
        first = messages
    if not first:
        return None
    return hashlib.blake2b(json.dumps(first, sort_keys=True).encode(), digest_size=16).hexdigest()


def pictures(messages: Sequence[Any]) -> Iterator[str]:
    """Yield where the pictures of a conversation come from: addresses, or the pictures themselves as data URLs."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict):
                source = part.get("image_url") or part.get("image")
                source = source.get("url") if isinstance(source, dict) else source
                if isinstance(source, str):
                    yield source


def is_system(message: Any) -> bool:
    """Whether a message is one that many conversations begin with."""
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def ranked(affinity: str, replicas: Sequence[str]) -> list[str]:
    """Return replicas in the order in which requests prefer them.

    By rendezvous hashing: everybody finds the same order without a table, and where a replica comes or goes only the
    requests that prefer it move.
    """

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{affinity} {replica}".encode(), digest_size=16).digest()

    return sorted(replicas, key=weight, reverse=True)


def within_bounds(order: Sequence[str], queued: dict[str, int], imbalance: int) -> list[str]:
    """Return replicas in order, those whose queue is longer than the shortest by more than ``imbalance`` last.

    A picture that everybody asks about does not leave the other replicas idle.
    """
    most = min((queued.get(replica, 0) for replica in order), default=0) + imbalance
    return sorted(order, key=lambda replica: queued.get(replica, 0) > most)

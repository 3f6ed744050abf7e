"""The responses that a later request may go on from, or ask for."""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from .schemas import Message


@dataclass(frozen=True)
class StoredResponse:
    """A response and the conversation that led to it.

    Attributes:
        body: what was answered.
        messages: the conversation, the answer included; the request's instructions are not.
        size: bytes, about.
        kept_until: in seconds of the monotonic clock.
    """

    body: dict[str, Any]
    messages: tuple[Message, ...]
    size: int
    kept_until: float


def new_id(replica: str = "") -> str:
    """Return an id for a response, which names the server that keeps it where there are several."""
    return f"resp_{replica}_{uuid.uuid4().hex}" if replica else f"resp_{uuid.uuid4().hex}"


def replica_of(response_id: str) -> str | None:
    """Return the server that an id names, or ``None``."""
    parts = response_id.split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "resp" else None


class ResponseStore:
    """Keeps the responses used last, for a time, up to a number and a size.

    Args:
        most: responses that are kept; 0 for none.
        most_bytes: of all of them together, images included.
        seconds: how long one is kept.
        replica: of several servers behind one address, the one that keeps them.
    """

    def __init__(self, most: int, most_bytes: int, seconds: float, replica: str = "") -> None:
        self.most = most
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.replica = replica
        self.bytes = 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()

    def new_id(self) -> str:
        """Return an id for a response that is to be kept."""
        return new_id(self.replica)

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, body: dict[str, Any], messages: list[Message]) -> None:
        """Keep a response, and let go of those used longest ago."""
        size = len(json.dumps(body)) + sum(map(message_size, messages))
        if self.most == 0 or size > self.most_bytes:
            return
        self._kept[body["id"]] = StoredResponse(body, tuple(messages), size, time.monotonic() + self.seconds)
        self.bytes += size
        while len(self._kept) > self.most or self.bytes > self.most_bytes:
            self.remove(next(iter(self._kept)))

    def get(self, name: str) -> StoredResponse | None:
        """Return a response by its id."""
        found = self._kept.get(name)
        if found is None:
            return None
        if found.kept_until < time.monotonic():
            self.remove(name)
            return None
        self._kept.move_to_end(name)
        return found

    def remove(self, name: str) -> bool:
        """Forget a response; returns whether there was one."""
        found = self._kept.pop(name, None)
        self.bytes -= 0 if found is None else found.size
        return found is not None


def message_size(message: Message) -> int:
    """Return about how many bytes a message takes."""
    texts = [part.text if part.type == "text" else part.url for part in message.parts]
    calls = [call.function.arguments for call in message.tool_calls or []]
    return 500 + sum(map(len, [*texts, *calls]))

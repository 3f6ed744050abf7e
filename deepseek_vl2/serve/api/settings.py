"""What an operator of the server decides."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

MEBI = 1 << 20


@dataclass(frozen=True)
class ImageLimits:
    """What images a request may bring.

    Attributes:
        max_images: images of a request.
        max_bytes: size of an image's file.
        max_pixels: pixels of all images of a request together, before any of them is decoded.
        allow_urls: fetch http and https addresses.
        allow_private: fetch from loopback, private and link-local addresses too.
        max_redirects: redirects followed for an image.
        seconds: time for fetching one image, redirects included.
    """

    max_images: int = 16
    max_bytes: int = 20 * MEBI
    max_pixels: int = 50_000_000
    allow_urls: bool = False
    allow_private: bool = False
    max_redirects: int = 3
    seconds: float = 10.0


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may do.

    Attributes:
        most: connections at the same time.
        per_address: of them, from one address.
        header_seconds: time for a request's line and headers to come, from its first byte (or the connection's begin).
        idle_seconds: time between a response and the next request.
        write_seconds: time for a client to read what fills its connection.
    """

    most: int = 512
    per_address: int = 256
    header_seconds: float = 10.0
    idle_seconds: float = 15.0
    write_seconds: float = 60.0


@dataclass(frozen=True)
class GrammarLimits:
    """What grammars may cost.

    Attributes:
        seconds: of a CPU, to compile one; the server spends them twice, first in a process that is ended in time.
        memory: bytes to compile one.
        processes: grammars that are tried out at the same time.
        cached_bytes: memory of the compiled grammars that are kept.
    """

    seconds: int = 2
    memory: int = 256 * MEBI
    processes: int = 2
    cached_bytes: int = 256 * MEBI


@dataclass(frozen=True)
class Settings:
    """What an operator decides of the HTTP side; the engine's bounds are in `EngineOptions`.

    Attributes:
        model_name: the name that requests give under ``model``.
        api_keys: requests must bear one of these; none: open to everyone who can reach the port.
        cors_origins: web pages that may call the server from a browser.
        images: limits of images.
        max_body_bytes: size of a request's body.
        body_seconds: time for a body to arrive.
        request_seconds: time for a request, from its first byte to its last; ``None``: no limit.
        max_choices: largest ``n``.
        max_requests: requests in hand at the same time, whatever they are doing; they begin when their body has come.
        stored_responses: responses that ``previous_response_id`` may name, at most; 0: none.
        stored_bytes: memory of all of them.
        stored_seconds: how long one is kept.
        replica: what tells this server from others behind the same address; its responses' ids bear it.
        allowed_hosts: names that requests may be sent to, beside local ones; ``None``: any.
        connections: limits of connections.
        grammars: limits of grammars.
        first_byte_seconds: after which a stream begins, though there is no token yet.
        ping_seconds: silence of a stream after which a comment is sent.
        preparing_threads: requests whose images are decoded and whose text is tokenized at the same time.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    images: ImageLimits = field(default_factory=ImageLimits)
    max_body_bytes: int = 32 * MEBI
    body_seconds: float = 30.0
    request_seconds: float | None = 600.0
    max_choices: int = 8
    max_requests: int = 128
    preparing_threads: int = field(default_factory=lambda: max(2, min(8, (os.cpu_count() or 2) // 2)))
    stored_responses: int = 256
    stored_bytes: int = 128 * MEBI
    stored_seconds: float = 3600.0
    replica: str = ""
    allowed_hosts: tuple[str, ...] | None = None
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    grammars: GrammarLimits = field(default_factory=GrammarLimits)
    first_byte_seconds: float = 1.0
    ping_seconds: float = 10.0

    @property
    def body_bytes(self) -> int:
        """Return the memory of all bodies that are coming."""
        return 16 * self.max_body_bytes

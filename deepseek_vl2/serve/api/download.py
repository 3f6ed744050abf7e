"""Fetching an image for a stranger, from nowhere that the stranger should not reach.

The name is resolved once, the address is checked, and the connection goes to that very address: a name that answers
differently the second time gains nothing. Every redirect is checked anew. Bytes and time are bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import anyio
import h11

from deepseek_vl2 import __version__

from .settings import ImageLimits

NAT64 = ipaddress.ip_network("64:ff9b::/96")
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 65_536
MAX_URL_LENGTH = 4096


class DownloadError(ValueError):
    """An image could not be fetched, or must not be."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it is wrapped into an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


def split_url(url: str) -> SplitResult:
    """Take an address apart.

    Raises:
        DownloadError: it is no http(s) address of a host, or bears credentials.
    """
    if len(url) > MAX_URL_LENGTH:
        raise DownloadError(f"The address has {len(url)} characters, more than {MAX_URL_LENGTH}.")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadError(f"{url[:200]!r} is not an address: {error}.") from error
    if parts.scheme not in ("http", "https") or not host:
        raise DownloadError(f"{url[:200]!r} is not an http or https address.")
    if parts.username is not None or parts.password is not None:
        raise DownloadError("An image's address must not bear a user name or a password.")
    return parts


async def resolve(host: str, port: int, allow_private: bool) -> str:
    """Return an IP address of a host that may be connected to.

    Raises:
        DownloadError: the host is unknown, or has addresses outside of the public internet alone.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DownloadError(f"The host {host!r} of the image's address cannot be found.") from error
    addresses = [str(entry[4][0]) for entry in found]
    allowed = [address for address in addresses if allow_private or is_public(address)]
    if not allowed:
        raise DownloadError(f"The host {host!r} is not on the public internet; this server fetches from nowhere else.")
    return allowed[0]


@dataclass
class _Reply:
    status: int
    location: str | None
    body: bytes


class _Exchange:
    """One request and its response over one connection, by h11."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: int) -> None:
        self.reader = reader
        self.writer = writer
        self.max_bytes = max_bytes
        self.connection = h11.Connection(h11.CLIENT)

    async def ask(self, parts: SplitResult) -> _Reply:
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        headers = [
            ("Host", parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc),
            ("User-Agent", f"deepseek_vl2/{__version__}"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        request = h11.Request(method="GET", target=target, headers=headers)
        self.writer.write(self.connection.send(request) or b"")
        self.writer.write(self.connection.send(h11.EndOfMessage()) or b"")
        await self.writer.drain()
        return await self._read()

    async def _read(self) -> _Reply:
        reply = _Reply(0, None, b"")
        body = bytearray()
        while True:
            event = self.connection.next_event()
            if event is h11.NEED_DATA:
                self.connection.receive_data(await self.reader.read(CHUNK))
            elif isinstance(event, h11.Response):
                reply.status = event.status_code
                reply.location = next((v.decode("latin-1") for k, v in event.headers if k == b"location"), None)
                if reply.status != 200:
                    return reply
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.max_bytes:
                    raise DownloadError(f"The image has more than the {self.max_bytes:,} bytes allowed.")
            elif isinstance(event, h11.EndOfMessage):
                reply.body = bytes(body)
                return reply
            elif isinstance(event, h11.ConnectionClosed):
                raise DownloadError("The connection was closed before the image had come.")


async def _get(parts: SplitResult, limits: ImageLimits) -> _Reply:
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    assert parts.hostname is not None
    address = await resolve(parts.hostname, port, limits.allow_private)
    # The certificate is checked against the name, though the connection goes to the address.
    tls = {"ssl": ssl.create_default_context(), "server_hostname": parts.hostname} if secure else {}
    reader, writer = await asyncio.open_connection(address, port, **tls)  # type: ignore[arg-type]
    try:
        return await _Exchange(reader, writer, limits.max_bytes).ask(parts)
    finally:
        writer.transport.abort()


async def _follow(url: str, limits: ImageLimits) -> bytes:
    for _ in range(limits.max_redirects + 1):
        reply = await _get(split_url(url), limits)
        if reply.status == 200:
            return reply.body
        if reply.status not in REDIRECTS or reply.location is None:
            raise DownloadError(f"The image's host answered with status {reply.status}.")
        url = urljoin(url, reply.location)
    raise DownloadError(f"The image's address redirects more than {limits.max_redirects} times.")


async def download(url: str, limits: ImageLimits) -> bytes:
    """Return the file at an http(s) address.

    Raises:
        DownloadError: it cannot or must not be fetched, is too large, or takes too long.
    """
    try:
        with anyio.fail_after(limits.seconds):
            return await _follow(url, limits)
    except TimeoutError as error:
        raise DownloadError(f"The image did not come within {limits.seconds:g} seconds.") from error
    except (OSError, UnicodeError, h11.ProtocolError) as error:
        raise DownloadError(f"The image could not be fetched: {error}.") from error

"""Fetching an image for a stranger, from nowhere that the stranger should not reach.

The name is resolved once, the address is checked, and the connection goes to that very address: a name that answers
differently the second time gains nothing. Every redirect is checked anew. Bytes and time are bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import anyio
import h11

from deepseek_vl2 import __version__

from .settings import ImageLimits

logger = logging.getLogger(__name__)

GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
# Of IANA's special-purpose addresses, those that not every supported version of Python knows.
SPECIAL_V4 = [ipaddress.IPv4Network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10")]
SPECIAL_V6 = [ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
# Whose last 32 bits are an IPv4 address, behind a gateway (NAT64, RFC 6052) or a translator (RFC 2765).
TRANSLATED = [ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "::ffff:0:0:0/96")]
ISATAP = 0x00005EFE  # before the IPv4 address in the interface's identifier (RFC 5214)
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 65_536
MAX_URL_LENGTH = 4096


class DownloadError(ValueError):
    """An image could not be fetched, or must not be."""


def inner_addresses(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address leads to, through a gateway or a tunnel."""
    last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    found = [inner for inner in (ip.ipv4_mapped, ip.sixtofour) if inner is not None]
    if ip.teredo is not None:
        found += ip.teredo
    if any(ip in network for network in TRANSLATED) or (int(ip) >> 32) & 0xFDFFFFFF == ISATAP:
        found.append(last)
    return found


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it is wrapped into an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        special = any(ip in network for network in SPECIAL_V4)
        return ip.is_global and not (special or ip.is_multicast or ip.is_reserved)
    inner = inner_addresses(ip)
    if not all(is_public(str(wrapped)) for wrapped in inner):
        return False
    if inner and (ip.ipv4_mapped is not None or any(ip in network for network in TRANSLATED)):
        return True  # such an address is no more than another spelling of the inner one
    # What is not listed is not public: site-local fec0::/10, for one, is in none of Python's lists.
    return ip in GLOBAL_V6 and ip.is_global and not any(ip in network for network in SPECIAL_V6)


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
        # The error's own words tell addresses and open ports, which are the operator's to know.
        logger.info("An image could not be fetched: %s", error)
        raise DownloadError("The image could not be fetched from its host.") from error

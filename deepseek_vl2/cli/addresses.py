"""The address that a server is to listen on, looked at before it loads a model."""

from __future__ import annotations

import errno
import os
import socket

REUSE = os.name == "posix"  # elsewhere the option lets two programs have one port


def check_address(host: str, port: int) -> None:
    """Raise what is wrong with an address to listen on; nothing stays open.

    Args:
        host: a name or an IP address; a name may have several, of which one is enough.
        port: 0 for any free one.

    Raises:
        OSError: the name is unknown, this machine has no such address, or the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name"
        raise OSError(f"There is no address for the host {host!r}: {reason[0].lower()}{reason[1:]}.") from error
    missing: OSError | None = None
    bound = False
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as tried:
                if REUSE:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # or it takes the port of IPv4 too, as no server does
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                tried.bind(address)
            bound = True
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise OSError(_refusal(host, port, error)) from error
            missing = error
    if not bound:
        raise OSError(_refusal(host, port, missing)) from missing


def _refusal(host: str, port: int, error: OSError | None) -> str:
    number = None if error is None else error.errno
    if number == errno.EADDRINUSE:
        return f"Port {port} on {host} is in use: name another one with --port."
    if number == errno.EACCES:
        return f"Port {port} on {host} is not allowed to this user: name another one with --port, above 1023."
    if number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, None):
        return (
            f"This machine has no address {host}: --host names one of its own, 127.0.0.1 for itself alone or 0.0.0.0 "
            "for every network that it is in."
        )
    return f"This machine cannot listen on {host}, port {port}: {error}."

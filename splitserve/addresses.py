"""Where others reach this process, when it listens on every interface.

Owns no socket. Invariant: what is advertised names one interface of this machine, never a wildcard.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

from splitserve.errors import ConfigError

_REDIS_PORT = 6379
_LOOKUP_SECONDS = 5.0


async def advertised_host(host: str, advertise_host: str | None, redis_url: str) -> str:
    """The host that goes into the directory: the one asked for, else ``host``, else (``host`` is a wildcard) the
    address of the interface that reaches Redis, which every other process of the cluster reaches too.

    Raises ConfigError where no such address can be told.
    """
    if advertise_host is not None:
        if is_wildcard(advertise_host):
            raise ConfigError(f"--advertise-host {advertise_host} is no address that others can connect to")
        return advertise_host
    if not is_wildcard(host):
        return host
    url = urlsplit(redis_url)
    if not url.hostname:
        raise ConfigError(
            f"--host {host} needs --advertise-host here: Redis at a Unix socket shows no interface to advertise"
        )
    family = socket.AF_UNSPEC if ":" in host else socket.AF_INET  # [::] takes IPv4 too
    try:
        async with asyncio.timeout(_LOOKUP_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(
                url.hostname, url.port or _REDIS_PORT, family=family, type=socket.SOCK_DGRAM
            )
        with socket.socket(found[0][0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[0][4])  # sends nothing: the kernel picks the route and with it the address
            return str(probe.getsockname()[0])
    except (OSError, TimeoutError) as error:
        raise ConfigError(
            f"--host {host} needs --advertise-host here: no route to {url.hostname} ({error or 'no answer'})"
        ) from error


def is_wildcard(host: str) -> bool:
    """Whether listening on ``host`` means listening on every interface."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return not host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def join(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"

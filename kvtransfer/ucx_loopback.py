"""Keeps UCX to this machine. By itself it listens on every interface, whatever address is asked for.

Owns neither UCX nor its sockets. Invariant: after `confine`, Linux takes connections to that port from the
loopback interface only.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

_LOOPBACK = "lo"


def prefer_loopback() -> None:
    """Before UCX starts: its lanes, which listen too, take no other interface. The environment may name some."""
    os.environ.setdefault("UCX_NET_DEVICES", _LOOPBACK)


def confine(port: int) -> None:
    """Binds the sockets of this process that listen on ``port`` to the loopback interface."""
    found = [number for number in _open_files() if _listens(number, port)]
    try:
        for number in found:
            with socket.socket(fileno=os.dup(number)) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _LOOPBACK.encode())
    except OSError as error:
        logger.warning("UCX listens on every interface, port %d: %s", port, error.strerror)
    if not found:
        logger.warning("UCX listens on every interface, port %d: no socket of it was found", port)


def _open_files() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir()]


def _listens(number: int, port: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
        with socket.socket(fileno=os.dup(number)) as candidate:
            return (
                candidate.family in (socket.AF_INET, socket.AF_INET6)
                and candidate.type == socket.SOCK_STREAM
                and candidate.getsockname()[1] == port
                and bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            )
    except OSError:
        return False  # closed meanwhile

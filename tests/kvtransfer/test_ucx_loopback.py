"""A listening socket is found by its port and kept to loopback; nothing else is touched or left open."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest

from kvtransfer.ucx_loopback import confine


def device(listener: socket.socket) -> bytes:
    return listener.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")


def test_only_the_socket_of_this_port_is_kept_to_loopback() -> None:
    with socket.create_server(("0.0.0.0", 0)) as ours, socket.create_server(("0.0.0.0", 0)) as other:
        try:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"")
        except OSError:
            pytest.skip("Linux does not let this user bind a socket to an interface")
        confine(ours.getsockname()[1])
        assert (device(ours), device(other)) == (b"lo", b"")
        with socket.create_connection(("127.0.0.1", ours.getsockname()[1]), timeout=5):
            pass


def test_no_file_is_left_open() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        before = sorted(Path("/proc/self/fd").iterdir())
        for _ in range(3):
            confine(listener.getsockname()[1])
        assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_port_that_nobody_listens_on_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        confine(0)
    assert "no socket of it was found" in caplog.text

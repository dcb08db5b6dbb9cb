"""What a cluster that was told nothing listens on: this machine's loopback, and nothing else."""

from __future__ import annotations

import socket

import psutil
import pytest

from tests.e2e.conftest import RunningCluster


def other_address() -> str:
    """An IPv4 address of this machine that is not loopback."""
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if interface != "lo" and address.family is socket.AF_INET:
                return str(address.address)
    pytest.skip("this machine has no interface but loopback")


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def can_confine() -> bool:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        except OSError:
            return False
        return True


def test_other_machines_reach_no_port_of_a_default_cluster(tiny_cluster: RunningCluster) -> None:
    outside = other_address()
    if not can_confine():
        pytest.skip("Linux does not let this user bind a socket to an interface")
    processes = {name: psutil.Process(child.pid) for name, child in tiny_cluster.cluster.children.items()}
    ports = {
        (name, connection.laddr.port)
        for name, process in processes.items()
        for each in (process, *process.children(recursive=True))
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {"router", "prefill-0", "decode-0"} <= {name for name, _ in ports}
    assert all(answers("127.0.0.1", port) for _, port in ports)
    assert [place for place in sorted(ports) if answers(outside, place[1])] == []


def test_a_port_that_is_open_to_others_would_be_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        assert answers(other_address(), listener.getsockname()[1])

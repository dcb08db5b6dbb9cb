"""Servers as child processes."""

from __future__ import annotations

import sys

import psutil
import pytest

from bench.router import CASES, first_token_ms, free_port, tokens_per_second
from bench.servers import RunningServer, ServerCommand
from splitserve.errors import ConfigError


def bare_server(**changes: object) -> ServerCommand:
    port = free_port()
    values: dict[str, object] = {
        "name": "bare",
        "command": f"{sys.executable} -m bench.bare --port {port}",
        "url": f"http://127.0.0.1:{port}",
        "start_seconds": 30.0,
    }
    return ServerCommand(**values | changes)  # type: ignore[arg-type]


def test_a_server_runs_within_the_block_and_not_after() -> None:
    with RunningServer(bare_server()) as server:
        assert server.ready_seconds > 0
        (process,) = [psutil.Process(int(name.split()[0])) for name in server.weigh().resident]
        assert process.is_running()
    assert not process.is_running()


def test_the_bare_server_streams_to_the_client() -> None:
    with RunningServer(bare_server()) as server:
        assert first_token_ms(server.spec.url, "bare", CASES[0], 3) > 0
        assert tokens_per_second(server, "bare", streams=2, tokens=50)[0] > 0


def test_a_server_that_ends_is_reported_with_what_it_said() -> None:
    command = f"{sys.executable} -c 'import sys; print(\"no luck\"); sys.exit(3)'"
    with pytest.raises(ConfigError, match=r"exit code 3:\s+no luck"):
        RunningServer(bare_server(command=command)).__enter__()


def test_a_server_that_never_listens_is_given_up_and_ended() -> None:
    command = f"{sys.executable} -c 'import time; time.sleep(60)'"
    with pytest.raises(ConfigError, match=r"not ready within 0\.3 s"):
        RunningServer(bare_server(command=command, start_seconds=0.3)).__enter__()


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no-such-program"):
        RunningServer(bare_server(command="no-such-program")).__enter__()

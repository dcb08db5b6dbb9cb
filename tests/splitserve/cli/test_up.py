"""``splitserve up`` from its first line to its last process, with a tiny model; and the commands that need it."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.splitserve.cli.conftest import COMMAND, environment, splitserve

START_SECONDS, END_SECONDS = 120.0, 60.0


class Up:
    """A running ``splitserve up``. Its stderr is collected while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("ready in "):
                self._ready.set()
        self._ready.set()

    def ready(self) -> str:
        """Waits for the ready line; the URL of the router."""
        assert self._ready.wait(START_SECONDS), self.lines
        [line] = [line for line in self.lines if line.startswith("ready in ")]
        found = re.search(r"(http://[\d.:]+)/v1 \(OpenAI\), [\d.:]+ \(gRPC\)", line)
        assert found is not None, line
        return found[1]

    def pid(self, name: str) -> int:
        [pid] = re.findall(rf"{name}\s+started, process (\d+)", "\n".join(self.lines))
        return int(pid)

    def end(self) -> int:
        """Waits until it has ended; its exit code."""
        code = self.process.wait(END_SECONDS)
        self._reader.join(END_SECONDS)
        assert not self._reader.is_alive(), "a process that was left behind holds the stream"
        return code


@contextmanager
def up(model: Path, *more: str) -> Iterator[Up]:
    """Asserts at the end that no process is left, however it ended."""
    arguments = ("up", "--model", str(model), "--served-model-name", "tiny", "--kv-cache-memory", "8M")
    command = [*COMMAND, *arguments, "--port", "0", "--grpc-port", "0", "--drain-timeout", "5", *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        running = Up(process)
        children: list[psutil.Process] = []
        try:
            running.ready()
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(END_SECONDS)
        _gone, left = psutil.wait_procs(children, timeout=30)
    assert not left


def test_sigterm_drains_and_ends_with_exit_code_0(tiny: Path) -> None:
    with up(tiny) as running:
        url = running.ready()
        body = {"model": "tiny", "prompt": "abc" * 30, "max_tokens": 4, "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 0
        for name in ("router", "prefill-0", "decode-0"):
            assert any(re.search(rf"{name}\s+ended with exit code 0", line) for line in running.lines), (
                running.lines
            )


def test_ctrl_c_drains_and_chat_answers_before(tiny: Path) -> None:
    with up(tiny) as running:
        url = running.ready()
        chat = splitserve("chat", "hello", "--url", url, "--max-tokens", "6", "--temperature", "0")
        assert chat.returncode == 0, chat.stderr
        assert re.search(r"first token \d+ ms, [\d.]+ tokens/s, \d+ tokens, prompt \d+ \(0 cached\)", chat.stdout)
        wrong = splitserve("chat", "hello", "--url", url, "--model", "nosuch")
        assert (wrong.returncode, wrong.stderr) == (1, "splitserve: The model `nosuch` does not exist.\n")
        running.process.send_signal(signal.SIGINT)
        assert running.end() == 0


def test_a_killed_worker_is_named_and_ends_it_with_exit_code_1(tiny: Path) -> None:
    with up(tiny) as running:
        psutil.Process(running.pid("decode-0")).kill()
        assert running.end() == 1
        assert running.lines[-1] == "splitserve: decode-0 ended with exit code -9; the cluster is shut down"


def test_what_a_worker_refuses_is_told_once(tiny: Path) -> None:
    done = splitserve("up", "--model", str(tiny), "--kernels", "magic", "--port", "0", "--grpc-port", "0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if "magic" in line]
    assert len(told) == 1 and re.match(r"splitserve: (prefill|decode)-0: unknown kernels 'magic'", told[0])


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[::1"])
def test_chat_without_a_router_says_so(url: str) -> None:
    done = splitserve("chat", "hello", "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"splitserve: .+\n\Z", done.stderr)


def test_pull_prints_where_the_model_is() -> None:
    done = splitserve("pull", "smollm2", timeout=300)
    assert done.returncode == 0 and Path(done.stdout.strip()).suffix == ".gguf"


def test_pull_refuses_what_it_does_not_know() -> None:
    done = splitserve("pull", "smollm3")
    assert done.returncode == 1 and "'smollm3' is neither" in done.stderr

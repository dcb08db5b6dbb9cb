"""deploy/Dockerfile and its context against the project: what the build needs is copied, and nobody is root."""

from __future__ import annotations

import re
import shlex
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import trustme
import yaml

from kernels.cpu.build import ISAS

ROOT = Path(__file__).parents[2]
READY = ROOT / "deploy" / "ready.py"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _copied(instructions: list[tuple[str, str]]) -> set[str]:
    """Paths that come from the build context."""
    lines = [shlex.split(rest) for word, rest in instructions if word == "COPY" and "--from" not in rest]
    return {path for line in lines for path in [w for w in line if not w.startswith("--")][:-1]}


def test_every_package_is_copied(instructions: list[tuple[str, str]], project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.removesuffix("*") for pattern in patterns} <= _copied(instructions)


def test_every_file_that_the_project_names_is_copied(
    instructions: list[tuple[str, str]], project: dict[str, Any]
) -> None:
    named = {
        "pyproject.toml",
        "constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    assert named <= _copied(instructions)


def test_what_is_copied_exists_and_is_in_the_build_context(instructions: list[tuple[str, str]]) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert _copied(instructions) == kept
    assert all((ROOT / path).exists() for path in kept)


def test_the_extra_exists(instructions: list[tuple[str, str]], project: dict[str, Any]) -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions if word == "ARG")
    assert arguments["EXTRAS"] in project["project"]["optional-dependencies"]


def test_torch_is_pinned(instructions: list[tuple[str, str]]) -> None:
    wheels = [rest for word, rest in instructions if word == "RUN" and "pip wheel" in rest]
    assert "--constraint constraints.txt" in wheels[0]
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_kernels_are_built_for_every_instruction_set(instructions: list[tuple[str, str]]) -> None:
    build = next(rest for word, rest in instructions if word == "RUN" and "kernels.cpu.build" in rest)
    assert f'isas="{" ".join(ISAS)}"' in build


def test_the_image_does_not_run_as_root(instructions: list[tuple[str, str]]) -> None:
    last_stage = max(i for i, (word, _) in enumerate(instructions) if word == "FROM")
    users = [rest for word, rest in instructions[last_stage:] if word == "USER"]
    assert users and users[-1].split(":")[0] not in ("0", "root")


@pytest.mark.parametrize("path", ["compose.yaml", "deploy/compose.shm.yaml", "deploy/compose.secured.yaml"])
def test_no_service_goes_back_to_root(path: str) -> None:
    for name, service in yaml.safe_load((ROOT / path).read_text())["services"].items():
        assert service.get("user", "") not in ("root", "0"), name
        if not service.get("image", "splitserve").startswith("splitserve"):
            assert service["user"], f"{name}: another's image, whose user is not ours to know"


def test_the_image_has_a_health_check(instructions: list[tuple[str, str]]) -> None:
    assert any(word == "HEALTHCHECK" and '"ready"' in rest for word, rest in instructions)


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 503)
        self.end_headers()
        self.wfile.write(b"the model is being loaded\n")

    def log_message(self, format: str, *args: Any) -> None:
        return


@contextmanager
def _serving(context: ssl.SSLContext | None = None) -> Iterator[str]:
    """``host:port`` of a server that speaks HTTPS if it is given a context."""
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def url() -> Iterator[str]:
    with _serving() as address:
        yield f"http://{address}"


def _ready(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(READY), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_a_ready_process_is_healthy(url: str) -> None:
    assert _ready(f"{url}/ready").returncode == 0


def test_the_url_may_come_from_the_environment_and_no_proxy_is_asked(url: str) -> None:
    assert _ready(READY_URL=f"{url}/ready", http_proxy="http://127.0.0.1:1").returncode == 0


def test_one_that_is_not_ready_says_why(url: str) -> None:
    done = _ready(f"{url}/starting")
    assert (done.returncode, done.stderr) == (1, "the model is being loaded\n")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_one_that_speaks_tls_is_asked_over_tls(scheme: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("router.example").configure_cert(context)
    with _serving(context) as address:
        assert _ready(f"{scheme}://{address}/ready").returncode == 0
        done = _ready(f"{scheme}://{address}/starting")
    assert (done.returncode, done.stderr) == (1, "the model is being loaded\n")


def test_one_that_does_not_answer_is_unhealthy() -> None:
    done = _ready("http://127.0.0.1:1/ready")
    assert done.returncode == 1 and "refused" in done.stderr

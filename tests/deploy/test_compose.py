"""compose.yaml against the real command line: no container engine is needed to see that they fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from splitserve.cli import options, processes
from splitserve.cli.main import app
from splitserve.config import WorkerConfig

ROOT = Path(__file__).parents[2]
WORKERS = ("prefill", "decode")
OURS = ("model", "router", *WORKERS)
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
_USAGE_ERROR: Any = typer.BadParameter.__base__  # typer brings click along under another name, or did not yet
# read by the code, not by a flag
_OTHER_VARIABLES = {"SPLITSERVE_CACHE", "SPLITSERVE_CPU_ISA"}


def _load(path: str) -> dict[str, Any]:
    """The file with every ``${NAME:-default}`` at its default."""
    text = _VARIABLE.sub(lambda match: match[2], (ROOT / path).read_text())
    assert "${" not in text, "every variable has a default"
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = _load("compose.yaml")["services"]
    return found


def _parse(service: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> typer.Context:
    """The service's command as the command line understands it; fails for an unknown flag or a bad value."""
    for name, value in service.get("environment", {}).items():
        assert isinstance(value, str), f"{name} must be quoted: YAML would make it {value!r}"
        monkeypatch.setenv(name, value)
    name, *arguments = service["command"]
    commands: Any = typer.main.get_command(app)
    context: typer.Context = commands.commands[name].make_context(name, arguments)
    return context


@pytest.mark.parametrize("name", OURS)
def test_the_command_line_takes_the_command(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _parse(services[name], monkeypatch).command.name == services[name]["command"][0]


@pytest.mark.parametrize("flag", ["--no-such-flag", "--metrics-port=abc"])
def test_a_wrong_flag_would_be_seen(services: dict[str, Any], flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**services["decode"], "command": [*services["decode"]["command"], flag]}
    with pytest.raises(_USAGE_ERROR):
        _parse(broken, monkeypatch)


@pytest.mark.parametrize("name", OURS)
def test_environment_variables_belong_to_flags(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = _parse(services[name], monkeypatch)
    known = {variable for p in context.command.params if isinstance(variable := p.envvar, str)}
    set_here = {v for v in services[name].get("environment", {}) if v.startswith("SPLITSERVE_")}
    assert set_here <= known | _OTHER_VARIABLES


@pytest.mark.parametrize("role", WORKERS)
def test_workers_get_a_whole_configuration(
    services: dict[str, Any], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[WorkerConfig] = []
    monkeypatch.setattr(processes, "become", made.append)  # the real one replaces this process
    context = _parse(services[role], monkeypatch)
    context.command.invoke(context)
    assert [(c.role, c.host, c.redis_url) for c in made] == [(role, "0.0.0.0", "redis://redis:6379/0")]
    assert made[0].transports == ("ucx", "tcp")
    assert made[0].kv_cache_memory == options.parse_bytes("1G")
    assert made[0].log.json


@pytest.mark.parametrize("role", WORKERS)
def test_replicas_share_nothing_that_must_differ(
    services: dict[str, Any], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = services[role]
    assert not {"ports", "container_name", "hostname", "network_mode"} & worker.keys()
    flags = _parse(worker, monkeypatch).params
    assert flags["worker_id"] is None and flags["advertise_host"] is None, "each container's own"
    assert flags["port"] == 0


@pytest.mark.parametrize("role", WORKERS)
def test_workers_are_asked_on_the_port_that_they_serve(
    services: dict[str, Any], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = _parse(services[role], monkeypatch).params["metrics_port"]
    assert services[role]["healthcheck"]["test"] == ["CMD", "ready", f"http://127.0.0.1:{port}/ready"]


def test_the_router_is_asked_and_published_on_the_ports_that_it_serves(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = _parse(services["router"], monkeypatch).params
    assert services["router"]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{flags['port']}/ready"
    assert services["router"]["ports"] == [f"127.0.0.1:{p}:{p}" for p in (flags["port"], flags["grpc_port"])]


def test_only_the_router_publishes_ports(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "ports" in service] == ["router"]


def test_workers_and_redis_are_on_a_network_of_their_own(services: dict[str, Any]) -> None:
    assert _load("compose.yaml")["networks"]["cluster"]["internal"]
    assert all(services[name]["networks"] == ["cluster"] for name in ("redis", *WORKERS))
    assert set(services["router"]["networks"]) == {"front", "cluster"}


def test_every_service_that_stays_has_a_health_check(services: dict[str, Any]) -> None:
    for name in ("redis", "router", *WORKERS):
        assert services[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("role", WORKERS)
def test_workers_wait_for_redis_and_the_model(services: dict[str, Any], role: str) -> None:
    assert services[role]["depends_on"] == {
        "redis": {"condition": "service_healthy"},
        "model": {"condition": "service_completed_successfully"},
    }


@pytest.mark.parametrize("role", WORKERS)
def test_the_model_that_is_fetched_is_the_one_that_is_served(
    services: dict[str, Any], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = _parse(services["model"], monkeypatch).params["name"]
    assert _parse(services[role], monkeypatch).params["model"] == fetched
    assert services[role]["volumes"] == services["model"]["volumes"]


@pytest.mark.parametrize("name", ["router", *WORKERS])
def test_there_is_time_to_drain(services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grace = int(services[name]["stop_grace_period"].removesuffix("s"))
    assert grace > _parse(services[name], monkeypatch).params["drain_timeout"] + 5


def test_the_overlay_for_shared_memory_joins_both_namespaces(services: dict[str, Any]) -> None:
    overlay = _load("deploy/compose.shm.yaml")["services"]
    assert set(overlay) - {"namespaces"} == set(WORKERS) <= set(services)
    for role in WORKERS:
        assert (overlay[role]["ipc"], overlay[role]["pid"]) == ("service:namespaces", "service:namespaces")
    assert overlay["namespaces"]["ipc"] == "shareable"


def test_the_overlay_with_keys_and_certificates_sets_flags_that_the_router_has(services: dict[str, Any]) -> None:
    overlay = _load("deploy/compose.secured.yaml")
    router = overlay["services"]["router"]
    commands: Any = typer.main.get_command(app)
    known = {p.envvar for p in commands.commands["router"].params}
    assert set(router["environment"]) <= known
    mounted = {f"/run/secrets/{name}" for name in router["secrets"]}
    assert set(router["environment"].values()) == mounted
    assert set(router["secrets"]) == set(overlay["secrets"])
    assert set(overlay["services"]) <= set(services)

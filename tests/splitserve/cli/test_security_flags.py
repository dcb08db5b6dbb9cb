"""Keys and certificates from the command line: what becomes of them, and what is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import typer.testing

from splitserve.api_keys import ApiKey
from splitserve.cli import processes
from splitserve.cli.main import app
from splitserve.config import RouterConfig, TlsFiles, WorkerConfig
from splitserve.errors import ConfigError

Made = Callable[..., Any]
COMMANDS = {
    "router": ("router", "--redis-url", "redis://x"),
    "prefill": ("prefill", "--model", "smollm2", "--redis-url", "redis://x"),
    "decode": ("decode", "--model", "smollm2", "--redis-url", "redis://x"),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """``made(command, *flags)``: the configuration that the process would run with."""
    configurations: list[RouterConfig | WorkerConfig] = []
    monkeypatch.setattr(processes, "become", configurations.append)  # the real one replaces this process

    def run(command: str, *flags: str, env: dict[str, str] | None = None) -> RouterConfig | WorkerConfig:
        result = typer.testing.CliRunner().invoke(app, [*COMMANDS[command], *flags], env=env)
        if result.exception is not None:
            raise result.exception
        return configurations.pop()

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    paths = [directory / name for name in ("cert.pem", "key.pem", "ca.pem")]
    for path, blob in zip(paths, (leaf.cert_chain_pems[0], leaf.private_key_pem, authority.cert_pem), strict=True):
        blob.write_to_path(str(path))
    return TlsFiles(*map(str, paths))


def cluster_flags(files: TlsFiles) -> list[str]:
    assert files.ca is not None
    return ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca]


@pytest.mark.parametrize("command", COMMANDS)
def test_keys_come_from_flags_and_a_file_and_only_digests_are_kept(
    made: Made, command: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("alice sk-three # hers\n")
    config = made(command, "--api-key", "sk-one", "--api-key", "sk-two", "--api-key-file", str(file))
    assert config.api_keys == (ApiKey.of("sk-one"), ApiKey.of("sk-two"), ApiKey.of("sk-three", "alice"))
    assert "sk-" not in repr(config)


def test_the_variable_holds_several_keys(made: Made) -> None:
    config = made("router", env={"SPLITSERVE_API_KEY": "sk-one sk-two"})
    assert config.api_keys == (ApiKey.of("sk-one"), ApiKey.of("sk-two"))


@pytest.mark.parametrize("command", COMMANDS)
def test_without_flags_there_are_no_keys_and_no_certificates(made: Made, command: str) -> None:
    config = made(command)
    assert (config.api_keys, config.tls) == ((), None)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_clusters_certificates_reach_the_process(made: Made, command: str, files: TlsFiles) -> None:
    assert made(command, *cluster_flags(files)).tls == files


def test_paths_stay_true_when_the_process_runs_elsewhere(
    made: Made, files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(files.cert).parent)
    config = made("router", "--ssl-certfile", "cert.pem", "--ssl-keyfile", "key.pem")
    assert config.public_tls == TlsFiles(files.cert, files.key)


@pytest.mark.parametrize("left_out", ["--tls-cert", "--tls-key", "--tls-ca"])
def test_half_a_set_of_certificates_is_refused(made: Made, files: TlsFiles, left_out: str) -> None:
    flags = cluster_flags(files)
    at = flags.index(left_out)
    with pytest.raises(ConfigError, match="give all of --tls-cert, --tls-key, --tls-ca or none"):
        made("decode", *flags[:at], *flags[at + 2 :])


def test_a_public_certificate_without_its_key_is_refused(made: Made, files: TlsFiles) -> None:
    with pytest.raises(ConfigError, match="give all of --ssl-certfile, --ssl-keyfile or none"):
        made("router", "--ssl-certfile", files.cert)


def test_a_file_that_is_no_certificate_is_named(made: Made, files: TlsFiles, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not PEM")
    with pytest.raises(ConfigError, match=r"wrong\.pem"):
        made("router", "--ssl-certfile", str(wrong), "--ssl-keyfile", files.key)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("", "holds no key"),
        ("alice\n", "line 1: expected NAME KEY"),
        ("alice sha256:12\n", "64 hexadecimal digits"),
    ],
)
def test_a_wrong_key_file_is_refused_without_showing_a_key(
    made: Made, tmp_path: Path, keys: str, words: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(keys)
    with pytest.raises(ConfigError, match=words):
        made("router", "--api-key-file", str(file))


@pytest.mark.parametrize("key", ["", "with space", "né", "x" * 513])
def test_what_can_be_no_key_is_refused_unseen(made: Made, key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        made("router", "--api-key", key)
    assert not key or key not in str(caught.value)

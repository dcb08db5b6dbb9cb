"""What a user gets for what can't be started: one clear line and exit code 1, never a traceback."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.splitserve.cli.conftest import refusal, splitserve

NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def decode(model: Path | str, redis_url: str, *more: str) -> str:
    arguments = ("--model", str(model), "--redis-url", redis_url, "--log-level", "error", *more)
    return refusal(splitserve("decode", *arguments))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "int4"], "--dtype must be one of auto, bfloat16, float16, float32, not int4"),
        (["--block-size", "7"], "--block-size must be 16 or 32, not 7"),
        (["--kv-cache-memory", "lots"], "'lots' is not a size"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], "--max-num-batched-tokens must be at least"),
        (["--log-level", "shout"], "--log-level must be one of debug, info, warning, error, not shout"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not tpu"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization is a share above 0 and up to 1, not 1.5"),
        (["--model", "/nowhere"], "model '/nowhere' is neither a directory"),
    ],
)
def test_up_refuses_values_that_cant_be_before_it_starts_anything(flags: list[str], words: str) -> None:
    done = splitserve("up", *flags)
    said = done.stderr.splitlines()
    assert done.returncode == 1 and said[-1].startswith("splitserve: ") and words in said[-1]
    assert "started, process" not in done.stderr


@pytest.mark.parametrize("command", ["router", "prefill", "decode"])
def test_redis_must_be_named(command: str) -> None:
    model = [] if command == "router" else ["--model", "smollm2"]
    assert "--redis-url is needed" in refusal(splitserve(command, *model))


@pytest.mark.parametrize("command", ["router", "prefill"])
def test_a_redis_that_cant_be_reached_is_named(command: str, tiny: Path) -> None:
    model = [] if command == "router" else ["--model", str(tiny)]
    said = refusal(splitserve(command, *model, "--redis-url", NOWHERE))
    assert said.startswith(f"cannot use Redis at {NOWHERE}: ")


def test_what_is_no_redis_url_is_refused() -> None:
    assert "not a Redis URL: ftp://x" in refusal(splitserve("router", "--redis-url", "ftp://x"))


def test_cores_that_are_not_there_are_refused(tiny: Path) -> None:
    assert decode(tiny, NOWHERE, "--cores", "4000").startswith("cannot run on cores 4000: there are ")


def test_cores_that_are_no_list_are_refused(tiny: Path) -> None:
    assert "'3-1' is not a list of cores" in decode(tiny, NOWHERE, "--cores", "3-1")


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_port_in_use_is_named(redis_url: str, flag: str, taken: int) -> None:
    other = {"--port": "--grpc-port", "--grpc-port": "--port"}[flag]
    arguments = ("--redis-url", redis_url, "--log-level", "error")
    said = refusal(splitserve("router", *arguments, flag, str(taken), other, "0"))
    assert f"cannot listen on 127.0.0.1:{taken}: " in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-transport", "pigeon"], "unknown transport pigeon"),
        (["--kv-cache-memory", "1K"], "holds fewer than two blocks"),
        (["--max-model-len", "100000"], "max-model-len 100000 is more than the 512 tokens"),
        (["--device", "cuda:99"], "--device cpu works everywhere"),
    ],
)
def test_a_worker_refuses_what_its_model_or_machine_cant_do(
    redis_url: str, tiny: Path, flags: list[str], words: str
) -> None:
    assert words in decode(tiny, redis_url, *flags)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "it has no config.json"),
        ({"config.json": "{}"}, "has no *.safetensors weights"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "has only pickled weights"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = splitserve("up", "--model", str(tmp_path))
    said = done.stderr.splitlines()
    assert done.returncode == 1 and said[-1].startswith(f"splitserve: {tmp_path} ") and words in said[-1]
    assert "started, process" not in done.stderr


def test_weights_that_end_early_are_refused(tmp_path: Path, redis_url: str, tiny: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "cut")
    with (model / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)
    assert f"{model} can't be read as a model" in decode(model, redis_url)


@pytest.mark.parametrize(
    "arguments",
    [["nosuch"], ["decode"], ["router", "--port", "99999"], ["up", "--max-num-seqs", "many"], ["up", "--nosuch"]],
)
def test_wrong_usage_ends_with_exit_code_2(arguments: list[str]) -> None:
    done = splitserve(*arguments)
    assert done.returncode == 2 and "Usage: " in done.stderr and "Traceback" not in done.stderr

"""The command, end to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import orjson
import pytest

from bench.options import check, parser
from bench.serve import build, main
from router.echo import EchoConfig
from splitserve.errors import ConfigError

ServeEcho = Callable[[EchoConfig], AbstractAsyncContextManager[str]]


async def test_a_run_prints_and_saves_the_same_figures(
    serve_echo: ServeEcho, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "result.json"
    flags = ["--num-prompts", "6", "--num-warmups", "2", "--ignore-eos"]
    flags += ["--random-input-len", "20", "--random-output-len", "5"]
    flags += ["--request-rate", "200", "--goodput", "ttft:60000", "tpot:60000", "--save-detailed"]
    async with serve_echo(EchoConfig()) as url:
        code = await asyncio.to_thread(main, ["--base-url", url, *flags, "--result-filename", str(path)])
    result = orjson.loads(path.read_bytes())
    printed = capsys.readouterr().out
    assert code == 0
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
    assert (result["model_id"], result["request_rate"], result["slo_attainment"]) == ("echo", 200.0, 1.0)
    assert len(result["itls"]) == 6
    assert f"{result['p99_itl_ms']:.2f}" in printed


async def test_failures_show_and_make_the_exit_code_1(
    serve_echo: ServeEcho, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve_echo(EchoConfig()) as url:
        flags = ["--base-url", url, "--num-prompts", "2", "--random-input-len", "40000"]
        code = await asyncio.to_thread(main, flags)
    assert code == 1
    assert "failed 2 times: status 400" in capsys.readouterr().out


async def test_a_model_that_is_not_served_is_named(serve_echo: ServeEcho) -> None:
    async with serve_echo(EchoConfig()) as url:
        with pytest.raises(ConfigError, match="serves echo, not other"):
            await asyncio.to_thread(main, ["--base-url", url, "--model", "other"])


def test_seeds_are_fresh_unless_given(trace_file: Path) -> None:
    options = parser().parse_args(["--num-prompts", "2", "--random-input-len", "30"])
    first, same, other = (build(options, "m", seed).conversations for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_a_trace_sets_times_and_lengths(trace_file: Path) -> None:
    flags = ["--trace", str(trace_file), "--trace-scale", "2", "--trace-length-scale", "0.125"]
    run = build(parser().parse_args(flags), "m", 1)
    assert run.offsets == [0.0, 1.0, 1.5]
    assert [len(chat.turns[0].prompt) for chat in run.conversations] == [138, 75, 38]
    assert [chat.turns[0].output_tokens for chat in run.conversations] == [5, 2, 1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-prompts", "0"],
        ["--request-rate", "0"],
        ["--burstiness", "-1"],
        ["--long-share", "2"],
        ["--turns", "0"],
    ],
)
def test_values_that_cannot_be_are_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=flags[0]):
        check(parser().parse_args(flags))

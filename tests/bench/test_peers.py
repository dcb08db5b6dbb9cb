"""The file that names the servers of a comparison, and what is made of their results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import bench
from bench.compare import medians
from bench.page import write_page
from bench.peers import read_peers
from bench.plots import write_plots
from bench.workloads import ORDER, SHOWN, TARGETS
from splitserve.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "peers.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("file", ["peers.example.toml", "peers.avx512.toml"])
def test_the_files_that_we_ship_are_valid(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setenv("PEERS", "/opt/peers")
    monkeypatch.setenv("PEER_FILES", "/opt/files")
    peers = read_peers(Path(bench.__file__).parent / file)
    names = set(ORDER)
    assert peers.servers[0].name == "SplitServe"
    assert {target.peer for target in TARGETS if target.peer} <= {peer.name for peer in peers.servers}
    assert all(set(peer.workloads) <= names for peer in peers.servers)
    for peer in peers.servers:
        command = peer.server(1234, (0,))
        assert "1234" in command.command
        assert command.url == "http://127.0.0.1:1234"
    assert sys.executable in peers.servers[0].server(1, ()).command


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no server"),
        ("[[server]]\nname = 'a'", "command"),
        ("[[server]]\nname = 'a'\ncommand = 'b'\nspeed = 1", "unknown key speed"),
        ("[[servers]]\nname = 'a'", "unknown table servers"),
        ("[[server]]\nname = 'a'\ncommand = 'b'\n[[server]]\nname = 'a'\ncommand = 'c'", "two servers"),
        ("not toml", "peers.toml"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_peers(write(tmp_path, text))


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    peer = read_peers(write(tmp_path, "[[server]]\nname = 'a'\ncommand = '$NOBODY_SETS_THIS/x'")).servers[0]
    with pytest.raises(ConfigError, match="NOBODY_SETS_THIS"):
        peer.server(1, ())


def test_medians_are_over_the_rounds_that_have_a_figure() -> None:
    rounds: list[dict[str, Any]] = [
        {"single": {"mean_ttft_ms": 3.0, "failures": {}, "p99_itl_ms": None}},
        {"single": {"mean_ttft_ms": 9.0}},
        {"single": {"mean_ttft_ms": 4.0}, "start": {"seconds": 2.0}},
        {"error": {"message": "it ended"}},
    ]
    assert medians(rounds) == {"single": {"mean_ttft_ms": 4.0}, "start": {"seconds": 2.0}}


def results(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2030-01-01",
        "rounds": 1,
        "scale": 1.0,
        "command": "python -m bench.compare",
        "machine": {"cores": 2},
        "note": "on a quiet machine",
        "servers": {
            "SplitServe": {"command": "a", "note": "", "rounds": 1, "stays": False},
            "vLLM": {"command": "b", "note": "slow", "rounds": 1, "stays": True},
        },
        "medians": {"SplitServe": medians([ours]), "vLLM": medians([theirs])},
        "probes": {},
        "runs": {"SplitServe": [ours], "vLLM": [theirs]},
    }


def test_the_page_tells_targets_met_missed_and_not_measured(tmp_path: Path) -> None:
    ours = {"single": {"mean_tpot_ms": 10.0}, "prefill": {"mean_ttft_ms": 900.0}}
    theirs = {"single": {"mean_tpot_ms": 24.0}, "prefill": {"mean_ttft_ms": 1000.0}}
    page = write_page(results(ours, theirs), tmp_path / "page.md", []).read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if "≤" in line or "≥" in line}
    assert "0.42× | ≤ 0.55× | met" in rows["128 in / 64 out, one at a time"]
    assert "0.90× | ≤ 0.85× | **missed**" in rows["1024 in / 1 out, one at a time"]
    assert rows["start to ready"].endswith("not measured |")
    assert "**on a quiet machine**" in page
    assert "vLLM (1 round; started once, idle while others are measured; slow): `b`" in page


def test_a_target_without_a_peer_is_judged_by_itself(tmp_path: Path) -> None:
    page = write_page(results({"idle": {"cpu_fraction": 0.07}}, {}), tmp_path / "page.md", []).read_text()
    assert "| nobody asks | CPU, cores | 0.07 |  |  | ≤ 0.05 | **missed** |" in page


def test_the_page_tells_the_rates_tried_and_what_failed(tmp_path: Path) -> None:
    tried = [
        {"rate": 1.0, "attainment": 0.95, "requests": 30, "ended_early": False},
        {"rate": 1.19, "attainment": 0.5, "requests": 36, "ended_early": True},
    ]
    ours = {"goodput": {"rate": 1.0, "tried": tried}, "error": {"message": "it ended\nwith a log"}}
    data = results(ours, {})
    page = write_page(data, tmp_path / "page.md", []).read_text()
    assert "- SplitServe, run 1: 1: 95%, 1.19: ≤ 50%" in page
    assert "- SplitServe, run 1: it ended" in page


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    step = {"rate": 1.0, "attainment": 0.95, "requests": 30, "ended_early": False}
    gaps = {"time": [0.1, 0.2], "gap_ms": [30.0, 100.0], "long_prompts": [0.15]}
    data = results({"goodput": {"rate": 1.0, "tried": [step]}, "mix": {"gaps": gaps}}, {})
    assert [path.name for path in write_plots(data, tmp_path, "x")] == ["x-itl.png", "x-goodput.png"]
    assert write_plots(results({}, {}), tmp_path, "y") == []


def test_failed_requests_spoil_a_target_and_are_listed(tmp_path: Path) -> None:
    ours = {"single": {"mean_tpot_ms": 1.0, "failed": 2, "failures": {"status 503": 2}}}
    theirs = {"single": {"mean_tpot_ms": 24.0, "failed": 0, "failures": {}}}
    page = write_page(results(ours, theirs), tmp_path / "page.md", []).read_text()
    assert "**missed**: 2 requests failed" in page
    assert "SplitServe, run 1, 128 in / 64 out, one at a time: 2 requests: status 503" in page


def test_every_workload_shows_something() -> None:
    assert set(ORDER) == set(SHOWN)

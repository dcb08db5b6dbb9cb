"""Who is measured when, with servers that only exist in name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.peers import Peer
from bench.results import Results
from bench.rounds import Rounds
from splitserve.errors import ConfigError

OURS = Peer("ours", "")
SLOW = Peer("slow start", "", stays=True)
SELDOM = Peer("seldom", "", rounds=1, workloads=("single",))


class Script:
    """Plays rounds and writes down what happened; ``broken``: (server, workload) that fail once each."""

    def __init__(
        self, folder: Path, *peers: Peer, rounds: int = 2, broken: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self.results = Results(folder)
        self.rounds = Rounds(peers, ["start", "single", "mix"], rounds, self.results)
        self.happened: list[str] = []
        self._broken = set(broken)

    def play(self) -> list[str]:
        self.happened.clear()
        self.rounds.play(self._start, self._measure, lambda: None, lambda text: None)
        return self.happened

    @contextmanager
    def _start(self, peer: Peer) -> Iterator[str]:
        self.happened.append(f"start {peer.name}")
        self._fail(peer, "start")
        try:
            yield f"server of {peer.name}"
        finally:
            self.happened.append(f"end {peer.name}")

    def _measure(self, peer: Peer, server: str, workload: str) -> dict[str, Any]:
        assert server == f"server of {peer.name}"
        self._fail(peer, workload)
        self.happened.append(f"{peer.name}: {workload}")
        return {"seconds": 1.0}

    def _fail(self, peer: Peer, workload: str) -> None:
        if (peer.name, workload) in self._broken:
            self._broken.remove((peer.name, workload))
            raise ConfigError(f"{workload} broke")


def test_servers_take_turns_and_end_after_theirs(tmp_path: Path) -> None:
    assert Script(tmp_path, OURS, SELDOM).play() == [
        *("start ours", "ours: start", "ours: single", "end ours"),
        *("start ours", "ours: start", "ours: single", "ours: mix", "end ours"),
        *("start seldom", "seldom: single", "end seldom"),
    ]


def test_a_server_that_stays_is_started_once_and_ended_after_its_last_turn(tmp_path: Path) -> None:
    assert Script(tmp_path, SLOW, SELDOM).play() == [
        *("start slow start", "slow start: start", "slow start: single"),
        *("slow start: single", "slow start: mix", "end slow start"),
        *("start seldom", "seldom: single", "end seldom"),
    ]


def test_what_is_on_disk_is_not_measured_again(tmp_path: Path) -> None:
    Script(tmp_path, OURS, SLOW).play()
    assert Script(tmp_path, OURS, SLOW).play() == []
    Results(tmp_path).drop("ours", 2, "single")
    assert Script(tmp_path, OURS, SLOW).play() == ["start ours", "ours: single", "end ours"]


@pytest.mark.parametrize("workload", ["start", "single"])
def test_a_failure_ends_one_turn_and_is_tried_again_the_next_time(tmp_path: Path, workload: str) -> None:
    script = Script(tmp_path, OURS, SLOW, rounds=1, broken=(("ours", workload),))
    happened = script.play()
    assert "ours: single" not in happened
    assert happened.count("start ours") - happened.count("end ours") == (workload == "start")
    assert "slow start: single" in happened
    assert script.results.runs("ours")[0]["error"] == {"message": f"{workload} broke"}
    assert "ours: single" in script.play()
    assert "error" not in script.results.runs("ours")[0]


def test_a_server_that_failed_while_it_stayed_is_started_again(tmp_path: Path) -> None:
    script = Script(tmp_path, SLOW, broken=(("slow start", "single"),))
    happened = script.play()
    assert happened.count("start slow start") == happened.count("end slow start") == 2


def test_results_of_another_scale_are_not_mixed_in(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.facts(1.0)["scale"] == 1.0
    assert results.facts(1.0) == results.facts(1.0)
    with pytest.raises(ConfigError, match="another folder"):
        results.facts(0.5)

"""Recorded requests, and prompts made from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.datasets import from_trace
from bench.trace import read_trace
from splitserve.errors import ConfigError

VOCAB = 5000


def prompts(path: Path, scale: float = 1.0, seed: int = 3) -> list[list[int]]:
    entries = [entry.scaled(scale) for entry in read_trace(path)]
    return [list(chat.turns[0].prompt) for chat in from_trace(entries, seed, VOCAB)]


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_line_becomes_a_request(trace_file: Path) -> None:
    first, second, _ = read_trace(trace_file)
    assert (first.time, first.input_tokens, first.output_tokens, first.blocks) == (0.0, 1100, 40, (0, 1, 2))
    assert second.time == 2.0


def test_only_as_many_requests_as_asked_for(trace_file: Path) -> None:
    assert len(read_trace(trace_file, 2)) == 2


def test_prompts_have_the_recorded_lengths(trace_file: Path) -> None:
    assert [len(prompt) for prompt in prompts(trace_file)] == [1100, 600, 300]


def test_prompts_share_exactly_the_recorded_blocks(trace_file: Path) -> None:
    first, second, third = prompts(trace_file)
    assert shared(first, second) == 512
    assert shared(first, third) == shared(second, third) == 0


def test_scaling_lengths_keeps_what_is_shared(trace_file: Path) -> None:
    first, second, third = prompts(trace_file, 1 / 16)
    assert [len(first), len(second), len(third)] == [69, 38, 19]
    assert shared(first, second) == 32
    assert shared(first, third) == 0


def test_scaled_requests_have_at_least_one_token(trace_file: Path) -> None:
    assert all(len(prompt) == 1 for prompt in prompts(trace_file, 1e-6))


def test_another_seed_gives_other_prompts(trace_file: Path) -> None:
    assert prompts(trace_file) == prompts(trace_file)
    assert shared(prompts(trace_file)[0], prompts(trace_file, seed=4)[0]) == 0


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"timestamp": 0}',
        '{"timestamp": "x", "input_length": 1, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}',
        '{"timestamp": -5, "input_length": 1, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": 7}',
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=r"trace\.jsonl:1"):
        read_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_trace(tmp_path / "nowhere")

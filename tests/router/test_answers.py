"""Tokens become text; several answers become one sequence; nothing outlives the block."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.answers import Answer, Answers, Piece
from router.backend import GenerationRequest, ModelSpec
from router.echo import EchoBackend, EchoConfig
from router.observer import NullObserver
from splitserve.errors import EngineError, Unavailable
from splitserve.sampling import FinishReason, SamplingParams

PARAMS = SamplingParams(max_tokens=300, seed=0)


def make(spec: ModelSpec, backend: EchoBackend, text: str, params: SamplingParams, index: int = 0) -> Answer:
    request = GenerationRequest(f"r{index}", spec.name, spec.tokenizer.encode(text), params)
    return Answer(backend, spec, request, index, asyncio.get_running_loop().time(), NullObserver())


async def read(answers: Sequence[Answer]) -> list[Piece]:
    pieces: list[Piece] = []
    async with Answers(answers) as running:
        while batch := await running.next():
            pieces += batch
    return pieces


def joined(pieces: Sequence[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)


@given(
    text=st.text("ab é👋", min_size=1, max_size=30),
    stop=st.lists(st.text("ab é", min_size=1, max_size=3), max_size=3),
    per_chunk=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_the_text_is_that_of_the_tokens_up_to_the_first_stop(
    spec: ModelSpec, text: str, stop: list[str], per_chunk: int
) -> None:
    backend = EchoBackend([spec], EchoConfig(tokens_per_chunk=per_chunk))

    async def run() -> list[Piece]:
        return await read([make(spec, backend, text, replace(PARAMS, stop=tuple(stop)))])

    pieces = asyncio.run(run())
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    assert joined(pieces) == (text[: min(ends)[1]] if ends else text)
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert (pieces[-1].stop_reason is not None) == bool(ends)
    assert backend.active == 0


async def test_tokens_behind_a_stop_string_are_dropped(spec: ModelSpec) -> None:
    backend = EchoBackend([spec], EchoConfig(tokens_per_chunk=99))
    answer = make(spec, backend, "one two three four", replace(PARAMS, stop=("three",)))
    pieces = await read([answer])
    assert answer.completion_tokens == sum(len(piece.tokens) for piece in pieces) == 3


async def test_held_back_text_comes_at_the_end(spec: ModelSpec) -> None:
    backend = EchoBackend([spec])
    pieces = await read([make(spec, backend, "one two", replace(PARAMS, stop=(" two three",)))])
    assert joined(pieces) == "one two"
    assert pieces[-1].text == " two"


async def test_an_unfinished_character_is_replaced_at_the_end(spec: ModelSpec) -> None:
    pieces = await read([make(spec, EchoBackend([spec]), "𓂀", replace(PARAMS, max_tokens=1))])
    assert (joined(pieces), pieces[-1].finish_reason) == ("\ufffd", FinishReason.LENGTH)


async def test_answers_run_side_by_side(spec: ModelSpec) -> None:
    backend = EchoBackend([spec], EchoConfig(token_delay=0.001))
    pieces = await read([make(spec, backend, "a b c d e f", PARAMS, index) for index in range(4)])
    assert [joined(pieces, index) for index in range(4)] == ["a b c d e f"] * 4
    assert len({piece.index for piece in pieces[:8]}) > 1


async def test_a_slow_reader_slows_its_answers_down(spec: ModelSpec) -> None:
    params = replace(PARAMS, max_tokens=390, ignore_eos=True)
    backend = EchoBackend([spec])
    answers = [make(spec, backend, "a", params, index) for index in range(3)]
    async with Answers(answers) as running:
        await running.next()
        for _ in range(2000):
            await asyncio.sleep(0)
        assert sum(answer.completion_tokens for answer in answers) < 300


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_early_closes_the_backend(spec: ModelSpec, count: int) -> None:
    backend = EchoBackend([spec], EchoConfig(token_delay=0.001))
    async with Answers([make(spec, backend, "a b c", PARAMS, i) for i in range(count)]) as running:
        await running.next()
    assert (backend.active, backend.cancelled) == (0, count)


@pytest.mark.parametrize("count", [1, 3])
async def test_a_failure_is_raised_and_ends_the_others(spec: ModelSpec, count: int) -> None:
    backend = EchoBackend([spec], EchoConfig(failure=Unavailable("gone"), fail_after=2))
    with pytest.raises(Unavailable, match="gone"):
        await read([make(spec, backend, "a b c", PARAMS, index) for index in range(count)])
    assert backend.active == 0


async def test_an_answer_that_breaks_off_is_an_error(spec: ModelSpec) -> None:
    class Mute(EchoBackend):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            return
            yield

    with pytest.raises(EngineError, match="broke off"):
        await read([make(spec, Mute([spec]), "a", PARAMS)])

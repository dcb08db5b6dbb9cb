"""Chat templates render in processes that the kernel ends when they use too much."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from router.renderer import Limits, ProcessRenderer
from splitserve.errors import InvalidRequest
from splitserve.text import ChatTemplate

pytestmark = pytest.mark.asyncio(loop_scope="module")
HI = [{"role": "user", "content": "hi"}]
POLITE = ChatTemplate("{{ bos }}{% for m in messages %}{{ m.content }};{% endfor %}", {"bos": "<s>"})
FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
FOR_EVER += "{% endfor %}{% endfor %}"
DOUBLED = "{{% set n = namespace(x={}) %}}{{% for i in range(64) %}}{{% set n.x = {} %}}{{% endfor %}}{{{{ {} }}}}"


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "router.render_process" in p.cmdline()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def renderer() -> AsyncIterator[ProcessRenderer]:
    async with ProcessRenderer(Limits(seconds=0.2, wall_seconds=60)) as made:
        yield made
    assert not children()


async def test_renders_as_the_template_says(renderer: ProcessRenderer) -> None:
    assert await renderer.render(POLITE, HI, True) == "<s>hi;"
    assert await renderer.render(POLITE, [*HI, *HI], True) == "<s>hi;hi;"


async def test_a_template_keeps_its_process(renderer: ProcessRenderer) -> None:
    await renderer.render(POLITE, HI, True)
    before = [p.pid for p in children()]
    await renderer.render(POLITE, HI, False)
    assert [p.pid for p in children()] == before


async def test_what_a_template_refuses_is_the_clients_error(renderer: ProcessRenderer) -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        await renderer.render(ChatTemplate("{{ raise_exception('roles must alternate') }}", {}), HI, True)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        FOR_EVER,
        "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for x in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
        DOUBLED.format("(1, 1)", "(n.x, n.x)", "{n.x: 1}"),  # hashes 2 ** 64 numbers in one operation
        DOUBLED.format("[]", "[n.x, n.x]", "n.x"),  # writes as many lists
        DOUBLED.format("9", "n.x * n.x", "1"),
    ],
)
async def test_one_that_never_ends_is_ended(renderer: ProcessRenderer, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await renderer.render(ChatTemplate(source, {}), HI, True)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%010000000000d' % 1 }}",
        "{{ '%10000000000s' | format('a') }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ [1] | batch(10**10, 'a') | list }}",
        "{{ ('a' * 9999).replace('a', 'b' * 999999) }}",
        "{{ range(99999) | join('a' * 99999) }}",
        "{{ [1] | tojson(indent=10**10) }}",
        "{{ lipsum(n=10**9) }}",
        DOUBLED.format("'ab'", "n.x ~ n.x", "1"),
    ],
)
async def test_one_that_would_fill_the_memory_is_refused(renderer: ProcessRenderer, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await renderer.render(ChatTemplate(source, {}), HI, True)
    assert caught.value.field == "messages"
    assert len(caught.value.message) < 700


async def test_a_template_that_was_ended_can_be_asked_again(renderer: ProcessRenderer) -> None:
    template = ChatTemplate("{% if messages[0].content == 'hi' %}" + FOR_EVER + "{% endif %}ok", {})
    with pytest.raises(InvalidRequest, match=r"did not end within 0\.2 s"):
        await renderer.render(template, HI, True)
    assert await renderer.render(template, [{"role": "user", "content": "ho"}], True) == "ok"


async def test_how_a_process_ended_is_known_to_a_slow_waiter_too(
    renderer: ProcessRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(pid: int, options: int) -> tuple[int, int]:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        time.sleep(0.1)
        return waitpid(pid, options)

    waitpid = os.waitpid
    monkeypatch.setattr("os.waitpid", slow)
    with pytest.raises(InvalidRequest, match=r"did not end within 0\.2 s"):
        await renderer.render(ChatTemplate(FOR_EVER + "slow", {}), HI, True)


async def test_others_go_on_while_one_hangs(renderer: ProcessRenderer) -> None:
    await renderer.render(POLITE, HI, True)
    async with ProcessRenderer(Limits(seconds=60)) as patient:
        hanging = asyncio.create_task(patient.render(ChatTemplate(FOR_EVER, {}), HI, True))
        while not any(p.cpu_times().user > 0.4 for p in children()):
            assert await patient.render(POLITE, HI, True) == "<s>hi;"
        assert not hanging.done()
        hanging.cancel()
        await asyncio.wait([hanging])


async def test_a_cancelled_rendering_leaves_no_answer_for_the_next() -> None:
    answers: list[Any] = []
    async with ProcessRenderer() as renderer:
        await renderer.render(POLITE, HI, True)
        for _ in range(3):
            task = asyncio.create_task(renderer.render(POLITE, [{"role": "user", "content": "no"}], True))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            answers.append(await renderer.render(POLITE, HI, True))
    assert answers == ["<s>hi;"] * 3


async def test_idle_processes_make_room() -> None:
    others = children()
    async with ProcessRenderer(Limits(processes=2)) as renderer:
        for number in range(4):
            assert await renderer.render(ChatTemplate(f"{number}", {}), HI, True) == str(number)
        assert len([p for p in children() if p not in others]) == 2

"""Chat completions, as the ``openai`` package sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from router.admission import tenant_salt
from router.echo import EchoConfig

pytestmark = pytest.mark.asyncio(loop_scope="session")

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You echo."},
    {"role": "user", "content": "Grüße 👋 to the whole world"},
]
ECHO = "system\nYou echo.\nuser\nGrüße 👋 to the whole world\nassistant\n"


async def test_a_plain_answer_has_openais_shape(front: Any) -> None:
    answer = await front.openai.chat.completions.create(model="echo", messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ECHO, "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_streamed_deltas_join_to_the_plain_answer(front: Any) -> None:
    stream = await front.openai.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ECHO
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all("\ufffd" not in (chunk.choices[0].delta.content or "") for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_the_synchronous_client_works(front: Any) -> None:
    def talk() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as client:
            plain = client.chat.completions.create(model="echo", messages=MESSAGES)
            stream = client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return plain.choices[0].message.content, streamed

    assert await asyncio.to_thread(talk) == (ECHO, ECHO)


async def test_usage_comes_last_in_a_stream_that_asks_for_it(serve: Any) -> None:
    async with serve(EchoConfig(cached_tokens=7)) as front:
        stream = await front.openai.chat.completions.create(
            model="echo", messages=MESSAGES, stream=True, max_tokens=5, stream_options={"include_usage": True}
        )
        *others, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert last.usage.completion_tokens == 5
    assert last.usage.prompt_tokens_details.cached_tokens == 7
    assert all(chunk.usage is None for chunk in others)


async def test_several_choices_interleave_and_differ_only_in_their_seed(serve: Any) -> None:
    async with serve(EchoConfig(token_delay=0.001)) as front:
        stream = await front.openai.chat.completions.create(
            model="echo", messages=MESSAGES, stream=True, n=3, seed=40, stream_options={"include_usage": True}
        )
        texts, order = ["", "", ""], []
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                order.append(choice.index)
            usage = chunk.usage
        assert texts == [ECHO] * 3
        assert order != sorted(order)
        assert sorted(request.sampling.seed for request in front.backend.requests) == [40, 41, 42]
        assert len({request.request_id for request in front.backend.requests}) == 3
        assert usage.prompt_tokens == len(front.backend.requests[0].prompt_tokens)


async def test_several_choices_without_a_stream(front: Any) -> None:
    answer = await front.openai.chat.completions.create(model="echo", messages=MESSAGES, n=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 12


async def test_logprobs_name_tokens_and_bytes(front: Any) -> None:
    answer = await front.openai.chat.completions.create(
        model="echo", messages=MESSAGES, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode().replace("<|im_start|>", "") == (
        ECHO + "<|im_end|>"
    )
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert content[0].logprob == content[0].top_logprobs[0].logprob == -0.5


async def test_logprobs_can_be_streamed_without_alternatives(front: Any) -> None:
    stream = await front.openai.chat.completions.create(
        model="echo", messages=MESSAGES, logprobs=True, stream=True, max_tokens=3
    )
    entries = [e async for chunk in stream if (lp := chunk.choices[0].logprobs) for e in lp.content]
    assert len(entries) == 3
    assert entries[0].top_logprobs == []


async def test_a_stop_string_ends_the_answer_and_its_work(serve: Any) -> None:
    async with serve(EchoConfig(token_delay=0.001)) as front:
        answer = await front.openai.chat.completions.create(
            model="echo", messages=MESSAGES, stop=["the wh", "never"]
        )
        [choice] = answer.choices
        assert choice.message.content == ECHO[: ECHO.index("the wh")]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", "the wh")
        assert (front.backend.active, front.backend.cancelled) == (0, 1)


async def test_a_stop_string_never_shows_in_a_stream(front: Any) -> None:
    stream = await front.openai.chat.completions.create(
        model="echo", messages=MESSAGES, stop="the whole world", stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == ECHO[: ECHO.index("the whole world")]


async def test_stop_strings_do_not_count_before_min_tokens(front: Any) -> None:
    answer = await front.openai.chat.completions.create(
        model="echo", messages=MESSAGES, stop="system", extra_body={"min_tokens": 5}
    )
    assert answer.choices[0].message.content == ECHO


async def test_an_answer_may_fill_the_context_by_default(front: Any) -> None:
    await front.openai.chat.completions.create(model="echo", messages=MESSAGES)
    [request] = front.backend.requests
    assert request.sampling.max_tokens == 400 - len(request.prompt_tokens)


async def test_max_completion_tokens_limits_the_answer(front: Any) -> None:
    answer = await front.openai.chat.completions.create(model="echo", messages=MESSAGES, max_completion_tokens=2)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")


async def test_parameters_reach_the_backend(front: Any) -> None:
    await front.openai.chat.completions.create(
        model="echo",
        messages=MESSAGES,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"17": -100},
        user="someone",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "cache_salt": "tenant",
        },
        max_tokens=3,
    )
    [request] = front.backend.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, {17: -100})
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((7,), True)
    assert sampling.seed is not None
    assert request.cache_salt == tenant_salt("", "tenant")


async def test_content_may_come_in_parts(front: Any) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = await front.openai.chat.completions.create(model="echo", messages=parts)
    assert "user\na\nb\n" in answer.choices[0].message.content


async def test_the_only_model_needs_no_name(front: Any) -> None:
    response = await front.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1})
    assert response.json()["model"] == "echo"

"""Completions, as the ``openai`` package sees them."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

TEXT = "The quick brown fox"


async def test_a_plain_answer_has_openais_shape(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=TEXT)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 5)


async def test_streamed_texts_join_to_the_plain_answer(front: Any) -> None:
    stream = await front.openai.completions.create(model="echo", prompt=TEXT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_usage_comes_last_in_a_stream_that_asks_for_it(front: Any) -> None:
    stream = await front.openai.completions.create(
        model="echo", prompt=TEXT, stream=True, stream_options={"include_usage": True}
    )
    *_, last = [chunk async for chunk in stream]
    assert (last.choices, last.usage.total_tokens) == ([], 9)


async def test_sixteen_tokens_are_the_default(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=TEXT, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


@pytest.mark.parametrize("prompt", ["one", ["one", "two"], [19556, 905], [[19556], [28120, 905]]], ids=repr)
async def test_prompts_come_in_four_forms(front: Any, spec: Any, prompt: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=prompt)
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    wanted = [p if isinstance(p, str) else spec.tokenizer.decode(p) for p in prompts]
    assert [choice.text for choice in answer.choices] == wanted


async def test_each_prompt_gets_its_n_answers_in_order(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=["one", "two", "three"], n=2)
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two", "three", "three"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 3


async def test_logprobs_are_parallel_lists(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=TEXT, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["The", " quick", " brown", " fox", "<|im_end|>"]
    assert logprobs.text_offset == [0, 3, 9, 15, 19]
    assert logprobs.token_logprobs == [-0.5] * 5
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


async def test_echo_puts_the_prompt_first(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=TEXT, echo=True, n=2)
    assert [choice.text for choice in answer.choices] == [TEXT + TEXT] * 2


async def test_echo_gives_the_logprobs_of_the_prompt(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=TEXT, echo=True, logprobs=1, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["The", " quick", " brown", " fox", "The", " quick"]
    assert logprobs.token_logprobs == [None] + [-0.5] * 5
    assert logprobs.top_logprobs[0] is None
    assert logprobs.text_offset == [0, 3, 9, 15, 19, 22]


async def test_echo_of_no_tokens_scores_a_prompt(front: Any) -> None:
    answer = await front.openai.completions.create(model="echo", prompt=TEXT, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == TEXT
    assert len(answer.choices[0].logprobs.tokens) == 4


async def test_a_streamed_echo_equals_the_plain_one(front: Any) -> None:
    body = {"prompt": TEXT, "echo": True, "logprobs": 2, "seed": 1}
    plain = (await front.complete(**body))["choices"][0]
    stream = await front.openai.completions.create(model="echo", stream=True, **body)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == plain["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for chunk in chunks for x in getattr(chunk.logprobs, name)] == plain["logprobs"][name]


async def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(front: Any, spec: Any) -> None:
    brown = spec.tokenizer.encode(" brown")[0]
    choice = (await front.complete(prompt=TEXT, stop_token_ids=[brown]))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The quick", "stop", brown)


async def test_token_ids_may_come_with_a_seed_and_keep_it(front: Any) -> None:
    await front.complete(prompt=[5, 6], seed=2**63 - 1, n=2)
    assert [request.sampling.seed for request in front.backend.requests] == [2**63 - 1, 0]

"""What bad input gets: a status, OpenAI's error shape, and the name of the field."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import openai
import pytest

from router.echo import EchoConfig
from router.http.tokenize import MAX_TOKENS
from splitserve.errors import EngineError, Overloaded, Unavailable

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]

# path, body, status, field, words of the message
BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (COMPLETIONS, {"prompt": "a", "model": "nope"}, 404, "model", "nope"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": ["a", ""]}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "valid"),
    (COMPLETIONS, {"prompt": 7}, 400, "prompt", "valid string"),
    (COMPLETIONS, {}, 400, "prompt", "required"),
    (COMPLETIONS, {"prompt": [49_152]}, 400, "prompt", "49152"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "-1"),
    (COMPLETIONS, {"prompt": ["a"] * 65}, 400, "prompt", "64"),
    (COMPLETIONS, {"prompt": ["a"] * 9, "n": 16}, 400, "prompt", "128"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "[1"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "9"}, 400, "max_tokens", "integer"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens", "integer"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2**70}, 400, "max_tokens", "integer"),
    (COMPLETIONS, {"prompt": [5] * 300, "max_tokens": 101}, 400, "prompt", "401 tokens"),
    (COMPLETIONS, {"prompt": [5] * 300, "max_tokens": 101}, 400, "prompt", "can hold 400"),
    (COMPLETIONS, {"prompt": [5] * 390, "max_tokens": 123}, 400, "prompt", "513 tokens"),
    (COMPLETIONS, {"prompt": [5] * 512}, 400, "prompt", "length is 512"),
    (COMPLETIONS, {"prompt": "lorem " * 10_000}, 400, "prompt", "400 tokens"),
    (COMPLETIONS, {"prompt": "a" * 100_000}, 400, "prompt", "at least"),
    (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, 400, "temperature", "[0, 2]"),
    (COMPLETIONS, {"prompt": "a", "temperature": 2.1}, 400, "temperature", "[0, 2]"),
    (COMPLETIONS, {"prompt": "a", "temperature": "1"}, 400, "temperature", "number"),
    (COMPLETIONS, {"prompt": "a", "temperature": True}, 400, "temperature", "number"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p", "(0, 1]"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.1}, 400, "top_p", "(0, 1]"),
    (COMPLETIONS, {"prompt": "a", "top_k": -2}, 400, "top_k", "-2"),
    (COMPLETIONS, {"prompt": "a", "min_p": 1.5}, 400, "min_p", "[0, 1]"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n", "[1, 16]"),
    (COMPLETIONS, {"prompt": "a", "n": 17}, 400, "n", "17"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of", "equal n"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
    (COMPLETIONS, {"prompt": "a", "seed": -1}, 400, "seed", "-1"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "16"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop", "characters"),
    (COMPLETIONS, {"prompt": "a", "stop": [1]}, 400, "stop", "string"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [99_999]}, 400, "stop_token_ids", "99999"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [-5]}, 400, "stop_token_ids", "negative"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "max_tokens (16)"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": -1}, 400, "min_tokens", "-1"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": 2.5}, 400, "presence_penalty", "2.5"),
    (COMPLETIONS, {"prompt": "a", "frequency_penalty": -2.5}, 400, "frequency_penalty", "-2.5"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty", "(0, 2]"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "'x'"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias", "100"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"49152": 1}}, 400, "logit_bias", "49152"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(2**40): 1}}, 400, "logit_bias", "token id"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "20"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, 400, "logprobs", "integer"),
    (COMPLETIONS, {"prompt": "a", "cache_salt": "s" * 129}, 400, "cache_salt", "128"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream", "boolean"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    (CHAT, {"messages": []}, 400, "messages", "empty"),
    (CHAT, {}, 400, "messages", "required"),
    (CHAT, {"messages": "hi"}, 400, "messages", "list"),
    (CHAT, {"messages": [{"content": "hi"}]}, 400, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "valid string"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "no content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "image_url"),
    (CHAT, {"messages": HI, "model": "nope"}, 404, "model", "nope"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "21"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": HI, "max_completion_tokens": 0}, 400, "max_tokens", "[1"),
    (CHAT, {"messages": HI, "max_tokens": 511}, 400, "messages", "length is 512"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 600}]}, 400, "messages", "512"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, 400, "response_format", "text"),
    ("/tokenize", {"prompt": "a" * (2**20 + 1)}, 400, "prompt", "1048577 characters"),
    ("/tokenize", {}, 400, "prompt", "either"),
    ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt", "either"),
    ("/detokenize", {"tokens": [10**9]}, 400, "tokens", "1000000000"),
    ("/detokenize", {"tokens": "abc"}, 400, "tokens", "list"),
]


def check_shape(response: Any) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(("path", "body", "status", "field", "words"), BAD)
async def test_bad_values_are_named(
    front: Any, path: str, body: dict[str, Any], status: int, field: str | None, words: str
) -> None:
    response = await front.http.post(path, json=body)
    error = check_shape(response)
    assert (response.status_code, error["param"]) == (status, field), error
    assert words in error["message"]
    assert front.backend.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b'"text"',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_bodies_that_are_no_json_object_are_refused(front: Any, body: bytes) -> None:
    for headers in ({}, {"content-type": "application/json"}):
        response = await front.http.post(COMPLETIONS, content=body, headers=headers)
        assert response.status_code == 400
        check_shape(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", CHAT, 405),
        ("DELETE", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nope", 404),
    ],
)
async def test_unknown_paths_and_methods(front: Any, method: str, path: str, status: int) -> None:
    response = await front.http.request(method, path)
    assert response.status_code == status
    check_shape(response)


async def test_openais_package_raises_its_own_errors(front: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await front.openai.completions.create(model="nope", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        await front.openai.completions.create(model="echo", prompt=[5] * 500, max_tokens=100)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "retry_after"),
    [
        (Overloaded("full", retry_after=2.5), 429, "3"),
        (Unavailable("no decode worker", retry_after=0.2), 503, "1"),
        (EngineError("broken"), 500, None),
    ],
)
async def test_failures_before_the_first_token_are_plain_answers(
    serve: Any, failure: Any, status: int, retry_after: str | None, stream: bool
) -> None:
    async with serve(EchoConfig(failure=failure)) as front:
        response = await front.http.post(COMPLETIONS, json={"prompt": "a b c", "stream": stream})
        assert (response.status_code, response.headers.get("retry-after")) == (status, retry_after)
        check_shape(response)


async def test_failures_after_it_are_events(serve: Any) -> None:
    failure = Unavailable("the decode worker went away")
    async with serve(EchoConfig(failure=failure, fail_after=2)) as front:
        response = await front.http.post(COMPLETIONS, json={"prompt": "a b c d", "stream": True})
        events = response.text.split("\n\n")
        assert response.status_code == 200
        assert "went away" in events[-3]
        assert events[-2] == "data: [DONE]"
        with pytest.raises(openai.APIError, match="went away"):
            async for _ in await front.openai.completions.create(model="echo", prompt="a b c d", stream=True):
                pass


async def test_one_failed_choice_ends_the_others(serve: Any) -> None:
    async with serve(EchoConfig(failure=Unavailable("gone"), fail_after=3)) as front:
        response = await front.http.post(COMPLETIONS, json={"prompt": "a b c d e f", "n": 4})
        assert response.status_code == 503
        assert front.backend.active == 0


@pytest.mark.parametrize("fail_after", [0, 2])
async def test_bugs_of_ours_say_nothing(serve: Any, caplog: Any, fail_after: int) -> None:
    async with serve(EchoConfig(failure=ZeroDivisionError("a secret"), fail_after=fail_after)) as front:
        for stream in (False, True):
            response = await front.http.post(COMPLETIONS, json={"prompt": "a b c d", "stream": stream})
            assert response.status_code == (200 if stream and fail_after else 500)
            assert "Internal server error" in response.text
            assert "secret" not in response.text
            assert front.backend.active == 0
    assert "a secret" in caplog.text


async def test_several_models_must_be_told_apart(serve: Any, spec: Any) -> None:
    async with serve(None, spec, replace(spec, name="other")) as front:
        response = await front.http.post(COMPLETIONS, json={"prompt": "a"})
        assert (response.status_code, check_shape(response)["param"]) == (400, "model")


MANY = 100_000  # entries: an error for each took four seconds and hundreds of megabytes


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": [{}] * MANY}),
        (COMPLETIONS, {"prompt": [[{}]] * MANY}),
        (COMPLETIONS, {"prompt": [5] * MANY}),
        (COMPLETIONS, {"prompt": "a", "stop": [5] * MANY}),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": ["a"] * MANY}),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {str(n): "a" for n in range(MANY)}}),
        (CHAT, {"messages": [5] * MANY}),
        (CHAT, {"messages": [{"role": "user", "content": [5] * MANY}]}),
        ("/detokenize", {"tokens": [5] * (MAX_TOKENS + 1)}),
    ],
    ids=[
        "wrong",
        "wrong inside",
        "tokens",
        "stop",
        "stop_token_ids",
        "logit_bias",
        "messages",
        "content",
        "detokenize",
    ],
)
async def test_millions_of_wrong_entries_cost_no_more_than_one(
    front: Any, path: str, body: dict[str, Any]
) -> None:
    before = time.thread_time()
    answer = await front.http.post(path, json={"model": "echo", **body})
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    assert time.thread_time() - before < 2  # of this thread's computing: the client's JSON and the server's


async def test_what_is_repeated_to_the_client_is_cut(front: Any) -> None:
    name = "x" * 100_000
    for body in ({"model": name}, {"logit_bias": {name: "a"}}, {"response_format": {"type": name}}):
        answer = await front.http.post(CHAT, json={"model": "echo", "messages": HI, **body})
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 3000

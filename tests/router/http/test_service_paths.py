"""Models, tokenizer, health, version, metrics: the paths around generation."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest

from router.echo import EchoConfig

pytestmark = pytest.mark.asyncio(loop_scope="session")

HI = [{"role": "user", "content": "hi"}]


async def test_models_are_listed_and_described(serve: Any, spec: Any) -> None:
    async with serve(None, spec, replace(spec, name="owner/other", max_model_len=99)) as front:
        listed = [model async for model in front.openai.models.list()]
        assert [model.id for model in listed] == ["echo", "owner/other"]
        assert (await front.openai.models.retrieve("owner/other")).max_model_len == 99


async def test_each_model_answers_for_itself(serve: Any, spec: Any) -> None:
    async with serve(None, spec, replace(spec, name="owner/other")) as front:
        answer = await front.complete(prompt="a", model="owner/other")
        assert answer["model"] == front.backend.requests[0].model == "owner/other"


async def test_text_becomes_tokens_and_back(front: Any) -> None:
    tokens = (await front.http.post("/tokenize", json={"prompt": "Hello world"})).json()
    assert tokens == {"count": 2, "max_model_len": 512, "tokens": [19556, 905], "token_strs": None}
    text = (await front.http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
    assert text == {"prompt": "Hello world"}


async def test_conversations_become_tokens_as_in_chat(front: Any) -> None:
    body = {"messages": HI, "return_token_strs": True}
    tokens = (await front.http.post("/tokenize", json=body)).json()
    await front.http.post("/v1/chat/completions", json={"messages": HI})
    assert tokens["tokens"] == list(front.backend.requests[0].prompt_tokens)
    assert tokens["token_strs"][0] == "<|im_start|>"


@pytest.mark.parametrize("path", ["/live", "/ready", "/health"])
async def test_a_ready_router_is_healthy(front: Any, path: str) -> None:
    assert (await front.http.get(path)).status_code == 200


async def test_a_router_that_is_not_ready_says_why(serve: Any) -> None:
    async with serve(EchoConfig(not_ready=("no decode worker",))) as front:
        for path in ("/ready", "/health"):
            response = await front.http.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert "no decode worker" in response.json()["error"]["message"]
        assert (await front.http.get("/live")).status_code == 200


async def test_the_version_is_told(front: Any) -> None:
    assert (await front.http.get("/version")).json() == {"version": version("splitserve")}


async def test_answers_are_counted(serve: Any) -> None:
    async with serve() as front:
        await front.complete(prompt="one two three", n=2)
        text = (await front.http.get("/metrics")).text
    assert 'splitserve_request_success_total{finished_reason="stop",model_name="echo"} 2.0' in text
    assert 'splitserve_generation_tokens_total{model_name="echo"} 8.0' in text
    assert 'splitserve_time_to_first_token_seconds_count{model_name="echo"} 2.0' in text
    assert 'splitserve_inter_token_latency_seconds_count{model_name="echo"} 6.0' in text
    assert 'splitserve_router_requests_running{model_name="echo"} 0.0' in text


async def test_the_api_describes_itself(front: Any) -> None:
    paths = (await front.http.get("/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= set(paths)

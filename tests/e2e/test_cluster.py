"""What a user sees of a running cluster, and what the directory shows of it."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai import AsyncOpenAI, OpenAI

from splitserve.cluster import Role
from splitserve.directory import Directory
from splitserve.grpc_server import open_channel
from splitserve.shared_cores import COLUMNS
from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc, sampling_pb2, worker_pb2, worker_pb2_grpc
from tests.e2e.conftest import RunningCluster, pair, running, worker

BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # of the tiny model: tokens x heads x layers x K and V x head size x float32


def prompt(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


def complete(cluster: RunningCluster, tokens: list[int], **options: object) -> httpx.Response:
    body = {"model": "tiny", "prompt": tokens, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options}
    return httpx.post(f"{cluster.http_url}/v1/completions", json=body, timeout=60)


def metric(cluster: RunningCluster, process: str, name: str) -> float:
    text = httpx.get(cluster.metrics_url(process)).text
    return sum(float(v) for v in re.findall(rf"^splitserve_{name}(?:{{.*}})? ([\d.e+-]+)$", text, re.MULTILINE))


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_idle(cluster: RunningCluster) -> bool:
    return all(
        metric(cluster, process, name) == 0
        for process in ("prefill-0", "decode-0")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    )


def test_bytes_moved_are_blocks_times_block_size(tiny_cluster: RunningCluster) -> None:
    before = metric(tiny_cluster, "decode-0", "kv_transfer_bytes_total")
    assert complete(tiny_cluster, prompt(100, seed=1)).status_code == 200
    assert metric(tiny_cluster, "decode-0", "kv_transfer_bytes_total") - before == 7 * BLOCK_BYTES


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="workers share the only core")
def test_a_decode_worker_computes_on_the_core_of_the_idle_prefill_worker(tiny_cluster: RunningCluster) -> None:
    spec = tiny_cluster.cluster._spec
    prefill_core = spec.workers[0].cores[0]

    def calls() -> int:
        table = memoryview((spec.run_dir / "cores").read_bytes()).cast("i")
        return table[prefill_core * COLUMNS + 2]

    before = calls()
    complete(tiny_cluster, prompt(100, seed=2), max_tokens=64)
    assert calls() > before


def test_workers_give_way_to_the_router(tiny_cluster: RunningCluster) -> None:
    children = tiny_cluster.cluster.children
    niceness = {name: os.getpriority(os.PRIO_PROCESS, children[name].pid) for name in ("router", "decode-0")}
    assert niceness["router"] == os.getpriority(os.PRIO_PROCESS, 0) < niceness["decode-0"]
    group = Path(f"/proc/{children['decode-0'].pid}/autogroup")
    if group.exists() and group.read_text():  # Linux, with sessions scheduled as groups
        assert group.read_text().split()[-1] == str(niceness["decode-0"])


def test_kv_travels_over_ucx(tiny_cluster: RunningCluster) -> None:
    complete(tiny_cluster, prompt(64, seed=2))
    text = httpx.get(tiny_cluster.metrics_url("decode-0")).text
    assert re.search(r'kv_transfer_bytes_total{.*transport="ucx"', text)


async def test_redis_shows_the_blocks_under_both_workers(tiny_cluster: RunningCluster) -> None:
    tokens = prompt(80, seed=3)
    await asyncio.to_thread(complete, tiny_cluster, tokens)
    async with Directory(tiny_cluster.redis_url) as directory, asyncio.timeout(30):
        states = await directory.workers()
        fingerprint = bytes.fromhex(states[0].info.fingerprint)
        from splitserve.hashing import PrefixHasher

        hashes = PrefixHasher(fingerprint).next_blocks(tokens, 16)
        workers = [(s.info.id, s.info.epoch) for s in states]
        while set((await directory.longest_prefix(hashes, workers)).values()) != {5}:
            await asyncio.sleep(0.05)
    assert {s.info.role for s in states} == {Role.PREFILL, Role.DECODE}


def test_an_equal_prompt_reports_cached_tokens(tiny_cluster: RunningCluster) -> None:
    tokens = prompt(120, seed=4)
    first, again = complete(tiny_cluster, tokens).json(), None

    def is_cached() -> bool:
        nonlocal again
        again = complete(tiny_cluster, tokens).json()
        return bool(again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 112)

    until(is_cached, 30)
    assert again is not None and again["choices"] == first["choices"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_salt_keeps_caches_apart(tiny_cluster: RunningCluster) -> None:
    tokens = prompt(120, seed=5)
    complete(tiny_cluster, tokens, cache_salt="a")
    time.sleep(0.3)
    answer = complete(tiny_cluster, tokens, cache_salt="b").json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
def test_one_token_answers_need_no_decode_worker(tiny_cluster: RunningCluster, length: int) -> None:
    answer = complete(tiny_cluster, prompt(length, seed=length), max_tokens=1)
    assert answer.json()["usage"]["completion_tokens"] == 1
    until(lambda: is_idle(tiny_cluster), 20)


def test_the_openai_package_works_unchanged(tiny_cluster: RunningCluster) -> None:
    with OpenAI(base_url=f"{tiny_cluster.http_url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello there, this is a prompt of some length"}],
            max_tokens=6,
            n=3,
            seed=1,
            logprobs=True,
            top_logprobs=2,
        )
        assert len(answer.choices) == 3
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert len(logprobs.content[0].top_logprobs) == 2
        echo = client.completions.create(
            model="tiny", prompt="abc", echo=True, logprobs=1, max_tokens=2, temperature=0
        )
        assert echo.choices[0].text.startswith("abc")
        scored = echo.choices[0].logprobs
        assert scored is not None and scored.token_logprobs is not None
        assert scored.token_logprobs[0] is None and len(scored.token_logprobs) == 5
        stream = client.completions.create(
            model="tiny", prompt="xyz" * 20, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens <= 5


async def test_grpc_health_and_reflection_on_every_process(tiny_cluster: RunningCluster) -> None:
    children = tiny_cluster.cluster.children
    for name, service in (
        ("router", "splitserve.v1.Inference"),
        ("prefill-0", "splitserve.v1.Prefill"),
        ("decode-0", "splitserve.v1.Decode"),
    ):
        async with open_channel(children[name].addresses["grpc"]) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=5
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
            )
            services = {s.name async for reply in call for s in reply.list_services_response.service}
            assert service in services


async def test_grpc_generate_streams_text_and_tokens(tiny_cluster: RunningCluster) -> None:
    async with open_channel(tiny_cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = sampling_pb2.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        request = pb.GenerateRequest(model="tiny", text="q" * 40, sampling=sampling, request_id="me")
        parts = [part async for part in stub.Generate(request, timeout=10)]
    assert sum(len(part.tokens) for part in parts) == 6
    assert {part.request_id for part in parts} == {"me"} and parts[-1].usage.prompt_tokens == 40


async def test_a_client_that_leaves_frees_its_blocks_soon(tiny_cluster: RunningCluster) -> None:
    async with AsyncOpenAI(base_url=f"{tiny_cluster.http_url}/v1", api_key="none") as client:
        for _ in range(3):
            stream = await client.completions.create(
                model="tiny",
                prompt=prompt(200, seed=9),  # type: ignore[arg-type]
                max_tokens=300,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            await anext(aiter(stream))
            await stream.close()
    await asyncio.to_thread(until, lambda: is_idle(tiny_cluster), 5.0)  # gauges are refreshed twice a second


async def test_a_worker_refuses_a_sequence_of_another_model(tiny_cluster: RunningCluster) -> None:
    address = tiny_cluster.cluster.children["decode-0"].addresses["grpc"]
    async with open_channel(address) as channel:
        sequence = worker_pb2.Sequence(request_id="r", fingerprint="00" * 32, tokens=[1], num_prompt_tokens=1)
        call = worker_pb2_grpc.DecodeStub(channel).Decode(worker_pb2.DecodeRequest(sequence=sequence), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "another model" in (refusal.value.details() or "")


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory, tiny_path: Callable[..., str]) -> Iterator[RunningCluster]:
    """A cluster over tcp that the tests below change."""
    workers = pair(tiny_path(), served_model_name="tiny", kv_cache_memory=8 << 20, transports=("tcp",))
    with running(workers, tmp_path_factory.mktemp("changing"), decode_only_tokens=16) as cluster:
        yield cluster


def test_kv_travels_over_tcp_too(changing: RunningCluster, tiny_cluster: RunningCluster) -> None:
    tokens = prompt(200, seed=20)
    over_tcp, over_ucx = complete(changing, tokens).json(), complete(tiny_cluster, tokens).json()
    assert metric(changing, "decode-0", "kv_transfer_bytes_total") == 13 * BLOCK_BYTES
    assert over_tcp["choices"] == over_ucx["choices"]


def test_two_models_live_behind_one_router(changing: RunningCluster, tiny_path: Callable[..., str]) -> None:
    config = worker(
        Role.DECODE, tiny_path("qwen2", 1), "other-0", served_model_name="other", kv_cache_memory=8 << 20
    )
    changing.add("other-0", config)
    with OpenAI(base_url=f"{changing.http_url}/v1", api_key="none") as client:
        assert {model.id for model in client.models.list()} == {"tiny", "other"}
        texts = {
            name: client.completions.create(model=name, prompt="The same prompt.", max_tokens=12, temperature=0)
            .choices[0]
            .text
            for name in ("tiny", "other")
        }
    assert texts["tiny"] != texts["other"]
    assert changing.stop("other-0") == 0


async def test_a_worker_that_ends_leaves_the_directory_with_its_claims(
    changing: RunningCluster, tiny_path: Callable[..., str]
) -> None:
    name = "prefill-1"
    config = worker(Role.PREFILL, tiny_path(), name, served_model_name="tiny", transports=("tcp",))
    await asyncio.to_thread(changing.add, name, config)
    async with Directory(changing.redis_url) as directory:
        assert name in {state.info.id for state in await directory.workers()}
        changing.cluster.children[name].signal(9)  # type: ignore[arg-type]
        async with asyncio.timeout(30):  # its lease is 5 s
            while name in {state.info.id for state in await directory.workers()}:
                await asyncio.sleep(0.1)
    changing.cluster.children.pop(name)


def test_without_prefill_workers_decode_workers_serve_alone(changing: RunningCluster) -> None:
    assert changing.stop("prefill-0") == 0
    assert complete(changing, prompt(100, seed=30)).status_code == 200


def test_without_decode_workers_the_answer_is_503_at_once(changing: RunningCluster) -> None:
    assert changing.stop("decode-0") == 0
    start = time.monotonic()
    answer = complete(changing, prompt(100, seed=31))
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    assert time.monotonic() - start < 10
    assert httpx.get(f"{changing.http_url}/ready").status_code == 503
    assert httpx.get(f"{changing.http_url}/live").status_code == 200

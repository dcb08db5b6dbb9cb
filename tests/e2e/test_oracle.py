"""The same words everywhere: cluster, engine alone and transformers, token by token, in float32."""

from __future__ import annotations

import asyncio
import random
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from engine import LLM, SamplingParams
from splitserve.grpc_server import open_channel
from splitserve.models import resolve_model
from splitserve.v1 import inference_pb2, inference_pb2_grpc
from splitserve.v1 import sampling_pb2 as pb
from tests.e2e.conftest import RunningCluster

PROMPTS = 64
LONGEST = 1500
NEW = 8
WORDS = (
    "The history of the city begins with a small harbour where traders met each spring to exchange wool, salt "
    "and copper. Over the centuries the walls grew, bridges were built, and scholars came from far away to read "
    "in its library. In winter the river froze and children skated between the ships. "
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts of 1 to 1,500 tokens; the lengths are spread evenly over their logarithm."""
    tokens = LLM("smollm2", kv_cache_memory=1 << 20).tokenizer.encode(WORDS * 40)
    draw = random.Random(7)
    lengths = [round(LONGEST ** (i / (PROMPTS - 1))) for i in range(PROMPTS)]
    starts = [draw.randrange(len(tokens) - length) for length in lengths]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """What transformers answers."""
    path = resolve_model("smollm2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        return [_greedy(model, prompt) for prompt in prompts]


def _greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def _engine(prompts: list[list[int]], **options: int) -> list[list[int]]:
    llm = LLM("smollm2", dtype="float32", **{"kv_cache_memory": 1 << 30, **options})
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    answers = [completion.tokens for completion in llm.generate(prompts, params)]
    llm.engine.check_integrity()
    if "kv_cache_memory" in options:
        assert llm.engine.scheduler.num_preemptions > 0
    return answers


def test_the_engine_says_what_transformers_says(prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert _engine(prompts) == expected


@pytest.mark.parametrize("chunk", [16, 100])
def test_other_chunk_sizes_say_the_same(prompts: list[list[int]], expected: list[list[int]], chunk: int) -> None:
    some = slice(0, PROMPTS, 4)
    assert _engine(prompts[some], max_num_batched_tokens=chunk, max_num_seqs=8) == expected[some]


def test_a_pool_that_preempts_says_the_same(prompts: list[list[int]], expected: list[list[int]]) -> None:
    growing = [i for i, prompt in enumerate(prompts) if len(prompt) % 16 > 16 - NEW and len(prompt) < 300]
    blocks = sum(-(-len(prompts[i]) // 16) for i in growing) + 1  # all are admitted, not all can grow
    memory = blocks * 16 * 46080  # bytes; the KV of one token has 46,080
    assert _engine([prompts[i] for i in growing], kv_cache_memory=memory) == [expected[i] for i in growing]


async def test_the_cluster_says_the_same(
    demo_cluster: RunningCluster, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert await _ask(demo_cluster, prompts) == expected


async def test_prefix_hits_say_the_same(
    demo_cluster: RunningCluster, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Prompts that were asked before: now their blocks are cached."""
    some = slice(0, PROMPTS, 3)
    assert await _ask(demo_cluster, prompts[some]) == expected[some]


async def test_seeded_answers_are_the_same_alone_and_in_a_crowd(
    demo_cluster: RunningCluster, prompts: list[list[int]]
) -> None:
    sampling = {"temperature": 1.0, "top_p": 0.95, "seed": 1234, "max_tokens": NEW, "ignore_eos": True}
    batch = prompts[20:44:3]
    alone = [(await _ask(demo_cluster, [prompt], **sampling))[0] for prompt in batch]
    assert await _ask(demo_cluster, batch, **sampling) == alone


async def _ask(cluster: RunningCluster, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """The token ids of all answers, asked for at the same time over the public gRPC API."""
    params = pb.SamplingParams(**(sampling or {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}))
    async with open_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def answer(prompt: list[int]) -> list[int]:
            request = inference_pb2.GenerateRequest(
                model="smollm2", tokens=inference_pb2.TokenIds(ids=prompt), sampling=params
            )
            return [token.id async for part in stub.Generate(request, timeout=250) for token in part.tokens]

        return await asyncio.gather(*(answer(prompt) for prompt in prompts))

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from splitserve.errors import ConfigError, InvalidRequest
from splitserve.sampling import FinishReason
from tests.tiny_models import EOS

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
BLOCK = 16 * 2 * 2 * 2 * 16 * 4  # bytes: tokens x heads x layers x K and V x head size x float32


@pytest.fixture(scope="module")
def path(tiny: Callable[..., Path]) -> str:
    return str(tiny())


@pytest.fixture(scope="module")
def llm(path: str) -> LLM:
    return LLM(path, dtype="float32", kv_cache_memory=8 << 20)


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def tokens(llm: LLM, batch: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [c.tokens for c in llm.generate(batch, params)]


def test_a_small_pool_preempts_and_answers_the_same(path: str, llm: LLM) -> None:
    small = LLM(path, dtype="float32", kv_cache_memory=9 * BLOCK)
    batch = prompts(8)
    assert tokens(small, batch) == tokens(llm, batch)
    assert small.engine.scheduler.num_preemptions > 0
    small.engine.check_integrity()


@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_the_chunk_size_changes_no_answer(path: str, llm: LLM, chunk: int) -> None:
    chunked = LLM(path, dtype="float32", kv_cache_memory=8 << 20, max_num_batched_tokens=chunk, max_num_seqs=8)
    batch = prompts(10, 400)
    assert tokens(chunked, batch) == tokens(llm, batch)


def test_kv_in_float8_takes_a_quarter_of_float32_and_chunks_change_no_answer(path: str, llm: LLM) -> None:
    float8 = LLM(path, dtype="float32", kv_cache_dtype="fp8", kv_cache_memory=8 << 20)
    assert float8.engine.runner.layout.block_bytes * 4 == llm.engine.runner.layout.block_bytes
    assert float8.engine.runner.fingerprint != llm.engine.runner.fingerprint, "their blocks must not meet"
    batch = prompts(10, 200)
    chunked = LLM(path, dtype="float32", kv_cache_dtype="fp8", kv_cache_memory=2 << 20, max_num_batched_tokens=16,
                  max_num_seqs=8)  # fmt: skip
    assert tokens(chunked, batch) == tokens(float8, batch)


def test_float16_answers_what_the_rounded_weights_say(path: str) -> None:
    half = LLM(path, dtype="float16", kv_cache_memory=8 << 20)
    assert half.engine.runner.layout.dtype == "float16"
    assert all(len(answer) == 20 for answer in tokens(half, prompts(3)))


def test_prefix_hits_change_no_answer(path: str) -> None:
    fresh = LLM(path, dtype="float32", kv_cache_memory=8 << 20)
    (base,) = prompts(1, 200, seed=5)
    batch = [[*base[:n], 9, 9] for n in range(1, len(base), 17)]
    first = tokens(fresh, batch)
    again = fresh.generate(batch, GREEDY)
    assert [c.tokens for c in again] == first
    assert again[-1].cached_tokens > 0


def test_a_seeded_answer_is_the_same_alone_and_in_a_crowd(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=11, max_tokens=20, ignore_eos=True)
    batch = prompts(12, seed=3)
    alone = [tokens(llm, [prompt], params)[0] for prompt in batch]
    assert tokens(llm, batch, params) == alone


def test_different_seeds_give_different_answers(llm: LLM) -> None:
    answers = {tuple(tokens(llm, [[1, 2, 3]], SamplingParams(seed=seed, max_tokens=12))[0]) for seed in range(5)}
    assert len(answers) == 5


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    assert len({tuple(tokens(llm, [[1, 2, 3]], params)[0]) for _ in range(5)}) > 1


def test_eos_ends_an_answer(llm: LLM) -> None:
    bias = {EOS: 100.0}
    (answer,) = llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=9, logit_bias=bias))
    assert (answer.tokens, answer.finish_reason) == ([EOS], FinishReason.STOP)


def test_min_tokens_holds_eos_back(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, min_tokens=4, logit_bias={EOS: 100.0})
    (answer,) = llm.generate([[1, 2]], params)
    assert len(answer.tokens) == 5 and answer.tokens[-1] == EOS


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (free,) = llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    stop = free.text[4:6]
    (cut,) = llm.generate(["hello"], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=(stop,)))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    llm.engine.check_integrity()


def test_prompt_logprobs_cover_all_but_the_first_token(llm: LLM) -> None:
    prompt = prompts(1, 100, seed=8)[0]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2, logprobs=3)
    (answer,) = llm.generate([prompt], params)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == len(prompt) - 1
    assert answer.logprobs[0].rank == 1 and len(answer.logprobs[0].top) == 3


def test_prompt_logprobs_equal_those_of_generated_tokens(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    (answer,) = llm.generate([[5, 6, 7]], greedy)
    again = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (scored,) = llm.generate([[5, 6, 7, *answer.tokens]], again)
    assert scored.prompt_logprobs is not None
    expected = [entry.logprob for entry in answer.logprobs]
    assert [e.logprob for e in scored.prompt_logprobs[2:]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "params", "numbers"),
    [
        ([], SamplingParams(), ()),
        ([1] * 512, SamplingParams(), ("512",)),
        ([1] * 500, SamplingParams(max_tokens=13), ("500", "13", "512")),
        ([320], SamplingParams(), ("320",)),
    ],
)
def test_what_can_never_be_served_is_refused(
    llm: LLM, prompt: list[int], params: SamplingParams, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        llm.generate([prompt], params)
    assert all(number in refusal.value.message for number in numbers)


def test_more_kv_than_the_pool_is_refused(path: str) -> None:
    small = LLM(path, dtype="float32", kv_cache_memory=4 * BLOCK)
    with pytest.raises(InvalidRequest, match=r"69 tokens.*64"):
        small.generate([[1] * 60], SamplingParams(max_tokens=10))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "no \\*.safetensors"),
        ({"config.json": "{}", "model.bin": ""}, "pickled"),
        ({"config.json": '{"architectures": ["Strange"]}', "m.safetensors": ""}, "Strange|read as a model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        LLM(str(tmp_path))


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("nonsense")
    with pytest.raises(ConfigError, match="GGUF"):
        LLM(str(tmp_path / "m.gguf"))

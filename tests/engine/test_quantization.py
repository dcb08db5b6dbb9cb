"""int8 weights on the demo model: what they cost in likelihood, and that their KV is not mixed with another's."""

from __future__ import annotations

import math

import pytest

from engine import LLM, SamplingParams
from splitserve.errors import ConfigError

TEXTS = (
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface. Cooks"
    " who live high above the sea know that beans take longer there, and that bread rises faster than the"
    " recipe says.",
    "The old lighthouse keeper climbed the stairs every evening, even after the lamp had been made "
    "electric. He said that the sea would notice if nobody came, and nobody in the village wanted to be "
    "the one to prove him wrong.",
    "To find the largest number in a list, keep the best one seen so far. Go through the list from the "
    "beginning, compare each number with it, and replace it whenever the new one is larger. At the end it"
    " is the answer.",
)


def mean_logprob(llm: LLM) -> float:
    """Of the tokens of TEXTS, natural logarithm."""
    answers = llm.generate(list(TEXTS), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    logprobs = [entry.logprob for answer in answers for entry in answer.prompt_logprobs or ()]
    assert len(logprobs) > 100
    return sum(logprobs) / len(logprobs)


def test_int8_weights_cost_little_likelihood_and_have_their_own_fingerprint() -> None:
    plain = LLM("smollm2", kv_cache_memory=32 << 20)
    rounded = LLM("smollm2", quantization="int8", kv_cache_memory=32 << 20)
    perplexity = math.exp(mean_logprob(plain) - mean_logprob(rounded))  # of int8 over that of bfloat16
    assert perplexity < 1.02, perplexity
    assert plain.engine.runner.fingerprint != rounded.engine.runner.fingerprint


def test_other_quantizations_are_refused() -> None:
    with pytest.raises(ConfigError, match="int4"):
        LLM("smollm2", quantization="int4", kv_cache_memory=1 << 20)

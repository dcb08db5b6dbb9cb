"""int8 weights are another model; what they cost in likelihood is measured with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from splitserve.errors import ConfigError


def test_int8_weights_answer_under_a_fingerprint_of_their_own(tiny: Callable[..., Path]) -> None:
    plain = LLM(str(tiny()), kv_cache_memory=1 << 20)
    rounded = LLM(str(tiny()), quantization="int8", kv_cache_memory=1 << 20)
    assert plain.engine.runner.fingerprint != rounded.engine.runner.fingerprint
    [answer] = rounded.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(answer.tokens) == 4


def test_other_quantizations_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="int4"):
        LLM(str(tiny()), quantization="int4", kv_cache_memory=1 << 20)

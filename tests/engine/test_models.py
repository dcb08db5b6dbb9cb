"""Greedy answers of every family equal those of transformers on the same weights, in float32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from tests.tiny_models import FAMILIES, VOCAB

NEW = 12


def transformers_greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(tiny: Callable[..., Path], family: str) -> None:
    path = tiny(family)
    draw = random.Random(1)
    prompts = [[draw.randrange(256) for _ in range(length)] for length in (1, 2, 15, 16, 17, 33, 150, 300)]
    llm = LLM(str(path), dtype="float32", max_num_batched_tokens=64, kv_cache_memory=8 << 20)
    got = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    assert [c.tokens for c in got] == transformers_greedy(path, prompts)
    llm.engine.check_integrity()


def test_vocabulary_is_that_of_the_config(tiny: Callable[..., Path]) -> None:
    assert LLM(str(tiny()), kv_cache_memory=1 << 20).engine.vocab_size == VOCAB

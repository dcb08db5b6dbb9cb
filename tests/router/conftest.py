"""A model to route for: the demo model's tokenizer and small limits."""

from __future__ import annotations

import pytest

from router.backend import ModelSpec
from splitserve.text import Tokenizer


@pytest.fixture(scope="session")
def spec(demo_tokenizer: Tokenizer) -> ModelSpec:
    """The demo model with a context of 512 tokens and a pool that holds 400."""
    return ModelSpec(
        name="echo",
        fingerprint="00" * 32,
        tokenizer=demo_tokenizer,
        eos_token_ids=frozenset({2}),
        max_model_len=512,
        vocab_size=49_152,
        block_tokens=16,
        max_sequence_tokens=400,
    )

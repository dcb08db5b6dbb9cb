"""How large everything is: the real sizes, and tiny ones that prove on a CPU that every part runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.gpu.model import LLAMA_3_8B
from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Scale:
    """Tokens, unless said otherwise."""

    model: ModelConfig
    dtype: torch.dtype
    copy_bytes: int
    matrix: int  # rows and columns
    decode_sequences: int  # of decode attention
    decode_context: int
    prefill: int  # a long prompt: prefill attention, the prefill step, what is transferred
    step_sequences: tuple[int, ...]  # decode steps
    step_context: int
    idle_sequences: int
    steps: int  # timed decode steps
    streams: int  # that are answered while long prompts arrive
    prompts: int  # that arrive
    stream_context: int
    chunk: int  # of chunked prefill beside the streams
    rounds: int  # of one timing
    tuned_cuts: int  # to try of each kernel


FULL = Scale(
    model=LLAMA_3_8B, dtype=torch.bfloat16, copy_bytes=4 << 30, matrix=8192, decode_sequences=64,
    decode_context=4096, prefill=8192, step_sequences=(1, 32, 128), step_context=1024, idle_sequences=64, steps=40,
    streams=32, prompts=6, stream_context=512, chunk=2048, rounds=20, tuned_cuts=14,
)  # fmt: skip
TINY_MODEL = replace(
    LLAMA_3_8B, vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
    intermediate_size=32, max_position=256,
)  # fmt: skip
TINY = Scale(
    model=TINY_MODEL, dtype=torch.float32, copy_bytes=1 << 16, matrix=32, decode_sequences=2, decode_context=32,
    prefill=48, step_sequences=(1,), step_context=8, idle_sequences=1, steps=2, streams=1, prompts=1,
    stream_context=8, chunk=16, rounds=1, tuned_cuts=1,
)  # fmt: skip

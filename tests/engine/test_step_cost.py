"""What Python does in a step must hardly grow with the number of running sequences.

Calls are counted, not seconds: `bench.overhead` times them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from engine import LLM, EngineRequest, SamplingParams
from engine.core import Engine

FEW, MANY = 8, 104
CALLS = 64  # of Python and C functions, for one more sequence in a step


def calls_of_a_decode_step(engine: Engine, sequences: int) -> int:
    """Of a step that allocates no block."""
    for i in range(sequences):
        engine.add(
            EngineRequest(f"r{i}", [i, 1, 2, 3], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        )
    while engine.scheduler.waiting or any(s.remaining > 1 for s in engine.scheduler.running):
        engine.step()
    engine.step()
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        result = engine.step()
    finally:
        sys.setprofile(None)
    assert len(result.outputs) == sequences
    while engine.has_work:
        engine.step()
    return calls


def test_one_more_sequence_costs_few_calls(tiny: Callable[..., Path]) -> None:
    engine = LLM(str(tiny()), max_num_seqs=128, max_num_batched_tokens=512, kv_cache_memory=4 << 20).engine
    few, many = (calls_of_a_decode_step(engine, n) for n in (FEW, MANY))
    print(few, many)
    assert (many - few) / (MANY - FEW) <= CALLS
    engine.check_integrity()

"""Counts and speeds of one engine, read by whoever exports them. Written by the engine's thread only."""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 0.2  # of the newest sample in a moving average
_PREFILL_ROWS = 32  # steps with fewer rows of prefill say little about prefill speed


@dataclass(slots=True)
class EngineStats:
    steps: int = 0
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0
    preemptions: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0

    def record_step(self, prefill_rows: int, decode_rows: int, seconds: float) -> None:
        self.steps += 1
        if prefill_rows >= _PREFILL_ROWS:
            self.prefill_tokens_per_second = _average(self.prefill_tokens_per_second, prefill_rows / seconds)
        elif decode_rows and not prefill_rows:
            self.decode_step_seconds = _average(self.decode_step_seconds, seconds)


def _average(mean: float, sample: float) -> float:
    return sample if mean == 0.0 else mean + _WEIGHT * (sample - mean)

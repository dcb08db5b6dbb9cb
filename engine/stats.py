"""Counts and speeds of one engine, read by whoever exports them. Written by the engine's thread only."""

from __future__ import annotations

from dataclasses import dataclass, field

_WEIGHT = 0.2  # of the newest sample in a moving average
_PREFILL_ROWS = 32  # steps with fewer rows of prefill say little about prefill speed
_SLOPE_WEIGHT = 0.02  # of the newest step in what a sequence adds: batches change size slowly
_SLOPE_VARIANCE = 0.25  # of recent batch sizes, below which they say nothing of it
_SLOPE_LEAST = 1e-6  # seconds: a sequence that costs nothing measurable is still no unknown


@dataclass(slots=True)
class _Slope:
    """Least squares over recent points, the older the lighter."""

    x: float = 0.0  # means
    y: float = 0.0
    variance: float = 0.0  # of x
    covariance: float = 0.0
    empty: bool = True

    def after(self, x: float, y: float) -> float | None:
        """The slope with this point; None while the points are too close together."""
        if self.empty:
            self.x, self.y, self.empty = x, y, False
        dx, dy = x - self.x, y - self.y
        self.x += _SLOPE_WEIGHT * dx
        self.y += _SLOPE_WEIGHT * dy
        self.variance = (1 - _SLOPE_WEIGHT) * (self.variance + _SLOPE_WEIGHT * dx * dx)
        self.covariance = (1 - _SLOPE_WEIGHT) * (self.covariance + _SLOPE_WEIGHT * dx * dy)
        return self.covariance / self.variance if self.variance > _SLOPE_VARIANCE else None


@dataclass(slots=True)
class EngineStats:
    steps: int = 0
    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of these, found in the prefix cache
    generated_tokens: int = 0
    preemptions: int = 0
    prefill_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0
    decode_sequence_seconds: float = 0.0  # what one more sequence adds to a decode step
    _slope: _Slope = field(default_factory=_Slope)

    def record_step(self, prefill_rows: int, decode_rows: int, seconds: float) -> None:
        self.steps += 1
        if prefill_rows >= _PREFILL_ROWS:
            self.prefill_tokens_per_second = _average(self.prefill_tokens_per_second, prefill_rows / seconds)
        elif decode_rows and not prefill_rows:
            self.decode_step_seconds = _average(self.decode_step_seconds, seconds)
            slope = self._slope.after(decode_rows, seconds)
            if slope is not None:
                self.decode_sequence_seconds = min(max(slope, _SLOPE_LEAST), self.decode_step_seconds)


def _average(mean: float, sample: float) -> float:
    return sample if mean == 0.0 else mean + _WEIGHT * (sample - mean)

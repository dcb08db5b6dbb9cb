"""When requests start: offsets in seconds from the beginning of a run.

Owns the arithmetic of arrival processes; knows no requests. Invariant: offsets never decrease, and a process of
a given rate lasts ``count / rate`` seconds exactly, so that two runs at one rate carry the same load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An open loop at ``rate`` a second (infinite: all at once), at most ``max_concurrency`` at a time.

    ``burstiness`` is the shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in
    bursts, more comes evenly.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def offsets(self, count: int, rng: np.random.Generator) -> list[float]:
        """Start times of ``count`` requests."""
        if math.isinf(self.rate) or count == 0:
            return [0.0] * count
        gaps = rng.gamma(self.burstiness, 1.0, count)
        times = np.cumsum(gaps)
        times *= count / self.rate / times[-1]
        return [float(time) for time in times]


def replayed(timestamps: Sequence[float], speed: float) -> list[float]:
    """Offsets of recorded ``timestamps`` (seconds), ``speed`` times as fast, the first at 0."""
    start = min(timestamps, default=0.0)
    return sorted((time - start) / speed for time in timestamps)

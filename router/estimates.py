"""What to believe of a worker that has not measured itself yet: what its peers have measured.

Pure functions; knows no policy and no network. With a fixed default instead, a worker that has just started would
get nothing while the others are faster than that, and everything while they are slower.
Invariant: what a worker has measured is never changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from splitserve.cluster import Role, WorkerLoad, WorkerState

_MEASURED = (
    "prefill_tokens_per_second",
    "decode_step_seconds",
    "decode_sequence_seconds",
    "transfer_bytes_per_second",
)


def estimated(states: Sequence[WorkerState]) -> list[WorkerState]:
    """The states with each unknown measurement at the mean of the workers of the same model and role."""
    peers: defaultdict[tuple[str, Role], list[WorkerLoad]] = defaultdict(list)
    for state in states:
        peers[state.info.fingerprint, state.info.role].append(state.load)
    means = {key: _means(loads) for key, loads in peers.items()}
    return [_filled(state, means[state.info.fingerprint, state.info.role]) for state in states]


def _means(loads: Sequence[WorkerLoad]) -> dict[str, float]:
    """Of each measurement that somebody has, over those who have it."""
    values = {name: [v for v in (getattr(load, name) for load in loads) if v] for name in _MEASURED}
    return {name: sum(known) / len(known) for name, known in values.items() if known}


def _filled(state: WorkerState, means: dict[str, float]) -> WorkerState:
    unknown = {name: mean for name, mean in means.items() if not getattr(state.load, name)}
    return replace(state, load=replace(state.load, **unknown)) if unknown else state  # type: ignore[arg-type]

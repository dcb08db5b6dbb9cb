"""Which workers answer a request: pure functions on a snapshot of worker states.

Knows no network and no clock, so that a test is a table of numbers. All predictions are in seconds.
Invariant: a plan names only workers that live, are not draining, have not failed this request, can hold the
sequence, and belong to one group of equal fingerprints (the caller passes one group).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from splitserve.cluster import Role, WorkerState
from splitserve.errors import InvalidRequest, Overloaded, Unavailable

MAX_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """How to weigh and when to refuse. The defaults stand for what a worker has not measured yet."""

    decode_only_tokens: int = 64  # with this many uncached tokens or fewer, no prefill worker is asked
    max_first_token_seconds: float = 60.0  # refuse rather than queue for longer: --ttft-slo
    max_waiting: int = 256  # requests queued on one worker
    expected_answer_tokens: int = 128  # longer ones seldom are: what is asked for is a limit
    kv_weight: float = 1.0  # a full pool counts like tokens that take 1 + kv_weight times as long
    compute_weight: float = (
        5.0  # a token computed holds up those who come later too: it costs more than one waited for
    )
    tie: float = 0.02  # costs this close, relatively, are equal
    default_prefill_tokens_per_second: float = 2000.0
    default_decode_step_seconds: float = 0.02
    default_decode_sequence_seconds: float = 0.001
    default_transfer_bytes_per_second: float = 1e9


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs of the workers."""

    tokens: int  # to have KV of: the prompt and, after a migration, what was generated
    max_new_tokens: int
    seconds_left: float | None = None  # until the request's deadline


@dataclass(frozen=True, slots=True)
class Plan:
    """Who computes the prompt (``prefill`` is None: the decode worker itself) and who generates."""

    prefill: WorkerState | None
    decode: WorkerState
    uncached_prefill: int  # tokens to be computed on the prefill worker
    uncached_decode: int  # tokens to be computed on the decode worker
    decode_blocks: int  # that the sequence will hold there when it starts
    first_token_seconds: float  # predicted

    @property
    def workers(self) -> tuple[WorkerState, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    def describe(self) -> dict[str, str | int | float | None]:
        """Fields for a log record."""
        return {
            "prefill_worker": self.prefill.info.id if self.prefill is not None else None,
            "decode_worker": self.decode.info.id,
            "uncached_tokens": self.uncached_prefill or self.uncached_decode,
            "predicted_ttft": round(self.first_token_seconds, 3),
        }


class _Start(NamedTuple):
    """A way to the first token."""

    worker: WorkerState
    uncached_tokens: int
    seconds: float


def plan(
    demand: Demand,
    owned_blocks: Mapping[str, int],
    states: Sequence[WorkerState],
    config: PolicyConfig,
    excluded: Collection[str] = (),
    rng: random.Random | None = None,
) -> Plan:
    """Chooses workers for one request.

    Args:
        owned_blocks: leading blocks of the prompt that each worker id owns; absent is none.
        states: workers of one model and one fingerprint, with the router's own in-flight requests counted in.
        excluded: ids of workers that have failed this request already.
        rng: breaks ties, so that equal workers share the load.

    Raises:
        Unavailable: no decode worker can be asked.
        Overloaded: all that could be asked are full, or could not make the deadline.
        InvalidRequest: no worker's pool can ever hold the sequence.
    """
    rng = rng or random.Random()
    usable = [s for s in states if not s.load.draining and s.info.id not in excluded]
    decoders = _able(demand.tokens + demand.max_new_tokens, [s for s in usable if s.info.role is Role.DECODE])
    prefillers = _roomy(demand.tokens, [s for s in usable if s.info.role is Role.PREFILL])

    prefill = _best_prefill(demand, owned_blocks, prefillers, config, rng)
    starts = {d.info.id: _start(demand, owned_blocks, d, prefill, config) for d in decoders}
    open_ones = [d for d in decoders if d.load.num_waiting < config.max_waiting]
    if not open_ones:
        wait = min(_step_seconds(d, config) * d.load.num_waiting for d in decoders)
        raise Overloaded("all decode workers are full", _retry_after(wait))
    # A worker that must wait for blocks is worse than any that need not, however fast it is.
    fitting = [d for d in open_ones if _blocks_after(demand, d) <= d.info.num_blocks]

    def cost(decoder: WorkerState) -> float:
        return starts[decoder.info.id].seconds + _decode_cost(demand, decoder, config)

    decode = _least(fitting or open_ones, cost, config, rng)
    start = starts[decode.info.id]
    if (late := _lateness(start, demand, config)) is not None:
        if config.compute_weight > 1:  # the owner of the prompt's blocks may be the busiest
            return plan(demand, owned_blocks, states, replace(config, compute_weight=1.0), excluded, rng)
        raise late
    blocks = _blocks(demand.tokens + 1, decode)
    if start.worker is decode:
        return Plan(None, decode, 0, start.uncached_tokens, blocks, start.seconds)
    return Plan(start.worker, decode, start.uncached_tokens, 0, blocks, start.seconds)


def predicted_first_token(tokens: float, state: WorkerState, config: PolicyConfig) -> float:
    """Seconds until ``state`` has computed ``tokens`` more behind what is queued."""
    speed = state.load.prefill_tokens_per_second or config.default_prefill_tokens_per_second
    return (state.load.queued_tokens + tokens) / speed


def predicted_inter_token(state: WorkerState, config: PolicyConfig) -> float:
    """Seconds between two tokens once what waits, and one more sequence, has joined the batch."""
    more = state.load.decode_sequence_seconds or config.default_decode_sequence_seconds
    if state.load.decode_step_seconds:
        return state.load.decode_step_seconds + more * (1 + state.load.num_waiting)
    return config.default_decode_step_seconds + more * (1 + state.load.num_waiting + state.load.num_running)


def _able(sequence_tokens: int, decoders: list[WorkerState]) -> list[WorkerState]:
    if not decoders:
        raise Unavailable("no decode worker is ready", retry_after=1.0)
    able = _roomy(sequence_tokens, decoders)
    if not able:
        most = max(_capacity(state) for state in decoders)
        raise InvalidRequest(
            f"prompt and answer need {sequence_tokens} tokens, but no worker can hold more than {most}",
            "max_tokens",
        )
    return able


def _roomy(sequence_tokens: int, states: list[WorkerState]) -> list[WorkerState]:
    return [state for state in states if sequence_tokens <= _capacity(state)]


def _capacity(state: WorkerState) -> int:
    """Tokens of the longest sequence that the worker can ever hold."""
    return min(state.info.max_model_len, state.info.num_blocks * state.info.block_tokens)


def _best_prefill(
    demand: Demand,
    owned_blocks: Mapping[str, int],
    prefillers: list[WorkerState],
    config: PolicyConfig,
    rng: random.Random,
) -> _Start | None:
    """The least waiting and weighted computing; full workers only if all are."""
    if not prefillers:
        return None
    open_ones = [p for p in prefillers if p.load.num_waiting < config.max_waiting]

    def cost(state: WorkerState) -> float:
        tokens = config.compute_weight * _uncached(demand, owned_blocks, state)
        return predicted_first_token(tokens, state, config)

    best = _least(open_ones or prefillers, cost, config, rng)
    uncached = _uncached(demand, owned_blocks, best)
    return _Start(best, uncached, predicted_first_token(uncached, best, config))


def _start(
    demand: Demand,
    owned_blocks: Mapping[str, int],
    decoder: WorkerState,
    prefill: _Start | None,
    config: PolicyConfig,
) -> _Start:
    """How a sequence starts that ``decoder`` will go on with."""
    rest = _uncached(demand, owned_blocks, decoder)
    if prefill is None or rest <= config.decode_only_tokens:
        return _Start(decoder, rest, predicted_first_token(rest, decoder, config))
    speeds = (decoder.load.transfer_bytes_per_second, prefill.worker.load.transfer_bytes_per_second)
    bandwidth = next((speed for speed in speeds if speed), config.default_transfer_bytes_per_second)
    missing = _blocks(rest, decoder)
    transfer = missing * decoder.info.block_bytes / bandwidth
    return _Start(prefill.worker, prefill.uncached_tokens, prefill.seconds + transfer)


def _decode_cost(demand: Demand, decoder: WorkerState, config: PolicyConfig) -> float:
    """Seconds of generating, dearer the fuller the pool will be."""
    tokens = min(demand.max_new_tokens, config.expected_answer_tokens)
    usage = min(1.0, _blocks_after(demand, decoder) / decoder.info.num_blocks)
    return tokens * predicted_inter_token(decoder, config) * (1 + config.kv_weight * usage)


def _blocks_after(demand: Demand, decoder: WorkerState) -> int:
    """Blocks held by live sequences once this one has been admitted; its cached blocks become held too."""
    return decoder.load.used_blocks + _blocks(demand.tokens + 1, decoder)


def _lateness(start: _Start, demand: Demand, config: PolicyConfig) -> Overloaded | None:
    """Why the first token would come too late, if so. Without work queued before it a request is tried, however
    slow the worker: waiting would not help it."""
    load, seconds = start.worker.load, start.seconds
    limit = config.max_first_token_seconds
    if load.num_waiting >= config.max_waiting:
        return Overloaded(f"{load.num_waiting} requests wait already", _retry_after(seconds - limit))
    if load.queued_tokens > 0 and seconds > limit:
        return Overloaded(
            f"the first token would take {seconds:.1f} s, {limit:g} s are allowed", _retry_after(seconds - limit)
        )
    left = demand.seconds_left
    if left is not None and load.queued_tokens > 0 and load.prefill_tokens_per_second > 0 and seconds > left:
        return Overloaded(
            f"the first token would take {seconds:.1f} s, the request has {left:.1f} s",
            _retry_after(seconds - left),
        )
    return None


def _step_seconds(state: WorkerState, config: PolicyConfig) -> float:
    return state.load.decode_step_seconds or config.default_decode_step_seconds


def _uncached(demand: Demand, owned_blocks: Mapping[str, int], state: WorkerState) -> int:
    """Tokens to compute there. At least one: a first token needs the last one's logits."""
    return max(1, demand.tokens - owned_blocks.get(state.info.id, 0) * state.info.block_tokens)


def _blocks(tokens: int, state: WorkerState) -> int:
    return -(-tokens // state.info.block_tokens)


def _least(
    states: Sequence[WorkerState],
    cost: Callable[[WorkerState], float],
    config: PolicyConfig,
    rng: random.Random,
) -> WorkerState:
    """One of the states whose cost is least, or as good as least."""
    costs = [cost(state) for state in states]
    bound = min(costs) * (1 + config.tie)
    return rng.choice([state for state, c in zip(states, costs, strict=True) if c <= bound])


def _retry_after(seconds: float) -> float:
    return min(MAX_RETRY_AFTER, max(1.0, seconds))

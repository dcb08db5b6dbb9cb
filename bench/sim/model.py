"""What the simulation knows of hardware, requests and their outcome. Plain data; times in simulated seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.trace import TraceEntry, block_of

BLOCK_TOKENS = 512  # what the trace names; a prefix is known in units of these


@dataclass(frozen=True, slots=True)
class Hardware:
    """Service times of one worker. The defaults are round numbers for a model of 70 B parameters (grouped-query
    attention, 80 layers, 8 KV heads of 128, bf16) on a node of eight H100: given, not measured."""

    prefill_tokens_per_second: float = 12_000.0
    prefill_pair_seconds: float = 5e-10  # for each pair of a computed token and one that it attends to
    decode_step_seconds: float = 0.018
    decode_sequence_seconds: float = 0.0001  # each running sequence adds to a step
    decode_kv_token_seconds: float = 2e-8  # each token of context held by them adds to a step
    kv_bytes_per_token: int = 327_680
    link_bytes_per_second: float = 25e9  # of each prefill worker
    pool_tokens: int = 1_200_000  # of KV on each worker
    max_num_seqs: int = 256
    max_model_len: int = 262_144

    def prefill_seconds(self, cached: int, tokens: int) -> float:
        """Time to compute what is not cached of ``tokens``."""
        fresh = tokens - cached
        pairs = fresh * (cached + fresh / 2)
        return fresh / self.prefill_tokens_per_second + pairs * self.prefill_pair_seconds

    def step_seconds(self, sequences: int, kv_tokens: int) -> float:
        """Time of a decode step."""
        return (
            self.decode_step_seconds
            + sequences * self.decode_sequence_seconds
            + kv_tokens * self.decode_kv_token_seconds
        )

    @property
    def pool_blocks(self) -> int:
        return self.pool_tokens // BLOCK_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request of the trace."""

    time: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]  # ids of the prompt's full blocks

    @classmethod
    def of(cls, entry: TraceEntry, time: float) -> Request:
        full = entry.input_tokens // BLOCK_TOKENS
        blocks = tuple(block_of(entry.blocks, index) for index in range(full))
        named = next((index for index, block in enumerate(blocks) if block < 0), full)
        return cls(time, entry.input_tokens, entry.output_tokens, blocks[:named])

    @property
    def held_blocks(self) -> int:
        """Blocks that it holds on a decode worker, its answer included."""
        return -(-(self.input_tokens + self.output_tokens) // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. A refused one has no times."""

    request: Request
    refused: bool = False
    ttft: float = 0.0
    tpot: float = 0.0  # waits for KV and for room on the decode worker included
    cached_tokens: int = 0  # of the prompt, not computed again
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep, in seconds."""

    ttft: float
    tpot: float

    def kept(self, outcome: Outcome) -> bool:
        return not outcome.refused and outcome.ttft <= self.ttft and outcome.tpot <= self.tpot


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one simulated run."""

    requests: int
    refused: int
    hit_rate: float  # of all prompt tokens, the part that was not computed
    ttft_attainment: float  # of all requests
    tpot_attainment: float
    attainment: float  # both
    goodput: float  # requests within both limits, a second of the trace's (scaled) time
    ttft_p50: float
    ttft_p99: float
    tpot_p99: float
    prefill_busy: float  # part of the time until the last arrival, mean over the workers
    decode_held: float  # part of the decode pool's KV that requests hold, mean over that time and the workers


def requests_of(entries: Sequence[TraceEntry], speed: float) -> list[Request]:
    """The trace, ``speed`` times as fast."""
    return [Request.of(entry, entry.time / speed) for entry in entries]

"""The state of one request inside an engine: its tokens, how far they are computed, the blocks it holds.

Knows nothing of tensors or of other sequences. One quantity drives everything: ``num_known - num_computed`` is
the work that is left before the next token can be sampled; 1 is a decode step, more is prefill. A token that a
step under way will bring is known to exist (``pending``) before it is in ``tokens``.
"""

from __future__ import annotations

import enum
import secrets
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from splitserve.hashing import BlockHash, PrefixHasher
from splitserve.sampling import FinishReason, Logprobs, SamplingParams, TokenOutput


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a caller asks of an engine.

    ``tokens`` is the client's prompt (the first ``num_prompt``) and what was generated for it before, here or
    elsewhere. With ``export`` the request leaves after one new token and its blocks stay held until
    `AsyncEngine.release`: a prefill worker's requests.
    """

    request_id: str
    tokens: SequenceOf[int]
    params: SamplingParams
    num_prompt: int | None = None  # None: all of the tokens
    salt: str = ""
    export: bool = False
    deadline: float | None = None  # monotonic time after which nothing is begun for it


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What one step did for one request."""

    tokens: tuple[TokenOutput, ...] = ()
    num_computed: int = 0  # tokens that have KV in the pool
    blocks: tuple[int, ...] = ()  # the block table; only for exports
    cached_tokens: int = 0  # of the tokens at arrival, found in the prefix cache
    prompt_logprobs: tuple[Logprobs, ...] | None = None  # for tokens 1 … of the prompt, with the first token
    queue_seconds: float = 0.0  # from arrival to the first step
    finished: bool = False


class Status(enum.Enum):
    WAITING = enum.auto()  # wants blocks
    LOADING = enum.auto()  # holds blocks that are being filled from elsewhere
    RUNNING = enum.auto()
    HELD = enum.auto()  # finished; blocks wait for release
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request at work. The scheduler moves ``status`` and the blocks, the engine appends tokens."""

    id: str
    tokens: list[int]
    num_prompt: int  # tokens of the client's prompt
    params: SamplingParams
    eos_ids: frozenset[int]
    max_len: int  # longest prompt plus answer
    hasher: PrefixHasher  # has seen the blocks that `hashes` name
    export: bool = False
    loads: bool = False  # blocks of the prompt come from elsewhere (`Status.LOADING` first)
    deadline: float | None = None  # monotonic time after which it is not begun
    status: Status = Status.WAITING
    num_computed: int = 0  # tokens that have KV, or will have it after the steps under way
    pending: int = 0  # tokens that steps under way will bring, 0 or 1
    in_flight: int = 0  # steps under way that write to the blocks
    blocks: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)  # of the full blocks of `tokens` hashed so far
    num_named: int = 0  # leading blocks whose hash the pool knows
    num_cached: int = 0  # tokens found in the prefix cache at first admission
    finish_reason: FinishReason | None = None
    arrival: float = field(default_factory=time.monotonic)
    first_step: float | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)  # of generated tokens, for penalties
    seed: int = 0  # of the random numbers; drawn here if the request has none

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        self.counts.update(self.tokens[self.num_prompt :])

    @classmethod
    def from_request(
        cls, request: EngineRequest, eos_ids: frozenset[int], max_len: int, hasher: PrefixHasher, *, loads: bool
    ) -> Sequence:
        tokens = list(request.tokens)
        num_prompt = len(tokens) if request.num_prompt is None else request.num_prompt
        return cls(
            request.request_id,
            tokens,
            num_prompt,
            request.params,
            eos_ids,
            max_len,
            hasher,
            request.export,
            loads,
            request.deadline,
        )

    @property
    def remaining(self) -> int:
        """Tokens without KV; the logits of the last one give the next token."""
        return self.num_known - self.num_computed

    @property
    def num_known(self) -> int:
        """Tokens, with the one that is under way."""
        return len(self.tokens) + self.pending

    @property
    def ending(self) -> bool:
        """Whether the token that is under way is the last one, whatever it is."""
        return self.pending > 0 and (self.export or self._at_length(self.pending))

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def queue_seconds(self) -> float:
        return 0.0 if self.first_step is None else self.first_step - self.arrival

    def hash_blocks(self, block_tokens: int) -> list[BlockHash]:
        """Hashes of all full blocks of ``tokens``; each is computed once."""
        start = len(self.hashes) * block_tokens
        if len(self.tokens) - start >= block_tokens:
            self.hashes += self.hasher.next_blocks(self.tokens[start:], block_tokens)
        return self.hashes

    def append(self, token: int) -> None:
        """Takes a generated token and decides whether the answer ends with it."""
        self.tokens.append(token)
        self.counts[token] += 1
        params, generated = self.params, self.num_generated
        if generated >= params.min_tokens and (
            (token in self.eos_ids and not params.ignore_eos) or token in params.stop_token_ids
        ):
            self.finish_reason = FinishReason.STOP
        elif self._at_length():
            self.finish_reason = FinishReason.LENGTH

    def _at_length(self, more: int = 0) -> bool:
        most = self.params.max_tokens
        return len(self.tokens) + more >= self.max_len or (most is not None and self.num_generated + more >= most)

"""Decides what each step computes: one token budget for decodes and chunks of prefill alike.

Knows sequences and the block pool, no tensors. Running sequences go first (decodes before chunks), then
waiting ones are admitted while budget, places and blocks last. All blocks of a sequence's known tokens are
allocated at its admission; only generated tokens ask for more. Out of blocks: the youngest sequence is
preempted and computed again later. A step may be scheduled while the one before it is under way (`start`,
`settle`): its rows count as computed and the token that it brings as known. Iteration-level batching: https://www.usenix.org/conference/osdi22/presentation/yu,
chunked prefill: https://arxiv.org/abs/2308.16369.

Invariant: a sequence holds blocks exactly while it is LOADING, RUNNING or HELD, or a step that writes to them is
under way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence and which of its tokens the step computes."""

    sequence: Sequence
    num_tokens: int
    start: int  # place of the first of them in the sequence
    samples: bool  # all that is known will be computed, so that a new token follows

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Scheduled:
        """The next ``num_tokens`` of the sequence."""
        return cls(sequence, num_tokens, sequence.num_computed, num_tokens == sequence.remaining)

    @property
    def end(self) -> int:
        """Tokens of the sequence that have KV after the step."""
        return self.start + self.num_tokens


class Scheduler:
    def __init__(
        self, pool: BlockPool, *, block_tokens: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.loading: set[Sequence] = set()
        self.held: set[Sequence] = set()
        self.leaving: set[Sequence] = set()  # finished, and a step that writes to their blocks is under way
        self.num_preemptions = 0

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that still have to be computed, for sequences that are here to be computed."""
        waiting = sum(s.remaining for s in self.waiting.copy() if not s.loads)
        return waiting + sum(s.remaining for s in self.running.copy() if s.remaining > 1)

    def add(self, sequence: Sequence) -> None:
        assert sequence.status is Status.WAITING
        self.waiting.append(sequence)

    def late(self, now: float) -> list[Sequence]:
        """Waiting sequences whose deadline has passed."""
        return [s for s in self.waiting if s.deadline is not None and s.deadline <= now]

    def schedule(self) -> tuple[list[Scheduled], list[Sequence]]:
        """What the next step computes, and the LOADING sequences that have just received their blocks."""
        budget = self.max_num_batched_tokens
        single = [s for s in self.running if s.remaining == 1 and not s.ending]
        grown = [s for s in single if s.status is Status.RUNNING and self._grow(s)]
        # growing may have preempted a sequence that had grown before
        scheduled = [Scheduled.of(s, 1) for s in grown if s.status is Status.RUNNING]
        budget -= len(scheduled)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                count = min(sequence.remaining, budget)
                scheduled.append(Scheduled.of(sequence, count))
                budget -= count
        loading: list[Sequence] = []
        while self.waiting and len(self.running) + len(self.loading) < self.max_num_seqs:
            sequence = self.waiting[0]
            if (budget <= 0 and not sequence.loads) or not self._admit(sequence):
                break
            self.waiting.popleft()
            if sequence.loads:
                sequence.status = Status.LOADING
                self.loading.add(sequence)
                loading.append(sequence)
                continue
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            count = min(sequence.remaining, budget)
            scheduled.append(Scheduled.of(sequence, count))
            budget -= count
        return scheduled, loading

    def start_loaded(self, sequence: Sequence, num_computed: int) -> None:
        """The blocks of a LOADING sequence are filled up to ``num_computed`` tokens: it may run."""
        assert sequence.status is Status.LOADING and num_computed < len(sequence.tokens)
        self.loading.remove(sequence)
        sequence.loads = False
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        self.advance(sequence, num_computed)

    @property
    def may_run_ahead(self) -> bool:
        """Whether a step can be scheduled behind the one under way: for sure without a preemption."""
        return self.pool.num_free >= len(self.running)

    def start(self, item: Scheduled) -> None:
        """A step that computes ``item`` is under way."""
        item.sequence.num_computed = item.end
        item.sequence.pending += item.samples
        item.sequence.in_flight += 1

    def settle(self, item: Scheduled) -> None:
        """The step is over: nothing writes to the blocks on its behalf any more."""
        sequence = item.sequence
        sequence.pending -= item.samples
        sequence.in_flight -= 1
        if sequence in self.leaving:
            self.leaving.remove(sequence)
            self._drop_blocks(sequence)

    def settle_all(self) -> None:
        """No step is under way any more, and what the last ones did doesn't count."""
        for sequence in (*self.running, *self.held, *self.leaving):
            sequence.pending = sequence.in_flight = 0
        leaving, self.leaving = self.leaving, set()
        for sequence in leaving:
            self._drop_blocks(sequence)

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """So many tokens are computed: names the blocks that they fill."""
        sequence.num_computed = max(sequence.num_computed, num_computed)
        full = num_computed // self.block_tokens
        if full > sequence.num_named:
            hashes = sequence.hash_blocks(self.block_tokens)
            for i in range(sequence.num_named, full):
                self.pool.name(sequence.blocks[i], hashes[i])
            sequence.num_named = full

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out; an export's blocks stay until `release`. Safe in any state, once or twice."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.LOADING:
            self.loading.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.HELD:
            self.held.remove(sequence)
        sequence.status = Status.FINISHED
        self._drop_blocks(sequence)

    def hold(self, sequence: Sequence) -> None:
        """A finished export: out of the batch, its blocks stay until `finish`."""
        assert sequence.status is Status.RUNNING
        self.running.remove(sequence)
        self.held.add(sequence)
        sequence.status = Status.HELD

    def check_integrity(self) -> None:
        self.pool.check_integrity()
        for sequence in self.waiting:
            assert not sequence.blocks
        if not (self.running or self.loading or self.held or self.leaving):
            assert self.pool.num_used == 0, f"{self.pool.num_used} blocks are held by nobody"

    def _admit(self, sequence: Sequence) -> bool:
        """Finds the cached prefix and allocates blocks for the rest of the known tokens, or changes nothing."""
        known = len(sequence.tokens)
        # the last token must be computed here for its logits, unless the first answer token comes from elsewhere
        reusable = known if sequence.loads else known - 1
        if sequence.params.prompt_logprobs is not None:
            reusable = 0
        hashes = sequence.hash_blocks(self.block_tokens)[: reusable // self.block_tokens]
        cached = self.pool.match(hashes)
        wanted = -(-known // self.block_tokens) - len(cached)
        reserve = 1 if self.running else 0  # a block for growth, or the newcomer would be preempted at once
        if wanted + reserve > self.pool.free_after(cached):
            return False
        self.pool.acquire(cached)
        sequence.blocks = cached + self.pool.allocate(wanted)
        sequence.num_computed = len(cached) * self.block_tokens
        sequence.num_named = len(cached)
        if sequence.first_step is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Makes room for one more token; False if the sequence itself had to be preempted."""
        while len(sequence.blocks) * self.block_tokens < sequence.num_known:
            if self.pool.num_free:
                sequence.blocks += self.pool.allocate(1)
                continue
            victims = [s for s in self.running if not s.export]
            if not victims:
                return False
            self._preempt(victims[-1])
            if victims[-1] is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.in_flight
        self.running.remove(sequence)
        self._drop_blocks(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _drop_blocks(self, sequence: Sequence) -> None:
        """At once, or when the last step that writes to them has settled."""
        if sequence.in_flight:
            self.leaving.add(sequence)
            return
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_named = 0

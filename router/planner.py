"""From a request to a plan: asks the view who lives, the directory who has cached what, and the policy.

Owns what this router itself has sent where lately: blocks that are being computed count as cached for those who
come next. Invariant: without the directory a plan is still made, from that alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from router.backend import GenerationRequest, ModelSpec
from router.breaker import Incarnation
from router.policy import Demand, Plan, PolicyConfig, plan
from router.recent_prompts import RecentPrompts, either
from router.snapshot import ClusterView, ModelPool
from splitserve.cluster import WorkerState
from splitserve.directory import Directory
from splitserve.errors import Overloaded, Unavailable
from splitserve.hashing import BlockHash, PrefixHasher

log = logging.getLogger(__name__)

_HITS = 32  # while there is no room, a prompt counts as cached as the best of so many before it, until looked up
ANNOUNCE_SECONDS = 5.0  # from a first token until the directory surely knows the prompt's blocks


class Planner:
    def __init__(self, directory: Directory, view: ClusterView, config: PolicyConfig) -> None:
        self._directory = directory
        self._view = view
        self._config = config
        self._rng = random.Random()
        self._recent: RecentPrompts[BlockHash] = RecentPrompts()
        self._sent: deque[tuple[str, list[BlockHash], float]] = deque()  # what `_recent` is still to be told
        self._refused: set[str] = set()  # models whose last plan was, for lack of room or of workers
        self._hits: dict[str, deque[float]] = {}  # of each model's last prompts, the cached part

    async def plan(
        self, request: GenerationRequest, spec: ModelSpec, tokens: Sequence[int], excluded: Collection[Incarnation]
    ) -> Plan:
        """Workers for a sequence of ``tokens``: the prompt and what was generated. Raises as `policy.plan`.

        ``excluded`` have failed this request; one that was restarted since has not."""
        given = len(tokens) - len(request.prompt_tokens)
        now = asyncio.get_running_loop().time()
        demand = Demand(
            tokens=len(tokens),
            max_new_tokens=max(1, (request.sampling.max_tokens or 1) - given),
            seconds_left=None if request.deadline is None else request.deadline - now,
        )
        if request.sampling.prompt_logprobs is not None:
            # log probabilities of a prompt need all of it computed, and only decode events carry them
            states = _members(self._view.pool(spec.name), spec, excluded)
            states = tuple(s for s in states if s.info.role == "decode")
            return plan(demand, {}, states, self._config, rng=self._rng)
        hits = self._hits.setdefault(spec.name, deque([1.0], maxlen=_HITS))
        if spec.name in self._refused and not excluded:  # another refusal costs no hash and no round trip
            states = _members(self._view.pool(spec.name), spec, excluded)
            usable = self._view.breakers.usable(states, now)
            blocks = math.ceil(max(hits) * len(tokens) / spec.block_tokens)
            plan(demand, {s.info.id: blocks for s in usable}, usable, self._config, rng=self._rng)
        hasher = PrefixHasher(bytes.fromhex(spec.fingerprint), request.cache_salt)
        hashes = hasher.next_blocks(tokens, spec.block_tokens)
        incarnations = self._view.incarnations(spec.name, spec.fingerprint)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(self._owned(hashes, [i for i in incarnations if i not in excluded]))
            await asyncio.sleep(0)  # the question goes out; while Redis works on it there is time for the view
            pool = self._view.pool(spec.name)
        self._remember()
        owned = either(asked.result(), self._recent.longest_prefix(hashes, now))
        hits.append(max(owned.values(), default=0) / max(1, len(hashes)))
        try:
            states = _members(pool, spec, excluded)
            chosen = plan(demand, owned, self._view.breakers.usable(states, now), self._config, rng=self._rng)
        except (Overloaded, Unavailable):
            self._refused.add(spec.name)
            raise
        self._refused.discard(spec.name)
        if chosen.prefill is not None:
            until = now + chosen.first_token_seconds + ANNOUNCE_SECONDS
            self._sent.append((chosen.prefill.info.id, hashes, until))
            asyncio.get_running_loop().call_soon(self._remember)  # once the request is on its way
        for worker in chosen.workers:
            self._view.breakers.claim(worker.info, now)
        return chosen

    def _remember(self) -> None:
        while self._sent:
            self._recent.add(*self._sent.popleft())

    async def _owned(self, hashes: Sequence[BlockHash], workers: Sequence[Incarnation]) -> Mapping[str, int]:
        """Leading blocks of the sequence that each worker has, in one round trip."""
        if not hashes or self._view.stale:
            return {}
        try:
            return await self._directory.longest_prefix(hashes, workers)
        except Unavailable as error:
            log.warning("planning without the directory: %s", error)
            return {}


def _members(
    pool: ModelPool | None, spec: ModelSpec, excluded: Collection[Incarnation]
) -> tuple[WorkerState, ...]:
    """Raises Unavailable if the workers of ``spec`` are gone or others have taken their place."""
    if pool is None or pool.fingerprint != spec.fingerprint:
        raise Unavailable(f"no worker of {spec.name} is ready")
    return tuple(s for s in pool.states if (s.info.id, s.info.epoch) not in excluded)

"""From a request to a plan: asks the view who lives, the directory who has cached what, and the policy.

Owns no state. Invariant: without the directory a plan is still made, as if nothing were cached.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

from router.backend import GenerationRequest, ModelSpec
from router.policy import Demand, Plan, PolicyConfig, plan
from router.snapshot import ClusterView
from splitserve.cluster import WorkerState
from splitserve.directory import Directory
from splitserve.errors import Unavailable
from splitserve.hashing import block_hashes, chain_root

log = logging.getLogger(__name__)


class Planner:
    def __init__(self, directory: Directory, view: ClusterView, config: PolicyConfig) -> None:
        self._directory = directory
        self._view = view
        self._config = config

    async def plan(
        self, request: GenerationRequest, spec: ModelSpec, tokens: Sequence[int], excluded: Collection[str]
    ) -> Plan:
        """Workers for a sequence of ``tokens``: the prompt and what was generated. Raises as `policy.plan`."""
        pool = self._view.pool(spec.name)
        if pool is None or pool.fingerprint != spec.fingerprint:
            raise Unavailable(f"no worker of {spec.name} is ready")
        given = len(tokens) - len(request.prompt_tokens)
        demand = Demand(
            tokens=len(tokens),
            max_new_tokens=max(1, (request.sampling.max_tokens or 1) - given),
            seconds_left=None
            if request.deadline is None
            else request.deadline - asyncio.get_running_loop().time(),
        )
        states = pool.states
        if request.sampling.prompt_logprobs is not None:
            # log probabilities of a prompt need all of it computed, and only decode events carry them
            states = tuple(s for s in states if s.info.role == "decode")
            return plan(demand, {}, states, self._config, excluded)
        owned = await self._owned(request, spec, tokens, states)
        return plan(demand, owned, states, self._config, excluded)

    async def _owned(
        self,
        request: GenerationRequest,
        spec: ModelSpec,
        tokens: Sequence[int],
        states: Sequence[WorkerState],
    ) -> Mapping[str, int]:
        """Leading blocks of the sequence that each worker has, in one round trip."""
        root = chain_root(bytes.fromhex(spec.fingerprint), request.cache_salt)
        hashes = block_hashes(root, tokens, spec.block_tokens)
        if not hashes or self._view.stale:
            return {}
        try:
            return await self._directory.longest_prefix(hashes, [(s.info.id, s.info.epoch) for s in states])
        except Unavailable as error:
            log.warning("planning without the directory: %s", error)
            return {}

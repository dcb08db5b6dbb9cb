"""A request that its engine cannot compute, in a batch with others that it can."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from tests.chaos.cluster import ChaosCluster
from tests.chaos.load import Case, Oracle, ask
from tests.chaos.sick_engine import EXPLODES, NOT_FINITE

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("mark", [NOT_FINITE, EXPLODES], ids=["logits that are not finite", "a step that raises"])
async def test_a_request_that_cannot_be_computed_fails_alone(
    cluster: ChaosCluster, channel: grpc.aio.Channel, oracle: Oracle, mark: tuple[int, ...]
) -> None:
    sick = Case(0, mark * 10, 40)
    mates = asyncio.ensure_future(oracle.run(channel, some=oracle.cases[:24], at_once=24))
    answer = await ask(channel, sick)
    (await mates).assert_all_right()
    assert answer.error is not None and answer.error.startswith("EngineError")
    assert len(answer.tokens) == 2, "what came before the failure was told"
    assert not cluster.dead()

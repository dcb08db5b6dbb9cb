"""Requests made up from the API's own description never find a bug of ours."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = pytest.mark.asyncio(loop_scope="session")


def fuzz(url: str) -> dict[int, int]:
    """How many answers of each status there were."""
    seen: dict[int, int] = {}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body["model"] = "echo"  # a made-up one would be as far as most requests get
            response = case.call(timeout=10)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            assert response.status_code < 500, (case.method, case.path, case.body, response.text)

        check()
    return seen


async def test_no_request_is_our_fault(front: Any) -> None:
    seen = await asyncio.to_thread(fuzz, front.url)
    assert seen.get(200, 0) > 0
    assert front.backend.active == 0

from __future__ import annotations

import pytest

from router.request_limit import RequestLimit
from splitserve.errors import Overloaded


def test_one_more_than_the_limit_is_refused_with_a_time_to_wait() -> None:
    limit = RequestLimit(2)
    with limit.place(), limit.place(), pytest.raises(Overloaded) as refused, limit.place():
        pass
    assert refused.value.retry_after > 0


def test_a_place_is_given_back_also_by_a_request_that_failed() -> None:
    limit = RequestLimit(1)
    with pytest.raises(ValueError, match="broken"), limit.place():
        raise ValueError("broken")
    with limit.place():
        pass

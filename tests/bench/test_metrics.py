"""Figures of records made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.load import LoadResult
from bench.metrics import Slo, inter_arrival_latencies, inter_token_latencies, summarize
from bench.record import Record
from splitserve.errors import ConfigError

MakeRecord = Callable[..., Record]


def summary_of(*records: Record, slo: Slo | None = None) -> dict[str, float]:
    return summarize(LoadResult(records, 10.0, 4.0, 0.2), slo or Slo())


def test_ttft_tpot_and_e2el_of_one_request(make_record: MakeRecord) -> None:
    record = make_record((10.5, 1), (10.6, 1), (10.9, 1))
    assert (record.ttft, record.e2el) == pytest.approx((0.5, 0.9))
    assert record.tpot == pytest.approx(0.2)


def test_an_answer_of_one_token_has_no_time_per_token(make_record: MakeRecord) -> None:
    assert make_record((10.5, 1)).tpot == 0.0
    assert summary_of(make_record((10.5, 1)))["mean_tpot_ms"] is None


def test_tokens_that_come_together_share_their_interval(make_record: MakeRecord) -> None:
    record = make_record((10.5, 1), (10.8, 3), (10.9, 1))
    assert inter_token_latencies(record) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert inter_arrival_latencies(record) == pytest.approx([0.3, 0.1])


def test_intervals_number_the_tokens_less_one_and_add_up(make_record: MakeRecord) -> None:
    record = make_record((10.5, 3), (10.7, 2), (11.0, 4))
    intervals = inter_token_latencies(record)
    assert len(intervals) == record.output_tokens - 1
    assert sum(intervals) == pytest.approx(record.e2el - record.ttft)


def test_percentiles_are_over_all_requests(make_record: MakeRecord) -> None:
    records = [make_record((10 + n / 100, 1)) for n in range(1, 101)]
    summary = summary_of(*records)
    assert summary["median_ttft_ms"] == pytest.approx(505.0)
    assert summary["p90_ttft_ms"] == pytest.approx(901.0)
    assert summary["p99_ttft_ms"] == pytest.approx(990.1)
    assert summary["mean_ttft_ms"] == pytest.approx(505.0)


def test_throughput_counts_what_succeeded(make_record: MakeRecord) -> None:
    summary = summary_of(make_record((10.5, 4)), make_record((10.5, 2)), make_record((10.1, 9), error="gone"))
    assert summary["request_throughput"] == pytest.approx(0.5)
    assert summary["output_throughput"] == pytest.approx(1.5)
    assert summary["total_token_throughput"] == pytest.approx(4.0)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (10, 6)


def test_failures_are_counted_with_their_reasons(make_record: MakeRecord) -> None:
    failed = [make_record(error="status 500"), make_record(error="status 500"), make_record(error="gone")]
    summary = summary_of(make_record((10.5, 1)), *failed)
    assert (summary["completed"], summary["failed"]) == (1, 3)
    assert summary["failures"] == {"status 500": 2, "gone": 1}


def test_goodput_needs_every_limit_kept(make_record: MakeRecord) -> None:
    slo = Slo.parse(["ttft:500", "tpot:50"])
    good = make_record((10.4, 1), (10.44, 1))
    late = make_record((10.6, 1), (10.64, 1))
    slow = make_record((10.4, 1), (10.5, 1))
    summary = summary_of(good, late, slow, make_record((10.1, 1), error="gone"), slo=slo)
    assert summary["request_goodput"] == pytest.approx(0.25)
    assert summary["slo_attainment"] == pytest.approx(0.25)


def test_without_limits_there_is_no_goodput(make_record: MakeRecord) -> None:
    assert summary_of(make_record((10.5, 1)))["request_goodput"] is None


def test_figures_of_no_request_are_null() -> None:
    summary = summary_of()
    assert (summary["completed"], summary["failed"]) == (0, 0)
    assert summary["p99_ttft_ms"] is None


def test_late_sending_shows(make_record: MakeRecord) -> None:
    assert summary_of(make_record((10.5, 1), scheduled=9.9))["max_send_lag_ms"] == pytest.approx(100.0)


def test_requests_that_overlap_count_as_concurrent(make_record: MakeRecord) -> None:
    records = [make_record((11.0, 1)), make_record((12.5, 1), sent=10.5), make_record((13.0, 1), sent=12.0)]
    assert summary_of(*records)["max_concurrent_requests"] == 2


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "speed:3", "ttft:nan"])
def test_limits_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a limit"):
        Slo.parse([text])

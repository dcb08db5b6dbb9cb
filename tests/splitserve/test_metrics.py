from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from splitserve.metrics import EngineMetrics, RouterMetrics, TransferMetrics, new_registry

PROMISED = {
    "splitserve_time_to_first_token_seconds",
    "splitserve_inter_token_latency_seconds",
    "splitserve_e2e_request_latency_seconds",
    "splitserve_request_queue_time_seconds",
    "splitserve_num_requests_running",
    "splitserve_num_requests_waiting",
    "splitserve_kv_cache_usage_perc",
    "splitserve_prefix_cache_queries_total",
    "splitserve_prefix_cache_hits_total",
    "splitserve_num_preemptions_total",
    "splitserve_request_success_total",
    "splitserve_prompt_tokens_total",
    "splitserve_generation_tokens_total",
    "splitserve_kv_transfer_seconds",
    "splitserve_kv_transfer_exposed_seconds",
    "splitserve_kv_transfer_bytes_total",
    "splitserve_kv_transfer_failures_total",
    "splitserve_kv_lease_expired_total",
}


def test_every_promised_name_exists() -> None:
    registry = new_registry()
    RouterMetrics(registry), EngineMetrics(registry, "m", "decode"), TransferMetrics(registry, "m", "decode")
    text = generate_latest(registry).decode()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE splitserve_")}
    assert names >= PROMISED
    assert "process_open_fds" in text


def test_the_exposition_can_be_parsed() -> None:
    registry = new_registry()
    RouterMetrics(registry).observe_first_token('odd "name"\n', 0.1)
    assert list(text_string_to_metric_families(generate_latest(registry).decode()))


def test_what_a_client_feels() -> None:
    registry = new_registry()
    metrics = RouterMetrics(registry)
    metrics.request_started("m")
    metrics.observe_first_token("m", 0.2)
    metrics.observe_inter_token("m", 0.4, tokens=4)
    metrics.observe_success("m", "stop", 1.5, prompt_tokens=100, generation_tokens=5)
    metrics.observe_failure("m", "Unavailable")
    metrics.observe_retry("m", "decode")
    metrics.request_ended("m")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"splitserve_{name}", {"model_name": "m", **labels})

    assert value("time_to_first_token_seconds_sum") == 0.2
    assert value("inter_token_latency_seconds_count") == 4
    assert value("inter_token_latency_seconds_bucket", le="0.1") == 4
    assert value("e2e_request_latency_seconds_sum") == 1.5
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("request_failures_total", error="Unavailable") == 1
    assert value("request_retries_total", leg="decode") == 1
    assert (value("prompt_tokens_total"), value("generation_tokens_total")) == (100, 5)
    assert value("router_requests_running") == 0


def test_what_an_engine_does() -> None:
    registry = new_registry()
    metrics = EngineMetrics(registry, "m", "prefill")
    metrics.observe_queue_time(0.3)
    metrics.follow_load(lambda: (3, 2, 0.25))
    metrics.add_prefix_lookup(queried_tokens=100, hit_tokens=64)
    metrics.add_preemptions()

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"splitserve_{name}", {"model_name": "m", "role": "prefill"})

    assert value("request_queue_time_seconds_sum") == 0.3
    assert (value("num_requests_running"), value("num_requests_waiting")) == (3, 2)
    assert value("kv_cache_usage_perc") == 0.25
    assert (value("prefix_cache_queries_total"), value("prefix_cache_hits_total")) == (100, 64)
    assert value("num_preemptions_total") == 1


def test_what_a_transfer_does() -> None:
    registry = new_registry()
    metrics = TransferMetrics(registry, "m", "decode")
    for _ in range(2):
        metrics.pull_started("ucx")
    metrics.bytes_received("ucx", 368_640)
    metrics.pull_finished("ucx", 0.01, 0.002)
    metrics.pull_failed("ucx", "stalled")
    metrics.lease_expired()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"splitserve_{name}", {"model_name": "m", "role": "decode", **labels})

    assert value("kv_transfer_seconds_count") == 1
    assert value("kv_transfer_exposed_seconds_sum") == 0.002
    assert value("kv_transfer_bytes_total", transport="ucx") == 368_640
    assert value("kv_transfer_failures_total", reason="stalled") == 1
    assert value("kv_lease_expired_total") == 1
    assert value("kv_transfers_active") == 0

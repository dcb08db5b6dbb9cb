"""``splitserve router | prefill | decode``: one process each. The command becomes the process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from splitserve.cli import options as o
from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.errors import ConfigError
from splitserve.process import config_environment

_NO_REDIS = "--redis-url is needed: the address of the Redis that the cluster shares"


def router(
    redis_url: o.RedisUrl = None,
    host: o.Host = "127.0.0.1",
    port: o.Port = 8000,
    grpc_port: o.GrpcPort = 50051,
    decode_only_tokens: o.DecodeOnlyTokens = 64,
    max_concurrent_requests: o.MaxConcurrentRequests = 1024,
    ttft_slo: o.TtftSlo = 60.0,
    request_timeout: o.RequestTimeout = 600.0,
    worker_timeout: o.WorkerTimeout = 2.0,
    drain_timeout: o.DrainTimeout = 30.0,
    api_key: o.ApiKeys = None,
    api_key_file: o.ApiKeyFile = None,
    ssl_certfile: o.SslCert = None,
    ssl_keyfile: o.SslKey = None,
    tls_cert: o.TlsCert = None,
    tls_key: o.TlsKey = None,
    tls_ca: o.TlsCa = None,
    log_level: o.LogLevel = "info",
    log_json: o.LogJson = False,
    config: o.ConfigFile = None,
) -> None:
    """Runs a router: the OpenAI-compatible HTTP API and the public gRPC API."""
    flags = locals()
    if redis_url is None:
        raise ConfigError(_NO_REDIS)
    become(
        RouterConfig(
            redis_url=redis_url,
            host=host,
            port=port,
            grpc_port=grpc_port,
            decode_only_tokens=decode_only_tokens,
            max_concurrent_requests=max_concurrent_requests,
            ttft_slo=ttft_slo,
            request_timeout=request_timeout,
            worker_timeout=worker_timeout,
            drain_timeout=drain_timeout,
            api_keys=o.api_keys(flags),
            tls=o.cluster_tls(flags),
            public_tls=o.public_tls(flags),
            log=LogConfig(log_level, log_json),
        )
    )


def worker_command(role: Role, text: str) -> Callable[..., None]:
    """The command of one role; the two take the same flags."""

    def run(
        model: o.Model,
        redis_url: o.RedisUrl = None,
        served_model_name: o.ServedName = None,
        worker_id: o.WorkerId = None,
        host: o.Host = "127.0.0.1",
        advertise_host: o.AdvertiseHost = None,
        port: o.WorkerPort = 0,
        metrics_port: o.MetricsPort = 0,
        kv_transport: o.Transports = None,
        dtype: o.Dtype = "auto",
        kv_cache_dtype: o.KvCacheDtype = "auto",
        quantization: o.Quantization = None,
        max_model_len: o.MaxModelLen = None,
        max_num_seqs: o.MaxNumSeqs = 64,
        max_num_batched_tokens: o.MaxBatchedTokens = 512,
        block_size: o.BlockSize = 16,
        kv_cache_memory: o.KvCacheMemory = None,
        enable_prefix_caching: o.PrefixCaching = True,
        kernels: o.Kernels = "auto",
        device: o.Device = "auto",
        gpu_memory_utilization: o.GpuMemoryUtilization = 0.9,
        cores: o.Cores = None,
        max_waiting: o.MaxWaiting = 256,
        drain_timeout: o.DrainTimeout = 30.0,
        api_key: o.ApiKeys = None,
        api_key_file: o.ApiKeyFile = None,
        tls_cert: o.TlsCert = None,
        tls_key: o.TlsKey = None,
        tls_ca: o.TlsCa = None,
        log_level: o.LogLevel = "info",
        log_json: o.LogJson = False,
        config: o.ConfigFile = None,
    ) -> None:
        become(_worker(role, locals()))

    run.__name__ = role.value
    run.__doc__ = text
    return run


prefill = worker_command(Role.PREFILL, "Runs a prefill worker: reads prompts and offers their KV blocks.")
decode = worker_command(Role.DECODE, "Runs a decode worker: pulls KV blocks and generates.")


def become(config: WorkerConfig | RouterConfig) -> None:
    """Replaces this process by the service."""
    module = f"{config.role}_service" if isinstance(config, WorkerConfig) else "router"
    os.execve(sys.executable, [sys.executable, "-m", module], config_environment(config))  # noqa: S606


def _worker(role: Role, flags: dict[str, object]) -> WorkerConfig:
    if flags["redis_url"] is None:
        raise ConfigError(_NO_REDIS)
    return o.worker_config(role, flags)

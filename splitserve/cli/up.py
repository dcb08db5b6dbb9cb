"""``splitserve up``: a whole cluster on this machine, in the foreground."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from splitserve.cli import options as o
from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.errors import ConfigError
from splitserve.local import ClusterSpec, LocalCluster, divide_cores
from splitserve.models import resolve_model

_POOL_SHARE = 0.6  # of the free memory, for the KV pools of all workers together
_POOL_MOST = 8 << 30  # bytes a worker, when no size is asked for


def up(
    model: o.Model = "smollm2",
    prefill: Annotated[int, typer.Option("--prefill", help="Prefill workers.", min=0, max=256)] = 1,
    decode: Annotated[int, typer.Option("--decode", help="Decode workers.", min=1, max=256)] = 1,
    redis_url: o.RedisUrl = None,
    served_model_name: o.ServedName = None,
    host: o.Host = "127.0.0.1",
    port: o.Port = 8000,
    grpc_port: o.GrpcPort = 50051,
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
    max_waiting: o.MaxWaiting = 256,
    decode_only_tokens: o.DecodeOnlyTokens = 64,
    max_concurrent_requests: o.MaxConcurrentRequests = 1024,
    ttft_slo: o.TtftSlo = 60.0,
    request_timeout: o.RequestTimeout = 600.0,
    worker_timeout: o.WorkerTimeout = 2.0,
    drain_timeout: o.DrainTimeout = 30.0,
    lend_cores: Annotated[
        bool, typer.Option("--lend-cores/--no-lend-cores", help="Let workers use the cores of idle ones.")
    ] = True,
    api_key: o.ApiKeys = None,
    api_key_file: o.ApiKeyFile = None,
    ssl_certfile: o.SslCert = None,
    ssl_keyfile: o.SslKey = None,
    log_level: o.LogLevel = "warning",
    log_json: o.LogJson = False,
    config: o.ConfigFile = None,
) -> None:
    """Starts Redis (unless --redis-url), workers and a router here; Ctrl-C drains and ends them."""
    flags = locals()
    router = RouterConfig(
        redis_url=redis_url or "",
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
        public_tls=o.public_tls(flags),
        log=LogConfig(log_level, log_json),
    )
    flags |= {"redis_url": redis_url or "", "host": "127.0.0.1", "port": 0}  # workers stay on loopback
    workers = [
        replace(o.worker_config(role, flags), worker_id=f"{role}-{i}")
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode))
        for i in range(count)
    ]
    raise typer.Exit(asyncio.run(_run(router, local_workers(workers), lend_cores)))


def local_workers(workers: list[WorkerConfig]) -> tuple[WorkerConfig, ...]:
    """The same workers with a share of this machine's cores and memory each, that of a GPU included."""
    memory = min(_POOL_MOST, int(psutil.virtual_memory().available * _POOL_SHARE / len(workers)))
    return tuple(
        replace(
            worker,
            cores=cores,
            host_kv_memory=memory,
            gpu_memory_utilization=worker.gpu_memory_utilization / len(workers),
        )
        for worker, cores in zip(workers, divide_cores(len(workers)), strict=True)
    )


async def _run(router: RouterConfig, workers: tuple[WorkerConfig, ...], lend_cores: bool) -> int:
    console = Console(stderr=True, highlight=False)
    began = time.monotonic()

    def report(process: str, text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/]  [bold]{process:<10}[/] {text}", soft_wrap=True)

    report("splitserve", f"model {workers[0].model}")
    await asyncio.to_thread(resolve_model, workers[0].model)  # fetched once, before the workers ask for it
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    with tempfile.TemporaryDirectory(prefix="splitserve-") as scratch:
        cluster = LocalCluster(ClusterSpec(router, workers, Path(scratch), lend_cores=lend_cores), report)
        starting = asyncio.ensure_future(cluster.__aenter__())
        stop = asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.wait([starting])
                return 0
            starting.result()
            console.print(
                f"[green]ready[/] in {time.monotonic() - began:.1f} s: {cluster.http_url}/v1 (OpenAI), "
                f"{cluster.grpc_address} (gRPC). Ctrl-C drains and ends.",
                soft_wrap=True,
            )
            ended = asyncio.ensure_future(cluster.first_to_end())
            await asyncio.wait([ended, stop], return_when=asyncio.FIRST_COMPLETED)
            if stopping.is_set():
                ended.cancel()
                report("splitserve", "draining")
                codes = await cluster.close()
                return 0 if all(code == 0 for code in codes.values()) else 1
            name, code = ended.result()
            raise ConfigError(f"{name} ended with exit code {code}; the cluster is shut down")
        finally:
            stop.cancel()
            await cluster.close()

"""How processes are set up: one frozen dataclass a kind, resolved once at the start by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitserve.api_keys import ApiKey
from splitserve.cluster import Role


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: str = "info"
    json: bool = False


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: a certificate (chain) and its key; with ``ca`` the peer must show one signed by it."""

    cert: str
    key: str
    ca: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """A prefill or decode worker. Seconds, bytes and tokens; ports of 0 mean any free one."""

    role: Role
    model: str
    redis_url: str
    served_model_name: str | None = None
    worker_id: str | None = None  # None: made of role, host name and process id
    host: str = "127.0.0.1"  # listens here
    advertise_host: str | None = None  # others reach it here; None: see `splitserve.addresses`
    port: int = 0
    metrics_port: int = 0
    transports: tuple[str, ...] = ()  # in order of preference; empty: the best that are installed
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"  # "auto" (as dtype) or "fp8"
    quantization: str | None = None  # "int8" or "fp8": weights of linear layers
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_tokens: int = 16
    kv_cache_memory: int | None = None  # None: what is left of gpu_memory_utilization, or host_kv_memory
    host_kv_memory: int | None = None  # of a pool in host memory; None: a share of what is free
    device: str = "cpu"  # "auto" (a GPU that serves, else the CPU), "cpu", "cuda" or "cuda:N"
    gpu_memory_utilization: float = 0.9  # of the GPU's memory, for this worker
    enable_prefix_caching: bool = True
    max_waiting: int = 256
    kernels: str = "auto"
    cores: tuple[int, ...] = ()  # empty: all that the process may use
    spare_cores: tuple[int, ...] = ()  # of other workers here, used while these idle
    core_table: str | None = None  # the file that says so, see `splitserve.shared_cores`
    lease_seconds: float = 5.0  # how long the directory believes a silent worker
    transfer_lease_seconds: float = 10.0
    step_timeout: float = 60.0  # a step that takes longer will never end: not live
    drain_timeout: float = 30.0
    api_keys: tuple[ApiKey, ...] = ()  # guard /metrics
    tls: TlsFiles | None = None  # between processes, mutual
    log: LogConfig = field(default_factory=LogConfig)
    ready_fd: int | None = None  # a pipe to tell a parent process that this one serves


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """A router. Seconds and tokens; ports of 0 mean any free one."""

    redis_url: str
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int = 50051
    decode_only_tokens: int = 64  # prompts with fewer uncached tokens skip the prefill worker
    max_retries: int = 2  # legs of one request that are tried again
    max_concurrent_requests: int = 1024
    ttft_slo: float = 60.0  # a request whose first token is predicted to come later is refused
    request_timeout: float = 600.0
    worker_timeout: float = 2.0  # a worker that is silent for so long has lost its open requests
    reader_timeout: float = 30.0  # a client that does not read its answer for so long is cut off
    drain_timeout: float = 30.0
    api_keys: tuple[ApiKey, ...] = ()  # none: everybody may ask
    tls: TlsFiles | None = None  # between processes, mutual
    public_tls: TlsFiles | None = None  # what clients of both fronts see; they show no certificate
    log: LogConfig = field(default_factory=LogConfig)
    ready_fd: int | None = None  # a pipe to tell a parent process that this one serves

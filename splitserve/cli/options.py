"""Flags that several commands share. Precedence: flag, ``SPLITSERVE_*`` variable, ``--config`` YAML, default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from splitserve.api_keys import ApiKey, read_keys
from splitserve.cluster import Role
from splitserve.config import LogConfig, TlsFiles, WorkerConfig
from splitserve.errors import ConfigError
from splitserve.tls import check_files


def _load_yaml(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's entries the defaults of this command; names as the flags, with - or _."""
    if path is None:
        return None
    try:
        entries: Any = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} must map flags to values")
    known = {p.name for p in context.command.params}
    given = {str(key).replace("-", "_"): value for key, value in entries.items()}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"{path} sets {', '.join(unknown)}, which this command does not have")
    context.default_map = {**(context.default_map or {}), **given}
    return path


def _log_level(level: str) -> str:
    if level not in _LOG_LEVELS:
        raise ConfigError(f"--log-level must be one of {', '.join(_LOG_LEVELS)}, not {level}")
    return level


def _device(name: str) -> str:
    kind, colon, number = name.partition(":")
    if name not in ("auto", "cpu") and (kind != "cuda" or (colon and not number.isdecimal())):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    return name


def _option(*names: str, help: str, **more: Any) -> Any:
    variable = "SPLITSERVE_" + names[0].lstrip("-").split("/")[0].upper().replace("-", "_")
    return typer.Option(*names, help=help, envvar=variable, show_envvar=False, **more)


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with defaults for the flags below.", callback=_load_yaml, is_eager=True
    ),
]
Model = Annotated[str, _option("--model", help="Directory, .gguf file, hub id (owner/name) or alias (smollm2).")]
ServedName = Annotated[str | None, _option("--served-model-name", help="Name that clients use. Default: --model.")]
Dtype = Annotated[str, _option("--dtype", help="auto (bfloat16), bfloat16, float16 or float32.")]
KvCacheDtype = Annotated[str, _option("--kv-cache-dtype", help="auto (as --dtype) or fp8 (half the memory).")]
Quantization = Annotated[
    str | None, _option("--quantization", help="int8 or fp8: weights rounded at load. Default: as stored.")
]
MaxModelLen = Annotated[
    int | None, _option("--max-model-len", help="Longest prompt plus answer, in tokens.", min=2)
]
MaxNumSeqs = Annotated[int, _option("--max-num-seqs", help="Sequences in one step.", min=1, max=4096)]
MaxBatchedTokens = Annotated[
    int, _option("--max-num-batched-tokens", help="Tokens in one step: the chunk of chunked prefill.", min=1)
]
BlockSize = Annotated[int, _option("--block-size", help="Tokens in a KV block: 16 or 32.")]
KvCacheMemory = Annotated[
    str | None,
    _option("--kv-cache-memory", help="Size of the KV pool, such as 512M or 4G. Default: from free memory."),
]
Device = Annotated[
    str, _option("--device", help="auto (a GPU that serves, else the CPU), cpu, cuda or cuda:N.", callback=_device)
]
GpuMemoryUtilization = Annotated[
    float,
    _option(
        "--gpu-memory-utilization", help="Share of the GPU's memory that weights, steps and KV pool may take."
    ),
]
PrefixCaching = Annotated[
    bool, _option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse blocks of equal prefixes.")
]
Kernels = Annotated[str, _option("--kernels", help="Kernel backend: auto, or the name of one.")]
RedisUrl = Annotated[str | None, _option("--redis-url", help="redis://, rediss:// or unix:// address of Redis.")]
Host = Annotated[str, _option("--host", help="Address to listen on; others than loopback must be asked for.")]
AdvertiseHost = Annotated[
    str | None,
    _option(
        "--advertise-host",
        help="Address at which other processes reach this one. Default: --host; where that is a wildcard, the"
        " address of the interface that reaches Redis.",
    ),
]
Transports = Annotated[
    str | None, _option("--kv-transport", help="KV transports in order of preference, e.g. ucx,tcp.")
]
MetricsPort = Annotated[
    int,
    _option("--metrics-port", help="Port of /metrics, /live and /ready; 0: any free one.", min=0, max=65535),
]
WorkerId = Annotated[
    str | None, _option("--worker-id", help="Name in the directory. Default: role, host, process.")
]
Cores = Annotated[
    str | None, _option("--cores", help="Cores to run on, such as 0-3 or 0,2. Default: all allowed.")
]
MaxWaiting = Annotated[
    int, _option("--max-waiting", help="Requests that may wait on a worker before it refuses.", min=1)
]
DrainTimeout = Annotated[
    float, _option("--drain-timeout", help="Seconds to finish open requests at the end.", min=0)
]
DecodeOnlyTokens = Annotated[
    int, _option("--decode-only-tokens", help="Prompts with fewer uncached tokens skip the prefill worker.", min=0)
]
RequestTimeout = Annotated[
    float, _option("--request-timeout", help="Longest time for one request, in seconds.", min=0.001)
]
MaxConcurrentRequests = Annotated[
    int,
    _option("--max-concurrent-requests", help="Requests that a router works on at once; more are refused.", min=1),
]
TtftSlo = Annotated[
    float,
    _option(
        "--ttft-slo",
        help="Refuse a request whose first token would come later than this, in seconds, because of the queue.",
        min=0.001,
    ),
]
WorkerTimeout = Annotated[
    float,
    _option("--worker-timeout", help="Seconds of silence after which a worker counts as lost.", min=0.1),
]
Port = Annotated[int, _option("--port", help="Port of the HTTP API; 0: any free one.", min=0, max=65535)]
GrpcPort = Annotated[
    int, _option("--grpc-port", help="Port of the public gRPC API; 0: any free one.", min=0, max=65535)
]
WorkerPort = Annotated[int, typer.Option("--port", help="gRPC port; 0: any free one.", min=0, max=65535)]
ApiKeys = Annotated[
    list[str] | None,
    _option(
        "--api-key",
        help="A key that clients must show; may be given several times. In the variable, keys are separated by"
        " spaces. Other users can see flags: better there, or in --api-key-file.",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    _option("--api-key-file", help="More keys, a line each: NAME KEY, or NAME sha256:DIGEST. # begins a comment."),
]
TlsCert = Annotated[
    Path | None,
    _option("--tls-cert", help="PEM certificate for gRPC between processes; names the advertised host."),
]
TlsKey = Annotated[Path | None, _option("--tls-key", help="PEM key of --tls-cert.")]
TlsCa = Annotated[
    Path | None, _option("--tls-ca", help="PEM certificate of the authority that signed the other processes'.")
]
SslCert = Annotated[
    Path | None, _option("--ssl-certfile", help="PEM certificate that clients see: HTTPS and gRPC over TLS.")
]
SslKey = Annotated[Path | None, _option("--ssl-keyfile", help="PEM key of --ssl-certfile.")]
LogLevel = Annotated[str, _option("--log-level", help="debug, info, warning or error.", callback=_log_level)]
LogJson = Annotated[bool, _option("--log-json/--no-log-json", help="One JSON object a line.")]

# flags that mean the same as a field of WorkerConfig with this name
_SAME = (
    "model", "redis_url", "served_model_name", "worker_id", "host", "advertise_host", "port", "metrics_port",
    "dtype", "kv_cache_dtype", "quantization", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "enable_prefix_caching", "kernels", "device", "gpu_memory_utilization", "max_waiting", "drain_timeout",
)  # fmt: skip
_MOST_CORES = 4096
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_KV_DTYPES = ("auto", "fp8", "fp8_e4m3")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str | None) -> int | None:
    """``512M`` -> 536870912. Raises ConfigError."""
    if text is None:
        return None
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size such as 512M or 4G") from None
    if not 0 < size < 2**63:
        raise ConfigError(f"{text!r} is not a possible size")
    return size


def parse_cores(text: str | None) -> tuple[int, ...]:
    """``0-2,5`` -> (0, 1, 2, 5). Raises ConfigError."""
    if not text:
        return ()
    try:
        ranges = [_core_range(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of cores such as 0-3 or 0,2") from None
    return tuple(sorted({core for cores in ranges for core in cores}))


def _core_range(text: str) -> range:
    first, dash, last = text.partition("-")
    cores = range(int(first), int(last if dash else first) + 1)
    if not cores or len(cores) > _MOST_CORES:
        raise ValueError
    return cores


def parse_list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def api_keys(flags: Mapping[str, Any]) -> tuple[ApiKey, ...]:
    """Raises ConfigError."""
    file: Path | None = flags["api_key_file"]
    return (*(ApiKey.of(key) for key in flags["api_key"] or ()), *(read_keys(file) if file else ()))


def cluster_tls(flags: Mapping[str, Any]) -> TlsFiles | None:
    """Raises ConfigError unless all three files are given, or none."""
    return _files(flags, "tls_cert", "tls_key", "tls_ca")


def public_tls(flags: Mapping[str, Any]) -> TlsFiles | None:
    """Raises ConfigError unless both files are given, or none."""
    return _files(flags, "ssl_certfile", "ssl_keyfile")


def _files(flags: Mapping[str, Any], *names: str) -> TlsFiles | None:
    given = [flags[name] for name in names]
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("give all of " + ", ".join("--" + name.replace("_", "-") for name in names) + " or none")
    files = TlsFiles(*(str(path.absolute()) for path in given))
    check_files(files)
    return files


def worker_config(role: Role, flags: Mapping[str, Any]) -> WorkerConfig:
    """From the flags of a command, by parameter name. Raises ConfigError for values that can't be."""
    if flags["dtype"] not in _DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}, not {flags['dtype']}")
    if flags["kv_cache_dtype"] not in _KV_DTYPES:
        raise ConfigError(f"--kv-cache-dtype must be auto or fp8, not {flags['kv_cache_dtype']}")
    if flags["block_size"] not in (16, 32):
        raise ConfigError(f"--block-size must be 16 or 32, not {flags['block_size']}")
    if flags["max_num_batched_tokens"] < flags["max_num_seqs"]:
        raise ConfigError("--max-num-batched-tokens must be at least --max-num-seqs: each takes one token a step")
    if flags.get("quantization") not in (None, "int8", "fp8"):
        raise ConfigError(f"--quantization must be int8 or fp8, not {flags['quantization']}")
    if not 0 < flags["gpu_memory_utilization"] <= 1:
        raise ConfigError(
            f"--gpu-memory-utilization is a share above 0 and up to 1, not {flags['gpu_memory_utilization']:g}"
        )
    return WorkerConfig(
        role=role,
        transports=parse_list(flags["kv_transport"]),
        block_tokens=flags["block_size"],
        kv_cache_memory=parse_bytes(flags["kv_cache_memory"]),
        cores=parse_cores(flags.get("cores")),
        log=LogConfig(flags["log_level"], flags["log_json"]),
        api_keys=api_keys(flags),
        tls=cluster_tls(flags) if "tls_cert" in flags else None,
        **{name: flags[name] for name in _SAME if name in flags},
    )

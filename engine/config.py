"""What an engine is told at its start; measured sizes live elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from kernels import SpareCores


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One model on one worker. Names and defaults follow vLLM where it has the same thing."""

    model: str  # directory, .gguf file, hub id or alias
    dtype: str = "auto"  # "auto" (bfloat16), "bfloat16", "float16" or "float32"; weights, activations and KV
    kv_cache_dtype: str = "auto"  # "auto" (as dtype) or "fp8" (e4m3, half the bytes; values above 448 are cut)
    quantization: str | None = None  # "int8" or "fp8": weights of linear layers, rounded as they are loaded
    max_model_len: int | None = None  # tokens; None: what the model was trained for
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int = 512  # rows in one step: the chunk size of chunked prefill
    block_tokens: int = 16
    kv_cache_memory: int | None = None  # bytes; None: a share of the free memory
    host_kv_memory: int | None = None  # the same for a pool in host memory alone, where kv_cache_memory is None
    enable_prefix_caching: bool = True
    threads: int | None = None  # None: one for each core that the process may use
    spare_cores: SpareCores | None = None  # of other processes, for the native CPU kernels
    device: str = "cpu"  # "auto" (a GPU that serves, else the CPU), "cpu", "cuda" or "cuda:N"
    gpu_memory_utilization: float = 0.9  # of the GPU's memory, for all that this process keeps there
    kernels: str = "auto"  # backend of `kernels.load_kernels`

    def __post_init__(self) -> None:
        assert self.block_tokens in (16, 32)
        assert 0 < self.gpu_memory_utilization <= 1
        assert self.max_num_seqs > 0 and self.max_num_batched_tokens >= self.max_num_seqs

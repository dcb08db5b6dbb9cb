"""From a worker's configuration to an engine that is warm, and the description of what it serves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.core import Engine
from engine.weights import ModelFiles, open_model
from kernels import SpareCores
from splitserve.config import WorkerConfig
from splitserve.model_info import ModelDescription
from splitserve.models import resolve_model, served_name
from splitserve.shared_cores import COLUMNS, SharedCores


def create_engine(
    config: WorkerConfig, make: Callable[[EngineConfig, ModelFiles], Engine] = Engine
) -> tuple[AsyncEngine, ModelDescription]:
    """Reads the model, warms it up, describes it. Takes seconds. ``make``: another engine, such as one that fails
    at a given point. Raises ConfigError."""
    shared = SharedCores(config.core_table, config.cores) if config.core_table is not None else None
    engine_config = EngineConfig(
        model=config.model,
        dtype=config.dtype,
        kv_cache_dtype=config.kv_cache_dtype,
        quantization=config.quantization,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_tokens=config.block_tokens,
        kv_cache_memory=config.kv_cache_memory,
        host_kv_memory=config.host_kv_memory,
        device=config.device,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enable_prefix_caching=config.enable_prefix_caching,
        threads=len(config.cores) or None,
        spare_cores=None if shared is None else _spare(shared, config),
        kernels=config.kernels,
    )
    files = open_model(resolve_model(config.model))
    tokenizer_json, template, special = files.tokenizer()
    engine = make(engine_config, files)
    engine.warm_up()
    # What lives as long as the process is not walked again at every full collection. With it the little garbage
    # that imports leave: to find it would take a walk of 0.15 s now.
    gc.freeze()
    description = ModelDescription(
        model=config.served_model_name or served_name(config.model),
        fingerprint=engine.runner.fingerprint.hex(),
        tokenizer_json=tokenizer_json.encode(),
        chat_template=template,
        special_tokens=special,
        eos_token_ids=files.config.eos_token_ids,
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        block_tokens=config.block_tokens,
        max_sequence_tokens=engine.max_sequence_tokens,
        generation_defaults=files.config.generation_defaults,
    )
    working = None if shared is None else shared.working
    return AsyncEngine(engine, max_waiting=config.max_waiting, working=working), description


def _spare(shared: SharedCores, config: WorkerConfig) -> SpareCores:
    table = torch.frombuffer(shared.memory, dtype=torch.int32).view(-1, COLUMNS)
    return SpareCores(config.spare_cores, table, borrower=config.cores[0] + 1)

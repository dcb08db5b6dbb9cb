"""Owns the model and the KV pool tensor, and computes one step: rows in, logits out.

Knows tensors, block tables and what the scheduler handed out, nothing of waiting requests. Invariant: a step
writes KV to the slots of its own rows only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf

import numpy as np
import psutil
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.models.llama import LlamaModel
from engine.sampler import token_logprobs
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from engine.weights import ModelFiles
from kernels import AttentionBatch, load_kernels, pool_shape
from kernels.cpu.build import BuildError
from splitserve.errors import ConfigError
from splitserve.layout import KVLayout
from splitserve.sampling import SamplingParams

log = logging.getLogger(__name__)

_POOL_SHARE = 0.2  # of the free memory, when no size is given
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Runner:
    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.dtype not in _DTYPES:
            raise ConfigError(f"dtype {config.dtype!r} is not supported; use {', '.join(_DTYPES)}")
        if config.quantization not in (None, "int8"):
            raise ConfigError(f"quantization {config.quantization!r} is not supported; use int8")
        self._dtype = _DTYPES[config.dtype]
        model = files.config
        self.max_model_len = config.max_model_len or model.max_position
        if self.max_model_len > model.max_position:
            raise ConfigError(
                f"max-model-len {self.max_model_len} is more than the {model.max_position} tokens "
                "that the model was trained for"
            )
        self.layout = KVLayout(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=str(self._dtype).removeprefix("torch."),
            block_tokens=config.block_tokens,
        )
        self.fingerprint = self.layout.fingerprint(_weights_name(files, config.quantization))
        try:
            self.kernels = load_kernels("cpu", config.kernels)
        except (ValueError, BuildError) as error:
            raise ConfigError(" ".join(str(error).split())) from error
        self.model = LlamaModel(
            files, self.kernels, self._dtype, self.max_model_len, int8=config.quantization == "int8"
        )
        self.num_blocks = _pool_blocks(config, self.layout, self.max_model_len)
        shape = pool_shape(
            self.num_blocks, model.num_kv_heads, model.num_layers, config.block_tokens, model.head_dim
        )
        # zero pages: memory is taken when a block is first used, and what a block never held is finite
        pool = np.zeros(self.num_blocks * self.layout.block_bytes, dtype=np.uint8)
        self.kv = torch.from_numpy(pool).view(self._dtype).view(shape)

    def memory(self) -> memoryview:
        """The pool's bytes, writable; block ``i`` is the ``i``-th ``layout.block_bytes`` of them."""
        return memoryview(self.kv.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    @torch.inference_mode()
    def run(self, scheduled: SequenceOf[Scheduled]) -> tuple[list[Sequence], Tensor]:
        """Computes the step. Returns the sequences whose known tokens are now all computed, and their logits
        ``[sequences, vocab]``; log probabilities of prompts are added to the sequences that want them."""
        ordered = sorted(scheduled, key=lambda item: item.num_tokens > 1)  # single rows first, else stable
        tokens, batch = _batch(ordered, self.layout.block_tokens)
        hidden = self.model.forward(tokens, self.kv, batch)
        last = [(item.sequence, int(end) - 1) for item, end in zip(ordered, batch.query_start[1:], strict=True)]
        for item, (_sequence, row) in zip(ordered, last, strict=True):
            if item.sequence.params.prompt_logprobs is not None:
                self._prompt_logprobs(item, hidden[row + 1 - item.num_tokens : row + 1])
        sampled = [pair for item, pair in zip(ordered, last, strict=True) if item.samples]
        rows = [row for _sequence, row in sampled]
        return [sequence for sequence, _row in sampled], self.model.logits(hidden[rows])

    @torch.inference_mode()
    def warm_up(self, num_rows: int) -> float:
        """Runs a chunk of ``num_rows`` and a decode step over blocks that nobody holds yet, so that the first
        request meets warm caches and finished lazy initialisation. Returns prefill speed in tokens/s."""
        num_rows = min(num_rows, self.num_blocks * self.layout.block_tokens - 1, self.max_model_len - 1)
        sequence = Sequence(
            "warm-up", [0] * num_rows, num_rows, SamplingParams(), frozenset(), self.max_model_len, b""
        )
        sequence.blocks = list(range(self.layout.blocks_for(num_rows + 1)))
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            self.run([Scheduled(sequence, num_rows)])
            seconds = time.perf_counter() - start
        sequence.num_computed = num_rows
        sequence.tokens.append(0)
        self.run([Scheduled(sequence, 1)])
        return num_rows / seconds

    def _prompt_logprobs(self, item: Scheduled, hidden: Tensor) -> None:
        """Row r predicts token r + 1, as far as that one belongs to the prompt."""
        sequence, start = item.sequence, item.sequence.num_computed
        wanted = min(start + item.num_tokens, sequence.num_prompt - 1) - start
        if wanted <= 0:
            return
        del sequence.prompt_logprobs[start:]  # a preempted sequence comes here twice
        top = sequence.params.prompt_logprobs
        assert top is not None
        logits = self.model.logits(hidden[:wanted])
        sequence.prompt_logprobs += [
            token_logprobs(logits[r], sequence.tokens[start + r + 1], top) for r in range(wanted)
        ]


def _weights_name(files: ModelFiles, quantization: str | None) -> str:
    """Names the weights that are computed with: KV of rounded weights must not meet that of others."""
    return files.digest() if quantization is None else f"{files.digest()}|{quantization}"


def _batch(ordered: SequenceOf[Scheduled], block_tokens: int) -> tuple[Tensor, AttentionBatch]:
    """Token ids ``[T]`` and the places of the rows, in one pass over the scheduled sequences."""
    counts = np.array([item.num_tokens for item in ordered], dtype=np.int32)
    starts = np.array([item.sequence.num_computed for item in ordered], dtype=np.int64)
    query_start = np.zeros(len(ordered) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    tables = np.zeros((len(ordered), max(len(item.sequence.blocks) for item in ordered)), dtype=np.int32)
    tokens: list[int] = []
    for i, item in enumerate(ordered):
        sequence = item.sequence
        tables[i, : len(sequence.blocks)] = sequence.blocks
        tokens += sequence.tokens[sequence.num_computed : sequence.num_computed + item.num_tokens]
    owner = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(len(tokens), dtype=np.int64) - query_start[owner] + starts[owner]
    slots = tables[owner, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
    contexts = (starts + counts).astype(np.int32)
    batch = AttentionBatch(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_start=torch.from_numpy(query_start),
        context_lens=torch.from_numpy(contexts),
        block_tables=torch.from_numpy(tables),
        num_decodes=int((counts == 1).sum()),
        max_query=int(counts.max()),
        max_context=int(contexts.max()),
    )
    return torch.tensor(tokens, dtype=torch.int64), batch


def _pool_blocks(config: EngineConfig, layout: KVLayout, max_model_len: int) -> int:
    memory = config.kv_cache_memory
    if memory is None:
        useful = config.max_num_seqs * max_model_len * layout.token_bytes
        memory = min(useful, int(psutil.virtual_memory().available * _POOL_SHARE))
    num_blocks = memory // layout.block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv-cache-memory of {memory} bytes holds fewer than two blocks of {layout.block_bytes} bytes"
        )
    return num_blocks

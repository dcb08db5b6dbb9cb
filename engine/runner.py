"""Owns the model and the KV pool tensor, and computes steps: rows in, tokens out.

Knows tensors, block tables and what the scheduler handed out, nothing of waiting requests. On a GPU a step is
queued (`launch`), and the next one may be queued before its tokens are read (`collect`). Invariant: a step writes
KV to the slots of its own rows and to the scratch block only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from engine.batch import HostBatch, host_batch
from engine.config import EngineConfig
from engine.device import CudaDevice, Device, choose_device
from engine.graphs import DecodeGraphs
from engine.linears import QUANTIZATIONS
from engine.memory import blocks_in, check_free, gpu_blocks, host_blocks
from engine.models.llama import LlamaModel
from engine.sampler import Sampled, drawable, numbers, sample, token_logprobs
from engine.scheduler import Scheduled
from engine.sequence import Sequence
from engine.staging import Staging
from engine.weights import ModelFiles
from kernels import AttentionBatch, AttentionShape, Kernels, SampleParams, load_kernels, pool_shape
from kernels.cpu.build import BuildError
from kernels.memory import zeros
from splitserve.errors import ConfigError
from splitserve.hashing import PrefixHasher
from splitserve.layout import KVLayout
from splitserve.sampling import SamplingParams

if TYPE_CHECKING:
    from engine.device_pool import TensorPool

log = logging.getLogger(__name__)

_FIRST_ROWS = 16  # enough for lazy initialisation
_LOGITS_ROWS = 256  # of a prompt at a time: 8,192 rows of a large vocabulary are 4 GiB
_DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_KV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way."""

    sequences: list[Sequence]  # those that sample
    logits: Tensor  # [sequences, vocab]
    drawn: Tensor | None  # [2, sequences] int64 on the host: tokens, and whether their rows are finite
    rows: dict[Sequence, int]  # of ``drawn``
    wait: Callable[[], None]  # until the step is over: KV is written, ``drawn`` filled, what it read is free again


class Runner:
    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        device: Device | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """``device`` and ``kernels`` stand in for those that the configuration names."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.dtype not in _DTYPES:
            raise ConfigError(f"dtype {config.dtype!r} is not supported; use {', '.join(_DTYPES)}")
        if config.kv_cache_dtype not in ("auto", *_KV_DTYPES):
            raise ConfigError(f"kv-cache-dtype {config.kv_cache_dtype!r} is not supported; use auto or fp8")
        if config.quantization not in QUANTIZATIONS:
            raise ConfigError(f"quantization {config.quantization!r} is not supported; use int8 or fp8")
        model = files.config
        if model.quantization is not None and config.quantization not in (None, model.quantization):
            raise ConfigError(
                f"the checkpoint is {model.quantization}, --quantization asks for {config.quantization}"
            )
        quantization = config.quantization or model.quantization
        self._dtype = _DTYPES[config.dtype]
        self._kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, self._dtype)
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
            dtype=str(self._kv_dtype).removeprefix("torch."),
            block_tokens=config.block_tokens,
        )
        self.fingerprint = self.layout.fingerprint(_weights_name(files, quantization))
        self._device = device or choose_device(config.device, fp8=quantization == "fp8")
        where = self._device.torch
        if isinstance(self._device, CudaDevice) and config.kv_cache_memory is None:
            check_free(*self._device.memory(), config.gpu_memory_utilization)
        try:
            self.kernels = kernels or load_kernels(str(where), config.kernels, config.spare_cores)
            self.kernels.check(
                AttentionShape(
                    model.num_heads,
                    model.num_kv_heads,
                    model.head_dim,
                    config.block_tokens,
                    self._dtype,
                    self._kv_dtype,
                )
            )
        except (ValueError, BuildError) as error:
            raise ConfigError(" ".join(str(error).split())) from error
        try:
            self._set_up(config, files, quantization)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the GPU is out of memory: other processes took some since the start, or the model is too large; "
                "lower --gpu-memory-utilization, or use --quantization fp8"
            ) from error

    @torch.no_grad()
    def _set_up(self, config: EngineConfig, files: ModelFiles, quantization: str | None) -> None:
        device, layout = self._device, self.layout
        self.model = LlamaModel(files, self.kernels, self._dtype, self.max_model_len, device.torch, quantization)
        max_blocks = layout.blocks_for(self.max_model_len)
        self._staging = Staging(device, config.max_num_batched_tokens, config.max_num_seqs, max_blocks)
        self._drawn = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device.torch)
        self.num_blocks = self._count_blocks(config)
        self.kv = self._pool(self.num_blocks + device.asynchronous)  # one more, for padding rows
        self._graphs: DecodeGraphs | None = None
        if device.asynchronous and self.kernels.capturable:
            self._graphs = DecodeGraphs(
                device, self._forward, most=config.max_num_seqs, max_blocks=max_blocks,
                max_context=self.max_model_len, scratch_block=self.num_blocks, block_tokens=config.block_tokens,
            )  # fmt: skip

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before it is collected."""
        return self._device.asynchronous

    @property
    def on_gpu(self) -> bool:
        """Whether the pool is in device memory: `device_pool` then, else `memory`."""
        return self._device.torch.type != "cpu"

    def device_pool(self) -> TensorPool:
        """The pool as transfers reach it on a GPU."""
        from engine.device_pool import TensorPool  # needs Triton

        return TensorPool(self.kv[: self.num_blocks])

    def memory(self) -> memoryview:
        """The pool's bytes, writable; block ``i`` is the ``i``-th ``layout.block_bytes`` of them."""
        return memoryview(self.kv[: self.num_blocks].view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

    @torch.inference_mode()
    def launch(self, scheduled: SequenceOf[Scheduled], before: Launched | None = None) -> Launched:
        """Starts the step. ``before`` is the one whose tokens this one reads and that is not yet collected.
        Log probabilities of prompts are added to the sequences that want them."""
        self._device.use()
        ordered = sorted(scheduled, key=lambda item: item.num_tokens > 1)  # single rows first, else stable
        batch = host_batch(ordered, self.layout.block_tokens, before.rows if before else None)
        sequences = [item.sequence for item in ordered if item.samples]
        wants_prompt = any(item.sequence.params.prompt_logprobs is not None for item in ordered)
        decodes = len(sequences) == len(batch.tokens) and not wants_prompt
        if self._graphs is not None and decodes and self._graphs.covers(batch):
            hidden = self._graphs.run(batch, self._staging.upload)
            logits = self.model.logits(hidden)[: len(ordered)]
        else:
            found = self._staging.upload(batch)
            hidden = self._forward(found["tokens"], found["sources"], _on_device(found, batch))
            for i, item in enumerate(ordered):
                if item.sequence.params.prompt_logprobs is not None:
                    self._prompt_logprobs(item, hidden[batch.query_start[i] : batch.query_start[i + 1]])
            logits = self.model.logits(hidden[found["last_rows"]])
        drawn, rows = None, {}
        if self._device.asynchronous and sequences and all(drawable(s) for s in sequences):
            drawn = self._draw(logits, sequences)
            rows = {sequence: row for row, sequence in enumerate(sequences)}
        return Launched(sequences, logits, drawn, rows, self._device.mark())

    @torch.inference_mode()
    def collect(self, launched: Launched) -> list[Sampled | None]:
        """Waits for the step: a token for each of its ``sequences``, None where a row is not finite."""
        launched.wait()  # also where nothing is sampled: others may read its blocks, and write what it read
        if not launched.sequences:
            return []
        if launched.drawn is None:
            return sample(launched.logits, launched.sequences, self.kernels.argmax)
        tokens, finite = launched.drawn.tolist()
        return [(token, None) if ok else None for token, ok in zip(tokens, finite, strict=True)]

    def wait(self) -> None:
        """Until no step is under way. Raises where the device has failed for good."""
        self._device.use()
        self._device.mark()()

    @torch.inference_mode()
    def warm_up(self, num_rows: int) -> float:
        """Runs chunks of up to ``num_rows`` and a decode step over blocks that nobody holds yet, so that the first
        request meets warm caches and finished lazy initialisation. Returns prefill speed in tokens/s."""
        num_rows = min(num_rows, self.num_blocks * self.layout.block_tokens - 1, self.max_model_len - 1)
        sequence = self._made_up(num_rows, list(range(self.layout.blocks_for(num_rows + 1))))
        seconds = 0.0
        # A GPU's kernels are compiled for the size that is measured next.
        first = num_rows if self._device.asynchronous else min(_FIRST_ROWS, num_rows)
        for rows in (first, num_rows):
            start = time.perf_counter()
            self.collect(self.launch([Scheduled.of(sequence, rows)]))
            seconds = time.perf_counter() - start
        sequence.num_computed = num_rows
        sequence.tokens.append(0)
        self.collect(self.launch([Scheduled.of(sequence, 1)]))
        return num_rows / seconds

    def _made_up(self, num_rows: int, blocks: list[int]) -> Sequence:
        params = SamplingParams(temperature=0)
        hasher = PrefixHasher(self.fingerprint)
        sequence = Sequence("warm-up", [0] * num_rows, num_rows, params, frozenset(), self.max_model_len, hasher)
        sequence.blocks = blocks
        return sequence

    def _forward(self, tokens: Tensor, sources: Tensor, batch: AttentionBatch) -> Tensor:
        if self._device.asynchronous:  # some tokens are known on the device alone
            tokens = torch.where(sources >= 0, self._drawn[sources.clamp(min=0).long()], tokens)
        return self.model.forward(tokens, self.kv, batch)

    def _draw(self, logits: Tensor, sequences: list[Sequence]) -> Tensor:
        """Tokens on the device, and a copy of them under way to the host: `Launched.drawn`."""
        if all(s.params.greedy for s in sequences):
            tokens = self.kernels.argmax(logits)
        else:
            tokens = self.kernels.sample(logits, SampleParams(*self._staging.upload_numbers(numbers(sequences))))
        self._drawn[: len(sequences)].copy_(tokens)
        finite = torch.isfinite(logits.amax(dim=-1)).long()
        return self._staging.read_back(torch.stack((tokens, finite)))

    def _prompt_logprobs(self, item: Scheduled, hidden: Tensor) -> None:
        """Row r predicts token r + 1, as far as that one belongs to the prompt."""
        sequence, start = item.sequence, item.start
        wanted = min(item.end, sequence.num_prompt - 1) - start
        if wanted <= 0:
            return
        del sequence.prompt_logprobs[start:]  # a preempted sequence comes here twice
        top = sequence.params.prompt_logprobs
        assert top is not None
        following = sequence.tokens[start + 1 : start + wanted + 1]
        for i, rows in enumerate(torch.split(hidden[:wanted], _LOGITS_ROWS)):
            tokens = following[i * _LOGITS_ROWS :][: len(rows)]
            sequence.prompt_logprobs += [
                token_logprobs(logits, token, top)
                for logits, token in zip(self.model.logits(rows), tokens, strict=True)
            ]

    def _pool(self, num_blocks: int) -> Tensor:
        layout = self.layout
        shape = pool_shape(
            num_blocks, layout.num_kv_heads, layout.num_layers, layout.block_tokens, layout.head_dim
        )
        if self._device.torch.type != "cpu":  # what a block never held is finite
            return torch.zeros(shape, dtype=self._kv_dtype, device=self._device.torch)
        # rows of K and V must not straddle cache lines
        return zeros(num_blocks * layout.block_bytes).view(self._kv_dtype).view(shape)

    def _count_blocks(self, config: EngineConfig) -> int:
        device = self._device
        size = config.kv_cache_memory
        if size is None and not isinstance(device, CudaDevice):
            size = config.host_kv_memory
        if size is not None:
            return blocks_in(size, self.layout)
        useful = config.max_num_seqs * self.max_model_len * self.layout.token_bytes
        if not isinstance(device, CudaDevice):
            return host_blocks(psutil.virtual_memory().available, useful, self.layout)
        peak = device.peak_bytes(lambda: self._largest_step(config))
        _free, total = device.memory()
        # one block is for padding rows
        return gpu_blocks(total, config.gpu_memory_utilization, peak + self.layout.block_bytes, self.layout)

    def _largest_step(self, config: EngineConfig) -> None:
        """The rows of the largest step over one small pool, and logits for the most sequences."""
        rows = min(config.max_num_batched_tokens, self.max_model_len - 1)
        self.kv = self._pool(2)
        sequence = self._made_up(rows, [0] * self.layout.blocks_for(rows))
        found = self._staging.upload(batch := host_batch([Scheduled.of(sequence, rows)], self.layout.block_tokens))
        hidden = self._forward(found["tokens"], found["sources"], _on_device(found, batch))
        logits = self.model.logits(hidden[: max(config.max_num_seqs, _LOGITS_ROWS)])  # of a prompt, or to sample
        logits = logits[: config.max_num_seqs]
        drawn = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)
        sequence.params = drawn
        self.kernels.sample(
            logits, SampleParams(*self._staging.upload_numbers(numbers([sequence] * logits.shape[0])))
        )
        del self.kv


def _on_device(found: dict[str, Tensor], batch: HostBatch) -> AttentionBatch:
    return AttentionBatch(
        positions=found["positions"],
        slots=found["slots"],
        query_start=found["query_start"],
        context_lens=found["context_lens"],
        block_tables=found["block_tables"],
        num_decodes=batch.num_decodes,
        max_query=batch.max_query,
        max_context=batch.max_context,
    )


def _weights_name(files: ModelFiles, quantization: str | None) -> str:
    """Names the weights that are computed with: KV of rounded weights must not meet that of others."""
    return files.digest() if quantization is None else f"{files.digest()}|{quantization}"

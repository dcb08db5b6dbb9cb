"""What a runner asks of memory, and what it says when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import EngineConfig, EngineRequest, SamplingParams, open_model
from engine.core import Engine
from engine.runner import _LOGITS_ROWS, Runner
from kernels import Linear, ReferenceKernels
from splitserve.errors import ConfigError
from splitserve.sampling import Logprobs


class WatchedHead(ReferenceKernels):
    """Notes how many rows of logits are asked for at once."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def pack_linear(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Linear:
        linear = super().pack_linear(weight, bias, out_dtype)
        if out_dtype is None:  # no head
            return linear

        def noted(x: Tensor) -> Tensor:
            self.rows.append(x.shape[0])
            return linear(x)

        return noted


class Full(ReferenceKernels):
    """The weights don't fit."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Linear:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has none.")


def config(path: Path, rows: int) -> EngineConfig:
    return EngineConfig(
        str(path), dtype="float32", threads=1, kv_cache_memory=1 << 20, max_num_seqs=4, max_num_batched_tokens=rows
    )


def prompt_logprobs(path: Path, rows: int) -> tuple[list[Logprobs], list[int]]:
    """Of 400 tokens in chunks of ``rows``, and the rows of logits that were computed at once."""
    kernels, files = WatchedHead(), open_model(path)
    engine = Engine(config(path, rows), files, Runner(config(path, rows), files, kernels=kernels))
    tokens = [(7 * i) % 251 for i in range(400)]
    engine.add(EngineRequest("a", tokens, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)))
    found: list[Logprobs] = []
    while engine.has_work:
        for _name, output in engine.step().outputs:
            found += output.prompt_logprobs or ()
    return found, kernels.rows


def test_logits_of_a_long_prompt_are_computed_in_parts(tiny: Callable[..., Path]) -> None:
    whole, at_once = prompt_logprobs(tiny(), rows=512)
    assert max(at_once) == _LOGITS_ROWS < 399 == len(whole)
    chunked, _rows = prompt_logprobs(tiny(), rows=100)
    assert [e.logprob for e in whole] == pytest.approx([e.logprob for e in chunked], abs=1e-4)


def test_a_model_that_does_not_fit_is_one_clear_line(tiny: Callable[..., Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"the GPU is out of memory: .* lower --gpu-memory-utilization"
    ) as caught:
        Runner(config(tiny(), 64), open_model(tiny()), kernels=Full())
    assert "\n" not in str(caught.value)

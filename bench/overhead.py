"""Times what an engine's step costs beside the model: scheduling, batches, greedy sampling, outputs.

    python -m bench.overhead [--model NAME]

The real engine, with a model that computes nothing. Its logits have 64 columns: a row of them takes no time to
speak of. Median, of decode steps that each sequence takes part in.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.core import Engine
from engine.models.llama import LlamaModel
from engine.runner import Runner
from engine.sequence import EngineRequest
from engine.weights import open_model
from splitserve.models import resolve_model
from splitserve.sampling import SamplingParams

SEQUENCES = (1, 8, 32, 128)
PROMPT, ANSWER = 16, 200  # tokens
TARGET = 3.0  # ms at the most sequences


class NoModel:
    """Stands in for a `LlamaModel`: the same calls, no arithmetic."""

    def __init__(self) -> None:
        self._row = torch.rand(1, 64)

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        return tokens.unsqueeze(1)  # [T, 1]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._row.repeat(hidden.shape[0], 1)  # [rows, 64]


def step_seconds(engine: Engine, sequences: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    for i in range(sequences):
        engine.add(EngineRequest(f"r{i}", [i + 1] * PROMPT, params))
    times = []
    while engine.has_work:
        start = perf_counter()
        result = engine.step()
        took = perf_counter() - start
        if len(result.outputs) == sequences:
            times.append(took)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    files = open_model(resolve_model(options.model))
    config = EngineConfig(options.model, threads=1, max_num_seqs=max(SEQUENCES), kv_cache_memory=1 << 30)
    runner = Runner(config, files)
    runner.model = cast(LlamaModel, NoModel())
    engine = Engine(config, files, runner)
    for count in SEQUENCES:
        print(f"  {count:>4} sequences {step_seconds(engine, count) * 1e3:>8.3f} ms")
    print(f"  target: {TARGET:.0f} ms at {max(SEQUENCES)}")


if __name__ == "__main__":
    main()

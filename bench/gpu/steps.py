"""Whole steps of the engine with random weights, beside what the device does with the same bytes or products."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch

from bench.gpu.measure import Bench, Line, synchronize
from bench.gpu.model import RandomFiles
from engine import EngineRequest, SamplingParams
from engine.core import Engine


def steps(bench: Bench) -> Iterator[Line]:
    """Decode, prefill, and how long the GPU waits for Python."""
    scale, model = bench.scale, bench.scale.model
    engine = bench.engine(
        max_num_seqs=max(*scale.step_sequences, scale.idle_sequences), max_num_batched_tokens=scale.prefill,
        gpu_memory_utilization=0.85,
    )  # fmt: skip
    engine.warm_up()
    files = RandomFiles(model, bench.device)
    for sequences in scale.step_sequences:
        wall, _busy = decode(engine, sequences, scale.step_context, scale.steps)
        bench.results[f"decode {sequences}"] = sequences / wall
        held = sequences * (scale.step_context + scale.steps) * engine.runner.layout.token_bytes
        rate = (files.weight_bytes(scale.dtype.itemsize) + held) / wall  # bytes that must be read, a second
        value = f"{wall * 1e3:.2f} ms, {sequences / wall:.0f} tokens/s"
        yield Line(f"decode step, {sequences} sequences / copy", value, rate / bench.copy_rate, 0.8)
    wall, busy = decode(engine, scale.idle_sequences, scale.step_context, scale.steps)
    name = f"GPU idle in a decode step, {scale.idle_sequences} sequences"
    yield Line(name, f"{wall * 1e3:.2f} ms", 1 - busy / wall, 0.03, most=True)
    taken = prefill(engine, scale.prefill, min(4, scale.rounds))
    rows = scale.prefill
    products = 2 * rows * model.num_layers * files.layer_weights
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * rows * (rows + 1) // 2
    rate = (products + attention) / taken
    name = f"prefill step, {rows} tokens / matrix product"
    yield Line(name, f"{taken * 1e3:.0f} ms", rate / bench.matrix_rate, 0.7)


def decode(engine: Engine, sequences: int, context: int, count: int) -> tuple[float, float]:
    """Median wall time between steps of ``sequences`` decodes, and the time that the GPU is busy in one."""
    greedy = SamplingParams(temperature=0, max_tokens=count + 24, ignore_eos=True)
    generator = torch.Generator().manual_seed(sequences)
    for i in range(sequences):
        tokens = torch.randint(0, engine.vocab_size, (context,), generator=generator).tolist()
        engine.add(EngineRequest(f"decode-{i}", tokens, greedy))
    running = engine.scheduler.running
    while len(running) < sequences or any(s.remaining > 1 for s in running):
        engine.step()
    for _ in range(4):
        engine.step()
    walls = []
    for _ in range(count):
        start = time.perf_counter()
        engine.step()
        walls.append(time.perf_counter() - start)
    busy = _busy(engine) if torch.cuda.is_available() else 0.0
    while engine.has_work:
        engine.step()
    return median(walls), busy


def _busy(engine: Engine, profiled: int = 8) -> float:
    """Seconds that the GPU computes in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(profiled):
            engine.step()
        synchronize()
    return float(sum(e.self_device_time_total for e in profile.key_averages()) / 1e6 / profiled)


def prefill(engine: Engine, tokens: int, rounds: int) -> float:
    """Median wall time of a step that reads a prompt of so many tokens."""
    walls = []
    for i in range(rounds):
        ids = torch.randint(0, engine.vocab_size, (tokens,)).tolist()
        engine.add(EngineRequest(f"prefill-{i}", ids, SamplingParams(temperature=0, max_tokens=1)))
        synchronize()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        walls.append(time.perf_counter() - start)
    return median(walls)

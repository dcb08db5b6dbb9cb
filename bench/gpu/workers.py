"""Two workers on one GPU: how fast KV goes from one process to the other, what streams notice of long prompts, and
whether the answers are those of one engine alone."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bench.gpu.measure import Bench, Line
from bench.gpu.source import SourceOptions, blocks_of, running_source
from engine import AsyncEngine, EngineOutput, EngineRequest, SamplingParams
from kvtransfer import PullClient, make_transports

ANSWER = 8  # tokens of an answer to a long prompt
APART = 0.25  # seconds between two long prompts
LIMIT_SECONDS = 120.0
SHARE = 0.42  # of the GPU's memory, for each of two workers

Answer = Callable[[str, list[int]], Coroutine[Any, Any, list[int]]]


def transfer(bench: Bench) -> Iterator[Line]:
    """The KV of a long prompt between two processes, over each transport that works here."""
    for name in ("ucx", "tcp"):
        try:
            make_transports([name])
        except Exception as error:  # one that is not installed is a row of the table
            yield Line(f"KV of {bench.scale.prefill} tokens, {name} / copy", f"skipped: {error}")
            continue
        yield asyncio.run(_transfer(bench, name))
        gc.collect()


async def _transfer(bench: Bench, transport: str) -> Line:
    rows = bench.scale.prefill
    async with _pair(bench, transport, rows) as (engine, pulled, answer):
        for i in range(4):  # the first one makes the connection
            await answer(f"pull-{i}", _prompt(bench, rows, seed=i))
        name = f"KV of {rows} tokens between two processes, {transport} / copy"
        num_bytes = rows * engine.engine.runner.layout.token_bytes
        best = sorted(pulled)[len(pulled) // 2]
        value = f"{best / 1e9:.1f} GB/s, {num_bytes / best * 1e3:.1f} ms"
        return Line(name, value, 2 * best / bench.copy_rate, 0.6 if transport == "ucx" else None)


def streams(bench: Bench) -> Iterator[Line]:
    """ITL p99 of streams while long prompts arrive: one engine with chunked prefill, then two workers. The second
    time of each counts: in the first, kernels are compiled."""
    colocated, alone = asyncio.run(_colocated(bench, times=2))
    yield Line("ITL p99 of one engine, chunked prefill", f"{colocated * 1e3:.1f} ms")
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    transport = "ucx" if _works("ucx") else "tcp"
    apart, together = asyncio.run(_apart(bench, transport, times=2))
    same, ratio = sum(alone[name] == together[name] for name in alone), apart / colocated
    yield Line(
        f"ITL p99 of two workers, {transport} / one engine", f"{apart * 1e3:.1f} ms", ratio, 1 / 3, most=True
    )
    yield Line(f"answers equal to one engine's, {bench.scale.dtype}", f"{same} of {len(alone)}")


def equality(bench: Bench) -> Iterator[Line]:
    """Greedy answers of two workers against one engine's, in float32, where no rounding may differ."""
    model = replace(bench.scale.model, num_layers=min(2, bench.scale.model.num_layers))
    small = Bench(replace(bench.scale, model=model, dtype=torch.float32), bench.device)
    _itl, alone = asyncio.run(_colocated(small))
    gc.collect()
    _itl, together = asyncio.run(_apart(small, "ucx" if _works("ucx") else "tcp"))
    same = sum(alone[name] == together[name] for name in alone)
    name = "answers of two workers equal to one engine's, float32"
    yield Line(name, f"{same} of {len(alone)}", same / len(alone), 1.0)


def _works(transport: str) -> bool:
    try:
        make_transports([transport])
    except Exception:  # whatever is missing: another transport serves
        return False
    return True


def _prompt(bench: Bench, tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, bench.scale.model.vocab_size, (tokens,), generator=generator).tolist()
    return ids


async def _colocated(bench: Bench, times: int = 1) -> tuple[float, dict[str, list[int]]]:
    scale = bench.scale
    engine = AsyncEngine(bench.engine(**_options(bench, scale.chunk, 2 * SHARE)))
    engine.engine.warm_up()
    await engine.start()
    try:

        async def answer(name: str, tokens: list[int]) -> list[int]:
            greedy = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
            return await _collect(engine.generate(EngineRequest(name, tokens, greedy)))

        return await _repeated(bench, engine, answer, times)
    finally:
        await engine.close()


async def _apart(bench: Bench, transport: str, times: int = 1) -> tuple[float, dict[str, list[int]]]:
    async with _pair(bench, transport, bench.scale.chunk) as (engine, _pulled, answer):
        return await _repeated(bench, engine, answer, times)


async def _repeated(
    bench: Bench, engine: AsyncEngine, answer: Answer, times: int
) -> tuple[float, dict[str, list[int]]]:
    """The last of so many runs of the load."""
    for i in range(times - 1):
        await _under_load(bench, engine, answer, f"run {i}: ")
    return await _under_load(bench, engine, answer)


@asynccontextmanager
async def _pair(
    bench: Bench, transport: str, chunk: int
) -> AsyncIterator[tuple[AsyncEngine, list[float], Answer]]:
    """A decode worker here and a prefill worker beside it: the engine here, bytes a second of each pull, and what
    answers a prompt by way of both."""
    other = SourceOptions(bench.scale, bench.device, transport, _options(bench, bench.scale.prefill, SHARE))
    engine = AsyncEngine(bench.engine(**_options(bench, chunk, SHARE)))
    engine.engine.warm_up()
    await engine.start()
    [puller] = make_transports([transport])
    fingerprint, pulled = engine.engine.runner.fingerprint, list[float]()
    pulls = PullClient(blocks_of(engine.engine), fingerprint, "puller", 1, [puller], progress_timeout=30.0)
    try:
        async with running_source(other) as source, pulls:

            async def answer(name: str, tokens: list[int]) -> list[int]:
                handle = await source.handle(name, tokens)
                greedy = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
                reservation = await engine.reserve(EngineRequest(name, tokens, greedy))
                result = await pulls.pull(handle, reservation.blocks)
                pulled.append(result.bytes / result.exposed_seconds)
                rest = engine.generate_loaded(name, len(tokens), result.first_token)
                return [result.first_token, *await _collect(rest)]

            yield engine, pulled, answer
    finally:
        await puller.close()
        await engine.close()


async def _under_load(
    bench: Bench, engine: AsyncEngine, answer: Answer, run: str = ""
) -> tuple[float, dict[str, list[int]]]:
    """p99 of the gaps between tokens of the streams while prompts are answered, in seconds, and the answers."""
    scale = bench.scale
    times: list[list[float]] = [[] for _ in range(scale.streams)]
    answered = [asyncio.Event() for _ in range(scale.streams)]

    async def stream(index: int) -> None:
        most = scale.model.max_position - scale.stream_context - 1
        endless = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        tokens = _prompt(bench, scale.stream_context, seed=1000 + index)
        async with aclosing(engine.generate(EngineRequest(f"{run}stream-{index}", tokens, endless))) as outputs:
            async for _output in outputs:
                times[index].append(time.perf_counter())
                if len(times[index]) > 1:
                    answered[index].set()

    running = [asyncio.create_task(stream(i)) for i in range(scale.streams)]
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            for event in answered:
                await event.wait()
            begin = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                answers = {}
                for i in range(scale.prompts):
                    name = f"{run}prompt-{i}"
                    answers[name] = group.create_task(answer(name, _prompt(bench, scale.prefill, seed=i)))
                    await asyncio.sleep(APART)
            end = time.perf_counter()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    gaps = [b - a for each in times for a, b in pairwise(each) if begin <= b <= end]
    return float(np.percentile(gaps, 99)), {name: task.result() for name, task in answers.items()}


async def _collect(outputs: AsyncGenerator[EngineOutput, None]) -> list[int]:
    async with aclosing(outputs):
        return [token.token async for output in outputs for token in output.tokens]


def _options(bench: Bench, chunk: int, share: float) -> dict[str, Any]:
    """Of an engine that takes ``share`` of the GPU."""
    scale = bench.scale
    options = {"max_num_seqs": scale.streams + scale.prompts, "max_num_batched_tokens": chunk}
    if bench.device.type == "cuda":
        return options | {"gpu_memory_utilization": share}
    return options | {"kv_cache_memory": 1 << 20}

"""A prefill worker without a cluster: a process that reads prompts and offers their blocks, over a pipe.

Knows no router and no gRPC; the engine, its blocks and the transfers are those of a real worker. Invariant: blocks
are freed only after their publication was released.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.gpu.measure import make_engine
from bench.gpu.scale import Scale
from engine import AsyncEngine, EngineRequest, SamplingParams
from engine.core import Engine
from kvtransfer import BlockMemory, BlockServer, DeviceBlocks, KvHandle, make_transports

START_SECONDS = 180.0
PROMPT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What the other process computes with."""

    scale: Scale
    device: torch.device
    transport: str
    engine: dict[str, Any]


def blocks_of(engine: Engine) -> BlockMemory | DeviceBlocks:
    runner = engine.runner
    if runner.on_gpu:
        return DeviceBlocks(runner.device_pool())
    return BlockMemory(runner.memory(), runner.layout, runner.num_blocks)


class Source:
    """The process as its parent sees it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._asking = asyncio.Lock()  # answers come in the order of the questions

    async def handle(self, name: str, tokens: list[int]) -> KvHandle:
        """Begins to read a prompt, and says where its blocks can be pulled."""
        async with self._asking:
            self._pipe.send((name, tokens))
            handle: KvHandle = await self.answer()
            return handle

    async def answer(self) -> Any:
        if not await asyncio.to_thread(self._pipe.poll, START_SECONDS):
            raise TimeoutError("the source process says nothing")
        answer = await asyncio.to_thread(self._pipe.recv)
        if isinstance(answer, str):
            raise RuntimeError(f"the source process failed: {answer}")
        return answer


@asynccontextmanager
async def running_source(options: SourceOptions) -> AsyncIterator[Source]:
    """Ready for prompts."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(there, options), daemon=True)
    process.start()
    there.close()
    source = Source(here)
    try:
        assert await source.answer() is True
        yield source
        here.send(None)
        await asyncio.to_thread(process.join, 30.0)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        here.close()


def _main(pipe: Connection, options: SourceOptions) -> None:
    try:
        asyncio.run(_serve(pipe, options))
    except Exception as error:  # the parent has to hear it, whatever it is
        pipe.send(f"{type(error).__name__}: {error}")
        raise


async def _serve(pipe: Connection, options: SourceOptions) -> None:
    core = await asyncio.to_thread(make_engine, options.scale, options.device, **options.engine)
    core.warm_up()
    engine = AsyncEngine(core)
    await engine.start()
    [transport] = make_transports([options.transport])
    fingerprint = core.runner.fingerprint
    try:
        async with (
            BlockServer(blocks_of(core), fingerprint, "source", 1, [transport]) as server,
            asyncio.TaskGroup() as prompts,
        ):
            pipe.send(True)
            while (message := await asyncio.to_thread(pipe.recv)) is not None:
                prompts.create_task(_offer(engine, server, pipe, *message))
    finally:
        await transport.close()
        await engine.close()


async def _offer(engine: AsyncEngine, server: BlockServer, pipe: Connection, name: str, tokens: list[int]) -> None:
    layout = engine.engine.runner.layout
    publication = server.publish(layout.blocks_for(len(tokens)))
    pipe.send(publication.handle)
    request = EngineRequest(name, tokens, SamplingParams(temperature=0), export=True)
    async with asyncio.timeout(PROMPT_SECONDS):
        async for output in engine.generate(request):
            complete = len(output.blocks) if output.finished else output.num_computed // layout.block_tokens
            publication.ready(output.blocks[len(publication.block_ids) : complete])
            if output.finished:
                publication.finish(output.tokens[0].token, finished=False)
        await publication.released()
    engine.release(name)

"""A process that offers blocks of a `TensorPool`: ``python -m tests.kvtransfer.device_source TRANSPORT BLOCKS…``

Says where on stdout and ends when they were released. Knows no engine but its pool.
"""

from __future__ import annotations

import asyncio
import sys

import torch

from bench.transfer import FINGERPRINT, SOURCE_ID, handle_to_json
from engine.device_pool import TensorPool
from kvtransfer import BlockServer, DeviceBlocks, TcpTransport, Transport, UcxTransport
from tests.kvtransfer.device_double import CarryingUcx

TRANSPORTS: dict[str, type[Transport]] = {"tcp": TcpTransport, "ucx": UcxTransport, "carrying": CarryingUcx}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS, WORDS = 40, 1024
TOKEN = 42


def source_tensor() -> torch.Tensor:
    """``[blocks, words]`` int32, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31, (BLOCKS, WORDS), generator=generator).to(torch.int32)


async def serve(transport: Transport, blocks: list[int]) -> None:
    pool = DeviceBlocks(TensorPool(source_tensor().to(DEVICE)))
    async with BlockServer(pool, FINGERPRINT, SOURCE_ID, 1, [transport]) as server:
        publication = server.publish(len(blocks))
        print(handle_to_json(publication.handle), flush=True)
        publication.ready(blocks[:3])
        await asyncio.sleep(0.05)
        publication.ready(blocks[3:])
        publication.finish(TOKEN, finished=False)
        print(await publication.released(), flush=True)
    await transport.close()


if __name__ == "__main__":
    asyncio.run(serve(TRANSPORTS[sys.argv[1]](), [int(block) for block in sys.argv[2:]]))

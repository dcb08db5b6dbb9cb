from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from router.legs import Channels, open_decode
from router.vigil import Vigil
from splitserve.cluster import WorkerInfo
from splitserve.errors import Unavailable
from splitserve.sampling import SamplingParams
from splitserve.sequences import SequenceRequest
from tests.router.scripted import MakeWorker

SILENCE = 0.4
SEQUENCE = SequenceRequest("r", "00" * 32, [1], 1, SamplingParams(max_tokens=3, seed=0))

# A decode worker that takes a request and says nothing more; it drains for as long as it is let.
SERVER = """
import asyncio, signal
from splitserve.cluster import Role
from splitserve.grpc_server import GrpcServer
from tests.router.scripted import SERVICES, Fault, Script, ScriptedWorker

async def main():
    script = Script()
    script.faults[Role.DECODE].append(Fault(0, hangs=True))
    worker = ScriptedWorker("d", Role.DECODE, script)
    async with GrpcServer("127.0.0.1", 0, [SERVICES[Role.DECODE]], worker.register, grace=0) as server:
        print(server.address, flush=True)
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        await stopping.wait()
        await server.stop(60)

asyncio.run(main())
"""


class Stranger:
    """The worker's process."""

    def __init__(self, process: asyncio.subprocess.Process, info: WorkerInfo) -> None:
        self.process = process
        self.info = info


@pytest.fixture
async def stranger(make_worker: MakeWorker) -> AsyncIterator[Stranger]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    yield Stranger(process, make_worker(grpc_address=address))
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def test_a_leg_to_a_stopped_worker_is_given_up(stranger: Stranger) -> None:
    channels = Channels()
    watching = asyncio.create_task(Vigil(channels, SILENCE).keep())
    async with asyncio.timeout(30):
        async with open_decode(channels, stranger.info, SEQUENCE, None, None) as leg:
            reading = asyncio.ensure_future(anext(aiter(leg.tokens())))
            await asyncio.sleep(4 * SILENCE)
            assert not reading.done(), "a worker that answers may take as long as it likes"
            os.kill(stranger.process.pid, signal.SIGSTOP)
            with pytest.raises(Unavailable, match="silent"):
                await reading
        assert channels.in_use() == []
    watching.cancel()
    await asyncio.wait([watching])
    await channels.close()


async def accepts(host: str, port: int) -> bool:
    try:
        _reader, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # closed at this moment
        return True
    writer.close()
    return True


async def test_a_leg_to_a_worker_that_drains_goes_on(stranger: Stranger) -> None:
    """It takes no new connection, so that it cannot be asked any more."""
    channels = Channels()
    host, port = stranger.info.grpc_address.split(":")
    watching = asyncio.create_task(Vigil(channels, SILENCE).keep())
    async with asyncio.timeout(20):
        async with open_decode(channels, stranger.info, SEQUENCE, None, None) as leg:
            reading = asyncio.ensure_future(anext(aiter(leg.tokens())))
            await asyncio.sleep(SILENCE)
            stranger.process.terminate()
            while await accepts(host, int(port)):
                await asyncio.sleep(0.01)
            await asyncio.sleep(4 * SILENCE)
            assert not reading.done()
            stranger.process.kill()
            with pytest.raises(Unavailable):
                await reading
    watching.cancel()
    await asyncio.wait([watching])
    await channels.close()


async def test_a_reader_that_is_cancelled_while_its_leg_is_lost_stays_cancelled(stranger: Stranger) -> None:
    channels = Channels()
    async with asyncio.timeout(30):
        async with open_decode(channels, stranger.info, SEQUENCE, None, None) as leg:
            reading = asyncio.ensure_future(anext(aiter(leg.tokens())))
            await asyncio.sleep(0.1)
            reading.cancel()
            assert channels.lose(stranger.info.grpc_address) == 1
            await asyncio.wait([reading])
            assert reading.cancelled()
    await channels.close()

"""Processes that start in tenths of a second: forked from one that has imported everything already.

``python -m tests.chaos.nursery FD`` is that one. It reads orders from the socket FD (what to run, with which
environment, and the child's files), forks, and reports process ids and exit codes. A child is a process like any
other: its own memory, files, signals and death. Invariant: the one that forks computes nothing itself, so no
lock of a library is held when it does.
"""

from __future__ import annotations

import array
import asyncio
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from types import TracebackType
from typing import IO, Any, Self

from splitserve.children import Child
from splitserve.process import end_with_parent

MODULES = ("tests.chaos.faulty_worker", "router.__main__")
_LIMIT = 1 << 20  # bytes of an order


class Forked:
    """What `splitserve.children` uses of an ``asyncio.subprocess.Process``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.ended = asyncio.Event()

    async def wait(self) -> int:
        await self.ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)  # exists, or the nursery has not reported its end yet


class Nursery:
    """``async with Nursery() as nursery``: its processes end with the block, if not before."""

    async def __aenter__(self) -> Self:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.nursery", str(theirs.fileno()), pass_fds=(theirs.fileno(),)
        )
        theirs.close()
        self._children: dict[int, Forked] = {}
        self._born: asyncio.Queue[Forked] = asyncio.Queue()
        self._one_at_a_time = asyncio.Lock()
        asyncio.get_running_loop().add_reader(self._socket, self._report)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()  # it ends then
        await self._process.wait()

    async def fork(self, module: str, name: str, env: dict[str, str], ready_fd: int, output: IO[bytes]) -> Forked:
        order = json.dumps({"module": module, "name": name, "env": env, "ready_fd": ready_fd}).encode()
        files = array.array("i", [ready_fd, output.fileno()])
        async with self._one_at_a_time:
            self._socket.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            async with asyncio.timeout(60):
                return await self._born.get()

    def _report(self) -> None:
        try:
            message = json.loads(self._socket.recv(_LIMIT) or b"{}")
        except BlockingIOError:
            return
        if not message:  # it has ended, and its children with it
            asyncio.get_running_loop().remove_reader(self._socket)
            message = {"ended": dict.fromkeys(map(str, self._children), -signal.SIGTERM)}
        if "born" in message:
            child = self._children[message["born"]] = Forked(message["born"])
            self._born.put_nowait(child)
        for pid, code in message.get("ended", {}).items():
            child = self._children.pop(int(pid))
            child.returncode = code
            child.ended.set()


class NurseryChild(Child):
    """A child of the cluster that the nursery forks."""

    nursery: Nursery  # set by whoever makes it

    async def _spawn(self, environment: dict[str, str], ready_fd: int, output: IO[bytes] | None) -> Any:
        assert output is not None
        return await self.nursery.fork(self.module, self.name, environment, ready_fd, output)


def serve(orders: socket.socket) -> None:
    """Forks until the other end of ``orders`` is closed."""
    end_with_parent()
    for module in MODULES:
        importlib.import_module(module)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                woken.recv(4096)
                _report_ended(orders)
            if orders in ready:
                order, files, _flags, _address = socket.recv_fds(orders, _LIMIT, 2)
                if not order:
                    return
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _become(json.loads(order), *files)
                for file in files:
                    os.close(file)
                orders.send(json.dumps({"born": pid}).encode())


def _report_ended(orders: socket.socket) -> None:
    ended = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        ended[pid] = os.waitstatus_to_exitcode(status)
    if ended:
        orders.send(json.dumps({"ended": ended}).encode())


def _become(order: dict[str, Any], ready_fd: int, output: int) -> None:
    """In the forked process: runs the module as ``python -m`` would, and exits."""
    os.setsid()
    kept = [os.dup2(file, 1000 + i) for i, file in enumerate((ready_fd, output))]
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (kept[1], 1), (kept[1], 2), (kept[0], order["ready_fd"])):
        os.dup2(source, target)
    os.closerange(3, order["ready_fd"])
    os.closerange(order["ready_fd"] + 1, 2000)
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = [order["module"], order["name"]]
    code = 1
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

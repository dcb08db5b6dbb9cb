"""Where an engine computes: a CPU, or one NVIDIA GPU; chosen and checked once, before anything is loaded.

Owns what differs between them: pinned memory, events, captured graphs, the size of the memory. Knows no model.
Invariant: a device that was chosen can run the engine; what can't is a ConfigError of one line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from splitserve.errors import ConfigError

log = logging.getLogger(__name__)

OLDEST = (8, 0)  # Ampere: bfloat16 in the matrix units
OLDEST_FP8 = (8, 9)  # Ada
_NO_GPU = ("Found no NVIDIA driver", "No CUDA GPUs are available")  # torch with CUDA on a machine without a GPU


class Device(Protocol):
    """What the runner needs of the place where it computes."""

    torch: torch.device
    asynchronous: bool  # work is queued: the host may prepare the next step while this one runs

    def use(self) -> None:
        """The calling thread computes here from now on."""
        ...

    def host_buffer(self, num_bytes: int) -> Tensor:
        """``[num_bytes]`` uint8 on the host, from which copies to the device run by themselves."""
        ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until everything queued so far is done."""
        ...

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """A function that does on the device what ``run`` does, on the same tensors, and the result that it
        fills each time."""
        ...


class CpuDevice:
    """The processor. ``asynchronous`` makes the engine work as it does on a GPU, which is how tests see that
    path without one."""

    def __init__(self, *, asynchronous: bool = False) -> None:
        self.torch = torch.device("cpu")
        self.asynchronous = asynchronous

    def use(self) -> None:
        return

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        result = run()
        return lambda: result.copy_(run()), result


class CudaDevice:
    """One GPU; everything is queued on its default stream."""

    asynchronous = True

    def __init__(self, index: int) -> None:
        self.torch = torch.device("cuda", index)
        self.use()
        self._graph_memory = torch.cuda.graph_pool_handle()

    def use(self) -> None:
        torch.cuda.set_device(self.torch)

    def host_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeps: the core is for the event loop meanwhile
        event.record()
        return event.synchronize

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        run()  # compiles what has to be compiled
        torch.cuda.synchronize(self.torch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            result = run()
        return graph.replay, result

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all that the GPU has."""
        return torch.cuda.mem_get_info(self.torch)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that this process's tensors took while ``run`` ran, weights and all."""
        torch.cuda.synchronize(self.torch)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch)
        run()
        torch.cuda.synchronize(self.torch)
        peak = torch.cuda.max_memory_reserved(self.torch)
        torch.cuda.empty_cache()
        return peak


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is known of a GPU before anything runs on it."""

    index: int
    name: str
    capability: tuple[int, int]


def choose_device(name: str, *, fp8: bool = False) -> Device:
    """``name``: "auto" (a GPU that serves, else the CPU), "cpu", "cuda" or "cuda:N". ConfigError in one line."""
    if name == "cpu":
        return CpuDevice()
    index = _index(name)
    why_none, gpus = find_gpus()
    problem = why_none or _problem(gpus, index, fp8)
    if problem is None:
        log.info("computing on %s", gpus[index].name)
        return CudaDevice(index)
    if name != "auto":
        raise ConfigError(f"--device {name}: {problem}; --device cpu works everywhere")
    plain = torch.version.cuda is None or problem.startswith(_NO_GPU)
    log.log(logging.INFO if plain else logging.WARNING, "computing on the CPU: %s", problem)
    return CpuDevice()


def find_gpus() -> tuple[str | None, list[Gpu]]:
    """Why there are none, if so, and those that there are."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA", []
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return None, [
            Gpu(i, torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        ]
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        # no driver, an old driver, no device, a device that does not answer
        return str(error).strip().partition("\n")[0].split(" Please")[0].rstrip("."), []


def _problem(gpus: Sequence[Gpu], index: int, fp8: bool) -> str | None:
    """Why the GPU can't serve; None if it can."""
    if index >= len(gpus):
        return f"there are {len(gpus)} GPUs, numbered from 0"
    gpu = gpus[index]
    capability = ".".join(map(str, gpu.capability))
    if gpu.capability < OLDEST:
        return f"{gpu.name} has compute capability {capability}, the oldest that is served is 8.0 (Ampere)"
    if fp8 and gpu.capability < OLDEST_FP8:
        return f"{gpu.name} has compute capability {capability}, fp8 weights need 8.9 (Ada) or newer"
    return None


def _index(name: str) -> int:
    kind, colon, number = name.partition(":")
    if name == "auto":
        return 0
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ConfigError(f"device {name!r} is not known; there are auto, cpu, cuda and cuda:N")
    return int(number) if colon else 0

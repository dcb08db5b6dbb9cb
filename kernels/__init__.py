"""Tensor functions behind one interface: a torch reference, and faster backends that stand in for it.

``load_kernels`` picks a backend for a device. Nothing here knows requests or scheduling.
"""

from __future__ import annotations

import logging
import os

from kernels.interface import AttentionBatch, Kernels, Linear, SampleParams, pool_shape
from kernels.reference import ReferenceKernels

__all__ = ["AttentionBatch", "Kernels", "Linear", "ReferenceKernels", "SampleParams", "load_kernels", "pool_shape"]

logger = logging.getLogger(__name__)


def load_kernels(device: str = "cpu", name: str = "auto") -> Kernels:
    """A backend that runs on ``device`` ("cpu", "cuda" or "cuda:N").

    ``name``: "reference" (torch), "cpu" (native), or "auto", the best one: native on a CPU if it can be built,
    else the reference, and a log line says why. ``SPLITSERVE_CPU_ISA`` forces an instruction set of the native
    backend. Raises ValueError for an unknown name, BuildError if "cpu" can't be built.
    """
    if name not in ("auto", "cpu", "reference"):
        raise ValueError(f"unknown kernels {name!r}; there are auto, cpu and reference")
    if name == "reference" or (name == "auto" and device != "cpu"):
        return ReferenceKernels()
    from kernels.cpu.backend import CpuKernels
    from kernels.cpu.build import BuildError

    try:
        kernels = CpuKernels(isa=os.environ.get("SPLITSERVE_CPU_ISA") or None)
    except (BuildError, OSError) as error:
        if name == "cpu":
            raise
        logger.warning("native CPU kernels are not available, using the torch reference: %s", error)
        return ReferenceKernels()
    logger.info("native CPU kernels: %s, %d threads", kernels.isa, kernels.threads)
    return kernels

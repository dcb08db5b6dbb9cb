"""Tensor functions behind one interface: a torch reference, and faster backends that stand in for it.

``load_kernels`` picks a backend for a device. Nothing here knows requests or scheduling.
"""

from __future__ import annotations

import logging
import os

from kernels.decoder import DecoderLayer, DecoderWeights
from kernels.interface import AttentionBatch, AttentionShape, Kernels, Linear, SampleParams, SpareCores, pool_shape
from kernels.reference import ReferenceKernels

__all__ = [
    "AttentionBatch", "AttentionShape", "DecoderLayer", "DecoderWeights", "Kernels", "Linear", "ReferenceKernels",
    "SampleParams", "SpareCores", "load_kernels", "pool_shape",
]  # fmt: skip

logger = logging.getLogger(__name__)


def load_kernels(device: str = "cpu", name: str = "auto", spare: SpareCores | None = None) -> Kernels:
    """A backend that runs on ``device`` ("cpu", "cuda" or "cuda:N").

    ``name``: "reference" (torch), "cpu" (native), "triton", or "auto", the best one: Triton on a GPU, native on a
    CPU if it can be built, else the reference, and a log line says why. ``SPLITSERVE_CPU_ISA`` forces an
    instruction set of the native backend, which alone makes use of ``spare`` cores. Raises ValueError for an
    unknown name or device, BuildError if "cpu" can't be built.
    """
    if name not in ("auto", "cpu", "reference", "triton"):
        raise ValueError(f"unknown kernels {name!r}; there are auto, cpu, reference and triton")
    if name == "reference":
        return ReferenceKernels()
    if name == "triton" or (name == "auto" and device != "cpu"):
        return _triton(device, required=name == "triton")
    if device != "cpu":
        raise ValueError(f"the kernels {name!r} run on the CPU, not on {device}")
    from kernels.cpu.backend import CpuKernels
    from kernels.cpu.build import BuildError

    try:
        kernels = CpuKernels(isa=os.environ.get("SPLITSERVE_CPU_ISA") or None, spare=spare)
    except (BuildError, OSError) as error:
        if name == "cpu":
            raise
        logger.warning("native CPU kernels are not available, using the torch reference: %s", error)
        return ReferenceKernels()
    logger.info("native CPU kernels: %s, %d threads", kernels.isa, kernels.threads)
    return kernels


def _triton(device: str, *, required: bool) -> Kernels:
    try:
        from kernels.triton.backend import TritonKernels
    except ImportError as error:
        if required:
            raise ValueError(f"the Triton kernels need the package triton: {error}") from error
        logger.warning("Triton is not installed, using the torch reference: %s", error)
        return ReferenceKernels()
    return TritonKernels(device)

"""Tensor functions behind one interface: a torch reference, and faster backends that stand in for it.

``load_kernels`` picks a backend for a device. Nothing here knows requests or scheduling.
"""

from __future__ import annotations

from kernels.interface import AttentionBatch, Kernels, Linear, pool_shape
from kernels.reference import ReferenceKernels

__all__ = ["AttentionBatch", "Kernels", "Linear", "ReferenceKernels", "load_kernels", "pool_shape"]


def load_kernels(device: str = "cpu", name: str = "auto") -> Kernels:
    """The best backend that runs on ``device`` ("cpu", "cuda" or "cuda:N")."""
    del device, name
    return ReferenceKernels()

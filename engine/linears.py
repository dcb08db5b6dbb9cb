"""Linear layers of a model on disk, packed for one backend: plain, int8 or fp8.

Knows weights by name and how they are rounded, no model. Invariant: the layers of one model are rounded alike,
but for those that an fp8 checkpoint leaves out; those are computed as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.weights import ModelFiles
from kernels import Kernels, Linear
from kernels.fp8 import pack_linear_fp8, quantize_channels
from kernels.reference import GateUp
from splitserve.errors import ConfigError

QUANTIZATIONS = (None, "int8", "fp8")


class Linears:
    """``quantization``: one of QUANTIZATIONS."""

    def __init__(
        self,
        files: ModelFiles,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None,
    ) -> None:
        self._files, self._kernels, self._dtype, self._device = files, kernels, dtype, device
        self._quantization = quantization

    def tensor(self, name: str) -> Tensor:
        """A weight as it is, on the device."""
        return self._files.tensor(name, self._dtype).to(self._device)

    def linear(self, bias: bool, *names: str) -> Linear:
        """The layers ``names`` as one, in this order."""
        if self._quantization == "fp8" and (rounded := self._fp8(names)) is not None:
            return pack_linear_fp8(*rounded, self._bias(bias, names), self._dtype)
        pack = self._kernels.pack_linear_int8 if self._quantization == "int8" else self._kernels.pack_linear
        return pack(self._weight(names), self._bias(bias, names))

    def gate_up(self, bias: bool, *names: str) -> Linear:
        """The same with the activation; gates first."""
        if self._quantization == "fp8":
            return GateUp(self.linear(bias, *names), self._kernels.silu_mul)
        int8 = self._quantization == "int8"
        return self._kernels.pack_gate_up(self._weight(names), self._bias(bias, names), int8=int8)

    def head(self, weight: Tensor) -> Linear:
        """To float32: rounded to bfloat16, near logits would become equal. fp8 models keep theirs unrounded."""
        pack = self._kernels.pack_linear_int8 if self._quantization == "int8" else self._kernels.pack_linear
        return pack(weight, None, torch.float32)

    def _weight(self, names: tuple[str, ...]) -> Tensor:
        return torch.cat([self.tensor(f"{name}.weight") for name in names])

    def _bias(self, bias: bool, names: tuple[str, ...]) -> Tensor | None:
        return torch.cat([self.tensor(f"{name}.bias") for name in names]) if bias else None

    def _fp8(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        """``[N, K]`` float8 and its scales ``[N]``: those of the file, else rounded here. None for layers that an
        fp8 checkpoint leaves out."""
        stored = [self._files.fp8(f"{name}.weight") for name in names]
        if self._files.config.quantization == "fp8" and None in stored:
            if any(stored):
                raise ConfigError(f"of {', '.join(names)} the checkpoint holds some in fp8 and some not")
            return None
        weights, scales = [], []
        for name, held in zip(names, stored, strict=True):
            weight, scale = held or quantize_channels(self.tensor(f"{name}.weight"))
            weights.append(weight.to(self._device).view(torch.uint8))
            scales.append(scale.to(self._device))
        return torch.cat(weights).view(torch.float8_e4m3fn), torch.cat(scales)

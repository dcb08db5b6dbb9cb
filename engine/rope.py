"""Rotary position tables: plain, and stretched for longer contexts (linear, Llama 3, YaRN).

https://arxiv.org/abs/2104.09864; Llama 3's rule as in its reference code; YaRN https://arxiv.org/abs/2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from splitserve.errors import ConfigError


def rope_table(
    head_dim: int, theta: float, scaling: Mapping[str, Any], length: int, factors: Tensor | None = None
) -> Tensor:
    """``[length, head_dim]`` float32: cosines in the first half, sines in the second.

    ``factors [head_dim / 2]`` divide the frequencies (GGUF's ``rope_freqs.weight``).
    """
    inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    amplitude = 1.0
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default":
            pass
        case "linear":
            inverse = inverse / scaling["factor"]
        case "llama3":
            inverse = _llama3(inverse, scaling)
        case "yarn":
            inverse, amplitude = _yarn(inverse, head_dim, theta, scaling)
        case other:
            raise ConfigError(f"rope scaling {other!r} is not supported")
    if factors is not None:
        inverse = inverse / factors
    angles = torch.outer(torch.arange(length, dtype=torch.int64).float(), inverse)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * amplitude


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, blended, scaled)


def _yarn(inverse: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings")
    if original is None:
        raise ConfigError("yarn rope scaling needs original_max_position_embeddings")

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(head_dim // 2).float() - low) / span).clamp(0, 1)
    blended = inverse / factor * ramp + inverse * (1 - ramp)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return blended, float(amplitude)

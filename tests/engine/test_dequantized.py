"""Values of every stored type, beside the gguf package's own; what no type allows is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize

from engine.dequantized import dequantized
from engine.gguf_file import GgufDirectory, StoredTensor

ROWS, WIDTH = 300, 512  # more than one piece


def stored(path: Path, data: np.ndarray, kind: Kind | None) -> GgufDirectory:
    """A file with the tensor ``weight``."""
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufDirectory(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0])
def test_values_have_the_bits_of_gguf(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    values = np.random.default_rng(3).normal(0.01, 0.1, (ROWS, WIDTH)).astype(np.float32)
    data = quantize(values, kind)
    file = stored(tmp_path / "m.gguf", data, kind)
    found = dequantized(file, file.tensors["weight"], dtype)
    expected = torch.from_numpy(dequantize(data, kind).astype(np.float32)).to(dtype)
    assert found.dtype is dtype and found.shape == (ROWS, WIDTH)
    assert torch.equal(found, expected)


def test_types_with_blocks_of_256_are_read(tmp_path: Path) -> None:
    data = np.random.default_rng(3).integers(0, 60, (ROWS, 2 * 210), dtype=np.uint8)  # finite scales
    file = stored(tmp_path / "m.gguf", data, Kind.Q6_K)
    found = dequantized(file, file.tensors["weight"], torch.float32)
    assert torch.equal(found, torch.from_numpy(dequantize(data, Kind.Q6_K)))


def test_what_no_type_allows_is_a_value_error(tmp_path: Path) -> None:
    file = stored(tmp_path / "m.gguf", np.zeros(64, dtype=np.float32), None)
    start = file.tensors["weight"].offset
    with pytest.raises(ValueError, match="blocks of 32"):
        dequantized(file, StoredTensor(8, (3, 11), start), torch.float32)
    with pytest.raises(ValueError, match="behind the end"):
        dequantized(file, StoredTensor(8, (1 << 40, 32), start), torch.float32)
    with pytest.raises(ValueError, match="99"):
        dequantized(file, StoredTensor(99, (8, 8), start), torch.float32)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gguf_file import GgufDirectory

WORDS = [f"word {i}" for i in range(3000)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("some.number", 7)
    writer.add_float32("some.fraction", 0.5)
    writer.add_bool("some.truth", True)
    writer.add_array("some.list", ["a", "b"])
    writer.add_array("many.words", WORDS)
    writer.add_array("many.numbers", list(range(2000)))
    writer.add_string("after.them", "it goes on")
    writer.add_tensor("weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("other", np.ones(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_small_fields_are_read_and_large_arrays_stepped_over(path: Path) -> None:
    file = GgufDirectory(path)
    fields = {name: value for name, value in file.fields.items() if not name.startswith("general.")}
    assert fields == {
        "some.number": 7,
        "some.fraction": 0.5,
        "some.truth": True,
        "some.list": ["a", "b"],
        "after.them": "it goes on",
    }
    assert {name: array.count for name, array in file.large.items()} == {"many.words": 3000, "many.numbers": 2000}


def test_entries_of_large_arrays_are_read_on_demand(path: Path) -> None:
    file = GgufDirectory(path)
    assert [file.string(file.large["many.words"], i) for i in (2999, 0, 17)] == ["word 2999", "word 0", "word 17"]
    with pytest.raises(IndexError):
        file.string(file.large["many.words"], 3000)
    with pytest.raises(IndexError):
        file.string(file.large["many.numbers"], 0)


def test_tensors_lie_where_the_directory_says(path: Path) -> None:
    file = GgufDirectory(path)
    weight = file.tensors["weight"]
    assert weight.shape == (3, 4)
    assert np.array_equal(file.data(weight.offset, 48).view(np.float32), np.arange(12, dtype=np.float32))
    with pytest.raises(ValueError, match="behind the end"):
        file.data(weight.offset, 1 << 20)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 60_000), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3))
def test_damaged_files_are_a_value_error(
    path: Path, tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(path.read_bytes()[:cut])
    for at, value in flips:
        if at < len(data):
            data[at] = value
    damaged = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged.write_bytes(data)
    try:
        GgufDirectory(damaged)
    except ValueError:
        return

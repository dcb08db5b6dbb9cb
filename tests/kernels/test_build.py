"""Building the native library, and what happens where it can't be built."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import ReferenceKernels, load_kernels
from kernels.cpu.build import BuildError, library, runnable_isas

# A compiler that only notes that it ran: what is tested here is everything around it.
FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake {version}"; exit 0; fi
echo run >> {log}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fake-c++"
    write_compiler(path, version=1)
    monkeypatch.setenv("CXX", str(path))
    return path


def write_compiler(path: Path, version: int) -> None:
    path.write_text(FAKE.format(version=version, log=path.with_suffix(".log")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def runs(compiler: Path) -> int:
    return len(compiler.with_suffix(".log").read_text().splitlines())


def test_a_library_is_built_once(compiler: Path, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    first = library("plain", [folder])
    assert first.read_text() == "made\n"
    assert library("plain", [folder]) == first
    assert runs(compiler) == 1
    assert [path.name for path in folder.iterdir()] == [first.name]


def test_another_compiler_or_instruction_set_means_another_library(compiler: Path, tmp_path: Path) -> None:
    first = library("plain", [tmp_path / "build"])
    assert library("avx2", [tmp_path / "build"]) != first
    write_compiler(compiler, version=2)
    assert library("plain", [tmp_path / "build"]) != first


def test_builds_at_once_leave_one_whole_library(compiler: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: library("plain", [tmp_path / "build"]), range(4)))
    assert len(paths) == 1
    assert paths.pop().read_text() == "made\n"
    assert len(list((tmp_path / "build").iterdir())) == 1


def test_an_unwritable_folder_is_passed_over(compiler: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert library("plain", [blocked / "build", tmp_path / "cache"]).parent == tmp_path / "cache"


def test_without_a_compiler_a_built_library_is_used(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = library("plain", [tmp_path / "build"])
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert library("plain", [tmp_path / "build"]) == built
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        library("plain", [tmp_path / "elsewhere"])


def test_a_failing_compiler_is_quoted(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'bad flag' >&2\nexit 1\n")
    with pytest.raises(BuildError, match="bad flag"):
        library("plain", [tmp_path / "build"])


def test_every_machine_runs_plain() -> None:
    assert runnable_isas()[-1] == "plain"


def test_an_unknown_instruction_set_or_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        library("mmx")
    with pytest.raises(ValueError, match="unknown kernels 'fast'"):
        load_kernels(name="fast")


def test_load_kernels_without_a_working_compiler_is_the_reference_and_says_so(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.write_text("#!/bin/sh\nexit 1\n")
    with caplog.at_level(logging.WARNING, "kernels"):
        assert isinstance(load_kernels("cpu"), ReferenceKernels)
    assert [record.getMessage() for record in caplog.records if "torch reference" in record.getMessage()]
    with pytest.raises(BuildError):
        load_kernels("cpu", "cpu")


def test_load_kernels_by_name() -> None:
    assert load_kernels("cpu", "reference").name == "reference"
    assert load_kernels("cpu", "triton").name == "triton"  # in the interpreter
    assert load_kernels("cpu", "cpu").name == "cpu"


def test_the_command_builds_and_names_the_library() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kernels.cpu.build"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout.startswith(f"{runnable_isas()[0]}: ")

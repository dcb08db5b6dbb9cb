"""Compiles the C++ sources of this folder into one shared library per instruction set.

Knows compilers and files; loads nothing. A library's name carries a digest of sources, flags and compiler, so a
stale one is never used, and it appears under its name whole (atomic rename): processes may build at once.

    python -m kernels.cpu.build            # the best instruction set of this machine
    python -m kernels.cpu.build avx2       # a named one
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
ISAS = ("amx", "avx512", "avx2", "plain")  # best first
BUILD_TIMEOUT = 300.0  # seconds

_COMMON = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-strict-aliasing", "-fno-math-errno", "-Wno-psabi",
)  # fmt: skip
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx512vnni", "-mfma")
_FLAGS = {
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512vbmi"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),
}
_NEEDED = {  # names as in /proc/cpuinfo, which lists what the system enabled
    "amx": {"amx_tile", "amx_bf16", "amx_int8", "avx512vbmi"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma"},
    "avx2": {"avx2", "fma"},
    "plain": set[str](),
}
_NEEDED["amx"] |= _NEEDED["avx512"]


class BuildError(RuntimeError):
    """No compiler, or it failed; the message says which."""


def runnable_isas() -> tuple[str, ...]:
    """The instruction sets that this machine runs, best first; ``plain`` is always one of them."""
    features: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                features = set(line.partition(":")[2].split())
                break
    return tuple(isa for isa in ISAS if features >= _NEEDED[isa])


def default_folders() -> tuple[Path, ...]:
    """Where libraries are looked for, and built in the first that is writable."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return SOURCES / "_build", (Path(cache) if cache else Path.home() / ".cache") / "splitserve"


def library(isa: str, folders: Sequence[Path] | None = None) -> Path:
    """Path of the library for ``isa`` in one of ``folders``, built if there is none yet. Raises BuildError."""
    folders = folders or default_folders()
    if isa not in ISAS:
        raise ValueError(f"unknown instruction set {isa!r}; there are {', '.join(ISAS)}")
    prefix = f"{isa}-{_source_digest(isa)}"
    compiler = _compiler()
    if compiler is None:
        # An image may carry the library and no compiler; sources and flags are what must match.
        for folder in folders:
            for path in sorted(folder.glob(f"{prefix}-*.so")):
                return path
        raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")
    name = f"{prefix}-{_compiler_digest(compiler)}.so"
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    return _compile(compiler, isa, _writable_folder(folders) / name)


def _writable_folder(folders: Sequence[Path]) -> Path:
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problems.append(str(error))
            continue
        if os.access(folder, os.W_OK):
            return folder
        problems.append(f"{folder} is not writable")
    raise BuildError("nowhere to build: " + "; ".join(problems))


def _compiler() -> list[str] | None:
    named = os.environ.get("CXX")
    for candidate in (named, "g++", "clang++", "c++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    return None


def _source_digest(isa: str) -> str:
    digest = hashlib.sha256(" ".join((platform.machine(), *_COMMON, *_FLAGS[isa])).encode())
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compiler_digest(compiler: list[str]) -> str:
    try:
        said = subprocess.run(  # noqa: S603 - the user's own compiler
            [*compiler, "--version"], capture_output=True, timeout=BUILD_TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{shlex.join(compiler)} does not run: {error}") from error
    return hashlib.sha256(said).hexdigest()[:8]


def _compile(compiler: list[str], isa: str, target: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        fresh = Path(folder) / target.name
        sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        command = [*compiler, *_COMMON, *_FLAGS[isa], *sources, "-o", str(fresh)]
        try:
            done = subprocess.run(  # noqa: S603 - the user's own compiler
                command, capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"{shlex.join(compiler)} does not run: {error}") from error
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(compiler)} failed for {isa}:\n{done.stderr[-2000:]}")
        fresh.replace(target)
    return target


def main() -> int:
    """Builds for the instruction sets named on the command line, or the machine's best."""
    try:
        for isa in sys.argv[1:] or runnable_isas()[:1]:
            print(f"{isa}: {library(isa)}")
    except BuildError as error:
        print(f"native CPU kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which cores of this machine are at work, in a file that its workers map: those of idle ones may be borrowed.

Knows the layout of the file, a row of 64 bytes for each core, of which the kernels' thread pool reads and writes
the same columns (kernels/cpu/pool.h). Invariant: a worker writes the first column of its own cores only.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Sequence
from pathlib import Path

from splitserve.errors import ConfigError

# int32 in a row: 0 the owner is at work, 1 who borrows the core, 2 calls that borrowers have joined, 3 items that
# they began there and ended on another core
COLUMNS = 16


def create_table(path: Path, cores: Collection[int]) -> None:
    """A table with a row for every core up to the highest of ``cores``, none at work."""
    path.write_bytes(bytes(4 * COLUMNS * (max(cores) + 1)))


def spare_cores(owned: Sequence[Collection[int]]) -> list[tuple[int, ...]]:
    """For each worker the cores of the others; none where two own the same or one owns no certain ones."""
    everything = [core for cores in owned for core in cores]
    if len(set(everything)) < len(everything) or not all(owned):
        return [() for _ in owned]
    return [tuple(sorted(set(everything) - set(cores))) for cores in owned]


class SharedCores:
    """The table as the owner of ``cores`` sees it. Raises ConfigError if the file is missing or too short."""

    def __init__(self, path: str, cores: Sequence[int]) -> None:
        try:
            with Path(path).open("r+b") as file:
                self.memory = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the table of shared cores {path} can't be mapped: {error}") from error
        self._table = memoryview(self.memory).cast("i")
        self._rows = [core * COLUMNS for core in cores]
        if max(self._rows) >= len(self._table):
            raise ConfigError(f"the table of shared cores {path} ends before core {max(cores)}")
        self.working(False)

    def working(self, at_work: bool) -> None:
        """Tells borrowers whether they must leave this worker's cores."""
        for row in self._rows:
            self._table[row] = at_work

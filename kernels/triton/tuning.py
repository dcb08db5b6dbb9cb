"""How the attention kernels are cut for a device: measured cuts from a file, and a rule for all other shapes.

Owns the numbers and their files, ``tuned/{device}.json`` beside this module. Knows no kernels. Invariant: what
``decode`` and ``prefill`` give for a shape changes only by ``keep``.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "tuned"
# A step's arrays begin anywhere in one buffer: a kernel compiled for one alignment would be compiled again.
VARYING = ("tables_ptr", "starts_ptr", "contexts_ptr")
LEAST_SEQUENCES = 64  # that a kernel is compiled for: fewer cost as much


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    multiprocessors: int
    shared_bytes: int  # that one program may use
    capability: tuple[int, int]

    @classmethod
    def cuda(cls, device: torch.device) -> Device:
        p = torch.cuda.get_device_properties(device)
        shared = int(getattr(p, "shared_memory_per_block_optin", p.shared_memory_per_block))
        return cls(p.name, p.multi_processor_count, shared, (p.major, p.minor))


# The interpreter runs programs one after another: few of them, and large steps.
INTERPRETER = Device("interpreter", 2, 227 << 10, (9, 0))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a cut is chosen by."""

    head_dim: int
    group: int  # query heads of one KV head
    block_tokens: int
    dtype: str  # of the queries, without "torch."
    kv_dtype: str

    @property
    def padded_dim(self) -> int:
        return max(16, 1 << (self.head_dim - 1).bit_length())

    @property
    def padded_group(self) -> int:
        return max(16, 1 << (self.group - 1).bit_length())  # rows of the smallest matrix product


@dataclass(frozen=True, slots=True)
class Cut:
    """Sizes of one kernel's work."""

    tokens: int  # of the context in one step of the loop
    rows: int  # queries times grouped heads of one program; decode: what the group is padded to
    programs: int  # on one multiprocessor; only decode has a fixed number
    warps: int
    stages: int  # steps under way at once; 1: none is loaded ahead


class Tuning:
    """The cuts of one device. ``measured``: by kernel, then by shape."""

    def __init__(self, device: Device, measured: dict[str, dict[Shape, Cut]] | None = None) -> None:
        self.device = device
        self._measured = measured or {}

    @classmethod
    def load(cls, device: Device, folder: Path = FOLDER) -> Tuning:
        """With the device's file, if there is one. Raises ValueError for a damaged one."""
        path = folder / file_name(device.name)
        return cls(device, _read(path) if path.exists() else None)

    def save(self, folder: Path = FOLDER) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(self.device.name)
        entries = {
            kernel: [asdict(shape) | asdict(cut) for shape, cut in cuts.items()]
            for kernel, cuts in self._measured.items()
        }
        path.write_text(json.dumps({"device": self.device.name, "kernels": entries}, indent=1) + "\n")
        return path

    def decode(self, shape: Shape) -> Cut:
        return self._measured.get("decode", {}).get(shape) or default_decode(self.device, shape)

    def prefill(self, shape: Shape) -> Cut:
        return self._measured.get("prefill", {}).get(shape) or default_prefill(self.device, shape)

    def keep(self, kernel: str, shape: Shape, cut: Cut) -> None:
        """Takes a measured cut; ``kernel`` is "decode" or "prefill"."""
        self._measured.setdefault(kernel, {})[shape] = cut


def padded_sequences(sequences: int) -> int:
    """For how many the kernels are compiled: few numbers, so that steps of other sizes find them compiled."""
    return max(LEAST_SEQUENCES, 1 << (sequences - 1).bit_length())


def smaller(cut: Cut, shape: Shape) -> Cut | None:
    """The next to try where ``cut`` takes more shared memory than there is. None: there is no smaller one."""
    if cut.stages > 1:
        return replace(cut, stages=cut.stages - 1)
    if cut.tokens > 16:
        return replace(cut, tokens=cut.tokens // 2)
    if cut.rows > shape.padded_group:
        return replace(cut, rows=cut.rows // 2)
    return None


def default_decode(device: Device, shape: Shape) -> Cut:
    """16 KB of K and as much of V in one step, two steps loaded ahead, two programs side by side if they fit."""
    tokens = max(16, min(128, (16 << 10) // (shape.padded_dim * _bytes(shape.kv_dtype))))
    step = 2 * tokens * shape.padded_dim * _bytes(shape.kv_dtype)
    stages = max(1, min(3, 1 + (device.shared_bytes - (8 << 10)) // step))
    programs = 2 if 2 * (stages - 1) * step <= device.shared_bytes else 1
    return Cut(tokens=tokens, rows=shape.padded_group, programs=programs, warps=4, stages=stages)


def default_prefill(device: Device, shape: Shape) -> Cut:
    """128 rows on tensor cores, fewer for heads and types that fill registers and shared memory sooner."""
    wide = shape.padded_dim * _bytes(shape.dtype)  # bytes of a query
    rows = 128 if wide <= 256 else 64 if wide <= 512 else 32
    rows = max(rows, shape.padded_group)
    tokens = 64 if wide <= 512 else 32
    stages = 3
    while stages > 1 and wide * (rows + 2 * tokens * (stages - 1)) > device.shared_bytes - (8 << 10):
        stages -= 1
    return Cut(tokens=tokens, rows=rows, programs=1, warps=8 if rows >= 128 else 4, stages=stages)


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def _read(path: Path) -> dict[str, dict[Shape, Cut]]:
    shapes, cuts = ({f.name for f in fields(kind)} for kind in (Shape, Cut))
    try:
        return {
            kernel: {Shape(**{n: e[n] for n in shapes}): Cut(**{n: e[n] for n in cuts}) for e in entries}
            for kernel, entries in json.loads(path.read_text())["kernels"].items()
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of kernel tunings: {error!r}") from error


def _bytes(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]

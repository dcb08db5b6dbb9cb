"""Checks and times the GPU path in one call of at most eight minutes.

    python -m bench.gpu [--out FILE] [--parts NAME ...] [--tuned FOLDER]

Every ratio is against a ceiling that the same call measures: a copy on the device, a matrix product, or another
library on the same data. A part that fails prints its traceback and the others go on; a part whose package is
missing says so. Medians of repeated runs. ``--dry-run`` runs every part on tiny shapes on the CPU, with
TRITON_INTERPRET=1 in the environment: it proves that they run, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.gpu.measure import Bench, Line
from bench.gpu.scale import FULL, TINY
from kernels.triton.backend import TritonKernels

SECONDS = 400.0  # later parts are left out
END_SECONDS = 470.0  # a part that hangs ends the call


# Modules and functions; a module is imported by its part: what one needs may be missing on a bare machine.
PARTS = {
    "ceilings": ("measure", "ceilings"),
    "tuning": ("attention", "tuning"),
    "decode-attention": ("attention", "decode_attention"),
    "prefill-attention": ("attention", "prefill_attention"),
    "blocks": ("attention", "block_kernels"),
    "steps": ("steps", "steps"),
    "equality": ("workers", "equality"),
    "transfer": ("workers", "transfer"),
    "streams": ("workers", "streams"),
    "generate": ("peers", "generate"),
    "continuous": ("peers", "continuous"),
}


def measure(bench: Bench, names: Sequence[str], out: Path | None = None) -> list[Line]:
    """The named parts in order; what they gave so far is kept in ``out``."""
    began, lines = time.monotonic(), list[Line]()
    for name in names:
        if time.monotonic() - began > SECONDS:
            lines.append(Line(name, "left out: no time"))
            continue
        found: list[Line] = []
        try:
            with torch.no_grad():
                found = _part(name)(bench)
        except Exception:  # the other parts are worth having
            traceback.print_exc()
            found = [Line(name, "failed: see the traceback")]
        show(found)
        lines += found
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if out is not None:
            out.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    return lines


def _part(name: str) -> Callable[[Bench], list[Line]]:
    module, function = PARTS[name]
    part: Callable[[Bench], list[Line]] = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    return part


def show(lines: list[Line]) -> None:
    for line in lines:
        ratio = "" if line.ratio is None else f"{line.ratio:.3g}"
        target = "" if line.target is None else f"{'<=' if line.most else '>='} {line.target:.3g}"
        print(f"{line.what:<64}{line.value:<34}{ratio:>8}{target:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the table as JSON")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tuned", type=Path, help="folder for the file of the cuts that were found")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    bench = Bench(TINY, torch.device("cpu")) if options.dry_run else Bench(FULL, torch.device("cuda", 0))
    name = "CPU" if options.dry_run else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, kernels: {bench.kernels.name}", flush=True)
    faulthandler.dump_traceback_later(END_SECONDS, exit=True)
    lines = measure(bench, options.parts, options.out)
    print(f"\n{'what':<64}{'measured':<34}{'ratio':>8}{'target':>9}")
    show(lines)
    if options.tuned is not None and isinstance(bench.kernels, TritonKernels):
        print(f"cuts kept in {bench.kernels.tuning.save(options.tuned)}")


if __name__ == "__main__":
    main()

"""Checks and times the GPU path in one call of at most eight minutes.

    python -m bench.gpu [--out FILE] [--parts NAME ...] [--tuned FOLDER]

Every ratio is against a ceiling that the same call measures: a copy on the device, a matrix product, or another
library on the same data. Rows appear as they are known, medians of repeated runs. Parts come in the order of their
weight, each with a limit of its own; what was not done in time is a row that says so. A part that fails prints its
traceback and the others go on; a part whose package is missing says so. ``--dry-run`` runs every part on tiny
shapes on the CPU, with TRITON_INTERPRET=1 in the environment: it proves that they run, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from bench.gpu.measure import Bench, Line
from bench.gpu.scale import FULL, TINY
from kernels.triton.backend import TritonKernels

SECONDS = 450.0  # of the parts together; later ones are left out
END_SECONDS = 475.0  # a part that hangs in the device's driver ends the call

# Modules, functions and most seconds. A module is imported by its part: what one needs may be missing on a bare
# machine. First the rows that have a target, then the others; limits are several times what a part should take.
PARTS = {
    "ceilings": ("measure", "ceilings", 30.0),
    "decode-attention": ("attention", "decode_attention", 60.0),
    "prefill-attention": ("attention", "prefill_attention", 45.0),
    "steps": ("steps", "steps", 90.0),
    "transfer": ("workers", "transfer", 90.0),
    "streams": ("workers", "streams", 120.0),
    "continuous": ("peers", "continuous", 60.0),
    "generate": ("peers", "generate", 60.0),
    "equality": ("workers", "equality", 60.0),
    "checks": ("checks", "checks", 90.0),
    "blocks": ("attention", "block_kernels", 20.0),
    "tuning": ("attention", "tuning", 90.0),
}


def measure(bench: Bench, names: Sequence[str], out: Path | None = None) -> list[Line]:
    """The named parts in order; what they gave so far is kept in ``out``."""
    began, lines = time.monotonic(), list[Line]()

    def keep(line: Line) -> None:
        show(line)
        lines.append(line)
        if out is not None:
            out.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")

    for name in names:
        _run(bench, name, SECONDS - (time.monotonic() - began), keep)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return lines


def _run(bench: Bench, name: str, left: float, keep: Callable[[Line], None]) -> None:
    """The rows of one part, and one more if it was not done."""
    module, function, most = PARTS[name]
    most, began = min(most, left), time.monotonic()
    if left <= 0:
        keep(Line(name, "left out: no time"))
        return
    try:
        with torch.no_grad(), limited(most):
            part: Callable[[Bench], Iterator[Line]] = getattr(
                importlib.import_module(f"bench.gpu.{module}"), function
            )
            for line in part(bench):
                keep(line)
    except Exception:  # the other parts are worth having
        traceback.print_exc()
        late = time.monotonic() - began >= most
        keep(Line(name, f"stopped after {most:.0f} s, unfinished" if late else "failed: see the traceback"))


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so long, in whatever runs then; another's alarm goes off as it would have."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, late)
    others, _interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, others - (time.monotonic() - began)))


def show(line: Line) -> None:
    ratio = "" if line.ratio is None else f"{line.ratio:.3g}"
    target = "" if line.target is None else f"{'<=' if line.most else '>='} {line.target:.3g}"
    print(f"{line.what:<64}{line.value:<34}{ratio:>8}{target:>9}", flush=True)


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
    for line in lines:
        show(line)
    if options.tuned is not None and isinstance(bench.kernels, TritonKernels):
        print(f"cuts kept in {bench.kernels.tuning.save(options.tuned)}")


if __name__ == "__main__":
    main()

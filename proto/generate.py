"""Generates the gRPC stubs in ``splitserve/v1`` from the schemas here; ``--check`` fails if they are stale."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
SCHEMAS = sorted((ROOT / "proto").rglob("*.proto"))
STUBS = ROOT / "splitserve" / "v1"


def generate(target: Path) -> None:
    """Writes ``splitserve/v1/*_pb2*`` below ``target``."""
    include = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    args = ["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", *outputs, *map(str, SCHEMAS)]
    if protoc.main(args) != 0:
        sys.exit("protoc failed")


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {p.name: p.read_text() for p in (Path(scratch) / "splitserve" / "v1").iterdir()}
    kept = {p.name: p.read_text() for p in STUBS.glob("*_pb2*")}
    stale = sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))
    if stale:
        sys.exit(f"stale stubs, run `make stubs`: {', '.join(stale)}")


if __name__ == "__main__":
    main()

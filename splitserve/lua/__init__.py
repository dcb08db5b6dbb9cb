"""The scripts that Redis runs for the directory: one file each, with all that must be atomic.

Knows no client. Invariant: a script that writes compares epochs, so a stale incarnation changes nothing.
Scripts name some keys themselves, so they need one Redis (or a replicated one), not a Redis Cluster.
"""

from __future__ import annotations

from importlib import resources


def source(name: str) -> str:
    """Text of the script ``name`` (without ``.lua``)."""
    return (resources.files(__name__) / f"{name}.lua").read_text(encoding="utf-8")

"""The plots of a comparison (PNG): pauses while long prompts arrive, and attainment over rate.

Needs matplotlib (extra ``bench``); without it there are no plots, and a line says so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.workloads import GOODPUT_ATTAINMENT, GOODPUT_SLO


def write_plots(data: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes what there are figures for; returns the files."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'splitserve[bench]')", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for suffix, draw in (("itl", _draw_itl), ("goodput", _draw_goodput)):
        figure = draw(pyplot, data)
        if figure is not None:
            paths.append(folder / f"{name}-{suffix}.png")
            figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
            pyplot.close(figure)
    return paths


def _last(data: Mapping[str, Any], workload: str) -> dict[str, Any]:
    """By server, what the last round that has this workload measured."""
    found = {}
    for name, runs in data["runs"].items():
        for results in runs:
            if workload in results:
                found[name] = results[workload]
    return found


def _draw_itl(pyplot: Any, data: Mapping[str, Any]) -> Any:
    results = _last(data, "mix")
    if not results:
        return None
    figure, axes = pyplot.subplots(len(results), 1, figsize=(9, 1.9 * len(results)), sharex=True, sharey=True)
    for axis, (name, figures) in zip([axes] if len(results) == 1 else axes, results.items(), strict=True):
        gaps = figures["gaps"]
        for sent in gaps["long_prompts"]:
            axis.axvline(sent, color="0.75", linewidth=1, zorder=0)
        axis.scatter(gaps["time"], gaps["gap_ms"], s=3, color="C0")
        axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.set_title(name, fontsize=9, loc="left")
    axis.set_xlabel("seconds; grey lines: a long prompt is sent")
    figure.suptitle("Time between tokens of short answers while long prompts arrive", fontsize=10)
    figure.tight_layout()
    return figure


def _draw_goodput(pyplot: Any, data: Mapping[str, Any]) -> Any:
    """Every window of every round: a dot; an arrow where the window was ended early, so that it is the most."""
    tried = {
        name: sorted((step for run in runs for step in run.get("goodput", {}).get("tried", ())), key=_rate)
        for name, runs in data["runs"].items()
    }
    if not any(tried.values()):
        return None
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for color, (name, steps) in enumerate((name, steps) for name, steps in tried.items() if steps):
        for ended, marker in ((False, "o"), (True, "v")):
            some = [step for step in steps if step["ended_early"] is ended]
            label = None if ended and len(some) < len(steps) else name
            shown = [step["attainment"] for step in some]
            axis.plot([_rate(step) for step in some], shown, marker, color=f"C{color}", markersize=5, label=label)
    axis.axhline(GOODPUT_ATTAINMENT, color="0.6", linewidth=1, linestyle="--")
    axis.set_xlabel("requests a second (Poisson); a triangle: ended early, the most it could have been")
    limits = " and ".join(f"{metric.upper()} ≤ {limit:g} ms" for metric, limit in GOODPUT_SLO.limits.items())
    axis.set_ylabel(f"part with {limits}", fontsize=8)
    axis.set_xscale("log")
    axis.set_xticks(sorted({_rate(step) for steps in tried.values() for step in steps}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_ylim(0, 1.03)
    axis.legend(fontsize=8)
    return figure


def _rate(step: Mapping[str, Any]) -> float:
    return float(step["rate"])

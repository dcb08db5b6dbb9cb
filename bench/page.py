"""The results of a comparison as a page in Markdown. Computes ratios, measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.workloads import GOODPUT_ATTAINMENT, GOODPUT_LENGTHS, GOODPUT_SLO, SHOWN, TARGETS, WORKLOADS, Target

_TITLES = {workload.name: workload.title for workload in WORKLOADS} | {
    "goodput": f"{GOODPUT_LENGTHS.input} in / {GOODPUT_LENGTHS.output} out: highest Poisson rate at which "
    f"{GOODPUT_ATTAINMENT:.0%} have "
    + " and ".join(f"{k.upper()} ≤ {v:g} ms" for k, v in GOODPUT_SLO.limits.items()),
    "idle": "nobody asks",
    "start": "start to ready",
}
_UNITS = {
    "request_throughput": "requests a second",
    "output_throughput": "tokens a second",
    "rate": "requests a second",
    "cpu_fraction": "CPU, cores",
    "resident_mib": "resident, MiB (shared pages counted in each process)",
    "seconds": "seconds",
}


def write_page(data: Mapping[str, Any], path: Path, plots: Sequence[Path]) -> Path:
    """Writes the page and returns its path."""
    medians: Mapping[str, Mapping[str, Mapping[str, float]]] = data["medians"]
    names = list(data["servers"])
    lines = ["# SplitServe and its peers on one machine", ""]
    lines += [
        f"Measured {data['date']}; medians of {data['rounds']} rounds in turns, the same client, model, cores and "
        "workloads for all, fresh random prompts for every run. ITL counts tokens, ICL arrivals (see "
        "`bench/metrics.py`). Ratios are ours divided by theirs.",
        "",
    ]
    if data["scale"] != 1:
        lines += [f"**Only a trial: {data['scale']:g} times the numbers of requests.**", ""]
    lines += ["## Targets", "", *_targets(medians, names[0]), "", "## Figures", ""]
    lines += [*_figures(medians, names), ""]
    lines += [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    if problems := list(_problems(data)):
        lines += ["## What failed", "", *problems, ""]
    lines += [*_probes(data), "## Machine and commands", ""]
    lines += [f"- {key}: {value}" for key, value in data["machine"].items()]
    lines += ["", "```", data["command"], "```", ""]
    for name, server in data["servers"].items():
        note = f" ({server['note']})" if server["note"] else ""
        lines += [f"- {name}{note}: `{server['command']}`"]
    path.write_text("\n".join(lines) + "\n")
    return path


def _targets(medians: Mapping[str, Any], ours: str) -> list[str]:
    lines = ["| workload | metric | ours | peer | ratio | target | |", "|---|---|---|---|---|---|---|"]
    for target in TARGETS:
        mine = medians[ours].get(target.workload, {}).get(target.metric)
        theirs = medians.get(target.peer, {}).get(target.workload, {}).get(target.metric)
        wanted = f"{'≥' if target.at_least else '≤'} {_ratio(target.ratio)}"
        head = f"| {_TITLES[target.workload]} | {_metric(target.metric)}"
        if mine is None or theirs is None:
            lines.append(f"{head} | {_number(mine)} | {_number(theirs)} | | {wanted} | not measured |")
            continue
        ratio, verdict = _judge(target, mine, theirs)
        if failed := medians[ours][target.workload].get("failed"):
            verdict = f"**missed**: {failed:g} requests failed"
        lines.append(
            f"{head} | {_number(mine)} | {target.peer} {_number(theirs)} | {ratio} | {wanted} | {verdict} |"
        )
    return lines


def _judge(target: Target, mine: float, theirs: float) -> tuple[str, str]:
    if theirs == 0:
        met = target.at_least and mine > 0
        return ("∞" if mine else "–"), ("met" if met else "missed")
    ratio = mine / theirs
    return _ratio(ratio), "met" if target.met(ratio) else "**missed**"


def _figures(medians: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    lines = [f"| workload | metric | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for workload, metrics in SHOWN.items():
        for metric in metrics:
            values = [medians[name].get(workload, {}).get(metric) for name in names]
            if any(value is not None for value in values):
                cells = " | ".join(map(_number, values))
                lines.append(f"| {_TITLES[workload]} | {_metric(metric)} | {cells} |")
    return lines


def _problems(data: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, runs in data["runs"].items():
        for number, results in enumerate(runs, 1):
            if "error" in results:
                lines.append(f"- {name}, round {number}: {results['error'].splitlines()[0]}")
            for workload, figures in results.items():
                if isinstance(figures, dict) and figures.get("failed"):
                    reason = next(iter(figures["failures"]))
                    lines.append(
                        f"- {name}, round {number}, {_TITLES[workload]}: {figures['failed']} requests: {reason}"
                    )
    return lines


def _probes(data: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, runs in data["probes"].items():
        lines += [f"## {name}", ""]
        for key in runs[0]:
            shown = [f"{run[key]['value']:g}" for run in runs if isinstance(run.get(key), dict)]
            unit = runs[0][key]["unit"] if isinstance(runs[0][key], dict) else runs[0][key]
            lines.append(f"- {key}: {', '.join(shown)} {unit}")
        lines.append("")
    return lines


def _metric(name: str) -> str:
    if name in _UNITS:
        return _UNITS[name]
    kind, metric, unit = name.split("_")
    return f"{metric.upper()} {kind}, {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}×" if value >= 0.1 else f"1/{1 / value:.0f}" if value > 0 else "0"

"""The results of a comparison as a page in Markdown. Computes ratios, measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import ERROR
from bench.workloads import (
    GOODPUT_ATTAINMENT,
    GOODPUT_LENGTHS,
    GOODPUT_SECONDS,
    GOODPUT_SLO,
    SHOWN,
    TARGETS,
    WORKLOADS,
    Target,
)

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
    lines = [f"# {names[0]} and its peers on one machine", ""]
    lines += [f"**{data['note']}**", ""] if data["note"] else []
    lines += [
        f"Measured {data['date']}. Figures are medians of {data['rounds']} rounds in turns, where a server has no "
        "fewer below: the same client, model, cores and workloads for all, fresh random prompts for every run. "
        "ITL counts tokens, ICL arrivals (see `bench/metrics.py`). Ratios are ours divided by theirs.",
        "",
    ]
    if data["scale"] != 1:
        lines += [f"**Only a trial: {data['scale']:g} times the numbers of requests.**", ""]
    lines += ["## Targets", "", *_targets(medians, names[0]), "", "## Figures", ""]
    lines += [*_figures(data, names), ""]
    lines += [*_ranges(data, names[0]), *_rates(data)]
    lines += [f"![{plot.stem}]({plot.name})\n" for plot in plots]
    if problems := list(_problems(data)):
        lines += ["## What failed", "", *problems, ""]
    lines += [*_probes(data), "## Machine and commands", ""]
    lines += [f"- {key}: {value}" for key, value in data["machine"].items()]
    lines += ["", f"    {data['command']}", ""]
    for name, server in data["servers"].items():
        rounds = "1 round" if server["rounds"] == 1 else f"{server['rounds']} rounds"
        stays = "; started once, idle while others are measured" if server["stays"] else ""
        note = f"; {server['note']}" if server["note"] else ""
        lines += [f"- {name} ({rounds}{stays}{note}): `{server['command']}`"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def _targets(medians: Mapping[str, Any], ours: str) -> list[str]:
    lines = ["| workload | metric | ours | peer | ratio | target | |", "|---|---|---|---|---|---|---|"]
    for target in TARGETS:
        mine = medians[ours].get(target.workload, {}).get(target.metric)
        theirs = medians.get(target.peer, {}).get(target.workload, {}).get(target.metric) if target.peer else 1.0
        limit = _ratio(target.ratio) if target.peer else _number(target.ratio)
        wanted = f"{'≥' if target.at_least else '≤'} {limit}"
        head = f"| {_TITLES[target.workload]} | {_metric(target.metric)}"
        if mine is None or theirs is None:
            lines.append(f"{head} | {_cell(mine)} | {_cell(theirs)} | | {wanted} | not measured |")
            continue
        ratio, verdict = _judge(target, mine, theirs)
        if failed := medians[ours][target.workload].get("failed"):
            verdict = f"**missed**: {failed:g} requests failed"
        peer = f"{target.peer} {_number(theirs)} | {ratio}" if target.peer else " | "
        lines.append(f"{head} | {_number(mine)} | {peer} | {wanted} | {verdict} |")
    return lines


def _judge(target: Target, mine: float, theirs: float) -> tuple[str, str]:
    if theirs == 0:
        met = target.at_least and mine > 0
        return ("∞" if mine else "–"), ("met" if met else "missed")
    ratio = mine / theirs
    return _ratio(ratio), "met" if target.met(ratio) else "**missed**"


def _figures(data: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    heads = [
        name if server["rounds"] == data["rounds"] else f"{name} ({server['rounds']} round)"
        for name, server in data["servers"].items()
    ]
    lines = [f"| workload | metric | {' | '.join(heads)} |", f"|---|---|{'---|' * len(names)}"]
    for workload, metrics in SHOWN.items():
        for metric in metrics:
            values = [data["medians"][name].get(workload, {}).get(metric) for name in names]
            if any(value is not None for value in values):
                cells = " | ".join(map(_cell, values))
                lines.append(f"| {_TITLES[workload]} | {_metric(metric)} | {cells} |")
    return lines


def _ranges(data: Mapping[str, Any], ours: str) -> Iterator[str]:
    """How far the rounds lie apart, for what the targets name."""
    peers = [
        ours,
        *dict.fromkeys(target.peer for target in TARGETS if target.peer and target.peer in data["runs"]),
    ]
    rows = []
    for workload, metric in dict.fromkeys((target.workload, target.metric) for target in TARGETS):
        cells = [
            ", ".join(
                _number(run[workload][metric]) for run in data["runs"][peer] if metric in run.get(workload, {})
            )
            for peer in peers
        ]
        if any("," in cell for cell in cells):
            rows.append(f"| {_TITLES[workload]} | {_metric(metric)} | {' | '.join(cells)} |")
    if rows:
        yield from ("## Round by round", "", f"| workload | metric | {' | '.join(peers)} |")
        yield from (f"|---|---|{'---|' * len(peers)}", *rows, "")


def _rates(data: Mapping[str, Any]) -> Iterator[str]:
    """Which rates the search for the goodput tried."""
    lines = []
    for name, runs in data["runs"].items():
        for number, run in enumerate(runs, 1):
            if steps := run.get("goodput", {}).get("tried"):
                said = [
                    f"{step['rate']:g}: {'≤ ' if step['ended_early'] else ''}{step['attainment']:.0%}"
                    for step in steps
                ]
                lines.append(f"- {name}, run {number}: {', '.join(said)}")
    if lines:
        yield from ("## Rates tried for the goodput", "")
        yield from (
            "In this order; requests a second, and the part of them within the limits. A window is "
            f"{GOODPUT_SECONDS:g} s of arrivals, and is ended as soon as it can't pass any more (≤: the most it "
            "could have been). So short a window doesn't show a backlog that grows slowly: neighbouring rates are "
            "19 % apart for that reason.",
            "",
            *lines,
            "",
        )


def _problems(data: Mapping[str, Any]) -> Iterator[str]:
    for name, runs in data["runs"].items():
        for number, results in enumerate(runs, 1):
            if ERROR in results:
                yield f"- {name}, run {number}: {results[ERROR]['message'].splitlines()[0]}"
            for workload, figures in results.items():
                if figures.get("failed"):
                    reason = next(iter(figures["failures"]))
                    yield f"- {name}, run {number}, {_TITLES[workload]}: {figures['failed']} requests: {reason}"


def _probes(data: Mapping[str, Any]) -> Iterator[str]:
    for name, runs in data["probes"].items():
        yield from (f"## {name}", "")
        for key in dict.fromkeys(key for run in runs for key in run):
            values = [run[key] for run in runs if key in run]
            if key == ERROR:
                yield f"- failed: {values[0]}"
            else:
                yield f"- {key}: {', '.join(format(value['value'], 'g') for value in values)} {values[0]['unit']}"
        yield ""


def _metric(name: str) -> str:
    if name in _UNITS:
        return _UNITS[name]
    kind, metric, unit = name.split("_")
    return f"{metric.upper()} {kind}, {unit}"


def _cell(value: float | None) -> str:
    return "" if value is None else _number(value)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}×" if value >= 0.1 else f"1/{1 / value:.0f}" if value > 0 else "0"

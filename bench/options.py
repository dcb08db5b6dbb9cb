"""The flags of ``bench serve``, and which values they may have. Names are those of ``vllm bench serve``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import orjson

from bench.metrics import METRICS
from splitserve.errors import ConfigError

DATASETS = ("random", "shared-prefix", "multi-turn", "mix", "trace")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(prog="bench serve", description="Measures an OpenAI-compatible server.")
    p.add_argument("--backend", choices=["openai", "openai-chat"], default="openai")
    p.add_argument("--base-url", default="http://127.0.0.1:8000")
    p.add_argument("--model", help="default: the first that the server lists")
    p.add_argument("--prompt-form", choices=["tokens", "text"], default="tokens", help="of completions")
    p.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more fields of each request"
    )
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--ignore-eos", action="store_true", help="answers of exactly the length asked for")
    p.add_argument("--request-timeout", type=float, default=600.0, metavar="SECONDS")
    p.add_argument("--ready-check-timeout-sec", type=float, default=0.0, metavar="SECONDS")

    load = p.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, help="requests; default 1000, or the whole trace")
    load.add_argument("--num-warmups", type=int, default=0, help="requests before the measurement")
    load.add_argument("--request-rate", type=float, default=math.inf, help="a second; default: all at once")
    load.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below: bursts; above: even")
    load.add_argument("--max-concurrency", type=int, help="closed loop of so many")
    load.add_argument("--trace", type=Path, metavar="FILE", help="replays recorded requests")
    load.add_argument("--trace-scale", type=float, default=1.0, help="times the recorded rate")
    load.add_argument("--trace-length-scale", type=float, default=1.0, help="times the recorded lengths")
    load.add_argument("--seed", type=int, help="default: a fresh one")

    data = p.add_argument_group("data set")
    data.add_argument("--dataset-name", choices=DATASETS, default="random")
    data.add_argument("--random-input-len", type=int, default=1024, help="tokens a prompt or turn adds")
    data.add_argument("--random-output-len", type=int, default=128)
    data.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this part of them")
    data.add_argument("--random-prefix-len", type=int, default=0, help="random: tokens that all prompts share")
    data.add_argument("--prefix-len", type=int, default=256, help="shared-prefix, multi-turn: tokens shared")
    data.add_argument("--num-prefixes", type=int, default=8, help="shared-prefix: groups")
    data.add_argument("--turns", type=int, default=4, help="multi-turn: of each conversation")
    data.add_argument("--think-seconds", type=float, default=0.0, help="multi-turn: mean pause between turns")
    data.add_argument("--long-input-len", type=int, default=2048, help="mix: of the long prompts")
    data.add_argument("--long-output-len", type=int, default=16, help="mix: of their answers")
    data.add_argument("--long-share", type=float, default=0.1, help="mix: of all requests")
    data.add_argument("--vocab-size", type=int, default=32_000, help="token ids are below")

    out = p.add_argument_group("results")
    out.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="limits: ttft:2500 tpot:60")
    out.add_argument("--percentile-metrics", default=",".join(METRICS), help="comma-separated")
    out.add_argument("--metric-percentiles", default="50,90,99", help="comma-separated")
    out.add_argument("--save-result", action="store_true", help="writes JSON")
    out.add_argument("--save-detailed", action="store_true", help="the same with every request")
    out.add_argument("--result-dir", type=Path, default=Path())
    out.add_argument("--result-filename")
    out.add_argument("--label")
    return p


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for values that can't be."""
    for name in (
        "num_prompts",
        "max_concurrency",
        "turns",
        "num_prefixes",
        "random_input_len",
        "random_output_len",
    ):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("request_rate", "burstiness", "trace_scale", "trace_length_scale", "request_timeout"):
        if not (value := getattr(options, name)) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
    for name in ("random_range_ratio", "long_share"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be between 0 and 1, not {value:g}")


def _json_object(text: str) -> dict[str, Any]:
    value = orjson.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value

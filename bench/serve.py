"""Measures an OpenAI-compatible server: ``python -m bench.serve --base-url http://127.0.0.1:8000``.

Flags, metrics and the names in the JSON are those of ``vllm bench serve`` where both have them. Seeds are fresh
by default, so that no prefix cache knows the prompts. Invariant: what is printed is what is saved.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np
import uvloop

from bench import datasets
from bench.arrivals import Arrivals, replayed
from bench.datasets import Conversation, Lengths, Tokens
from bench.http_client import Server
from bench.load import Client, LoadResult, run_load
from bench.metrics import METRICS, Slo, summarize
from bench.openai_api import Api
from bench.options import check, parser
from bench.report import details, save, table
from bench.trace import read_trace
from splitserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    """All that one measurement needs."""

    client: Client
    conversations: Sequence[Conversation]
    offsets: Sequence[float]
    max_concurrency: int | None = None
    warmups: Sequence[Conversation] = ()


async def measure(run: Run) -> LoadResult:
    """Warms up one conversation at a time, then measures."""
    if run.warmups:
        await run_load(run.client, run.warmups, [0.0] * len(run.warmups), 1)
    return await run_load(run.client, run.conversations, run.offsets, run.max_concurrency)


def build(options: argparse.Namespace, model: str, seed: int) -> Run:
    """From flags to a run. Raises ConfigError for those that don't fit together."""
    rng = np.random.default_rng(seed)
    tokens = Tokens(rng, options.vocab_size)
    if options.trace or options.dataset_name == "trace":
        if options.trace is None:
            raise ConfigError("--dataset-name trace needs --trace FILE")
        entries = read_trace(options.trace, options.num_prompts)
        entries = [entry.scaled(options.trace_length_scale) for entry in entries]
        conversations = datasets.from_trace(entries, seed, options.vocab_size)
        offsets = replayed([entry.time for entry in entries], options.trace_scale)
    else:
        conversations = _conversations(options, tokens)
        offsets = Arrivals(options.request_rate, options.burstiness).offsets(len(conversations), rng)
    api = Api(
        model=model,
        chat=options.backend == "openai-chat",
        prompt_form=options.prompt_form,
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        extra_body=options.extra_body,
    )
    warmup = Lengths(options.random_input_len, min(options.random_output_len, 16))
    return Run(
        client=Client(Server.parse(options.base_url), api, options.request_timeout),
        conversations=conversations,
        offsets=offsets,
        max_concurrency=options.max_concurrency,
        warmups=datasets.random_prompts(tokens, options.num_warmups, warmup),
    )


def _conversations(options: argparse.Namespace, tokens: Tokens) -> list[Conversation]:
    count = options.num_prompts or 1000
    lengths = Lengths(options.random_input_len, options.random_output_len, options.random_range_ratio)
    match options.dataset_name:
        case "random":
            return datasets.random_prompts(tokens, count, lengths, options.random_prefix_len)
        case "shared-prefix":
            return datasets.shared_prefix(tokens, count, lengths, options.prefix_len, options.num_prefixes)
        case "multi-turn":
            return datasets.multi_turn(
                tokens, count, lengths, options.turns, options.prefix_len, options.think_seconds
            )
        case _:
            long = Lengths(options.long_input_len, options.long_output_len, options.random_range_ratio)
            return datasets.mixed(tokens, count, lengths, long, options.long_share)


def find_model(base_url: str, wanted: str | None, wait: float) -> str:
    """The model to ask: ``wanted``, or the first that the server lists within ``wait`` seconds.

    Raises ConfigError.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            answer = httpx.get(f"{base_url}/v1/models", timeout=10.0)
            names = [entry["id"] for entry in answer.raise_for_status().json()["data"]]
            if wanted in names or (names and wanted is None):
                return wanted or str(names[0])
            problem = f"{base_url} serves {', '.join(names) or 'no model'}, not {wanted or 'any'}"
        except (httpx.HTTPError, KeyError, ValueError) as error:
            problem = f"{base_url}/v1/models: {error}"
        if time.monotonic() >= deadline:
            raise ConfigError(problem)
        time.sleep(0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 if every request succeeded; raises ConfigError."""
    options = parser().parse_args(arguments)
    check(options)
    metrics = [name for name in options.percentile_metrics.split(",") if name]
    if unknown := set(metrics) - set(METRICS):
        raise ConfigError(f"--percentile-metrics: {', '.join(sorted(unknown))} is none of {', '.join(METRICS)}")
    percentiles = [float(value) for value in options.metric_percentiles.split(",") if value]
    slo = Slo.parse(options.goodput)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    options.base_url = options.base_url.rstrip("/")
    model = find_model(options.base_url, options.model, options.ready_check_timeout_sec)
    run = build(options, model, seed)
    turns = sum(len(conversation.turns) for conversation in run.conversations)
    print(f"{turns} requests to {model} at {options.base_url}, seed {seed}", file=sys.stderr)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(measure(run))
    facts = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "label": options.label,
        "model_id": model,
        "num_prompts": turns,
        "dataset_name": "trace" if options.trace else options.dataset_name,
        "request_rate": options.request_rate if math.isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": seed,
        "goodput_config": dict(slo.limits),
    }
    data = facts | summarize(result, slo, metrics, percentiles)
    print(table(data, metrics, percentiles))
    if options.save_result or options.save_detailed or options.result_filename:
        name = options.result_filename or f"{options.backend}-{model.replace('/', '-')}-{facts['date']}.json"
        path = options.result_dir / name
        save(path, data | (details(result) if options.save_detailed else {}))
        print(f"written to {path}", file=sys.stderr)
    return 0 if data["failed"] == 0 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(f"bench serve: {problem}")

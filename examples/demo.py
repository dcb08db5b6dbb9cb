"""``make demo``: a cluster on this machine, one streamed answer with its numbers, and everything gone again."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import time
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from rich.console import Console

from splitserve.cli.up import local_workers
from splitserve.cluster import Role
from splitserve.config import LogConfig, RouterConfig, WorkerConfig
from splitserve.errors import ConfigError
from splitserve.local import ClusterSpec, LocalCluster
from splitserve.models import resolve_model

MODEL = "smollm2"
QUESTION = "What is the capital of France?"
# long enough that the prompt is worth a prefill worker of its own
SYSTEM = (
    "You are a helpful assistant that answers questions about geography. Answer each question in one short, "
    "complete and correct sentence. Name the place that was asked for. If you are not sure of an answer, say so "
    "plainly. Do not add any other facts, lists or explanations, and do not repeat the question first."
)


async def main() -> int:
    console = Console(highlight=False)
    began = time.monotonic()

    def report(process: str, text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/]  [bold]{process:<10}[/] {text}", soft_wrap=True)

    report("model", f"{MODEL} (fetched once, then kept)")
    await asyncio.to_thread(resolve_model, MODEL)
    quiet = LogConfig("warning")
    router = RouterConfig(redis_url="", port=0, grpc_port=0, log=quiet)
    workers = local_workers(
        [
            WorkerConfig(role, MODEL, redis_url="", worker_id=f"{role}-0", kv_cache_memory=512 << 20, log=quiet)
            for role in (Role.PREFILL, Role.DECODE)
        ]
    )
    with tempfile.TemporaryDirectory(prefix="splitserve-") as scratch:
        async with LocalCluster(ClusterSpec(router, workers, Path(scratch)), report) as cluster:
            report("cluster", "ready")
            text = await ask(console, cluster.http_url)
            metrics = await scrape(cluster.children["decode-0"].addresses["metrics"])
            console.print(
                f"[dim]KV moved from prefill to decode: {metrics['bytes'] / 1e6:.2f} MB over "
                f"{metrics['transport']}[/]"
            )
    right = "Paris" in text
    console.print("[green]done[/]" if right else "[red]that answer is wrong[/]")
    return 0 if right else 1


async def ask(console: Console, url: str) -> str:
    """Streams the answer to the terminal, then its numbers."""
    console.print(f"\n[bold cyan]{QUESTION}[/]")
    began = time.monotonic()
    arrivals: list[float] = []
    text = ""
    tokens = 0
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                arrivals.append(time.monotonic())
                text += chunk.choices[0].delta.content
                console.out(chunk.choices[0].delta.content, end="")
    rate = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    console.print(
        f"\n\n[dim]time to first token {1000 * (arrivals[0] - began):.0f} ms, {rate:.0f} tokens/s, "
        f"{tokens} tokens[/]"
    )
    return text


async def scrape(url: str) -> dict[str, float | str]:
    """Bytes of KV that a worker pulled, and by which transport."""
    async with httpx.AsyncClient() as client:
        metrics = (await client.get(f"{url}/metrics")).text
    found = re.search(r'splitserve_kv_transfer_bytes_total\{.*transport="(\w+)".*\} ([\d.e+]+)', metrics)
    if found is None:
        raise ConfigError("no KV was moved: the prompt never reached the prefill worker")
    return {"transport": found[1], "bytes": float(found[2])}


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except ConfigError as error:
        sys.exit(f"demo: {error}")

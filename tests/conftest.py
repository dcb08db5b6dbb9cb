"""What several packages' tests share: a real, private Redis and a worker to register in it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings

from splitserve.cluster import Role, WorkerInfo
from splitserve.directory import Directory
from splitserve.models import cache_dir, resolve_model
from splitserve.redis_client import RedisClient
from splitserve.redis_server import PrivateRedis
from splitserve.text import Tokenizer

# The same examples in every run, and none fails for being slow. ``--hypothesis-profile explore`` looks further.
_patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
settings.register_profile("explore", _patient)
settings.register_profile("repeatable", _patient, derandomize=True)
settings.load_profile("repeatable")

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks once, when it is first imported


@pytest.fixture(scope="session")
def _session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = PrivateRedis(tmp_path_factory.mktemp("redis"))
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield server.url
        runner.run(server.close())


@pytest.fixture
async def redis_url(_session_redis: str) -> str:
    """A Redis shared by the session, empty at the start of each test. Don't stop it."""
    client = RedisClient(_session_redis, timeout=5.0)
    await client.execute("FLUSHALL")
    await client.close()
    return _session_redis


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[PrivateRedis]:
    """A Redis of this test alone, to be stopped, killed or restarted."""
    server = PrivateRedis(tmp_path / "redis")
    async with server:
        yield server


@pytest.fixture
async def directory(redis_url: str) -> AsyncIterator[Directory]:
    """A directory without entries."""
    async with Directory(redis_url) as connected:
        yield connected


class MakeWorker(Protocol):
    def __call__(self, id: str = ..., role: Role = ..., **changes: Any) -> WorkerInfo: ...


@pytest.fixture
def make_worker() -> MakeWorker:
    """Makes the description of a worker that nobody serves."""

    def make(id: str = "decode-0", role: Role = Role.DECODE, **changes: Any) -> WorkerInfo:
        info = WorkerInfo(
            id=id,
            role=role,
            model="tiny",
            fingerprint="ab" * 32,
            grpc_address="127.0.0.1:1",
            block_tokens=16,
            num_blocks=1000,
            max_num_seqs=32,
            max_model_len=8192,
            transfer_addresses={"tcp": "127.0.0.1:2"},
        )
        return replace(info, **changes)

    return make


@pytest.fixture
def worker(make_worker: MakeWorker) -> WorkerInfo:
    """One decode worker that nobody serves."""
    return make_worker()


# In a process of its own: transformers warns, and takes seconds to import.
_READ_TOKENIZER = """
import json, pathlib, sys
from transformers import AutoTokenizer
model, target = map(pathlib.Path, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(str(model.parent), gguf_file=model.name)
target.write_text(json.dumps({
    "tokenizer": tokenizer.backend_tokenizer.to_str(),
    "template": tokenizer.chat_template,
    "special": {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
}))
"""


@pytest.fixture(scope="session")
def demo_tokenizer() -> Tokenizer:
    """The tokenizer of the demo model, SmolLM2; kept in the cache of models."""
    kept = cache_dir() / "tests" / "smollm2-tokenizer.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}")  # others may be at it too
        command = [sys.executable, "-c", _READ_TOKENIZER, str(resolve_model("smollm2")), str(fresh)]
        subprocess.run(command, check=True, timeout=300)
        fresh.rename(kept)
    parts = json.loads(kept.read_text())
    return Tokenizer(parts["tokenizer"].encode(), parts["template"], parts["special"])

from __future__ import annotations

import asyncio

import pytest

from splitserve.errors import ConfigError, Unavailable
from splitserve.redis_client import RedisClient, Script, ScriptCall, redacted
from splitserve.redis_server import PrivateRedis


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://:secret@host:6379", "rediss://host:6379"),
        ("redis://host?password=secret", "redis://host"),
        ("unix://me:secret@/run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redacted(url) == shown


async def test_a_script_that_redis_has_forgotten_is_loaded_again(redis_url: str) -> None:
    client = RedisClient(redis_url, 5.0)
    call = ScriptCall(Script("return ARGV[1]", "d83bf1ad0a7e5d8a0e3d1a2fcd7cc0ea0cd8fc6b"), [], ["x"])
    with pytest.raises(Unavailable, match="NoScriptError"):
        await client.run(call)
    workers = ScriptCall(Script.named("workers"), ["ss:workers"], ["ss:worker:"])
    assert await client.run(workers) == []
    for count in (1, 2):
        await client.execute("SCRIPT", "FLUSH")
        assert await client.run_all([workers] * count, atomic=True) == [[]] * count
    await client.close()


@pytest.mark.parametrize("count", [1, 2])
async def test_a_call_can_be_cancelled_at_every_step(redis_url: str, count: int) -> None:
    workers = ScriptCall(Script.named("workers"), ["ss:workers"], ["ss:worker:"])
    for steps in range(40):
        client = RedisClient(redis_url, 5.0)
        call = asyncio.create_task(client.run_all([workers] * count, atomic=True))
        for _ in range(steps):
            await asyncio.sleep(0)
        if call.cancel():
            with pytest.raises(asyncio.CancelledError):
                await call
        await client.close()


async def test_more_callers_than_connections_all_get_their_answer(redis_url: str) -> None:
    client = RedisClient(redis_url, 5.0)
    answers = await asyncio.gather(*(client.execute("ECHO", str(i)) for i in range(200)))
    assert answers == [str(i).encode() for i in range(200)]
    await client.close()


async def test_an_error_of_redis_is_unavailable(redis_url: str) -> None:
    client = RedisClient(redis_url, 5.0)
    with pytest.raises(Unavailable, match="unknown command"):
        await client.execute("JUGGLE")
    await client.close()


async def test_a_wrong_password_is_one_line(own_redis: PrivateRedis) -> None:
    client = RedisClient(own_redis.url, 5.0)
    await client.execute("CONFIG", "SET", "requirepass", "right")
    await client.close()
    wrong = RedisClient(own_redis.url.replace("unix://", "unix://:hunter2@"), 5.0)
    with pytest.raises(ConfigError) as caught:
        await wrong.connect()
    await wrong.close()
    assert "hunter2" not in caught.value.message
    assert "\n" not in caught.value.message

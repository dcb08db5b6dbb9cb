from __future__ import annotations

import pytest

from splitserve.addresses import advertised_host, is_loopback, is_wildcard, join
from splitserve.errors import ConfigError

LOCAL_REDIS = "redis://127.0.0.1:6379/0"


async def test_an_address_that_is_asked_for_wins() -> None:
    assert await advertised_host("0.0.0.0", "10.1.2.3", LOCAL_REDIS) == "10.1.2.3"


async def test_without_a_wildcard_the_listening_address_is_advertised() -> None:
    assert await advertised_host("10.1.2.3", None, LOCAL_REDIS) == "10.1.2.3"


@pytest.mark.parametrize("url", [LOCAL_REDIS, "redis://user:secret@127.0.0.1", "rediss://127.0.0.1:6380"])
async def test_behind_a_wildcard_the_interface_towards_redis_is_advertised(url: str) -> None:
    assert await advertised_host("0.0.0.0", None, url) == "127.0.0.1"


async def test_a_unix_socket_shows_no_interface() -> None:
    with pytest.raises(ConfigError, match="needs --advertise-host"):
        await advertised_host("0.0.0.0", None, "unix:///run/redis.sock")


async def test_a_redis_that_cannot_be_found_is_an_error_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"no route to redis\.invalid") as caught:
        await advertised_host("0.0.0.0", None, "redis://:secret@redis.invalid:6379")
    assert "secret" not in str(caught.value)


async def test_a_wildcard_is_never_advertised() -> None:
    with pytest.raises(ConfigError, match="no address that others can connect to"):
        await advertised_host("0.0.0.0", "0.0.0.0", LOCAL_REDIS)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0", ""])
def test_wildcards(host: str) -> None:
    assert is_wildcard(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "worker-0"])
def test_addresses_and_names_are_no_wildcards(host: str) -> None:
    assert not is_wildcard(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_only_this_machine_reaches_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker-0", ""])
def test_others_may_reach_the_rest(host: str) -> None:
    assert not is_loopback(host)


def test_an_ipv6_address_is_joined_in_brackets() -> None:
    assert (join("::1", 7), join("[::1]", 7), join("10.0.0.1", 7)) == ("[::1]:7", "[::1]:7", "10.0.0.1:7")

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from splitserve.api_keys import ApiKey, Keyring, new_key, read_keys
from splitserve.errors import ConfigError, Unauthenticated


def test_without_keys_everybody_may_ask() -> None:
    assert not Keyring()
    assert Keyring().tenant(None) == ""


def test_a_key_is_known_by_its_name() -> None:
    keyring = Keyring([ApiKey.of("sk-one", "alice"), ApiKey.of("sk-two", "bob")])
    assert keyring.tenant("Bearer sk-two") == "bob"
    assert keyring.tenant("bearer  sk-one") == "alice"


@pytest.mark.parametrize("given", [None, "", "sk-one", "Basic sk-one", "Bearer", "Bearer sk-on", "Bearer é"])
def test_anything_else_is_refused(given: str | None) -> None:
    with pytest.raises(Unauthenticated):
        Keyring([ApiKey.of("sk-one", "alice")]).tenant(given)


def test_only_a_digest_is_kept() -> None:
    assert "sk-one" not in repr(ApiKey.of("sk-one"))


def test_a_key_without_a_name_has_one_of_its_own() -> None:
    assert ApiKey.of("a").name == ApiKey.of("a").name != ApiKey.of("b").name


@pytest.mark.parametrize("key", ["", "two words", "tab\t", "ü", "x" * 513])
def test_what_no_header_can_carry_is_no_key(key: str) -> None:
    with pytest.raises(ConfigError, match="printable"):
        ApiKey.of(key)


def test_new_keys_differ() -> None:
    assert new_key() != new_key()


def test_a_file_names_keys_or_their_digests(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    digest = hashlib.sha256(b"sk-two").hexdigest()
    path.write_text(f"# ours\nalice sk-one  # until May\n\nbob sha256:{digest.upper()}\n")
    assert read_keys(path) == (ApiKey.of("sk-one", "alice"), ApiKey.of("sk-two", "bob"))


@pytest.mark.parametrize("text", ["", "# none", "alice", "alice one two", "bob sha256:abc", "alice é"])
def test_a_file_that_is_none_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert "one two" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys(tmp_path / "none")

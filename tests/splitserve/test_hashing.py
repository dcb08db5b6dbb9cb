from __future__ import annotations

import hashlib
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.hashing import BlockHash, PrefixHasher
from splitserve.layout import KVLayout

FINGERPRINT = bytes(range(32))
TOKENS = list(range(40))
B = 16


def hashes(tokens: list[int], fingerprint: bytes = FINGERPRINT, salt: str = "", size: int = B) -> list[BlockHash]:
    return PrefixHasher(fingerprint, salt).next_blocks(tokens, size)


def test_a_name_is_the_digest_of_all_up_to_the_end_of_the_block() -> None:
    # who changes this changes `PROTOCOL_VERSION`: workers that name blocks otherwise must not be taken for ours
    root = hashlib.sha256(b"root" + FINGERPRINT + b"salt").digest()
    prefixes = [array("I", TOKENS[:end]).tobytes() for end in (16, 32)]
    assert hashes(TOKENS, salt="salt") == [hashlib.sha256(root + prefix).digest() for prefix in prefixes]


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=70),
    ends=st.sets(st.integers(0, 70)),
    size=st.integers(1, 17),
)
def test_a_sequence_that_grows_gets_the_names_of_the_whole(tokens: list[int], ends: set[int], size: int) -> None:
    hasher, named = PrefixHasher(FINGERPRINT), list[BlockHash]()
    for end in [*sorted(ends), len(tokens)]:
        named += hasher.next_blocks(tokens[len(named) * size : end], size)
    assert named == hashes(tokens, size=size)
    assert len(set(named)) == len(tokens) // size


@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_another_token_changes_the_names_from_its_block_on(place: int) -> None:
    changed = [token + (i == place) for i, token in enumerate(TOKENS)]
    same = [a == b for a, b in zip(hashes(TOKENS), hashes(changed), strict=True)]
    assert same == [i < place // B for i in range(2)]


def test_other_models_and_tenants_share_no_name() -> None:
    named = [hashes(TOKENS), hashes(TOKENS, bytes(32)), hashes(TOKENS, salt="a"), hashes(TOKENS, salt="b")]
    assert len({name for names in named for name in names}) == 8


def test_blocks_of_other_sizes_share_no_name() -> None:
    small, large = (KVLayout(1, 1, 4, "float32", size) for size in (16, 32))
    names = [hashes(TOKENS, layout.fingerprint("m"), size=layout.block_tokens) for layout in (small, large)]
    assert len(names[0]) == 2 and not set(names[0]) & set(names[1])

"""Encoding, decoding and what single tokens stand for."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from splitserve.errors import ConfigError, InvalidRequest
from splitserve.text import Tokenizer
from splitserve.text.pieces import piece_reader


@given(text=st.text(st.characters(codec="utf-8")))
def test_the_bytes_of_all_tokens_are_the_text(demo_tokenizer: Tokenizer, text: str) -> None:
    ids = demo_tokenizer.encode(text, add_special_tokens=False)
    assume(demo_tokenizer.decode(ids, skip_special_tokens=False) == text)  # the vocabulary lacks a few bytes
    assert b"".join(map(demo_tokenizer.token_bytes, ids)) == text.encode()
    assert len(ids) >= demo_tokenizer.at_least(text)


def test_special_tokens_are_recognised_and_left_out(demo_tokenizer: Tokenizer) -> None:
    ids = demo_tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert {ids[0], ids[-1]} == {1, 2} <= demo_tokenizer.special_ids
    assert demo_tokenizer.decode(ids) == "hi"
    assert demo_tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


async def test_long_texts_leave_the_event_loop_free(demo_tokenizer: Tokenizer) -> None:
    text = "The quick brown fox. " * 20_000
    task = asyncio.create_task(demo_tokenizer.encode_async(text))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    assert await task == demo_tokenizer.encode(text)


def test_half_a_surrogate_pair_is_refused(demo_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        demo_tokenizer.encode("a\ud800")


def test_unknown_ids_stand_for_nothing(demo_tokenizer: Tokenizer) -> None:
    assert demo_tokenizer.token_text(10**6) == ""


def test_bytes_that_are_no_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a tokenizer"):
        Tokenizer(b'{"model": 3}')


@pytest.mark.parametrize(
    ("decoder", "piece", "data"),
    [
        ({"type": "ByteLevel"}, "ĠHello", b" Hello"),
        ({"type": "ByteLevel"}, "Ã©", "é".encode()),
        ({"type": "ByteLevel"}, "plain text, with a space", b"plain text, with a space"),
        ({"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}, "<0x0A>", b"\n"),
        ({"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}, "▁Hello", b" Hello"),
        (None, "word", b"word"),
    ],
)
def test_pieces_are_read_by_the_kind_of_vocabulary(
    decoder: dict[str, object] | None, piece: str, data: bytes
) -> None:
    assert piece_reader(decoder)(piece) == data


def test_text_and_router_never_import_torch_or_transformers() -> None:
    code = (
        "import sys, splitserve.text, splitserve.wire, router.echo, router.http, router.grpc_front\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

"""Frames survive the wire, and nothing else does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.checksums import Checksum, all_of
from kvtransfer.faults import ProtocolError, Reason
from kvtransfer.frames import (
    Ack,
    Cancel,
    Done,
    End,
    Error,
    Frame,
    Heartbeat,
    Hello,
    HelloOk,
    Pull,
    Ready,
    Resend,
    Stamp,
    decode,
    encode,
    pack_worker_id,
)
from kvtransfer.transport import MAX_FRAME

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
worker_ids = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=32)
digests, ids = st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16)


def ready_of(first: int, runs: list[list[int]], attempt: int) -> Ready:
    """A READY with the checksums of the blocks of each run."""
    return Ready(first, tuple(map(len, runs)), tuple(itertools.chain(*runs)), attempt)


stamps = st.builds(Stamp, ids, u64, u64)
frames = st.one_of(
    st.builds(Hello, u16, digests, ids, worker_ids, worker_ids, u32, st.just(all_of(Checksum))),
    st.builds(HelloOk, u16, digests, u32, u32, u64, st.sampled_from(Checksum)),
    st.builds(Pull, u32, u64, u64, st.binary(max_size=64)),
    st.builds(ready_of, u32, st.lists(st.lists(u32, min_size=1, max_size=9), min_size=1, max_size=100), u8),
    st.builds(Resend, u32, u8),
    st.builds(End, u32, st.booleans(), u32),
    st.builds(Cancel, st.booleans()),
    st.builds(Error, st.sampled_from(Reason), st.text(st.characters(exclude_categories=["Cs"]), max_size=250)),
    st.sampled_from([Heartbeat(), Done(), Ack()]),
)


@given(stamps, frames)
def test_what_is_encoded_is_decoded(stamp: Stamp, frame: Frame) -> None:
    data = encode(stamp, frame)
    assert len(data) <= MAX_FRAME
    assert decode(data) == (stamp, frame)


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@given(stamps, frames, st.data())
def test_a_damaged_frame_is_a_protocol_error(stamp: Stamp, frame: Frame, data: st.DataObject) -> None:
    damaged = bytearray(encode(stamp, frame))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        decode(bytes(damaged))


@given(stamps, frames, st.integers(1, 60))
def test_a_frame_cut_short_or_drawn_out_is_a_protocol_error(stamp: Stamp, frame: Frame, count: int) -> None:
    data = encode(stamp, frame)
    for wrong in (data[:-count], data + bytes(count)):
        with pytest.raises(ProtocolError):
            decode(wrong)


def test_a_long_error_message_is_cut_between_characters() -> None:
    stamp = Stamp(bytes(16), 1, 2)
    _, frame = decode(encode(stamp, Error(Reason.REFUSED, "ä" * 5000)))
    assert isinstance(frame, Error) and frame.message == "ä" * 512


@pytest.mark.parametrize("worker_id", ["", "x" * 129, "a\0b"])
def test_a_worker_id_that_fits_no_frame_is_refused(worker_id: str) -> None:
    with pytest.raises(ValueError, match="worker id"):
        pack_worker_id(worker_id)

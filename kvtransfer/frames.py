"""The control frames of a pull as bytes: fixed structs, little-endian.

Knows no connection and no pool. Every frame starts with a header that names the transfer and the incarnations
of both workers; a HELLO is followed by HELLO_OK and a PULL, everything else by whom it concerns.
The last four bytes are the CRC32C of the others: a first token with a flipped bit is as wrong as a block with one.
Invariant: ``decode(encode(stamp, frame)) == (stamp, frame)``, and ``decode`` of any bytes whatsoever returns a
frame or raises ProtocolError.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import crc32c

from kvtransfer.checksums import Checksum
from kvtransfer.faults import ProtocolError, Reason
from kvtransfer.transport import MAX_FRAME

MAGIC = b"SSKVPULL"
MAX_WORKER_ID = 128  # bytes of UTF-8
MAX_MESSAGE = 1024  # bytes of UTF-8 in an ERROR
MAX_READY = 1024  # blocks in one READY
MAX_JOINED = 4096  # bytes in a PULL; blocks behind them are not joined

_HEADER = struct.Struct("<BxxxI16sQQ")  # kind, length of the whole frame, transfer, source epoch, puller epoch
_HELLO = struct.Struct(f"<8sHBxI32s16s{MAX_WORKER_ID}s{MAX_WORKER_ID}s")
_HELLO_OK = struct.Struct("<HBxI32sIQ")
_PULL = struct.Struct("<BxxxIQQ")
_READY = struct.Struct("<IHHBx")
_RESEND = struct.Struct("<IB")
_END = struct.Struct("<IBxxxI")
_CANCEL = struct.Struct("<B")
_ERROR = struct.Struct("<B")
_CHECKSUM = struct.Struct("<I")
_REASONS = list(Reason)  # an ERROR names its reason by place; append only


class PullMode(enum.IntEnum):
    """What the indices of a PULL count."""

    TRANSFER = 0  # blocks of the published transfer, in the order of the sequence


@dataclass(frozen=True, slots=True)
class Stamp:
    """Names the transfer and both incarnations; the header of every frame."""

    transfer_id: bytes  # 16 bytes
    source_epoch: int
    puller_epoch: int


@dataclass(frozen=True, slots=True)
class Hello:
    """Puller to source, first of all."""

    version: int
    fingerprint: bytes  # 32 bytes
    secret: bytes  # 16 bytes
    source: str  # worker id that the puller means to talk to
    puller: str  # worker id
    timeout_ms: int  # the puller gives up after so long a silence
    checksums: Checksum  # those that the puller has
    magic: bytes = MAGIC


@dataclass(frozen=True, slots=True)
class HelloOk:
    """The source accepts."""

    version: int
    fingerprint: bytes  # 32 bytes
    lease_ms: int  # the source lets go after so long a silence
    num_blocks: int
    block_bytes: int
    checksum: Checksum  # the one in every READY


@dataclass(frozen=True, slots=True)
class Pull:
    """Asks for the bytes ``[offset, offset + length)`` of the blocks ``first …`` of the transfer."""

    first: int
    offset: int
    length: int
    joined: bytes = b""  # bit i: block first + i may come in one payload with the one before it
    mode: PullMode = PullMode.TRANSFER


@dataclass(frozen=True, slots=True)
class Ready:
    """Blocks ``first … first + len(checksums) - 1`` follow, in payloads of ``runs`` blocks each."""

    first: int
    runs: tuple[int, ...]
    checksums: tuple[int, ...]  # of each block, as HELLO_OK says
    attempt: int = 0  # 1 for a block that was asked for again


@dataclass(frozen=True, slots=True)
class Resend:
    """The payload of this block was damaged."""

    index: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Alive, with nothing to send yet."""


@dataclass(frozen=True, slots=True)
class End:
    """All blocks were sent. ``finished``: the answer ends with ``first_token``."""

    first_token: int
    finished: bool
    age_us: int  # how long ago the last block was computed


@dataclass(frozen=True, slots=True)
class Cancel:
    """The puller wants no more. ``abandon``: nobody will ask again, the source may let go."""

    abandon: bool


@dataclass(frozen=True, slots=True)
class Done:
    """The puller has verified every block: the source may let go."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Answers CANCEL and DONE: the source sends no further payload."""


@dataclass(frozen=True, slots=True)
class Error:
    """The end, and why."""

    reason: Reason
    message: str


Frame = Hello | HelloOk | Pull | Ready | Resend | Heartbeat | End | Cancel | Done | Ack | Error
_KINDS: tuple[type, ...] = (Hello, HelloOk, Pull, Ready, Resend, Heartbeat, End, Cancel, Done, Ack, Error)


def encode(stamp: Stamp, frame: Frame) -> bytes:
    """At most ``MAX_FRAME`` bytes."""
    body = _encode_body(frame)
    length = _HEADER.size + len(body) + _CHECKSUM.size
    assert length <= MAX_FRAME
    kind = _KINDS.index(type(frame))
    data = _HEADER.pack(kind, length, stamp.transfer_id, stamp.source_epoch, stamp.puller_epoch) + body
    return data + _CHECKSUM.pack(crc32c.crc32c(data))


def decode(data: bytes) -> tuple[Stamp, Frame]:
    """ProtocolError if ``data`` is not exactly one frame."""
    end = len(data) - _CHECKSUM.size
    if end < _HEADER.size:
        raise ProtocolError(f"a frame of {len(data)} bytes")
    kind, length, transfer_id, source_epoch, puller_epoch = _HEADER.unpack_from(data)
    if length != len(data) or kind >= len(_KINDS):
        raise ProtocolError(f"a frame of kind {kind} and {len(data)} bytes says that it has {length}")
    if _CHECKSUM.unpack_from(data, end) != (crc32c.crc32c(data[:end]),):
        raise ProtocolError(f"a {_KINDS[kind].__name__} frame that was damaged on its way")
    try:
        frame = _decode_body(_KINDS[kind], data[_HEADER.size : end])
    except (struct.error, UnicodeDecodeError, ValueError, IndexError) as error:
        raise ProtocolError(f"a malformed {_KINDS[kind].__name__} frame: {error}") from error
    return Stamp(transfer_id, source_epoch, puller_epoch), frame


def pack_worker_id(worker_id: str) -> bytes:
    """ValueError if it does not fit into a frame."""
    data = worker_id.encode()
    if not 0 < len(data) <= MAX_WORKER_ID or b"\0" in data:
        raise ValueError(f"a worker id has 1 to {MAX_WORKER_ID} bytes, none of them NUL: {worker_id!r}")
    return data


def _encode_body(frame: Frame) -> bytes:
    match frame:
        case Hello():
            source, puller = pack_worker_id(frame.source), pack_worker_id(frame.puller)
            return _HELLO.pack(
                frame.magic, frame.version, frame.checksums, frame.timeout_ms, frame.fingerprint, frame.secret,
                source, puller,
            )  # fmt: skip
        case HelloOk():
            return _HELLO_OK.pack(
                frame.version, frame.checksum, frame.lease_ms, frame.fingerprint, frame.num_blocks,
                frame.block_bytes,
            )  # fmt: skip
        case Pull():
            assert len(frame.joined) <= MAX_JOINED
            return _PULL.pack(frame.mode, frame.first, frame.offset, frame.length) + frame.joined
        case Ready():
            count, runs = len(frame.checksums), len(frame.runs)
            head = _READY.pack(frame.first, count, runs, frame.attempt)
            return head + struct.pack(f"<{count}I{runs}H", *frame.checksums, *frame.runs)
        case Resend():
            return _RESEND.pack(frame.index, frame.attempt)
        case End():
            return _END.pack(frame.first_token, frame.finished, frame.age_us)
        case Cancel():
            return _CANCEL.pack(frame.abandon)
        case Error():
            message = frame.message.encode()[:MAX_MESSAGE].decode(errors="ignore").encode()
            return _ERROR.pack(_REASONS.index(frame.reason)) + message
        case Heartbeat() | Done() | Ack():
            return b""


def _decode_body(kind: type, body: bytes) -> Frame:
    if kind is Hello:
        magic, version, kinds, timeout_ms, fingerprint, secret, source, puller = _HELLO.unpack(body)
        if magic != MAGIC:
            raise ValueError("not a puller")
        return Hello(version, fingerprint, secret, _text(source), _text(puller), timeout_ms, Checksum(kinds))
    if kind is HelloOk:
        version, chosen, lease_ms, fingerprint, num_blocks, block_bytes = _HELLO_OK.unpack(body)
        return HelloOk(version, fingerprint, lease_ms, num_blocks, block_bytes, Checksum(chosen))
    if kind is Pull:
        mode, first, offset, length = _PULL.unpack_from(body)
        joined = body[_PULL.size :]
        if len(joined) > MAX_JOINED:
            raise ValueError(f"{len(joined)} bytes of joined blocks")
        return Pull(first, offset, length, joined, PullMode(mode))
    if kind is Ready:
        first, count, runs, attempt = _READY.unpack_from(body)
        if not 0 < runs <= count <= MAX_READY:
            raise ValueError(f"{count} blocks in {runs} runs")
        numbers = struct.unpack(f"<{count}I{runs}H", body[_READY.size :])
        if 0 in numbers[count:] or sum(numbers[count:]) != count:
            raise ValueError(f"runs that are not {count} blocks")
        return Ready(first, numbers[count:], numbers[:count], attempt)
    if kind is Resend:
        return Resend(*_RESEND.unpack(body))
    if kind is End:
        token, finished, age_us = _END.unpack(body)
        return End(token, _flag(finished), age_us)
    if kind is Cancel:
        return Cancel(_flag(*_CANCEL.unpack(body)))
    if kind is Error:
        (place,) = _ERROR.unpack_from(body)
        if len(body) > _ERROR.size + MAX_MESSAGE:
            raise ValueError(f"a message of {len(body)} bytes")
        return Error(_REASONS[place], body[_ERROR.size :].decode())
    if body:
        raise ValueError(f"{len(body)} bytes where none belong")
    frame: Frame = kind()
    return frame


def _flag(value: int) -> bool:
    if value > 1:
        raise ValueError(f"a flag of {value}")
    return bool(value)


def _text(padded: bytes) -> str:
    text = padded.rstrip(b"\0").decode()
    pack_worker_id(text)
    return text

"""Messages of any protobuf type, as hypothesis makes them up: right in form, wrong in everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

_UINT32 = st.sampled_from([0, 1, 2, 15, 16, 17, 255, 256, 512, 2**31 - 1, 2**31, 2**32 - 1]) | st.integers(0, 600)
_UINT64 = _UINT32 | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1])
_DOUBLE = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-300, 1e300]) | st.floats()
_TEXT = st.sampled_from(["", "a", "echo", "\x00", "é" * 200, "x" * 5000]) | st.text(max_size=20)
_VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_UINT32: _UINT32,
    FieldDescriptor.CPPTYPE_UINT64: _UINT64,
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: _DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 9),
    FieldDescriptor.CPPTYPE_STRING: _TEXT,
}


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Of this kind, with any of its fields set."""
    return _fields(kind.DESCRIPTOR).map(lambda fields: kind(**fields))


def _fields(descriptor: Descriptor) -> st.SearchStrategy[dict[str, Any]]:
    def set_one_of_each(fields: dict[str, Any]) -> dict[str, Any]:
        for group in descriptor.oneofs:
            for field in [f for f in group.fields if f.name in fields][1:]:
                del fields[field.name]
        return fields

    optional = {field.name: _field(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=optional).map(set_one_of_each)


def _field(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        by_name = field.message_type.fields_by_name
        return st.dictionaries(_one(by_name["key"]), _one(by_name["value"]), max_size=3)
    return st.lists(_one(field), max_size=40) if field.is_repeated else _one(field)


def _one(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return _fields(field.message_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=20)
    return _VALUES[field.cpp_type]


# Few and always the same: what was found once is found again, and nothing flakes.
FUZZ = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


async def status_of(
    channel: grpc.aio.Channel, method: str, request: bytes, last: Callable[[bytes], bool] = lambda _: False
) -> str:
    """How the call of a method with one request and any number of answers ends. It is left after ``last``."""
    call = channel.unary_stream(method)(request, timeout=10)
    try:
        async for answer in call:
            if last(answer):
                call.cancel()
                break
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"

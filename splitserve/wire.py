"""Sampling parameters and tokens on the wire: protobuf to dataclasses and back.

Owns the two directions of every message in ``sampling.proto``; knows neither routers nor workers.
Invariant: ``x_from_proto(x_to_proto(value)) == value`` for parameters, and for log probabilities
that fit 32 bits; an optional
field that is unset stays distinguishable from one that is set to its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitserve.errors import Incompatible
from splitserve.sampling import FinishReason, Logprobs, SamplingParams, TokenOutput
from splitserve.v1 import sampling_pb2 as pb

# Fields with presence, in the order of the message; an unset one means the default.
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
)

_REASON_TO_PROTO: Mapping[FinishReason, pb.FinishReason] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_REASON_FROM_PROTO: Mapping[int, FinishReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    **{number: reason for reason, number in _REASON_TO_PROTO.items()},
}


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Every field is set but those that are ``None``. Token ids must fit 32 bits."""
    message = pb.SamplingParams(
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logit_bias=params.logit_bias,
    )
    for name in _OPTIONAL:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    return message


def sampling_fields(message: pb.SamplingParams) -> dict[str, Any]:
    """The fields that the sender set, by the names of ``SamplingParams``."""
    fields: dict[str, Any] = {n: getattr(message, n) for n in _OPTIONAL if message.HasField(n)}
    if message.stop:
        fields["stop"] = tuple(message.stop)
    if message.stop_token_ids:
        fields["stop_token_ids"] = tuple(message.stop_token_ids)
    if message.ignore_eos:
        fields["ignore_eos"] = True
    if message.logit_bias:
        fields["logit_bias"] = dict(message.logit_bias)
    return fields


def sampling_from_proto(message: pb.SamplingParams, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """What is unset comes from ``defaults``, then from ``SamplingParams``; no ``max_tokens`` is no limit.

    Raises:
        InvalidRequest: a value is out of its range.
    """
    return SamplingParams(**{"max_tokens": None, **(defaults or {}), **sampling_fields(message)})


def finish_reason_to_proto(reason: FinishReason | None) -> pb.FinishReason:
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _REASON_TO_PROTO[reason]


def finish_reason_from_proto(number: int) -> FinishReason | None:
    """Raises ``Incompatible`` for a reason that this version does not know."""
    try:
        return _REASON_FROM_PROTO[number]
    except KeyError:
        raise Incompatible(f"the peer sent finish reason {number}, unknown to this version") from None


def logprobs_to_proto(logprobs: Logprobs) -> pb.Logprobs:
    return pb.Logprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_ids=[token for token, _ in logprobs.top],
        top_logprobs=[value for _, value in logprobs.top],
    )


def logprobs_from_proto(message: pb.Logprobs) -> Logprobs:
    """Raises ``Incompatible`` if ids and values do not pair up."""
    if len(message.top_ids) != len(message.top_logprobs):
        raise Incompatible(
            f"the peer sent {len(message.top_ids)} alternatives with {len(message.top_logprobs)} values"
        )
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return Logprobs(message.logprob, message.rank, top)


def token_to_proto(token: TokenOutput) -> pb.Token:
    return pb.Token(
        index=token.index,
        id=token.token,
        logprobs=None if token.logprobs is None else logprobs_to_proto(token.logprobs),
        finish_reason=finish_reason_to_proto(token.finish_reason),
    )


def token_from_proto(message: pb.Token) -> TokenOutput:
    logprobs = logprobs_from_proto(message.logprobs) if message.HasField("logprobs") else None
    return TokenOutput(message.index, message.id, logprobs, finish_reason_from_proto(message.finish_reason))

"""A sequence on its way from a router to a worker, and the one message that carries it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitserve.errors import Incompatible, InvalidRequest
from splitserve.sampling import SamplingParams
from splitserve.v1 import worker_pb2 as pb
from splitserve.wire import sampling_from_proto, sampling_to_proto


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """Tokens to go on from: the client's prompt and what was generated for it before."""

    request_id: str
    fingerprint: str  # hex; of the model that the ids belong to
    tokens: Sequence[int]
    num_prompt: int
    params: SamplingParams  # seed is set
    salt: str = ""


def sequence_to_proto(sequence: SequenceRequest) -> pb.Sequence:
    return pb.Sequence(
        request_id=sequence.request_id,
        fingerprint=sequence.fingerprint,
        tokens=sequence.tokens,
        num_prompt_tokens=sequence.num_prompt,
        sampling=sampling_to_proto(sequence.params),
        cache_salt=sequence.salt,
    )


def sequence_from_proto(message: pb.Sequence, fingerprint: str) -> SequenceRequest:
    """Raises Incompatible unless the sequence is meant for the model with ``fingerprint``."""
    if message.fingerprint != fingerprint:
        raise Incompatible(
            f"the request is for model {message.fingerprint[:12]}, this worker serves {fingerprint[:12]}: "
            "another model, dtype, block size or version"
        )
    if not 0 < message.num_prompt_tokens <= len(message.tokens):
        raise InvalidRequest("the prompt must have at least one token", "prompt")
    return SequenceRequest(
        request_id=message.request_id,
        fingerprint=message.fingerprint,
        tokens=list(message.tokens),
        num_prompt=message.num_prompt_tokens,
        params=sampling_from_proto(message.sampling),
        salt=message.cache_salt,
    )

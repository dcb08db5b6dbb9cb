"""What a router must know of a model to serve it without its weights; workers tell, routers ask.

Plain data and its two conversions. Invariant: two descriptions with equal fingerprints tokenise alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitserve.v1 import worker_pb2 as pb
from splitserve.wire import sampling_fields


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as one worker serves it."""

    model: str  # the name that clients use
    fingerprint: str  # hex
    tokenizer_json: bytes
    chat_template: str
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    max_model_len: int  # tokens
    vocab_size: int
    block_tokens: int
    max_sequence_tokens: int  # what the worker's KV pool can hold
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)  # fields of SamplingParams


def description_to_proto(description: ModelDescription) -> pb.ModelInfo:
    message = pb.ModelInfo(
        model=description.model,
        fingerprint=description.fingerprint,
        tokenizer_json=description.tokenizer_json,
        chat_template=description.chat_template,
        special_tokens=description.special_tokens,
        eos_token_ids=description.eos_token_ids,
        max_model_len=description.max_model_len,
        vocab_size=description.vocab_size,
        block_tokens=description.block_tokens,
        max_sequence_tokens=description.max_sequence_tokens,
    )
    for name, value in description.generation_defaults.items():
        setattr(message.generation_defaults, name, value)
    return message


def description_from_proto(message: pb.ModelInfo) -> ModelDescription:
    return ModelDescription(
        model=message.model,
        fingerprint=message.fingerprint,
        tokenizer_json=message.tokenizer_json,
        chat_template=message.chat_template,
        special_tokens=dict(message.special_tokens),
        eos_token_ids=tuple(message.eos_token_ids),
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        block_tokens=message.block_tokens,
        max_sequence_tokens=message.max_sequence_tokens,
        generation_defaults=sampling_fields(message.generation_defaults),
    )

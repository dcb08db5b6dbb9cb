from splitserve.v1 import sampling_pb2 as _sampling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sequence(_message.Message):
    __slots__ = ("request_id", "fingerprint", "tokens", "num_prompt_tokens", "sampling", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    fingerprint: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _sampling_pb2.SamplingParams
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ...) -> None: ...

class KvHandle(_message.Message):
    __slots__ = ("transfer_id", "secret", "addresses", "source", "epoch", "fingerprint", "num_blocks")
    class AddressesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    secret: bytes
    addresses: _containers.ScalarMap[str, str]
    source: str
    epoch: int
    fingerprint: bytes
    num_blocks: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., secret: _Optional[bytes] = ..., addresses: _Optional[_Mapping[str, str]] = ..., source: _Optional[str] = ..., epoch: _Optional[int] = ..., fingerprint: _Optional[bytes] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("accepted", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: PrefillAccepted
    done: PrefillDone
    def __init__(self, accepted: _Optional[_Union[PrefillAccepted, _Mapping]] = ..., done: _Optional[_Union[PrefillDone, _Mapping]] = ...) -> None: ...

class PrefillAccepted(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: KvHandle
    def __init__(self, handle: _Optional[_Union[KvHandle, _Mapping]] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("token", "cached_tokens", "queue_seconds")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    token: _sampling_pb2.Token
    cached_tokens: int
    queue_seconds: float
    def __init__(self, token: _Optional[_Union[_sampling_pb2.Token, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "handle", "slot")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    sequence: Sequence
    handle: KvHandle
    slot: FeedSlot
    def __init__(self, sequence: _Optional[_Union[Sequence, _Mapping]] = ..., handle: _Optional[_Union[KvHandle, _Mapping]] = ..., slot: _Optional[_Union[FeedSlot, _Mapping]] = ...) -> None: ...

class FeedSlot(_message.Message):
    __slots__ = ("feed", "number")
    FEED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    feed: int
    number: int
    def __init__(self, feed: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class FeedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FeedEvent(_message.Message):
    __slots__ = ("feed", "tokens")
    FEED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    feed: int
    tokens: _containers.RepeatedCompositeFieldContainer[FeedTokens]
    def __init__(self, feed: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[FeedTokens, _Mapping]]] = ...) -> None: ...

class FeedTokens(_message.Message):
    __slots__ = ("slot", "tokens")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    tokens: DecodeTokens
    def __init__(self, slot: _Optional[int] = ..., tokens: _Optional[_Union[DecodeTokens, _Mapping]] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("accepted", "tokens")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    accepted: DecodeAccepted
    tokens: DecodeTokens
    def __init__(self, accepted: _Optional[_Union[DecodeAccepted, _Mapping]] = ..., tokens: _Optional[_Union[DecodeTokens, _Mapping]] = ...) -> None: ...

class DecodeAccepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeTokens(_message.Message):
    __slots__ = ("tokens", "cached_tokens", "prompt_logprobs", "queue_seconds")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.Token]
    cached_tokens: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_sampling_pb2.Logprobs]
    queue_seconds: float
    def __init__(self, tokens: _Optional[_Iterable[_Union[_sampling_pb2.Token, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_sampling_pb2.Logprobs, _Mapping]]] = ..., queue_seconds: _Optional[float] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model", "fingerprint", "tokenizer_json", "chat_template", "special_tokens", "eos_token_ids", "generation_defaults", "max_model_len", "vocab_size", "block_tokens", "max_sequence_tokens")
    class SpecialTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    tokenizer_json: bytes
    chat_template: str
    special_tokens: _containers.ScalarMap[str, str]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    generation_defaults: _sampling_pb2.SamplingParams
    max_model_len: int
    vocab_size: int
    block_tokens: int
    max_sequence_tokens: int
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokenizer_json: _Optional[bytes] = ..., chat_template: _Optional[str] = ..., special_tokens: _Optional[_Mapping[str, str]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., generation_defaults: _Optional[_Union[_sampling_pb2.SamplingParams, _Mapping]] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., block_tokens: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ...) -> None: ...

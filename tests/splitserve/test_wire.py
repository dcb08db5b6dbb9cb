"""Sampling parameters and tokens survive the wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve import wire
from splitserve.errors import Incompatible, InvalidRequest
from splitserve.sampling import FinishReason, Logprobs, SamplingParams, TokenOutput
from splitserve.v1 import sampling_pb2 as pb

tokens = st.integers(0, 2**32 - 1)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, allow_subnormal=False)


sampling = st.builds(
    SamplingParams,
    temperature=floats(0, 2),
    top_p=floats(2**-100, 1),
    top_k=st.integers(0, 2**31 - 1),
    min_p=floats(0, 1),
    seed=st.none() | st.integers(0, 2**63 - 1),
    max_tokens=st.none() | st.integers(100, 2**31 - 1),
    min_tokens=st.integers(0, 100),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), max_size=16).map(tuple),
    stop_token_ids=st.lists(tokens, max_size=9).map(tuple),
    ignore_eos=st.booleans(),
    presence_penalty=floats(-2, 2),
    frequency_penalty=floats(-2, 2),
    repetition_penalty=floats(2**-100, 2),
    logit_bias=st.dictionaries(tokens, floats(-100, 100), max_size=5),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
logprobs = st.builds(
    Logprobs,
    logprob=st.floats(max_value=0, width=32),
    rank=st.integers(1, 2**32 - 1),
    top=st.lists(st.tuples(tokens, st.floats(max_value=0, width=32)), max_size=20).map(tuple),
)
outputs = st.builds(
    TokenOutput,
    index=st.integers(0, 2**31),
    token=tokens,
    logprobs=st.none() | logprobs,
    finish_reason=st.none() | st.sampled_from(FinishReason),
)


@given(sampling)
def test_sampling_round_trip(params: SamplingParams) -> None:
    data = wire.sampling_to_proto(params).SerializeToString()
    assert wire.sampling_from_proto(pb.SamplingParams.FromString(data)) == params


@given(outputs)
def test_token_round_trip(output: TokenOutput) -> None:
    data = wire.token_to_proto(output).SerializeToString()
    assert wire.token_from_proto(pb.Token.FromString(data)) == output


def test_unset_fields_take_given_defaults_then_those_of_the_class() -> None:
    message = pb.SamplingParams(temperature=0.0)
    params = wire.sampling_from_proto(message, {"temperature": 0.5, "top_p": 0.9})
    assert params == SamplingParams(temperature=0.0, top_p=0.9, max_tokens=None)


def test_a_field_set_to_its_default_is_seen() -> None:
    assert wire.sampling_fields(pb.SamplingParams(top_k=0)) == {"top_k": 0}
    assert wire.sampling_fields(pb.SamplingParams()) == {}


def test_positive_values_too_small_for_32_bits_stay_positive() -> None:
    params = SamplingParams(top_p=1e-60, repetition_penalty=1e-60)
    assert wire.sampling_from_proto(wire.sampling_to_proto(params)).top_p > 0


def test_out_of_range_values_name_their_field() -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.sampling_from_proto(pb.SamplingParams(seed=2**64 - 1))
    assert caught.value.field == "seed"


def test_an_unknown_finish_reason_is_refused() -> None:
    with pytest.raises(Incompatible, match="finish reason 77"):
        wire.finish_reason_from_proto(77)


def test_alternatives_without_values_are_refused() -> None:
    with pytest.raises(Incompatible):
        wire.logprobs_from_proto(pb.Logprobs(top_ids=[1, 2], top_logprobs=[-1.0]))

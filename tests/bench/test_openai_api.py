"""Bodies that are sent and events that come back."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.http_client import RequestFailed
from bench.openai_api import AnswerReader, Api, Past


def text_event(text: str, tokens: int | None = None, finish: str | None = None) -> bytes:
    event: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    if tokens is not None:
        event["usage"] = {"prompt_tokens": 4, "completion_tokens": tokens}
    return orjson.dumps(event)


def usage_event(tokens: int) -> bytes:
    usage = {"prompt_tokens": 4, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 3}}
    return orjson.dumps({"choices": [], "usage": usage})


def read(*events: bytes) -> AnswerReader:
    reader = AnswerReader()
    for time, event in enumerate(events):
        reader.read(event, float(time))
    return reader


def test_events_with_usage_carry_the_tokens_it_says() -> None:
    reader = read(text_event("a", 1), text_event("bcd", 4), text_event("", 5, "length"), usage_event(5), b"[DONE]")
    assert [(arrival.time, arrival.tokens) for arrival in reader.arrivals] == [(0.0, 1), (1.0, 3), (2.0, 1)]
    assert (reader.output_tokens, reader.counted, reader.finished, reader.text) == (5, True, True, "abcd")
    assert (reader.prompt_tokens, reader.cached_tokens) == (4, 3)


def test_events_without_usage_carry_one_token_each() -> None:
    reader = read(text_event("a"), text_event(""), text_event("", finish="stop"), usage_event(2))
    assert [arrival.tokens for arrival in reader.arrivals] == [1, 1]
    assert reader.counted


def test_a_total_that_events_do_not_add_up_to_is_kept_and_marked() -> None:
    reader = read(text_event("a"), text_event("b"), usage_event(7))
    assert (reader.output_tokens, reader.counted) == (7, False)


def test_the_role_of_a_chat_is_no_token() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "hi"}, {}]
    reader = read(*(orjson.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas))
    assert [arrival.time for arrival in reader.arrivals] == [1.0]


def test_an_error_in_the_stream_is_a_failure() -> None:
    with pytest.raises(RequestFailed, match="too much"):
        read(orjson.dumps({"error": {"message": "too much"}}))


_VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | st.text("abc"),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["choices", "text", "usage", "delta"]), inner),
)


@given(st.binary() | _VALUES.map(orjson.dumps))
def test_whatever_comes_is_read_or_a_failure(data: bytes) -> None:
    try:
        read(data)
    except RequestFailed as failure:
        assert "event" in str(failure)


def test_completions_send_ids_and_the_turns_before_them() -> None:
    body = orjson.loads(Api("m", ignore_eos=True).body([Past([1, 2], "text", 3)], [9], 5))
    assert body["prompt"] == [1, 2, 1, 2, 1, 9]
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (5, 5, True)


def test_chats_send_the_real_answers() -> None:
    body = orjson.loads(Api("m", chat=True).body([Past([1], "an answer", 2)], [2, 3], 5))
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == "an answer"
    assert len(body["messages"][2]["content"].split()) == 2


def test_more_fields_win() -> None:
    body = orjson.loads(Api("m", extra_body={"temperature": 0.7, "top_k": 3}).body([], [1], 1))
    assert (body["temperature"], body["top_k"]) == (0.7, 3)

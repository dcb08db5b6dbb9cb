"""What a conversation may weigh, wherever one is taken."""

from __future__ import annotations

from typing import Any

import pytest

from router.http.conversation import MAX_MESSAGES

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_too_many_messages_are_refused_before_the_template_sees_them(front: Any, path: str) -> None:
    messages = [{"role": "user", "content": "hi"}] * (MAX_MESSAGES + 1)
    answer = await front.http.post(path, json={"model": "echo", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert f"at most {MAX_MESSAGES}" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_no_message_is_too_few(front: Any, path: str) -> None:
    answer = await front.http.post(path, json={"model": "echo", "messages": []})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")

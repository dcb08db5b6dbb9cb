"""A conversation as text, for chat and for ``/tokenize``.

Owns what a conversation may weigh before its template sees it: many templates look back from each message, so
that their work grows with the square of the number. Knows no answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.backend import ModelSpec
from router.http.schemas import ChatMessage
from router.renderer import Renderer
from splitserve.errors import InvalidRequest

MAX_MESSAGES = 2048


async def conversation_text(
    renderer: Renderer, spec: ModelSpec, messages: Sequence[ChatMessage], add_generation_prompt: bool | None
) -> str:
    """The prompt that the model's chat template makes of it. Raises ``InvalidRequest`` on ``messages``."""
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"{len(messages)} messages were given, at most {MAX_MESSAGES} are allowed", "messages"
        )
    turns = [message.for_template() for message in messages]
    return await renderer.render(spec.tokenizer.template, turns, add_generation_prompt is not False)

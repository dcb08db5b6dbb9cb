"""A model's chat template: Jinja in a sandbox, with the helpers that published templates rely on.

Owns compiling and rendering; knows no tokens. Templates come from model files, messages from clients, so both
are foreign: attributes of Python objects are out of reach, mutation is refused, sizes are limited.
Invariant: a failing template is the client's ``InvalidRequest`` on ``messages``, never a crash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from splitserve.errors import InvalidRequest

MAX_REASON = 500  # characters of a template's own error
MAX_CHARS = 16 * 2**20  # of a rendered prompt, and of any string that a template multiplies

# What foreign code does with foreign data; anything else is a bug of ours.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    SyntaxError,  # of the Python that Jinja makes: blocks nested too deeply
    MemoryError,
)


class ChatTemplate:
    """Compiled at the first use, so that a model with a broken template still serves completions."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], max_chars: int = MAX_CHARS) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.max_chars = max_chars
        self._compiled: Template | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        """Raises ``InvalidRequest`` on ``messages``."""
        if not self.source:
            raise InvalidRequest("the model has no chat template; use /v1/completions", "messages")
        try:
            if self._compiled is None:
                self._compiled = _environment(self.max_chars).from_string(self.source)
            parts, size = [], 0
            for part in self._compiled.generate(
                **self.special_tokens,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                size += len(part)
                if size > self.max_chars:
                    raise InvalidRequest(f"the prompt is longer than {self.max_chars} characters", "messages")
                parts.append(part)
        except _RENDER_ERRORS as error:
            reason = str(error)[:MAX_REASON]
            raise InvalidRequest(f"the chat template refused the messages: {reason}", "messages") from error
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no single operator can fill the memory."""

    intercepted_binops = frozenset({"*", "**", "%"})
    max_chars = MAX_CHARS

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self._limit(len(value) * times)
        elif operator == "**":
            self._limit(abs(right) * 1024 if isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not allowed")
        return super().call_binop(context, operator, left, right)

    def _limit(self, size: int) -> None:
        if size > self.max_chars:
            raise SecurityError("a value of the template is too large")


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's words for training. Here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012  (the base class wants a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(max_chars: int) -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.max_chars = max_chars
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which templates do not expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time is what templates expect

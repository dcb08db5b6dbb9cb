"""``splitserve chat``: talk to a running cluster in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import orjson
import typer
from rich.console import Console

from splitserve.errors import ConfigError

_TIMEOUT = httpx.Timeout(600.0, connect=5.0)

Url = Annotated[str, typer.Option("--url", help="Address of the router.", envvar="SPLITSERVE_URL")]


def chat(
    message: Annotated[str | None, typer.Argument(help="Ask this and end; without it, a conversation.")] = None,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", help="Default: the only one served.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, max=2)] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="SPLITSERVE_API_KEY")] = None,
) -> None:
    """Streams answers in the terminal. An empty line or Ctrl-D ends."""
    console = Console(highlight=False)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    settings = {"max_tokens": max_tokens, "temperature": temperature, "model": model}
    try:
        key = (api_key or "").partition(" ")[0]  # the variable may hold several
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        opened = httpx.Client(base_url=url, timeout=_TIMEOUT, headers=headers)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url}: {error}") from error
    with opened as client:
        while True:
            text = message or _ask(console)
            if not text:
                return
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _answer(client, console, messages, settings)})
            if message:
                return


def _ask(console: Console) -> str:
    try:
        return console.input("[bold cyan]> [/]").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _answer(
    client: httpx.Client, console: Console, messages: list[dict[str, str]], settings: dict[str, Any]
) -> str:
    """Prints the answer as it arrives, then its numbers; returns its text."""
    body = {key: value for key, value in settings.items() if value is not None}
    body |= {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    began = time.monotonic()
    first = last = began
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    try:
        for event in _events(client, body):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    last = time.monotonic()
                    first = last if not pieces else first
                    pieces.append(piece)
                    console.out(piece, end="")
    except httpx.HTTPError as error:
        raise ConfigError(f"no answer from {client.base_url}: {error or type(error).__name__}") from error
    console.out("")
    tokens = usage.get("completion_tokens", 0)
    rate = (tokens - 1) / (last - first) if last > first else 0.0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    console.print(
        f"[dim]first token {1000 * (first - began):.0f} ms, {rate:.1f} tokens/s, {tokens} tokens, "
        f"prompt {usage.get('prompt_tokens', 0)} ({cached} cached)[/]"
    )
    return "".join(pieces)


def _refusal(response: httpx.Response) -> str:
    """The server's own message, if it is one of ours."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered {response.status_code} {response.reason_phrase}: is that a router?"


def _events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event. Raises ConfigError with the server's own message."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise ConfigError(_refusal(response))
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event: dict[str, Any] = orjson.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ConfigError(event["error"]["message"])
            yield event

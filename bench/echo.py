"""The router's HTTP front in a process of its own, with a backend that echoes: ``python -m bench.echo --port P``.

What the front costs, without any worker behind it. Prints nothing; ready when ``/health`` answers.
"""

from __future__ import annotations

import argparse
import os

import uvloop

from router.backend import ModelSpec
from router.echo import EchoBackend, EchoConfig
from router.http import create_app
from splitserve.http_server import HttpServer
from splitserve.text import Tokenizer

CONTEXT = 32_768  # tokens


def echo_spec(tokenizer: Tokenizer, context: int = CONTEXT) -> ModelSpec:
    """A model named ``echo`` with this tokenizer and ``context`` tokens."""
    return ModelSpec(
        name="echo",
        fingerprint="00" * 32,
        tokenizer=tokenizer,
        eos_token_ids=frozenset({2}),
        max_model_len=context,
        vocab_size=32_000,
        block_tokens=16,
        max_sequence_tokens=context,
    )


def read_tokenizer(model: str) -> Tokenizer:
    """Of a model as ``--model`` names it. Raises ConfigError."""
    from engine.weights import open_model  # takes seconds, and tests bring a tokenizer of their own
    from splitserve.models import resolve_model

    text, template, special = open_model(resolve_model(model)).tokenizer()
    return Tokenizer(text.encode(), template, special)


async def serve(port: int, tokenizer: Tokenizer, config: EchoConfig) -> None:
    """Serves until the process is ended."""
    backend = EchoBackend([echo_spec(tokenizer)], config)
    async with HttpServer(create_app(backend), "127.0.0.1", port) as server:
        await server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="smollm2", help="whose tokenizer")
    parser.add_argument("--cores", type=int, nargs="+")
    parser.add_argument("--first-delay", type=float, default=0.0, help="seconds before the first token")
    parser.add_argument("--token-delay", type=float, default=0.0, help="seconds before each later event")
    parser.add_argument("--tokens-per-event", type=int, default=1)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    config = EchoConfig(options.first_delay, options.token_delay, options.tokens_per_event)
    uvloop.run(serve(options.port, read_tokenizer(options.model), config))


if __name__ == "__main__":
    main()

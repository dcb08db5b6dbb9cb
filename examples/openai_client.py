"""Streams one chat answer with the openai package.

python examples/openai_client.py "What is the capital of France?"

For a server whose certificate is of your own authority, name that in the variable SSL_CERT_FILE.
"""

from __future__ import annotations

import argparse
import os

from openai import APIError, OpenAI


def main(url: str, key: str, question: str, max_tokens: int) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            cached = (details.cached_tokens if details else None) or 0
            print(
                f"\n{chunk.usage.completion_tokens} tokens, prompt {chunk.usage.prompt_tokens} ({cached} cached)"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    # "none": a server without keys asks for none, but the package wants one
    parser.add_argument("--api-key", default=os.environ.get("SPLITSERVE_API_KEY") or "none")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    try:
        main(arguments.url, arguments.api_key, arguments.question, arguments.max_tokens)
    except APIError as error:
        raise SystemExit(str(error)) from error

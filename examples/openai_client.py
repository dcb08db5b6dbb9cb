"""Streams one chat answer with the openai package.

python examples/openai_client.py "What is the capital of France?"
"""

from __future__ import annotations

import argparse

from openai import APIError, OpenAI


def main(url: str, question: str, max_tokens: int) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")  # no key is asked for, but the package wants one
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
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    try:
        main(arguments.url, arguments.question, arguments.max_tokens)
    except APIError as error:
        raise SystemExit(str(error)) from error

"""Streams one answer over the public gRPC API.

python examples/grpc_client.py "The capital of France is"
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

import grpc.aio

from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc
from splitserve.v1 import sampling_pb2 as sampling


def open_channel(address: str, ca: Path | None) -> grpc.aio.Channel:
    if ca is None:
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()))


async def main(address: str, ca: Path | None, key: str | None, prompt: str, max_tokens: int) -> None:
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    async with open_channel(address, ca) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        models = await stub.ListModels(pb.ListModelsRequest(), timeout=10, metadata=metadata)
        if not models.models:
            raise SystemExit(f"{address} serves no model")
        request = pb.GenerateRequest(
            model=models.models[0].id,
            text=prompt,
            sampling=sampling.SamplingParams(max_tokens=max_tokens, temperature=0),
        )
        print(prompt, end="", flush=True)
        async for response in stub.Generate(
            request, timeout=120, metadata=metadata
        ):  # leaving the loop early cancels the work
            print(response.text, end="", flush=True)
            if response.finish_reason:
                usage = response.usage
                print(
                    f"\n{sampling.FinishReason.Name(response.finish_reason)}: {usage.completion_tokens} tokens, "
                    f"prompt {usage.prompt_tokens} ({usage.cached_tokens} cached)"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--api-key", default=os.environ.get("SPLITSERVE_API_KEY"))
    parser.add_argument("--ca", type=Path, help="PEM file of the authority that signed the server's certificate")
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    try:
        asyncio.run(
            main(arguments.address, arguments.ca, arguments.api_key, arguments.prompt, arguments.max_tokens)
        )
    except grpc.aio.AioRpcError as error:
        raise SystemExit(f"{error.code().name}: {error.details()}") from error

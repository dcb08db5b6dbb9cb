"""Requests whose answers are known, asked over the public gRPC API, token by token.

An answer is compared as (index, token id) pairs, so that a token that is missing, there twice or wrong shows.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc.aio

from splitserve.grpc_errors import error_from_rpc
from splitserve.v1 import inference_pb2 as pb
from splitserve.v1 import inference_pb2_grpc
from splitserve.v1.sampling_pb2 import SamplingParams

MODEL = "tiny"
# A probability's last bits depend on the batch that it is computed in, so a draw next to the border of two tokens
# goes either way; one at 6e-7 did. Few tokens to draw from have few borders, and with these seeds no draw of any
# case comes nearer than 2e-5 to one (`transformers` alone, float32).
FIRST_SEED, TOP_K = 7_000, 4
_salts = itertools.count()  # an answer does not depend on it, a cache hit does

UNAVAILABLE = ("Unavailable", "PeerLost")  # errors that say: try again
OnToken = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    """One request; every second one is drawn with a seed."""

    number: int
    prompt: tuple[int, ...]
    new: int

    @property
    def sampling(self) -> SamplingParams:
        greedy = self.number % 2 == 0
        return SamplingParams(
            temperature=0 if greedy else 1.0,
            top_k=0 if greedy else TOP_K,
            seed=FIRST_SEED + self.number,
            max_tokens=self.new,
            ignore_eos=True,
        )


def cases(count: int, longest: int = 300, new: tuple[int, int] = (1, 80), seed: int = 0) -> list[Case]:
    draw = random.Random(seed)
    return [
        Case(i, tuple(draw.randrange(256) for _ in range(draw.randrange(1, longest))), draw.randrange(*new))
        for i in range(count)
    ]


@dataclass(slots=True)
class Answer:
    tokens: list[tuple[int, int]] = field(default_factory=list)  # index, id
    error: str | None = None
    first: float = 0.0  # seconds
    gap: float = 0.0  # longest time between two messages, seconds
    seconds: float = 0.0
    request_id: str = ""


async def ask(
    channel: grpc.aio.Channel,
    case: Case,
    *,
    timeout: float = 60.0,
    salt: str | None = None,
    on_token: OnToken | None = None,
) -> Answer:
    """``on_token`` is awaited with the number of tokens there are, after each message."""
    loop = asyncio.get_running_loop()
    request = pb.GenerateRequest(
        model=MODEL,
        tokens=pb.TokenIds(ids=case.prompt),
        sampling=case.sampling,
        cache_salt=f"s{next(_salts)}" if salt is None else salt,
    )
    answer, began = Answer(), loop.time()
    last = began
    try:
        async for part in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout):
            now = loop.time()
            if answer.tokens:
                answer.gap = max(answer.gap, now - last)
            else:
                answer.first = now - last
            last = now
            answer.request_id = part.request_id
            answer.tokens += [(token.index, token.id) for token in part.tokens]
            if on_token is not None:
                await on_token(len(answer.tokens))
    except grpc.aio.AioRpcError as error:
        answer.error = f"{type(error_from_rpc(error)).__name__}: {error.details()}"
    answer.seconds = loop.time() - began
    return answer


async def ask_any(channels: Sequence[grpc.aio.Channel], case: Case) -> Answer:
    """Of the first router; where it refuses before the first token, of the next one."""
    for channel in channels:
        answer = await ask(channel, case)
        if answer.error is None or answer.tokens or not answer.error.startswith(UNAVAILABLE):
            return answer
    return answer


@dataclass(slots=True)
class Result:
    """What a load came to."""

    answers: list[Answer]
    failed: list[str]
    wrong: list[str]

    @property
    def longest_gap(self) -> float:
        return max(answer.gap for answer in self.answers)

    def assert_all_right(self) -> None:
        assert not self.failed, f"{len(self.failed)} failed: {self.failed[:3]}"
        assert not self.wrong, f"{len(self.wrong)} wrong: {self.wrong[:3]}"


class Oracle:
    """Cases and the answers of an undisturbed run."""

    def __init__(self, known: Sequence[Case]) -> None:
        self.cases = known
        self.expected: dict[int, list[tuple[int, int]]] = {}

    async def learn(self, channel: grpc.aio.Channel, at_once: int = 16) -> None:
        result = await self.run(channel, at_once=at_once)
        assert not result.failed, result.failed
        for case, answer in zip(self.cases, result.answers, strict=True):
            assert [index for index, _ in answer.tokens] == list(range(case.new))
            self.expected[case.number] = answer.tokens

    async def run(
        self,
        channel: grpc.aio.Channel,
        *others: grpc.aio.Channel,
        at_once: int = 16,
        some: Sequence[Case] | None = None,
        on_answer: Callable[[int], Awaitable[None]] | None = None,
    ) -> Result:
        """All cases, ``at_once`` at a time. ``on_answer`` is awaited with the number of answers so far.

        ``others``: channels to more routers; the cases begin with each in turn and go on to the next.
        """
        channels = [channel, *others]
        asked = self.cases if some is None else some
        answers: list[Answer | None] = [None] * len(asked)
        todo, done = iter(range(len(asked))), itertools.count(1)

        async def work() -> None:
            for i in todo:
                turn = i % len(channels)
                answers[i] = await ask_any([*channels[turn:], *channels[:turn]], asked[i])
                if on_answer is not None:
                    await on_answer(next(done))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        result = Result([a for a in answers if a is not None], [], [])
        for case, answer in zip(asked, result.answers, strict=True):
            self.judge(case, answer, result)
        return result

    def judge(self, case: Case, answer: Answer, into: Result) -> None:
        expected = self.expected.get(case.number)
        if answer.error is not None:
            into.failed.append(f"case {case.number} after {len(answer.tokens)} tokens: {answer.error}")
        elif expected is not None and answer.tokens != expected:
            into.wrong.append(f"case {case.number}: {answer.tokens} instead of {expected}")

"""The engine as it works on a GPU (steps queued ahead, padded buckets, tokens that stay on the device), on the
CPU: same answers as the plain engine, and every block comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from engine import EngineConfig, EngineOutput, EngineRequest, SamplingParams, open_model
from engine.core import Engine
from engine.device import CpuDevice
from engine.graphs import buckets
from engine.runner import Runner
from kernels import ReferenceKernels

BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # tokens x heads x layers x K and V x head size x float32


class Watched(CpuDevice):
    """Knows which of the steps that were launched have been waited for."""

    def __init__(self) -> None:
        super().__init__(asynchronous=True)
        self.launched = self.waited = 0

    def mark(self) -> Callable[[], None]:
        assert self.waited >= self.launched - 1, "the step wrote what the one two before it may still read"
        self.launched += 1
        number = self.launched

        def wait() -> None:
            self.waited = max(self.waited, number)

        return wait


class Faulty(Watched):
    """Refuses so many of the next steps, as a GPU does after a fault."""

    faults = 0

    def mark(self) -> Callable[[], None]:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().mark()


class Capturable(ReferenceKernels):
    capturable = True  # as far as a double of a graph goes, which runs the same calls again


def make(path: Path, *, ahead: bool, blocks: int = 64, rows: int = 32, device: CpuDevice | None = None) -> Engine:
    config = EngineConfig(
        str(path), dtype="float32", kernels="reference", threads=1, kv_cache_memory=blocks * BLOCK_BYTES,
        max_num_seqs=6, max_num_batched_tokens=rows,
    )  # fmt: skip
    files = open_model(path)
    runner = Runner(config, files, device or CpuDevice(asynchronous=ahead), Capturable() if ahead else None)
    return Engine(config, files, runner)


def drive(
    engine: Engine, requests: list[EngineRequest], abort: dict[int, str] | None = None
) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {r.request_id: [] for r in requests}
    waiting, steps = list(requests), 0
    while waiting or engine.has_work:
        for _ in range(2):
            if waiting:
                engine.add(waiting.pop(0))
        result = engine.step()
        assert not result.failed
        for request_id, output in result.outputs:
            assert isinstance(output, EngineOutput)
            answers[request_id] += [t.token for t in output.tokens]
            if output.finished and output.blocks:
                engine.release(request_id)
        steps += 1
        if abort and steps in abort:
            engine.abort(abort[steps])
        engine.check_integrity()
    assert engine.pool.num_used == 0
    return answers


def requests(count: int, seed: int, **more: object) -> list[EngineRequest]:
    draw = random.Random(seed)
    return [
        EngineRequest(
            f"r{i}",
            [draw.randrange(256) for _ in range(draw.randint(1, 90))],
            SamplingParams(
                temperature=draw.choice([0, 0.8]), seed=i, top_p=draw.choice([1.0, 0.9]),
                max_tokens=draw.randint(1, 30), ignore_eos=draw.random() < 0.5, **more,  # type: ignore[arg-type]
            ),
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("blocks", [64, 14])
def test_running_ahead_changes_no_answer(tiny: Callable[..., Path], blocks: int) -> None:
    plain, ahead = make(tiny(), ahead=False), make(tiny(), ahead=True, blocks=blocks)
    work = requests(14, seed=blocks)
    assert drive(ahead, work) == drive(plain, work)
    assert (blocks == 64) or ahead.scheduler.num_preemptions > 0


def test_a_chunk_of_one_row_beside_decodes_samples_nothing(tiny: Callable[..., Path]) -> None:
    work = [EngineRequest(f"d{i}", [i], SamplingParams(temperature=0, max_tokens=20)) for i in range(5)]
    work.append(EngineRequest("chunks", list(range(9)), SamplingParams(temperature=0, max_tokens=3)))
    assert drive(make(tiny(), ahead=True, rows=6), work) == drive(make(tiny(), ahead=False, rows=6), work)


def test_a_request_that_needs_its_own_tokens_to_sample_stops_nobody(tiny: Callable[..., Path]) -> None:
    work = [
        *requests(5, seed=3),
        EngineRequest("biased", [1, 2, 3], SamplingParams(temperature=0, max_tokens=9, frequency_penalty=1.5)),
        EngineRequest("likely", [4, 5], SamplingParams(temperature=0, max_tokens=9, logprobs=2)),
    ]
    assert drive(make(tiny(), ahead=True), work) == drive(make(tiny(), ahead=False), work)


def test_an_aborted_request_keeps_its_blocks_until_its_step_is_over(tiny: Callable[..., Path]) -> None:
    work = requests(6, seed=5)
    answers = drive(make(tiny(), ahead=True), work, {3: "r0", 4: "r1", 5: "r2", 6: "r3"})
    plain = drive(make(tiny(), ahead=False), work)
    for name, tokens in answers.items():
        assert tokens == plain[name][: len(tokens)]
    assert answers["r5"] == plain["r5"]


def test_a_step_is_under_way_while_the_one_before_is_read(tiny: Callable[..., Path]) -> None:
    engine = make(tiny(), ahead=True)
    engine.add(EngineRequest("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))
    engine.step()
    (sequence,) = engine.scheduler.running
    assert sequence.pending == 1 and sequence.in_flight == 1
    while engine.has_work:
        engine.step()
    assert sequence.num_generated == 8 and not sequence.in_flight


def test_exports_leave_with_their_blocks(tiny: Callable[..., Path]) -> None:
    work = [
        EngineRequest(f"e{i}", list(range(i, i + 70)), SamplingParams(temperature=0), export=True)
        for i in range(3)
    ]
    assert drive(make(tiny(), ahead=True), work) == drive(make(tiny(), ahead=False), work)


@pytest.mark.parametrize(
    ("params", "export"),
    [
        (SamplingParams(temperature=0), True),  # two chunks that sample nothing, and one that does
        (SamplingParams(temperature=0, max_tokens=3, logprobs=1), False),  # sampled on the host
        (SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), False),
    ],
)
def test_a_step_is_waited_for_before_anybody_hears_of_it(
    tiny: Callable[..., Path], params: SamplingParams, export: bool
) -> None:
    device = Watched()
    engine = make(tiny(), ahead=True, device=device)
    engine.add(EngineRequest("a", list(range(80)), params, export=export))
    while engine.has_work:
        engine.step()
        assert device.waited == engine.stats.steps
    assert engine.stats.steps >= 3 and device.launched == device.waited
    engine.release("a")


def fault_beside_a_step_under_way(path: Path, faults: int) -> tuple[Engine, Faulty]:
    """Of two requests one is an export that was given up while its step was under way."""
    device = Faulty()
    engine = make(path, ahead=True, device=device)
    engine.add(EngineRequest("a", list(range(20)), SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)))
    engine.add(EngineRequest("e", list(range(100, 200)), SamplingParams(temperature=0), export=True))
    engine.step()
    engine.abort("e")
    device.faults = faults
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.step()
    assert device.waited < device.launched
    return engine, device


def test_blocks_of_a_failed_step_are_free_when_the_device_has_come_to_rest(tiny: Callable[..., Path]) -> None:
    engine, device = fault_beside_a_step_under_way(tiny(), faults=1)
    assert [name for name, _error in engine.step_apart().failed] == ["a"]
    assert device.waited == device.launched
    engine.release("e")
    assert engine.pool.num_used == 0
    engine.check_integrity()
    work = requests(3, seed=1)
    assert drive(engine, work) == drive(make(tiny(), ahead=False), work)


def test_blocks_of_a_failed_step_stay_where_the_device_does_not_come_to_rest(tiny: Callable[..., Path]) -> None:
    engine, _device = fault_beside_a_step_under_way(tiny(), faults=2)
    used = engine.pool.num_used
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.step_apart()
    assert engine.pool.num_used == used > 0


def test_graphs_keep_no_logits(tiny: Callable[..., Path]) -> None:
    class Recording(CpuDevice):
        def __init__(self) -> None:
            super().__init__(asynchronous=True)
            self.kept: list[Tensor] = []

        def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            replay, result = super().capture(run)
            self.kept.append(result)
            return replay, result

    engine = make(tiny(), ahead=True, device=(device := Recording()))
    hidden = engine.runner.model.config.hidden_size
    assert [tuple(t.shape) for t in device.kept] == [(rows, hidden) for rows in reversed(buckets(6))]


def test_buckets_end_at_the_largest_batch() -> None:
    assert buckets(1) == [1]
    assert buckets(6) == [1, 2, 4, 6]
    assert buckets(64) == [1, 2, 4, *range(8, 65, 8)]

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import sampler
from engine.sampler import Sampled, uniform
from engine.sequence import EngineRequest, Sequence
from splitserve.hashing import PrefixHasher
from splitserve.sampling import SamplingParams

VOCAB = 50


def sequence(params: SamplingParams, prompt: tuple[int, ...] = (1,), generated: tuple[int, ...] = ()) -> Sequence:
    request = EngineRequest("r", [*prompt, *generated], params, num_prompt=len(prompt))
    return Sequence.from_request(request, frozenset({49}), 1000, PrefixHasher(b""), loads=False)


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled | None]:
    return sampler.sample(logits, sequences, lambda rows: rows.argmax(dim=-1))


def one(logits: torch.Tensor, params: SamplingParams, **more: tuple[int, ...]) -> int:
    result = sample(logits.unsqueeze(0), [sequence(params, **more)])[0]
    assert result is not None
    return result[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def drawn(logits: torch.Tensor, count: int = 400, **options: float) -> Counter[int]:
    return Counter(one(logits, SamplingParams(seed=s, **options)) for s in range(count))  # type: ignore[arg-type]


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_uniform_numbers_lie_in_the_unit_interval(seed: int, index: int) -> None:
    assert 0.0 <= uniform(seed, index) < 1.0
    assert uniform(seed, index) == uniform(seed, index)


def test_uniform_numbers_are_uniform() -> None:
    counts = Counter(int(uniform(seed, index) * 10) for seed in range(100) for index in range(100))
    assert all(850 < counts[i] < 1150 for i in range(10))


def test_greedy_takes_the_most_likely(logits: torch.Tensor) -> None:
    assert one(logits, SamplingParams(temperature=0)) == int(logits.argmax())


def test_samples_follow_the_probabilities(logits: torch.Tensor) -> None:
    counts = drawn(logits, 3000)
    expected = torch.softmax(logits, -1)
    for token in expected.topk(5).indices.tolist():
        assert counts[token] / 3000 == pytest.approx(float(expected[token]), abs=0.04)


def test_top_k_keeps_k_tokens(logits: torch.Tensor) -> None:
    assert set(drawn(logits, top_k=3, temperature=2.0)) == set(logits.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: torch.Tensor) -> None:
    probs, ids = torch.softmax(logits, -1).sort(descending=True)
    kept = int((probs.cumsum(0) < 0.8).sum()) + 1
    assert set(drawn(logits, 600, top_p=0.8)) <= set(ids[:kept].tolist())


def test_top_p_of_a_flat_row_looks_past_the_first_candidates() -> None:
    flat = torch.zeros(2000)
    assert len({one(flat, SamplingParams(seed=s, top_p=0.99)) for s in range(300)}) > 250


def test_min_p_drops_what_is_much_less_likely(logits: torch.Tensor) -> None:
    probs = torch.softmax(logits, -1)
    allowed = set((probs >= 0.2 * probs.max()).nonzero().flatten().tolist())
    assert set(drawn(logits, min_p=0.2)) <= allowed


def test_logit_bias_can_force_a_token(logits: torch.Tensor) -> None:
    assert one(logits, SamplingParams(temperature=0, logit_bias={7: 100.0})) == 7


def test_frequency_penalty_counts_generated_tokens_only() -> None:
    logits = torch.tensor([2.0, 1.5, 0.0])
    params = SamplingParams(temperature=0, frequency_penalty=0.4)
    assert one(logits, params, prompt=(0, 0, 0)) == 0
    assert one(logits, params, generated=(0,)) == 0
    assert one(logits, params, generated=(0, 0)) == 1


def test_presence_penalty_counts_once() -> None:
    logits = torch.tensor([2.0, 1.5, 0.0])
    params = SamplingParams(temperature=0, presence_penalty=0.4)
    assert one(logits, params, generated=(0, 0, 0)) == 0


def test_repetition_penalty_sees_the_prompt() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert one(logits, SamplingParams(temperature=0, repetition_penalty=2.0), prompt=(0,)) == 1


def test_a_row_that_is_not_finite_fails_alone(logits: torch.Tensor) -> None:
    rows = torch.stack([logits, torch.full_like(logits, float("nan")), logits])
    results = sample(rows, [sequence(SamplingParams(temperature=0))] * 3)
    assert results[1] is None and results[0] == results[2] and results[0] is not None


def test_logprobs_are_of_the_raw_distribution(logits: torch.Tensor) -> None:
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={7: 100.0})
    result = sample(logits.unsqueeze(0), [sequence(params)])[0]
    assert result is not None and result[1] is not None
    log_probs = torch.log_softmax(logits, -1)
    assert result[1].logprob == pytest.approx(float(log_probs[7]))
    assert result[1].rank == int((log_probs > log_probs[7]).sum()) + 1
    assert [t for t, _ in result[1].top] == logits.topk(2).indices.tolist()


def test_batch_mates_change_nothing(logits: torch.Tensor) -> None:
    params = SamplingParams(seed=5, top_p=0.7, temperature=1.3)
    crowd = [sequence(SamplingParams(seed=s)) for s in range(6)]
    together = sample(logits.repeat(7, 1), [*crowd[:3], sequence(params), *crowd[3:]])[3]
    assert together is not None and together[0] == one(logits, params)


@pytest.mark.parametrize(
    "params, held_back",
    [
        (SamplingParams(min_tokens=3), True),
        (SamplingParams(min_tokens=3, ignore_eos=True), False),
        (SamplingParams(min_tokens=3, ignore_eos=True, stop_token_ids=(7,)), True),
        (SamplingParams(min_tokens=0), False),
    ],
)
def test_min_tokens_changes_logits_only_where_a_token_could_end_the_answer(
    params: SamplingParams, held_back: bool
) -> None:
    assert sampler.drawable(sequence(params)) is not held_back

"""Turns logits into tokens: penalties, filters, and random numbers that only seed and position decide.

Knows rows of logits and the sequences they belong to. A row's random number is a hash of (seed, index of the
token in the answer), so batch mates, preemption, migration and the choice of worker never change a seeded
answer. One inverse-CDF draw per token, in vocabulary order.

Invariant: a row whose logits are not finite gives None and leaves the other rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sequence import Sequence
from splitserve.sampling import Logprobs

Sampled = tuple[int, Logprobs | None]

_CANDIDATES = 256  # rows rarely need more for top-p; those that do are sorted whole
_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from (seed, index): two rounds of SplitMix64 (Steele et al., OOPSLA 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + index + 1) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def sample(
    logits: Tensor, sequences: SequenceOf[Sequence], argmax: Callable[[Tensor], Tensor]
) -> list[Sampled | None]:
    """One token for each row of ``logits [rows, vocab]`` (any float dtype); None where a row is not finite.
    ``argmax``: as `kernels.Kernels.argmax`."""
    raw = logits.float()
    greedy_rows = [i for i, s in enumerate(sequences) if _is_plain(s)]
    tokens = argmax(raw)
    finite = torch.isfinite(raw.gather(1, tokens.unsqueeze(1)).squeeze(1)).tolist()
    chosen: list[int] = tokens.tolist()
    if len(greedy_rows) < len(sequences):
        plain = set(greedy_rows)
        rows = [i for i in range(len(sequences)) if i not in plain and finite[i]]
        if rows:
            picked = [sequences[i] for i in rows]
            drawn = _draw(_adjust(raw[rows], picked), picked, argmax)
            for i, token in zip(rows, drawn, strict=True):
                chosen[i] = token
    return [
        (token, token_logprobs(raw[i], token, s.params.logprobs) if s.params.logprobs is not None else None)
        if ok
        else None
        for i, (s, token, ok) in enumerate(zip(sequences, chosen, finite, strict=True))
    ]


def drawable(sequence: Sequence) -> bool:
    """Whether a token can be drawn from the logits and `numbers` alone, without what was generated before."""
    return sequence.params.logprobs is None and not _adjusted(sequence)


def numbers(sequences: SequenceOf[Sequence]) -> list[NDArray[np.generic]]:
    """The fields of `kernels.SampleParams` for drawable sequences, whose last token may still be under way."""
    params = [s.params for s in sequences]
    return [
        np.array([0.0 if p.greedy else p.temperature for p in params], np.float32),
        np.array([p.top_k for p in params], np.int32),
        np.array([p.top_p for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
        np.array([uniform(s.seed, s.num_generated + s.pending) for s in sequences], np.float64),
    ]


def token_logprobs(logits: Tensor, token: int, top: int) -> Logprobs:
    """Log probability and rank of ``token`` and the ``top`` most likely ones; ``logits [vocab]``."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    own = log_probs[token]
    rank = int((log_probs > own).sum()) + 1
    values, ids = log_probs.topk(top)
    return Logprobs(float(own), rank, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _is_plain(sequence: Sequence) -> bool:
    """Whether the most likely token of the raw logits is the answer."""
    return sequence.params.greedy and not _adjusted(sequence)


def _adjusted(sequence: Sequence) -> bool:
    """Whether `_adjust` changes the row."""
    p = sequence.params
    return bool(
        p.logit_bias
        or p.presence_penalty
        or p.frequency_penalty
        or p.repetition_penalty != 1.0
        or (sequence.num_generated + sequence.pending < p.min_tokens and _ends(sequence))
    )


def _ends(sequence: Sequence) -> list[int]:
    """Tokens that would end the answer."""
    p = sequence.params
    return [*p.stop_token_ids, *(() if p.ignore_eos else sequence.eos_ids)]


def _adjust(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """Penalties (as OpenAI defines presence and frequency, CTRL the repetition), bias, min_tokens."""
    for row, sequence in zip(logits, sequences, strict=True):
        p = sequence.params
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(sequence.tokens)), dtype=torch.int64, device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if sequence.counts and (p.presence_penalty or p.frequency_penalty):
            ids = torch.tensor(list(sequence.counts), dtype=torch.int64, device=row.device)
            counts = torch.tensor(list(sequence.counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= p.presence_penalty + p.frequency_penalty * counts
        for token, bias in p.logit_bias.items():
            row[token] += bias
        if sequence.num_generated < p.min_tokens:
            row[[t for t in _ends(sequence) if t < row.shape[0]]] = float("-inf")
    return logits


def _draw(logits: Tensor, sequences: SequenceOf[Sequence], argmax: Callable[[Tensor], Tensor]) -> list[int]:
    """Greedy rows take the largest; the others are scaled, filtered (top-k, top-p, min-p) and drawn."""
    rows = [i for i, s in enumerate(sequences) if not s.params.greedy]
    tokens: list[int] = argmax(logits).tolist() if len(rows) < len(sequences) else [0] * len(rows)
    if not rows:
        return tokens
    params = [sequences[i].params for i in rows]
    logits = logits[rows] / torch.tensor([p.temperature for p in params], device=logits.device).unsqueeze(1)
    floor = torch.stack([_floor(row, p.top_k, p.top_p, p.min_p) for row, p in zip(logits, params, strict=True)])
    weights = torch.softmax(logits.masked_fill(logits < floor.unsqueeze(1), float("-inf")), dim=-1)
    cumulative = weights.double().cumsum(dim=-1)
    points = torch.tensor(
        [uniform(s.seed, s.num_generated) for s in (sequences[i] for i in rows)],
        dtype=torch.float64,
    ).to(logits.device)
    targets = (points * cumulative[:, -1]).unsqueeze(1)
    drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    for i, token in zip(rows, drawn.clamp(max=logits.shape[1] - 1).tolist(), strict=True):
        tokens[i] = token
    return tokens


def _floor(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The smallest logit of one row that the filters keep; ties with it are kept too."""
    vocab = logits.shape[0]
    floor = torch.tensor(float("-inf"), device=logits.device)
    if min_p > 0.0:
        floor = logits.max() + torch.log(torch.tensor(min_p, device=logits.device))
    if 0 < top_k < vocab:
        values = logits.topk(top_k).values
        floor = torch.maximum(floor, values[-1])
    if top_p < 1.0:
        log_total = torch.logsumexp(logits.masked_fill(logits < floor, float("-inf")), dim=-1)
        for count in (min(_CANDIDATES, vocab), vocab):
            values = logits.topk(count).values
            values = values[values >= floor]
            mass = torch.exp(values - log_total).cumsum(dim=-1)
            if count == vocab or mass[-1] >= top_p:
                break
        keep = int((mass < top_p).sum())  # the one that reaches top_p is kept too
        floor = torch.maximum(floor, values[min(keep, len(values) - 1)])
    return floor

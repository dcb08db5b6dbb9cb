"""The same shape with random weights in transformers, on the same GPU: ``generate`` and continuous batching."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.measure import Bench, Line, synchronize
from bench.gpu.scale import Scale

SHORT, LONG = 8, 40  # tokens of two calls: their difference is decoding alone


def generate(bench: Bench) -> Iterator[Line]:
    """Tokens a second of greedy decoding against our engine's in the same call."""
    model = _model(bench)
    for sequences in bench.scale.step_sequences:
        ids = torch.randint(5, bench.scale.model.vocab_size, (sequences, bench.scale.step_context))
        ids, mask = ids.to(bench.device), torch.ones_like(ids).to(bench.device)

        def run(tokens: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

        yield _line(bench, "transformers generate", sequences, _decoding(run))


def continuous(bench: Bench) -> Iterator[Line]:
    """The same by ``generate_batch``."""
    if bench.device.type != "cuda":
        yield Line("transformers continuous batching", "not on a CPU: it takes all of its memory")
        return
    from transformers import GenerationConfig

    model = _model(bench)
    for sequences in bench.scale.step_sequences:
        prompts = torch.randint(5, bench.scale.model.vocab_size, (sequences, bench.scale.step_context)).tolist()

        def run(tokens: int, prompts: list[list[int]] = prompts) -> None:
            config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
            done = model.generate_batch(prompts, generation_config=config)
            assert all(len(output.generated_tokens) == tokens for output in done.values())

        yield _line(bench, "transformers continuous batching", sequences, _decoding(run))


def _model(bench: Bench) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(bench.device):
        model = LlamaForCausalLM._from_config(_config(bench.scale, LlamaConfig), dtype=bench.scale.dtype)
    return model.eval()


def _config(scale: Scale, kind: Any) -> Any:
    m = scale.model
    return kind(
        vocab_size=m.vocab_size, hidden_size=m.hidden_size, intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim, max_position_embeddings=m.max_position, rms_norm_eps=m.rms_norm_eps,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _decoding(run: Any) -> float:
    """Seconds of one decode step: of a long call less those of a short one."""
    times = []
    run(SHORT)
    for tokens in (SHORT, LONG):
        synchronize()
        start = time.perf_counter()
        run(tokens)
        synchronize()
        times.append(time.perf_counter() - start)
    return max(1e-9, (times[1] - times[0]) / (LONG - SHORT))


def _line(bench: Bench, name: str, sequences: int, step: float) -> Line:
    ours = bench.results.get(f"decode {sequences}")
    ratio = None if ours is None else ours * step / sequences
    return Line(f"decode, {sequences} sequences / {name}", f"theirs {sequences / step:.0f} tokens/s", ratio, 2.0)

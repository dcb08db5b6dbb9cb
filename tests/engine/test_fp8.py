"""fp8 weights: rounded at load, and from checkpoints that hold them (compressed-tensors)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams, open_model
from kernels.fp8 import quantize_channels
from splitserve.errors import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
OPTIONS: dict[str, Any] = {"dtype": "float32", "kernels": "reference", "kv_cache_memory": 1 << 20, "threads": 1}
SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}


@pytest.fixture
def checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """The tiny model with the weights of its linear layers in fp8."""
    path = tmp_path / "fp8"
    shutil.copytree(tiny(), path)
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], scales = quantize_channels(tensor)
            tensors[f"{name}_scale"] = scales.unsqueeze(1)
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")
    rewrite(path, SCHEME)
    return path


def rewrite(path: Path, scheme: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))


def tokens(llm: LLM) -> list[list[int]]:
    return [c.tokens for c in llm.generate([[1, 2, 3], [7] * 40], GREEDY)]


def test_an_fp8_checkpoint_answers_as_weights_rounded_at_load(checkpoint: Path, tiny: Callable[..., Path]) -> None:
    stored, rounded = LLM(str(checkpoint), **OPTIONS), LLM(str(tiny()), quantization="fp8", **OPTIONS)
    assert tokens(stored) == tokens(rounded)


def test_fp8_weights_have_their_own_fingerprint(tiny: Callable[..., Path]) -> None:
    plain, rounded = LLM(str(tiny()), **OPTIONS), LLM(str(tiny()), quantization="fp8", **OPTIONS)
    assert plain.engine.runner.fingerprint != rounded.engine.runner.fingerprint


def test_a_scale_for_the_whole_weight_counts_for_each_output(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = [n for n in tensors if n.endswith("_scale")]
    for name in names:
        tensors[name] = torch.full((1,), 0.01)
    save_file(tensors, checkpoint / "model.safetensors")
    assert all(tokens(LLM(str(checkpoint), **OPTIONS)))


def change(path: Path, function: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    function(tensors)
    save_file(tensors, path / "model.safetensors")


def unrounded(tensors: dict[str, torch.Tensor], *names: str) -> None:
    """Leaves layers out of the rounding."""
    for name in [n for n in tensors if n.endswith(names)]:
        tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale")


def test_layers_that_a_checkpoint_leaves_out_are_not_rounded(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: unrounded(tensors, "_proj.weight"))
    left_out = LLM(str(checkpoint), **OPTIONS)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    plain = LLM(str(checkpoint), **OPTIONS)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    [one], [other] = (llm.generate([[7] * 40], params) for llm in (left_out, plain))
    assert one.logprobs and one.logprobs == other.logprobs  # where tokens may be equal by chance


def test_layers_that_are_computed_as_one_are_rounded_alike(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: unrounded(tensors, "0.self_attn.k_proj.weight"))
    with pytest.raises(ConfigError, match=r"k_proj, .*v_proj the checkpoint holds some in fp8 and some not"):
        LLM(str(checkpoint), **OPTIONS)


def test_an_embedding_in_fp8_is_read_with_its_scale(checkpoint: Path) -> None:
    name = "model.embed_tokens.weight"

    def round_it(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name], scales = quantize_channels(tensors[name])
        tensors[f"{name}_scale"] = scales.unsqueeze(1)

    before = open_model(checkpoint).tensor(name, torch.float32)
    change(checkpoint, round_it)
    after = open_model(checkpoint).tensor(name, torch.float32)
    assert torch.allclose(after, before, rtol=2**-4, atol=1e-3)
    assert all(tokens(LLM(str(checkpoint), **OPTIONS)))


def test_an_fp8_weight_without_a_scale_is_refused(checkpoint: Path) -> None:
    change(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight_scale"))
    with pytest.raises(ConfigError, match=r"weight is torch.float8_e4m3fn without a scale"):
        LLM(str(checkpoint), **OPTIONS)


def test_an_fp8_checkpoint_is_not_rounded_again(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="fp8, --quantization asks for int8"):
        LLM(str(checkpoint), quantization="int8", **OPTIONS)


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {
            **SCHEME,
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
        },
    ],
)
def test_other_schemes_are_refused_by_name(checkpoint: Path, scheme: dict[str, Any]) -> None:
    rewrite(checkpoint, scheme)
    with pytest.raises(ConfigError, match=f"quantised as {scheme['quant_method']}"):
        LLM(str(checkpoint), **OPTIONS)

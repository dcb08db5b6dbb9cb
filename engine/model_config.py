"""The shape of a model, read from a Hugging Face ``config.json`` or from GGUF metadata.

Knows names of fields in both formats and nothing of weights. Only architectures of the Llama family are
accepted here; anything else is a ConfigError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitserve.errors import ConfigError

# architecture -> whether q, k and v have biases, and q and k norms, where the config does not say
_HF_ARCHITECTURES = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}
_GGUF_ARCHITECTURES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family: RMS norms, rotary positions, gated MLP, grouped-query attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    window: int | None = None  # tokens that a row attends to, its own included; None: all
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_p, top_k, …
    quantization: str | None = None  # of the weights as stored: "fp8"


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """From the contents of ``config.json`` and ``generation_config.json``."""
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in _HF_ARCHITECTURES:
        raise ConfigError(
            f"architecture {architecture} is not supported; supported are {', '.join(_HF_ARCHITECTURES)}"
        )
    qkv_bias, qk_norm = _HF_ARCHITECTURES[architecture]
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    attention_bias = bool(config.get("attention_bias", False))
    max_position = int(config["max_position_embeddings"])
    window = int(config.get("sliding_window") or 0) or None
    if architecture != "MistralForCausalLM":
        if window and config.get("use_sliding_window"):  # in some layers only: within it, all attention is full
            max_position = min(max_position, window)
        window = None
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=int(config["intermediate_size"]),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        max_position=max_position,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias or attention_bias,
        output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=qk_norm,
        window=window,
        rope_scaling=rope,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        generation_defaults=_sampling_defaults(generation),
        quantization=_stored_quantization(config.get("quantization_config") or {}),
    )


def from_gguf(fields: Mapping[str, Any], vocab_size: int, tensors: frozenset[str]) -> ModelConfig:
    """From GGUF metadata, the number of tokens in it, and the names of the file's tensors."""
    name = str(fields["general.architecture"])
    if name not in _GGUF_ARCHITECTURES:
        raise ConfigError(
            f"GGUF architecture {name} is not supported; supported are {', '.join(_GGUF_ARCHITECTURES)}"
        )
    qkv_bias, qk_norm = _GGUF_ARCHITECTURES[name]

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{name}.{key}", default)
        if value is None:
            raise ConfigError(f"the GGUF file lacks {name}.{key}")
        return value

    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    scaling: dict[str, Any] = {}
    if (kind := fields.get(f"{name}.rope.scaling.type", "none")) != "none":
        scaling = {"rope_type": kind, "factor": float(get("rope.scaling.factor"))}
        if original := fields.get(f"{name}.rope.scaling.original_context_length"):
            scaling["original_max_position_embeddings"] = int(original)
    eos = [fields.get("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")]
    return ModelConfig(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=int(get("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=int(get("attention.key_length", hidden // heads)),
        intermediate_size=int(get("feed_forward_length")),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        max_position=int(get("context_length")),
        tied_embeddings="output.weight" not in tensors,
        qkv_bias=qkv_bias or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm=qk_norm,
        rope_scaling=scaling,
        eos_token_ids=tuple(dict.fromkeys(int(t) for t in eos if t is not None)),
    )


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: generation[name] for name in names if generation.get(name) is not None}


def _stored_quantization(found: Mapping[str, Any]) -> str | None:
    """compressed-tensors: fp8 weights with a scale for each output or tensor, activations rounded as they come."""
    if not found:
        return None
    groups = list((found.get("config_groups") or {}).values())
    if found.get("quant_method") == "compressed-tensors" and groups and all(map(_is_dynamic_fp8, groups)):
        return "fp8"
    raise ConfigError(
        f"checkpoints quantised as {found.get('quant_method')} {found.get('format', '')} are not supported; use "
        "fp8 of compressed-tensors with dynamic activations for each token, the unquantised model, or GGUF"
    )


def _is_dynamic_fp8(group: Mapping[str, Any]) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    return (
        (weights.get("type"), weights.get("num_bits")) == ("float", 8)
        and weights.get("strategy") in ("channel", "tensor")
        and (inputs.get("type"), inputs.get("num_bits")) == ("float", 8)
        and inputs.get("strategy") == "token"
        and bool(inputs.get("dynamic"))
    )

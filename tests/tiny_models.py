"""Tiny models with random weights, of every family, as directories that ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 320
BOS, EOS = 256, 257
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama3": LlamaConfig(**_SHAPE, head_dim=32, rope_parameters=_LLAMA3_ROPE),
    "llama-linear": LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama-bias": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**_SHAPE, sliding_window=40),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=32),
    "qwen3-yarn": Qwen3Config(**_SHAPE, head_dim=16, rope_parameters=_YARN_ROPE),
}


def make_tiny(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Writes the model below ``directory``; the same seed gives the same weights."""
    path = directory / f"tiny-{family}-{seed}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # all zeros or ones would hide mistakes
            torch.nn.init.uniform_(weight.data, 0.5, 1.5)
    model.save_pretrained(path)
    _tokenizer().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def _tokenizer() -> Tokenizer:
    """Bytes and a few special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *(f"<extra_{i}>" for i in range(VOCAB - 258))])
    return tokenizer

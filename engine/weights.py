"""Reads models from disk: configuration, weights and tokenizer, from safetensors directories or GGUF files.

Weights come out under Hugging Face names whatever the file calls them. Knows no model classes and keeps no
tensor. Never unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.dequantized import dequantized
from engine.gguf_file import GgufDirectory
from engine.model_config import ModelConfig, from_gguf, from_hf
from splitserve.errors import ConfigError
from splitserve.models import cache_dir

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 1 << 20


class ModelFiles(Protocol):
    """A model on disk."""

    config: ModelConfig

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """The weight with this Hugging Face name."""
        ...

    def optional(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The same, or None where the model has no such weight."""
        ...

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The weight as float8 ``[N, K]`` with float32 scales ``[N]``, where the file holds it so."""
        ...

    def digest(self) -> str:
        """Names the weights: over the size and the first and last MiB of each weight file."""
        ...

    def tokenizer(self) -> tuple[str, str, dict[str, str]]:
        """``tokenizer.json``, the chat template ("" if none) and the named special tokens."""
        ...


def open_model(path: Path) -> ModelFiles:
    """Raises ConfigError if the files are not those of a model that can be served."""
    try:
        return GgufFile(path) if path.is_file() else SafetensorsDirectory(path)
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise ConfigError(f"{path} can't be read as a model: {error!r}") from error


class SafetensorsDirectory:
    """A directory as ``save_pretrained`` writes it."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._path = path
        self.config = from_hf(_json(path / "config.json"), _json(path / "generation_config.json"))
        self._files = sorted(path.glob("*.safetensors"))
        self._open: list[Any] = [safe_open(file, framework="pt") for file in self._files]
        self._where = {name: handle for handle in self._open for name in handle.keys()}  # noqa: SIM118

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        found = self.optional(name, dtype)
        if found is None:
            raise ConfigError(f"{self._path} lacks the weight {name}")
        return found

    def optional(self, name: str, dtype: torch.dtype) -> Tensor | None:
        handle = self._where.get(name)
        if handle is None:
            return None
        if (stored := self.fp8(name)) is not None:
            weight, scales = stored
            return (weight.float() * scales.unsqueeze(1)).to(dtype)
        tensor: Tensor = handle.get_tensor(name)
        if tensor.dtype.itemsize == 1:
            raise ConfigError(f"{self._path}: {name} is {tensor.dtype} without a scale")
        return tensor.to(dtype)

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        handle = self._where.get(name)
        if handle is None or f"{name}_scale" not in self._where:
            return None
        weight: Tensor = handle.get_tensor(name)
        scales = self.tensor(f"{name}_scale", torch.float32).flatten()
        if weight.dtype is not torch.float8_e4m3fn or scales.numel() not in (1, weight.shape[0]):
            raise ConfigError(f"{self._path}: {name} is no fp8 weight with a scale for each output")
        return weight, scales.expand(weight.shape[0]).contiguous()

    def digest(self) -> str:
        return _digest(self._files)

    def tokenizer(self) -> tuple[str, str, dict[str, str]]:
        settings = _json(self._path / "tokenizer_config.json")
        template = settings.get("chat_template") or ""
        if isinstance(template, list):
            template = next((t["template"] for t in template if t["name"] == "default"), "")
        with suppress(FileNotFoundError):
            template = (self._path / "chat_template.jinja").read_text()
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, dict | str)
        }
        file = self._path / "tokenizer.json"
        return (file.read_text() if file.is_file() else _converted(self._path, None), template, special)


class GgufFile:
    """A ``.gguf`` file; quantised weights are dequantised as they are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = GgufDirectory(path)
        self._fields = self._file.fields
        self._tokens = self._file.large.get(_VOCABULARY)
        size = len(self._fields[_VOCABULARY]) if self._tokens is None else self._tokens.count
        self.config = from_gguf(self._fields, size, frozenset(self._file.tensors))

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        found = self.optional(name, dtype)
        if found is None:
            raise ConfigError(f"{self._path.name} lacks the weight {name}")
        return found

    def optional(self, name: str, dtype: torch.dtype) -> Tensor | None:
        tensor = self._file.tensors.get(_gguf_name(name))
        if tensor is None:
            return None
        try:
            weight = dequantized(self._file, tensor, dtype)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigError(f"{self._path.name}: the weight {name} can't be read: {error!r}") from error
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if heads and self.config.architecture == "llama":
            weight = _deinterleave(weight, heads)
        return weight

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        return None

    def digest(self) -> str:
        return _digest([self._path])

    def _token(self, index: int) -> str:
        if self._tokens is None:
            return str(self._fields[_VOCABULARY][index])
        return self._file.string(self._tokens, index)

    def tokenizer(self) -> tuple[str, str, dict[str, str]]:
        special = {
            f"{kind}_token": self._token(index)
            for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if (index := self._fields.get(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        kept = cache_dir() / "tokenizers" / f"{self.digest()}.json"
        if kept.is_file():
            text = kept.read_text()
        else:
            text = _converted(self._path.parent, self._path.name)
            _keep(kept, text)
        return text, str(self._fields.get("tokenizer.chat_template", "")), special


def _keep(path: Path, text: str) -> None:
    """Writes a cache file; where that is not allowed, the next start is slower and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
            scratch.write(text)
        Path(scratch.name).replace(path)
    except OSError as error:
        log.warning("the tokenizer could not be kept in %s: %s", path.parent, error)


def _converted(directory: Path, gguf_file: str | None) -> str:
    """``tokenizer.json`` made by transformers from another format. Slow (seconds), so callers keep it."""
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **options)
    return str(tokenizer.backend_tokenizer.to_str())


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return _GGUF_GLOBAL.get(name, name)
    _model, _layers, index, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{_GGUF_LAYER.get(module, module)}.{kind}"


def _deinterleave(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's order of rotary pairs (neighbours) for halves: rows of each head."""
    rows = weight.shape[0]
    return weight.view(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _digest(files: list[Path]) -> str:
    state = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as handle:
            state.update(size.to_bytes(8, "little") + handle.read(_SAMPLE_BYTES))
            handle.seek(max(0, size - _SAMPLE_BYTES))
            state.update(handle.read(_SAMPLE_BYTES))
    return state.hexdigest()


def _json(path: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


_VOCABULARY = "tokenizer.ggml.tokens"
_GGUF_GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "rope_factors": "rope_freqs.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

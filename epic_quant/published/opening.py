"""A published file by its path, recognised by what it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, ConfigError, unknown
from epic_quant.files import user_path
from epic_quant.published import compressed_tensors, gemma, gguf, mlx
from epic_quant.published.source import PublishedFile

_METHODS = {compressed_tensors.METHOD: compressed_tensors.read, gemma.METHOD: gemma.read}


def open_published(source: str) -> PublishedFile:
    """Open a GGUF file, or a folder or hub id in the local cache in the format of compressed-tensors, `gemma` or MLX.

    Headers are read once, and again where the file or folder has changed. Raises CheckpointError for what is not
    there, is damaged, or is in a format unknown here, and ConfigError for a folder without a readable config.json.
    """
    return _opened(source, _state(user_path(source)))


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the file, or of the files in the folder; nothing where there is none, as for a hub id."""
    if not os.path.exists(path):
        return ()
    try:
        files = sorted(path.iterdir()) if os.path.isdir(path) else [path]
        return tuple(
            (file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if os.path.exists(file)
        )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


@lru_cache(maxsize=32)
def _opened(source: str, _state: tuple[tuple[str, int, int], ...]) -> PublishedFile:
    path = user_path(source)
    if os.path.isfile(path):
        with path.open("rb") as file:
            if file.read(len(gguf.MAGIC)) == gguf.MAGIC:
                return gguf.read(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{source}: no GGUF file; expected one, or a folder of .safetensors files")
    if os.path.isdir(path) and (found := sorted(path.glob("*.gguf"))) and not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{source}: a folder of GGUF files; name one of them, as {found[0]}")
    checkpoint = Checkpoint.open(source)
    config = checkpoint.config_json
    method = config.get("quantization_config")
    if isinstance(method, Mapping) and "quant_method" in method:
        name = str(method["quant_method"])
        if name not in _METHODS:
            raise CheckpointError(f"{source}: {unknown('quantization method', name, _METHODS)}")
        return _METHODS[name](checkpoint, method)
    quantization = config.get("quantization")
    if isinstance(quantization, Mapping):
        return mlx.read(checkpoint, quantization)
    raise ConfigError(f"{source}: its config.json names no quantization; expected quantization_config, or MLX's")

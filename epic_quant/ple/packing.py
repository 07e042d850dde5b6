"""Rows as the bytes they are kept in: those of the file, or packed by a quantizer, the scales behind the codes.

A packed table is a .safetensors file with one uint8 matrix, so that a row, its scales included, is one read.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from epic_quant.checkpoint import Checkpoint, TensorLocation
from epic_quant.errors import CheckpointError, ConfigError, QuantizationError, SpecError
from epic_quant.gemma4.config import TextConfig
from epic_quant.quant import QuantizedTensor, Quantizer, quantizer
from epic_quant.quant.scheme import SCALE_DTYPE

UNPACKED = "bf16"
PACKED_NAME = "embed_tokens_per_layer.packed"
_TABLE_NAME = "embed_tokens_per_layer.weight"
_CHUNK_NBYTES = 2**26


@dataclass(frozen=True)
class Table:
    """The PLE table of a checkpoint: its name in the file and how a row is cut into layers."""

    checkpoint: Checkpoint
    name: str
    num_layers: int
    dim: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Table:
        """Find it. Raises CheckpointError where there is none, ConfigError where it is not as the config says."""
        config = TextConfig.read(checkpoint)
        if not config.ple_dim:
            raise ConfigError(f"{checkpoint.source}: this model has no per-layer embeddings")
        names = [name for name in checkpoint.names if name.endswith(_TABLE_NAME)]
        if len(names) != 1:
            raise CheckpointError(f"{checkpoint.source}: {len(names)} tensors named {_TABLE_NAME}, expected one")
        shape, expected = checkpoint.shape(names[0]), (config.ple_vocab_size, config.num_layers * config.ple_dim)
        if shape != expected:
            raise ConfigError(
                f"{checkpoint.source}: {names[0]} is {list(shape)}, but {config.num_layers} layers of {config.ple_dim} "
                f"for {config.ple_vocab_size} ids make it {list(expected)}"
            )
        return cls(checkpoint, names[0], config.num_layers, config.ple_dim)

    @property
    def location(self) -> TensorLocation:
        """Where its bytes lie."""
        return self.checkpoint.location(self.name)

    @property
    def num_rows(self) -> int:
        """Ids that it has."""
        return self.location.shape[0]

    @property
    def cols(self) -> int:
        """Weights of a row."""
        return self.location.shape[1]


class RowFormat(Protocol):
    """How a row's weights become the bytes that are kept."""

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        ...

    def encode(self, weights: Tensor) -> Tensor:
        """Weights [n, cols] to uint8 [n, row_nbytes]."""
        ...

    def decode(self, rows: Tensor) -> Tensor:
        """The inverse, as near as the format allows."""
        ...


@dataclass(frozen=True)
class PlainRows:
    """The bytes of the file itself."""

    dtype: torch.dtype
    cols: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self.cols * self.dtype.itemsize

    def encode(self, weights: Tensor) -> Tensor:
        """Weights [n, cols] to uint8 [n, row_nbytes]: the same bytes."""
        return weights.view(torch.uint8)

    def decode(self, rows: Tensor) -> Tensor:
        """The same bits in the file's dtype."""
        return rows.view(self.dtype)


@dataclass(frozen=True)
class PackedRows:
    """A quantizer's codes, and its fp16 scales behind them. `quantizer` is one that has fitted itself to the row."""

    quantizer: Quantizer
    cols: int

    @classmethod
    def of(cls, spec: str, cols: int) -> PackedRows:
        """The format of a spec. Raises SpecError for one that needs Hessians, which a table has not."""
        scheme = quantizer(spec)
        if scheme.gptq:
            raise SpecError(f"{spec}: a table that is looked up has no inputs to take Hessians of; leave out +gptq")
        # What the spec makes of rows of this width, such as the Hadamard block that fits, is known by doing it.
        return cls(scheme.quantize(torch.zeros(1, cols)).quantizer, cols)

    @cached_property
    def _codes_nbytes(self) -> int:
        return self.quantizer.quantize(torch.zeros(1, self.cols)).packed.nbytes

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self.quantizer.quantize(torch.zeros(1, self.cols)).nbytes

    def encode(self, weights: Tensor) -> Tensor:
        """Weights [n, cols] to uint8 [n, row_nbytes]; raises QuantizationError where one is not finite."""
        quantized = self.quantizer.quantize(weights)
        return torch.cat([quantized.packed, quantized.scale.view(torch.uint8)], dim=1)

    def decode(self, rows: Tensor) -> Tensor:
        """Weights [n, cols] in fp32."""
        codes, scale = rows.split([self._codes_nbytes, self.row_nbytes - self._codes_nbytes], dim=1)
        # contiguous() does nothing for a single row, whose scales may then begin at an odd byte.
        scale = scale.clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE)
        return QuantizedTensor(codes.contiguous(), scale, self.cols, self.quantizer).dequantize()


def pack_table(checkpoint: Checkpoint, spec: str, path: str | Path) -> Path:
    """Quantize the PLE table into a file of its own, for `PLERowCache(…, packed=path)`; done once, a part at a time.

    The file names its spec and the fingerprint of its checkpoint, and is written beside its place and renamed.
    Raises QuantizationError, naming the row, where a weight is not finite, and what `Table.of` and `PackedRows.of` do.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a packed table is a .safetensors file, so its name must end that way")
    table = Table.of(checkpoint)
    rows_format = PackedRows.of(spec, table.cols)
    header = {
        "__metadata__": {
            "spec": rows_format.quantizer.spec,
            "cols": str(table.cols),
            "fingerprint": checkpoint.fingerprint,
        },
        PACKED_NAME: {
            "dtype": "U8",
            "shape": [table.num_rows, rows_format.row_nbytes],
            "data_offsets": [0, table.num_rows * rows_format.row_nbytes],
        },
    }
    weights = checkpoint.tensor(table.name)
    step = max(1, _CHUNK_NBYTES // (4 * table.cols))
    try:
        with tempfile.TemporaryDirectory(prefix=".pack-", dir=path.parent) as beside:
            made = Path(beside, path.name)
            with made.open("wb") as file:
                text = json.dumps(header).encode()
                text = text.ljust(-(-len(text) // 8) * 8)
                file.write(len(text).to_bytes(8, "little") + text)
                for start in range(0, table.num_rows, step):
                    try:
                        file.write(rows_format.encode(weights[start : start + step]).numpy().data)
                    except QuantizationError as error:
                        raise QuantizationError(f"{table.name}, rows from {start} on: {error}") from error
            os.replace(made, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def open_packed(path: str | Path, table: Table) -> tuple[Checkpoint, PackedRows]:
    """A packed table and its format. Raises CheckpointError where it is none, or not of this checkpoint."""
    packed = Checkpoint.open(path)
    location = packed.location(PACKED_NAME)
    with safe_open(location.path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("fingerprint") != table.checkpoint.fingerprint or metadata.get("cols") != str(table.cols):
        raise CheckpointError(
            f"{path}: packed from another checkpoint ({metadata.get('fingerprint')}); "
            f"{table.checkpoint.source} has the fingerprint {table.checkpoint.fingerprint}"
        )
    rows_format = PackedRows.of(metadata.get("spec", ""), table.cols)
    if location.shape != (table.num_rows, rows_format.row_nbytes) or location.dtype != torch.uint8:
        raise CheckpointError(
            f"{path}: a packed table of {list(location.shape)}, "
            f"expected {[table.num_rows, rows_format.row_nbytes]} for {rows_format.quantizer.spec}"
        )
    return packed, rows_format

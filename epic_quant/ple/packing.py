"""Rows as the bytes they are kept in: those of the file, or what a storage format keeps of them.

A packed table is a .safetensors file with one uint8 matrix, so that a row, its scales included, is one read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from epic_quant.checkpoint import Checkpoint, TensorLocation, dtype_name
from epic_quant.errors import CheckpointError, ConfigError, QuantizationError, SpecError
from epic_quant.files import safetensors_writer
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import FLOATS, PLAIN
from epic_quant.quant import from_tensors, quantize, resolved
from epic_quant.spec import WeightSpec

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
        if (dtype := checkpoint.dtype(names[0])) not in FLOATS:
            raise CheckpointError(f"{checkpoint.source}: {names[0]} is stored as {dtype_name(dtype)}; {PLAIN}")
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
    """All that a format stores of a row, tensor after tensor. `spec` has the Hadamard block that fits the row."""

    spec: WeightSpec
    cols: int

    @classmethod
    def of(cls, spec: WeightSpec, cols: int) -> PackedRows:
        """The rows of a spec. Raises QuantizationError where its group does not divide the row.

        A table that is looked up multiplies no inputs, so there is no Hessian: SpecError for a spec that needs one.
        """
        if spec.needs_hessian:
            raise SpecError(
                f"{spec}: a table that is looked up multiplies no inputs, so it has no Hessian; "
                "leave out +gptq, +yaqa and +imatrix"
            )
        return cls(resolved(spec, cols), cols)

    @cached_property
    def _row(self) -> dict[str, Tensor]:
        """What is stored of one row, found by storing one."""
        return quantize(torch.zeros(1, self.cols), self.spec).tensors()

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return sum(tensor.nbytes for tensor in self._row.values())

    def encode(self, weights: Tensor) -> Tensor:
        """Weights [n, cols] to uint8 [n, row_nbytes]; raises QuantizationError where one is not finite."""
        stored = quantize(weights, self.spec).tensors().values()
        return torch.cat([tensor.view(torch.uint8) for tensor in stored], dim=1)

    def decode(self, rows: Tensor) -> Tensor:
        """Weights [n, cols] in fp32."""
        parts = rows.split([tensor.nbytes for tensor in self._row.values()], dim=1)
        tensors = {
            # contiguous() does nothing for a single row, which may then begin at an odd byte.
            name: part.clone(memory_format=torch.contiguous_format).view(tensor.dtype)
            for (name, tensor), part in zip(self._row.items(), parts, strict=True)
        }
        return from_tensors(self.spec, tensors, (len(rows), self.cols)).dequantize()


def pack_table(checkpoint: Checkpoint, spec: WeightSpec, path: str | Path) -> Path:
    """Quantize the PLE table into a file of its own, for `PLERowCache(…, packed=path)`; done once, a chunk at a time.

    The file names its spec and the fingerprint of its checkpoint; it is there whole, or not at all.
    Raises QuantizationError, naming the row, where a weight is not finite, and what `Table.of` and `PackedRows.of` do.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a packed table is a .safetensors file, so its name must end that way")
    table = Table.of(checkpoint)
    rows_format = PackedRows.of(spec, table.cols)
    tensors = {PACKED_NAME: ("U8", (table.num_rows, rows_format.row_nbytes))}
    metadata = {"spec": str(rows_format.spec), "cols": str(table.cols), "fingerprint": checkpoint.fingerprint}
    weights = checkpoint.tensor(table.name)
    step = max(1, _CHUNK_NBYTES // (4 * table.cols))
    try:
        with safetensors_writer(path, tensors, metadata) as write:
            for start in range(0, table.num_rows, step):
                try:
                    write(rows_format.encode(weights[start : start + step]).numpy().data)
                except QuantizationError as error:
                    raise QuantizationError(f"{table.name}, rows from {start} on: {error}") from error
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
    rows_format = PackedRows.of(WeightSpec.parse(metadata.get("spec", "")), table.cols)
    if location.shape != (table.num_rows, rows_format.row_nbytes) or location.dtype != torch.uint8:
        raise CheckpointError(
            f"{path}: a packed table of {list(location.shape)}, "
            f"expected {[table.num_rows, rows_format.row_nbytes]} for {rows_format.spec}"
        )
    return packed, rows_format

"""A published file's text tensors, as it stores them, and its difference from the checkpoint that it was made of."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epic_quant.errors import CheckpointError, ConfigError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.gguf_metadata import ROPE_FACTORS, metadata, rope_factors
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.gemma4.weights import Weights
from epic_quant.quant import Weight
from epic_quant.quant.stored import row_chunks
from epic_quant.spec import Target, WeightSpec

# Of a value: what one that was rounded to bf16 differs by at most.
_ROUNDING = 2.0**-8
# The same of one that was rounded to fp32.
_FLOAT32 = 2.0**-23
_LARGEST = torch.finfo(torch.float32).max
# Weights that are decoded at a time to be checked: 1 MB in fp32 stays in a core's cache.
_PIECE = 2**18


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a published file: `nbytes` are of all that stands for it, and `read` maps it."""

    shape: tuple[int, ...]
    nbytes: int
    spec: WeightSpec
    read: Callable[[], Weight]


@dataclass(frozen=True)
class PublishedFile:
    """The text tensors of a published file by canonical name, from its headers alone.

    `others` are the names of what is not text, as vision towers; `metadata` is what it states of the model, by the
    keys of `gguf_metadata`. `notes` are lines for people: what engines do with it beside its weights.
    """

    source: str
    kind: str
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over every byte of its files, whatever their names: some seconds for E4B.

        Raises CheckpointError where they cannot be read.
        """
        digests = []
        for path in self.files:
            try:
                with path.open("rb") as file:
                    digests.append(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]

    def check(self, config: TextConfig) -> None:
        """Raise ConfigError where a tensor has another shape than a model of this config, CheckpointError where none.

        So a file of another size of Gemma 4 is refused.
        """
        expected = {tensor.name: tensor for tensor in expected_tensors(config)}
        for name, tensor in expected.items():
            found = self.tensors.get(name)
            if found is None:
                if not tensor.unused:
                    raise CheckpointError(f"{self.source}: no tensor {name}, which the checkpoint has")
            elif found.shape != tensor.shape:
                raise ConfigError(
                    f"{self.source}: {name} is {list(found.shape)}, the checkpoint's {list(tensor.shape)}; is it a "
                    "file of another model?"
                )
        if extra := sorted(self.tensors.keys() - expected.keys()):
            raise ConfigError(f"{self.source}: it has {extra[0]}, which the checkpoint has not; is it another model's?")

    def specs(self, config: TextConfig) -> dict[Target, WeightSpec]:
        """What each matrix in use of a model of this config is stored in; of each class, what most of it is."""
        found = {
            tensor.target: self.tensors[tensor.name].spec
            for tensor in expected_tensors(config)
            if tensor.target is not None and not tensor.unused
        }
        by_class: dict[Target, Counter[WeightSpec]] = {}
        for target, spec in found.items():
            by_class.setdefault(Target(target.tensor_class), Counter())[spec] += 1
        return {target: counted.most_common(1)[0][0] for target, counted in by_class.items()} | found


class PublishedWeights(Weights):
    """A published file's weights, for the config of the checkpoint that it was made of. Raises as `check`.

    Reading a tensor, or rows of it, raises CheckpointError where they decode to NaN or infinity, as of a damaged scale.
    """

    def __init__(self, file: PublishedFile, config: TextConfig) -> None:
        file.check(config)
        super().__init__(config, file.tensors)
        self.file = file

    def get(self, name: str) -> Weight:
        """A tensor by its canonical name: plain values as a Tensor in the file's dtype, all else packed."""
        weight = self.file.tensors[name].read()
        if len(weight.shape) != 2:
            assert isinstance(weight, Tensor)
            self._checked(name, weight.reshape(1, -1), torch.zeros(1))
            return weight
        for rows in row_chunks(*weight.shape, _PIECE):
            ids = torch.arange(rows.start, rows.stop)
            self._checked(name, decoded(weight, ids), ids)
        return weight

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows [n, cols] of a matrix, decoded; no other row is read."""
        ids = ids.reshape(-1).to("cpu", torch.int64)
        return self._checked(name, decoded(self.file.tensors[name].read(), ids), ids)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in the file, scales and all."""
        return self.file.tensors[name].nbytes

    def _checked(self, name: str, values: Tensor, ids: Tensor) -> Tensor:
        """`values` [n, cols], the rows `ids`. A matrix decodes infinity to the largest number that there is."""
        peaks = torch.linalg.vector_norm(values.float(), ord=float("inf"), dim=1)
        if not (sound := peaks < _LARGEST).all():
            row = int(ids[~sound][0])
            raise CheckpointError(f"{self.file.source}: {name} has NaN or infinity in row {row}")
        return values


def decoded(weight: Weight, ids: Tensor) -> Tensor:
    """Rows [n, cols] of a matrix, in the dtype that it has where it is plain, else in fp32."""
    return weight.index_select(0, ids) if isinstance(weight, Tensor) else weight.rows(ids).dequantize()


def differences(published: PublishedWeights, reference: Weights) -> list[str]:
    """Lines for people: norms and scalars that differ by more than rounding, and tensors that only one of them has.

    And first what it states of the model that is otherwise in the reference's config.
    """
    lines = []
    if stated := list(_stated_otherwise(published.file.metadata, reference.config)):
        lines.append(
            f"it states another model than the checkpoint's config ({'; '.join(stated)}): engines compute by what it "
            "states, and its divergence is measured by the config"
        )
    vectors = [tensor for tensor in published.tensors.values() if tensor.tensor_class is None]
    if other := [tensor.name for tensor in vectors if not tensor.unused and _differs(tensor, published, reference)]:
        lines.append(
            f"{len(other)} of {len(vectors)} norms and scalars differ from the checkpoint's by more than rounding "
            f"({_listed(other)}): made from another checkpoint, so its divergence is not its quantization's alone"
        )
    if absent := sorted(reference.tensors.keys() - published.tensors.keys()):
        lines.append(f"{len(absent)} tensors that no layer uses are not in it ({_listed(absent)})")
    if others := published.file.others:
        lines.append(f"{len(others)} tensors in it are not the text model's ({_listed(others)})")
    return [*lines, *published.file.notes]


def _stated_otherwise(stated: Mapping[str, Any], config: TextConfig) -> Iterator[str]:
    """What metadata says otherwise than a config; one number stands for that of every layer."""
    for key, ours in {**metadata(config), ROPE_FACTORS: rope_factors(config)}.items():
        if (theirs := stated.get(key)) is None:
            continue
        found, expected = (
            value if isinstance(value, list) else [value] * config.num_layers for value in (theirs, ours)
        )
        if len(found) != len(expected):
            yield f"{key} of {len(found)} values, not {len(expected)}"
            continue
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            if not (isinstance(one, int | float) and math.isclose(one, other, rel_tol=_FLOAT32)):
                yield f"{key}{f'[{index}]' if isinstance(theirs, list) else ''} {one}, not {other}"
                break


def _differs(tensor: TextTensor, published: Weights, reference: Weights) -> bool:
    ours, theirs = reference.get(tensor.name), published.get(tensor.name)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    return bool(((theirs.double() - ours.double()).abs() > _ROUNDING * ours.double().abs()).any())


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


def one_to_one(names: Iterable[tuple[str, str]], source: str) -> dict[str, str]:
    """Canonical names to the file's. Raises CheckpointError where two names of the file are one tensor."""
    found: dict[str, str] = {}
    for canonical, name in names:
        if canonical in found:
            raise CheckpointError(f"{source}: {found[canonical]} and {name} are the same tensor")
        found[canonical] = name
    return found

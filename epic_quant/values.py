"""What the values of text tensors are, from one read of them: NaN, infinity, overflow, zero rows, outliers, dtypes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint, dtype_name
from epic_quant.errors import CheckpointError
from epic_quant.gemma4.tensors import is_head
from epic_quant.quant.scales import SCALE_DTYPE

# Scales are stored in fp16. What is larger than its largest number saturates in the formats of the fewest levels.
LARGEST = torch.finfo(SCALE_DTYPE).max

# Times the root mean square: in 4 bits with a scale that one such weight sets, all others of its group become zero.
OUTLIER = 32.0

_CHUNK_WEIGHTS = 2**19


@dataclass(frozen=True)
class Values:
    """What one tensor's values are. Of a vector every value is a row. `fault` ends the read, and the rest is of before.

    `fault` names the first row with NaN, infinity or a magnitude beyond `LARGEST`.
    """

    name: str  # in the file
    dtype: torch.dtype
    num_rows: int
    zero_rows: int
    max_abs: float
    rms: float
    fault: str | None = None

    @property
    def peak(self) -> float:
        """The largest magnitude over the root mean square; 0 where all is zero."""
        return self.max_abs / self.rms if self.rms else 0.0


def read_values(name: str, tensor: Tensor) -> Values:
    """Read a tensor once, some rows at a time: nothing as large as the tensor is held."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)
    zero_rows, max_abs, squares = 0, 0.0, 0.0
    for first, values in _chunks(rows):
        # NaN comes out of both ends, and an end that is not finite or too large says that there is a fault.
        peak = float(torch.stack(values.aminmax()).abs().max())
        if not peak <= LARGEST:
            fault = _fault(values, first)
            return Values(name, tensor.dtype, len(rows), zero_rows, max_abs, math.nan, fault)
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
        # The squares of tiny weights are zero too.
        zero_rows += int((values[norms == 0] == 0).all(dim=1).sum())
        max_abs, squares = max(max_abs, peak), squares + float(norms.double().square().sum())
    return Values(name, tensor.dtype, len(rows), zero_rows, max_abs, math.sqrt(squares / max(1, rows.numel())))


def _chunks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time, each with the number of its first; none that are empty."""
    step = max(1, _CHUNK_WEIGHTS // max(1, rows.shape[1]))
    yield from ((first, rows[first : first + step]) for first in range(0, len(rows), step) if rows.numel())


def _fault(values: Tensor, first: int) -> str:
    bad = ~(values.abs() <= LARGEST)
    row = int(bad.any(dim=1).nonzero()[0])
    found = values[row][bad[row]]
    if found.isnan().any():
        return f"NaN in row {first + row}"
    if found.isinf().any():
        return f"infinity in row {first + row}"
    return f"{float(found[0]):.3g} in row {first + row}, beyond {LARGEST:.0f}, the largest scale that fp16 holds"


def check_values(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[str]:
    """Read these tensors, and yield the name of each before it is read.

    Raises CheckpointError that names the first tensor and row with NaN, infinity or a magnitude beyond `LARGEST`.
    """
    for name in names:
        yield name
        if (fault := read_values(name, checkpoint.tensor(name)).fault) is not None:
            raise CheckpointError(f"{checkpoint.source}: {name} has {fault}; nothing was measured")


def findings(checkpoint: Checkpoint, values: Sequence[Values]) -> list[tuple[str, str]]:
    """What is remarkable of tensors that were read: the tensor's name and what was found, in plain words.

    Faults come first; then other dtypes than most weights have, rows of zeros, outliers, and a head beside the
    embedding.
    """
    found = [(one.name, one.fault) for one in values if one.fault is not None]
    found += _dtypes(checkpoint, values)
    found += [
        (one.name, f"{one.zero_rows:,} of {one.num_rows:,} rows are zero")
        for one in values
        if one.zero_rows and len(checkpoint.shape(one.name)) > 1
    ]
    peaks = sorted((one for one in values if one.peak > OUTLIER), key=lambda one: -one.peak)
    found += [(one.name, f"the largest of {one.max_abs:.3g} is {one.peak:,.0f} times the rms") for one in peaks]
    heads = (name for name in checkpoint.names if is_head(name))
    return [*found, *((name, f"the embedding again: {checkpoint.nbytes(name):,} bytes twice") for name in heads)]


def _dtypes(checkpoint: Checkpoint, values: Sequence[Values]) -> Iterator[tuple[str, str]]:
    """A line for each dtype but that of most weights, which names its first tensor."""
    numel: Counter[torch.dtype] = Counter()
    names: dict[torch.dtype, list[str]] = defaultdict(list)
    for one in values:
        numel[one.dtype] += math.prod(checkpoint.shape(one.name))
        names[one.dtype].append(one.name)
    usual = max(numel, key=lambda dtype: numel[dtype], default=torch.bfloat16)
    for dtype, its in names.items():
        if dtype is not usual:
            more = f", and {len(its) - 1} more" if len(its) > 1 else ""
            yield its[0] + more, f"{dtype_name(dtype)}, where most weights are {dtype_name(usual)}"

"""What all formats write alike: bytes of tensors, piece by piece, with a progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

Write = Callable[[memoryview], object]


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major and little-endian, as they lie in memory."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


@contextmanager
def progress(write: Write, nbytes: int) -> Iterator[Write]:
    """`write`, with a bar on stderr that shows how much of `nbytes` it has written."""
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="export") as bar:

        def counted(data: memoryview) -> None:
            write(data)
            bar.update(data.nbytes)

        yield counted

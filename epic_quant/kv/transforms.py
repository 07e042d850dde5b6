"""The transforms that K and V go through before they are quantized, and back: one class each.

A transform is applied to floats in fp32, whose last dim are a head's dims, or a row of them. What it fits to the first
tokens it stores and counts. Another one is a class here and its place in `QuantizedStore`'s chain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from epic_quant.kv import directions
from epic_quant.kv.rows import Rows
from epic_quant.quant import hadamard
from epic_quant.quant.scales import SCALE_DTYPE, stored_scale


class Transform(ABC):
    """One step of the chain."""

    def fit(self, x: Tensor) -> Tensor:
        """Fit the transform to the first tokens [tokens, heads, dims], and apply it to them."""
        return self.apply(x)

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """[..., dims] fp32 to the same shape."""

    @abstractmethod
    def invert(self, x: Tensor) -> Tensor:
        """The inverse of `apply`, as far as there is one; `x` may be overwritten."""

    def stored(self) -> list[Rows]:
        """The tensors that it stores once fitted, one row each."""
        return []


class Center(Transform):
    """Subtracts the mean of the first tokens, fp16, from every head and channel."""

    def __init__(self, num_heads: int, num_dims: int) -> None:
        self._offset = Rows((num_heads, num_dims), SCALE_DTYPE)

    def fit(self, x: Tensor) -> Tensor:
        """As `Transform.fit`."""
        self._offset.append(stored_scale(x.mean(dim=0, keepdim=True)))
        return self.apply(x)

    def apply(self, x: Tensor) -> Tensor:
        """As `Transform.apply`."""
        return x - self._offset.rows()

    def invert(self, x: Tensor) -> Tensor:
        """As `Transform.invert`."""
        return x.add_(self._offset.rows())

    def stored(self) -> list[Rows]:
        """The offset."""
        return [self._offset]


class Directions(Transform):
    """Rotates heads so that their first coordinates lie along the directions in which the first tokens vary most."""

    def __init__(self, num_heads: int, num_directions: int, num_dims: int) -> None:
        self._reflectors = Rows((num_heads, num_directions, num_dims), SCALE_DTYPE)

    def fit(self, x: Tensor) -> Tensor:
        """As `Transform.fit`; the tokens are to be centered."""
        found = directions.reflectors(x, self._reflectors.shape[1], SCALE_DTYPE)
        self._reflectors.append(found.unsqueeze(0))
        return self.apply(x)

    def apply(self, x: Tensor) -> Tensor:
        """As `Transform.apply`."""
        return directions.rotate(x, self._reflectors.rows()[0])

    def invert(self, x: Tensor) -> Tensor:
        """As `Transform.invert`."""
        return directions.unrotate(x, self._reflectors.rows()[0])

    def stored(self) -> list[Rows]:
        """The Householder reflectors."""
        return [self._reflectors]


@dataclass(frozen=True)
class Hadamard(Transform):
    """Random signs and a block Hadamard transform over the dims; nothing is stored of it."""

    block: int

    def apply(self, x: Tensor) -> Tensor:
        """As `Transform.apply`."""
        return hadamard.rotate(x, self.block)

    def invert(self, x: Tensor) -> Tensor:
        """As `Transform.invert`."""
        return hadamard.unrotate(x, self.block)


@dataclass(frozen=True)
class Clip(Transform):
    """Moves the outer part of each row's range, at either end, to where that begins; what is lost stays lost."""

    part: float

    def apply(self, x: Tensor) -> Tensor:
        """As `Transform.apply`, of rows [n, cols]."""
        least, largest = x.aminmax(dim=1, keepdim=True)
        ends = ((least, largest), (largest, least))
        low, high = ((1 - self.part) * end + self.part * other for end, other in ends)
        return x.clamp(low, high)

    def invert(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

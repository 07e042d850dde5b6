"""Bounds for a Gaussian source, as relative L2: the square root of the mean squared error at unit variance."""

from __future__ import annotations

import math
from collections.abc import Mapping

# The best scalar quantizers of 2, 3, 4, 8 and 16 levels, each level coded in log2(levels) bits.
# J. Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory 6 (1960), table I.
LLOYD_MAX: Mapping[float, float] = {1.0: 0.603, math.log2(3): 0.436, 2.0: 0.343, 3.0: 0.186, 4.0: 0.0975}


def shannon(bits: float) -> float:
    """The least relative L2 any code can have at `bits` a weight: sqrt(D) of the rate distortion function D = 2^-2R."""
    return math.pow(2.0, -bits)

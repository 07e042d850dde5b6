import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import pytest

from epic_quant.report.analysis.gaussian import LLOYD_MAX, shannon

FACTS = Path(__file__).parents[2] / "benchmarks" / "facts" / "published-numbers.json"
NORMAL = NormalDist()


def best_scalar_quantizer(num_levels):
    """Relative L2 of Lloyd's iteration on a unit Gaussian, with the exact centroid of every cell."""
    levels = [NORMAL.inv_cdf((index + 0.5) / num_levels) for index in range(num_levels)]
    for _ in range(2000):
        middles = [(low + high) / 2 for low, high in pairwise(levels)]
        below = [0.0, *map(NORMAL.cdf, middles), 1.0]
        density = [0.0, *map(NORMAL.pdf, middles), 0.0]
        mass = [high - low for low, high in pairwise(below)]
        levels = [(density[i] - density[i + 1]) / mass[i] for i in range(num_levels)]
    # The error of centroids is what their own energy lacks of the variance.
    return math.sqrt(1 - sum(part * level**2 for part, level in zip(mass, levels, strict=True)))


@pytest.mark.parametrize("num_levels", [2, 3, 4, 8, 16])
def test_lloyd_max_is_what_lloyds_iteration_finds(num_levels):
    assert LLOYD_MAX[math.log2(num_levels)] == pytest.approx(best_scalar_quantizer(num_levels), rel=3e-3)


def test_the_bounds_are_the_published_ones():
    published = json.loads(FACTS.read_text(encoding="utf-8"))["gaussian_rel_l2"]
    assert {f"{bits:.4g}": error for bits, error in LLOYD_MAX.items()} == published["lloyd_max"]
    for bits, error in published["shannon"].items():
        assert shannon(float(bits)) == pytest.approx(error, rel=2e-3)

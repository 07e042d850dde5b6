"""What several subjects need."""

from functools import cache

import pytest

from epic_quant.quant import quantizer


@pytest.fixture(scope="session")
def moments_for(run, tmp_path_factory):
    """`moments_for(*specs)`: the calibration moments, gathered when a spec with +gptq first needs them; else none."""
    gathered = cache(lambda: run.moments(tmp_path_factory.mktemp("moments")))
    return lambda *specs: gathered() if any(quantizer(spec).gptq for spec in specs) else {}

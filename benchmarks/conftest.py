"""What several subjects need."""

from functools import cache

import pytest


@pytest.fixture(scope="session")
def hessians_for(run, tmp_path_factory):
    """`hessians_for(*specs)`: the calibration Hessians, gathered when a spec with +gptq first needs them; else none."""
    gathered = cache(lambda: run.hessians(tmp_path_factory.mktemp("hessians")))
    return lambda *specs: gathered() if any(spec.gptq for spec in specs) else {}

"""What several subjects need."""

from functools import cache

import pytest

from epic_quant.plugin.session import run_of


def pytest_generate_tests(metafunc):
    """A `layer_type` is every type of layer that the model has."""
    if "layer_type" in metafunc.fixturenames:
        metafunc.parametrize("layer_type", run_of(metafunc.config).layer_types)


@pytest.fixture(scope="session")
def hessians_for(run, tmp_path_factory):
    """`hessians_for(*specs)`: the calibration Hessians, gathered when a spec first needs them; else none."""
    gathered = cache(lambda: run.hessians(tmp_path_factory.mktemp("hessians")))
    return lambda *specs: gathered() if any(spec.needs_hessian for spec in specs) else {}

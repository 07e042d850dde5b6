"""Kernels are tested on two threads, whatever the machine has."""

import pytest
import torch

from epic_quant import kernels


@pytest.fixture(autouse=True, scope="package")
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def native_isas():
    """A parameter for every instruction set but the reference; a skip where nothing was built."""
    none = pytest.param("none", marks=pytest.mark.skip(reason="the native module is not built"))
    return kernels.isas()[:-1] or [none]


@pytest.fixture(params=native_isas())
def isa(request):
    return request.param

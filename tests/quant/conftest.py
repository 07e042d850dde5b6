"""One thread for tensors this small: it is quicker, and sums come out the same on every machine."""

import pytest
import torch

from epic_quant.quant import quantize
from epic_quant.spec import WeightSpec


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(weight, spec, hessian=None, **options):
    return quantize(weight, WeightSpec.parse(spec), hessian, **options)


def same_tensors(one, other):
    tensors = other.tensors()
    return one.tensors().keys() == tensors.keys() and all(torch.equal(t, tensors[n]) for n, t in one.tensors().items())

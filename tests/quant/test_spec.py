"""Specs and the quantizers they name."""

import pytest
import torch

from epic_quant.errors import SpecError
from epic_quant.quant import SCHEMES, quantizer

SPECS = [
    *SCHEMES,
    "absmax3-packed-g32",
    "int4-g128",
    "ternary-g64+had256",
    "codebook3+had512+gptq",
    "int2-g32+gptq",
    "int4+had1",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_reads_back(spec):
    assert quantizer(spec).spec == spec
    assert quantizer(spec) == quantizer(quantizer(spec).spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown scheme ''"),
        ("in4", "did you mean int4"),
        ("int9-g32", "unknown scheme 'int9'; did you mean"),
        ("absmax3-pack", "unknown option of absmax3 'pack'"),
        ("int4-h32", "unknown option of int4 'h32'"),
        ("int4-g0", "unknown option of int4 'g0'"),
        ("int4-g032", "unknown option of int4 'g032'"),
        ("int4-g32-g32", "unknown option of int4 'g32'"),
        ("int4-", "unknown option of int4 ''"),
        ("int4+hat256", "unknown stage 'hat256'; known: "),
        ("int4+gptq+had256", "hadBLOCK comes before gptq"),
        ("int4+gptq+gptq", "at most once"),
        ("int4+", "unknown stage ''"),
        ("int4+had0", "unknown stage 'had0'"),
        ("int4+had100", "must be a power of two up to 4096"),
        ("int4+had8192", "must be a power of two up to 4096"),
        ("bf16-g32", "bf16 keeps the weight"),
        ("bf16+had256", "bf16 keeps the weight"),
        ("bf16+gptq", "bf16 keeps the weight"),
        (" int4", "unknown scheme"),
    ],
)
def test_a_spec_that_names_nothing_is_told_apart(spec, message):
    with pytest.raises(SpecError) as caught:
        quantizer(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cols", "used"), [(512, "int4+had256"), (96, "int4+had32"), (7, "int4+had1")])
def test_the_result_names_the_hadamard_block_that_was_used(cols, used):
    quantized = quantizer("int4+had256").quantize(torch.ones(2, cols))
    assert quantized.spec == used
    assert quantizer(used).quantize(torch.ones(2, cols)).spec == used

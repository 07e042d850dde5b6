"""The text of a `WeightSpec`."""

import pytest

from epic_quant.errors import SpecError
from epic_quant.spec import FORMATS, WeightSpec

SPECS = [
    *FORMATS,
    "absmax3-packed-g32",
    "int4-g128",
    "ternary-g64+had256",
    "codebook3+had512+gptq",
    "int2-g32+gptq",
    "int2-g32+yaqa",
    "codebook3+had512+yaqa",
    "int4+had1",
    "q4_k+imatrix",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_reads_back(spec):
    assert str(WeightSpec.parse(spec)) == spec
    assert WeightSpec.parse(str(WeightSpec.parse(spec))) == WeightSpec.parse(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown format ''"),
        ("in4", "did you mean int4"),
        ("int9-g32", "unknown format 'int9'; did you mean"),
        ("absmax3-pack", "unknown option of absmax3 'pack'"),
        ("int4-h32", "unknown option of int4 'h32'"),
        ("int4-g0", "unknown option of int4 'g0'"),
        ("int4-g032", "unknown option of int4 'g032'"),
        ("int4-g32-g32", "unknown option of int4 'g32'"),
        ("int4-", "unknown option of int4 ''"),
        ("int4+hat256", "unknown stage 'hat256'; known: "),
        ("int4+gptq+had256", "stages stand in that order"),
        ("int4+gptq+gptq", "at most once"),
        ("int4+", "unknown stage ''"),
        ("int4+had0", "unknown stage 'had0'"),
        ("int4+had100", "expected a power of two up to 4096"),
        ("int4+had8192", "expected a power of two up to 4096"),
        ("bf16-g32", "bf16 stores values as they are"),
        ("bf16+had256", "bf16 stores values as they are"),
        ("bf16+gptq", "bf16 stores values as they are"),
        ("bf16+yaqa", "bf16 stores values as they are"),
        ("q4_k+yaqa", "q4_k stores blocks of 256 weights"),
        ("int4+gptq+yaqa", "a spec has one of them"),
        ("int4+yaqa+had256", "stages stand in that order"),
        (" int4", "unknown format"),
        ("q4_k-g32", "q4_k stores blocks of 256 weights: it takes no group"),
        ("q8_0+had256", "q8_0 stores blocks of 32 weights"),
        ("tq1_0+gptq", "tq1_0 stores blocks of 256 weights"),
        ("int4+imatrix", "int4 has no blocks"),
        ("int4+gptq+imatrix", "int4 has no blocks"),
        ("bf16+imatrix", "bf16 has no blocks"),
        ("q4_k+imatrix+imatrix", "at most once"),
        ("q4_k+imatrx", "unknown stage 'imatrx'; did you mean imatrix"),
        ("Q4_K", "unknown format 'Q4_K'; did you mean q4_k"),
    ],
)
def test_an_unknown_spec_is_refused(spec, message):
    with pytest.raises(SpecError) as caught:
        WeightSpec.parse(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

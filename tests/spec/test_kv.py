"""The texts that KV specs are read from, and the named table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.spec import NAMED_KV, KVSpec, KVStorageSpec, LayerKVSpec, PCASpec

storages = st.sampled_from(
    [
        *("bf16", "fp32", "int4", "int4-g8", "int3+had16", "int8-g8+had32", "absmax2-b8", "codebook3-b16"),
        *("ternary-b8+had8", "int4+had8+center30", "int2-b8+center9+clip5+unbiased", "affine2-g8+center1"),
        *("int2+had8+center9+pca3-int4+unbiased", "ternary-b8+center8+pca2-absmax3-packed+clip5"),
    ]
).map(KVStorageSpec.parse)
heads = st.tuples(storages) | st.tuples(storages, storages)
full_layers = st.builds(LayerKVSpec, heads, heads, st.integers(0, 30), st.integers(0, 9))
sliding_layers = st.builds(LayerKVSpec, heads, heads, st.integers(0, 30))


@given(st.builds(KVSpec, full_layers, sliding_layers))
def test_parse_and_str_are_inverses(policy):
    assert KVSpec.parse(str(policy)) == policy
    assert "," not in str(policy)
    assert policy.name == str(policy)


@pytest.mark.parametrize("name", NAMED_KV)
def test_a_named_policy_reads_back_by_name_and_by_string(name):
    assert KVSpec.parse(name) is NAMED_KV[name]
    assert NAMED_KV[name].name == name
    assert KVSpec.parse(str(NAMED_KV[name])) == NAMED_KV[name]
    assert hash(KVSpec.parse(str(NAMED_KV[name]))) == hash(NAMED_KV[name])


def test_the_default_is_bf16():
    assert KVSpec() == NAMED_KV["bf16"] == KVSpec.parse("sliding.k=bf16")
    assert str(KVSpec()) == "bf16"


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("k=int4/v=int4", "int4"),
        ("int8/k=int4/full.k=int3", "v=int8/sliding.k=int4/full.k=int3"),
        ("full.k=int4/full.k.rotated=int8", "full.k.rotated=int8/full.k.unrotated=int4"),
        ("full.k.rotated=int8", "full.k.rotated=int8/full.k.unrotated=bf16"),
        ("full.k.rotated=int8/k=int4", "k=int4"),
        ("residual=4/full.residual=9/sinks=2", "full.residual=9/sliding.residual=4/full.sinks=2"),
        ("int4+had/residual=5", "int4+had512/residual=5"),
        ("original+ls/full.v=int3", "int4/full.k.unrotated=int2/full.v=int3"),
    ],
)
def test_later_parts_override_what_they_cover(text, same):
    assert KVSpec.parse(text) == KVSpec.parse(same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int99", "unknown KV spec 'int99'; did you mean int"),
        ("orignal", "did you mean original"),
        ("k=itn4", "unknown format 'itn4'; did you mean int4"),
        ("int4-x3", "unknown option of int4 'x3'"),
        ("full.q=int4", "unknown place of K or V 'full.q'; did you mean full."),
        ("k.turned=int4", "unknown place of K or V 'k.turned'"),
        ("int4/original", "the named spec original must come first"),
        ("int4/", "unknown KV spec ''"),
        ("residual=many", "'many' is not a number of tokens"),
        ("sliding.sinks=4", "a sliding layer loses its first tokens"),
        ("k=int4-b0", "unknown option of int4 'b0'"),
        ("k=int4-b20", "must be a multiple of 8"),
        ("k=int4-g8-b16", "not for both"),
        ("k=int4+gptq", "unknown stage 'gptq'"),
        ("k=bf16-b64", "stores values as they are, without options"),
        ("k=fp32+had64", "stores values as they are, without options"),
        ("k=int4+had48", "expected a power of two"),
        ("k=int4+center0", "unknown stage 'center0'"),
        ("k=int4+center", "unknown stage 'center'"),
        ("k=int4+unbiased+center4", "unknown stage 'center4'"),
        ("k=int4+clip50", "must be 1 to 49 percent"),
        ("k=int4-g8+clip5", "without groups"),
        ("k=int4-g8+unbiased", "without groups"),
        ("k=affine4+unbiased", "without a zero point"),
        ("k=int4+pca3-int8", "finds its directions in the tokens of a center"),
        ("k=int4+center8+pca0-int8", "unknown stage 'pca0-int8'"),
        ("k=int4+center8+pca3-itn8", "unknown format 'itn8'; did you mean int8"),
        ("k=int4+center8+pca3-int8-g4", "unknown format 'int8-g4'"),
        ("k=int4+center8+pca3-bf16", "in a format with scales"),
        ("k=int4-g8+center8+pca3-int8", "without groups"),
        ("k=int4+center8+pca3-affine4+unbiased", "without a zero point"),
        ("k=bf16+center4", "without options"),
        ("k=int4+\n", "unknown stage"),
        ("v=q8_0", "q8_0: blocks of 32 weights are not for K and V"),
        ("k=int4+center8+pca3-q8_0", "in a format with scales"),
    ],
)
def test_a_wrong_kv_spec_is_one_clear_line(text, message):
    with pytest.raises(SpecError) as error:
        KVSpec.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: KVStorageSpec("fp16"),
        lambda: KVStorageSpec("bf16", block_tokens=64),
        lambda: KVStorageSpec("bf16", center_tokens=4),
        lambda: KVStorageSpec("int4", center_tokens=0),
        lambda: KVStorageSpec("int4", center_tokens=8, pca=PCASpec(0, "int8")),
        lambda: LayerKVSpec(residual_window=-1),
        lambda: KVSpec(sliding=LayerKVSpec(attention_sinks=3)),
    ],
)
def test_what_no_text_could_say_is_refused_too(build):
    with pytest.raises(SpecError):
        build()

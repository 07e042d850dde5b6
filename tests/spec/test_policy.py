"""Policy strings and the named table."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.spec import BF16, KINDS, NAMED, KVSpec, PLESpec, PolicySpec, Target, TensorClass, WeightSpec

specs = st.sampled_from(
    ["bf16", "int4", "int4-g128", "ternary", "absmax4", "absmax3-packed", "int8-g32+gptq", "q4_k+imatrix"]
)
kvs = st.sampled_from(["bf16", "original", "p-rope", "k=int4-b64/full.v.rotated=int8-g32+had64/residual=5/sinks=1"])
ples = st.just("all") | st.builds("{}:{}".format, st.sampled_from(["static", "lru"]), st.integers(1, 10**6))
in_layers = st.sampled_from([tensor_class for tensor_class, kinds in KINDS.items() if kinds])
layers = st.none() | st.integers(0, 6)


@st.composite
def targets(draw):
    """Any class, kind of a class, layer of one, or kind in a layer."""
    tensor_class = draw(st.sampled_from([*TensorClass]))
    if not KINDS[tensor_class]:
        return Target(tensor_class)
    return Target(tensor_class, draw(st.none() | st.sampled_from(KINDS[tensor_class])), draw(layers))


policies = st.builds(
    PolicySpec,
    st.just("some"),
    st.dictionaries(targets(), specs.map(WeightSpec.parse)).map(lambda given: tuple(given.items())),
    kvs.map(KVSpec.parse),
    ples.map(PLESpec.parse),
    st.dictionaries(st.integers(0, 50), kvs.map(KVSpec.parse)).map(lambda given: tuple(given.items())),
)


def narrowest(given, target):
    """The rule, by definition: kinds before layers before the class, all of them before bf16."""
    tensor_class, kind, layer = target
    for other in (Target(tensor_class, kind, layer), Target(tensor_class, kind), Target(tensor_class, None, layer)):
        if other in given:
            return given[other]
    return given.get(Target(tensor_class), BF16)


@given(policies)
def test_parse_and_str_are_inverses(policy):
    again = PolicySpec.parse(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)


@given(policies)
def test_a_policy_can_be_pickled(policy):
    again = pickle.loads(pickle.dumps(policy))
    assert (again, again.name) == (policy, policy.name)


@given(st.dictionaries(targets(), specs.map(WeightSpec.parse)), targets())
def test_the_narrowest_target_decides_and_what_changes_nothing_is_left_out(given, tensor):
    policy = PolicySpec("some", tuple(given.items()))
    tensor_class, kind, layer = tensor
    kinds = KINDS[tensor_class]
    tensor = Target(tensor_class, kind or kinds[0], layer or 0) if kinds else tensor
    assert policy.spec_of(tensor) == narrowest(given, tensor)
    assert dict(policy.weights).items() <= given.items()
    assert PolicySpec("other", policy.weights) == policy


@pytest.mark.parametrize("name", NAMED)
def test_a_named_policy_reads_back_by_name_and_by_string(name):
    assert PolicySpec.parse(name) is NAMED[name]
    assert PolicySpec.parse(str(NAMED[name])) == NAMED[name]
    assert hash(PolicySpec.parse(str(NAMED[name]))) == hash(NAMED[name])


def test_classes_that_have_no_spec_stay_bf16():
    policy = PolicySpec.parse("mlp=int4")
    assert {part: str(policy.class_spec(part)) for part in TensorClass} == {
        part: "int4" if part == "mlp" else "bf16" for part in TensorClass
    }
    assert policy.quantized_classes == (TensorClass.MLP,)
    assert {str(spec) for spec in policy.weight_specs} == {"int4", "bf16"}
    assert str(policy.ple) == "all"


def test_layers_and_kinds_may_have_specs_of_their_own():
    policy = PolicySpec.parse("mlp=int4,mlp@0-2+5=int8,mlp@4=bf16,mlp.down_proj@2=int6,full_attention@5=int3")
    for layer, spec in enumerate(["int8", "int8", "int8", "int4", "bf16", "int8"]):
        assert str(policy.spec_of(Target(TensorClass.MLP, "up_proj", layer))) == spec
    assert str(policy.spec_of(Target(TensorClass.MLP, "down_proj", 2))) == "int6"
    assert policy.quantized_classes == (TensorClass.FULL_ATTENTION, TensorClass.MLP)
    assert str(policy) == (
        "full_attention@5=int3,mlp=int4,mlp@0-2+5=int8,mlp@4=bf16,mlp.down_proj@2=int6,kv=bf16,ple=all"
    )
    # What says the same as the class says nothing.
    assert PolicySpec.parse("mlp=int4,mlp@3=int4,mlp.up_proj=int4") == PolicySpec.parse("mlp=int4")
    assert policy != PolicySpec.parse("mlp=int4")


def test_k_and_v_of_layers_may_have_a_spec_of_their_own():
    policy = PolicySpec.parse("kv=int8,kv@2-3=int4")
    assert [str(policy.kv_of(layer)) for layer in range(5)] == ["int8", "int8", "int4", "int4", "int8"]
    assert str(policy) == "kv=int8,kv@2-3=int4,ple=all"
    assert PolicySpec.parse("kv=int8,kv@2=int8") == PolicySpec.parse("kv=int8")


def test_a_policy_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMED["bf16"].name = "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("original-2", "unknown policy 'original-2'; did you mean original-"),
        ("mpl=int4", "unknown tensor class 'mpl'; did you mean"),
        ("mlp=itn4", "unknown format 'itn4'"),
        ("mlp=int4,mlp=int3", "mlp is given twice"),
        ("mlp=int4,", "'' is not of the form class=spec"),
        ("mlp=", "'mlp=' is not of the form class=spec"),
        ("mlp.dwn_proj=int4", "unknown kind of mlp 'dwn_proj'; did you mean down_proj"),
        ("ple_table.row=int4", "ple_table is one tensor, so it has no kind 'row'"),
        ("kv=int99", "unknown"),
        ("kv=int4@64", "unknown format 'int4@64'"),
        ("mlp@=int4", "'' are no layers; expected numbers and ranges, such as 0-5+8"),
        ("mlp@5-3=int4", "'5-3' are no layers"),
        ("mlp@0-2=int4,mlp@2=int3", "layer 2 of mlp is given twice"),
        ("mpl@1=int4", "unknown tensor class 'mpl'"),
        ("kv@1=int4,kv@0-2=int8", "layer 1 of kv is given twice"),
        ("embedding@1=int4", "embedding is in no layer"),
        ("ple=lfu:10", "unknown PLE residency 'lfu'"),
        ("ple=lru", "every other residency needs one"),
        ("ple=all:7", "'all' takes no number of rows"),
        ("ple=lru:0", "must be positive"),
        ("ple=lru:many", "'many' is not a number of rows"),
    ],
)
def test_a_wrong_policy_is_one_clear_line(text, message):
    with pytest.raises(SpecError) as error:
        PolicySpec.parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "name", "file"),
    [
        ("file:a/b/model-Q4_K_M.gguf", "model-Q4_K_M", "a/b/model-Q4_K_M.gguf"),
        ("file:big-00002-of-00003.gguf", "big", "big-00002-of-00003.gguf"),
        ("file:C:\\models\\x.gguf", "x", "C:\\models\\x.gguf"),
        ("file:some/folder/", "folder", "some/folder/"),
        ("file:owner/name-4.5", "name-4.5", "owner/name-4.5"),
        ("mine=file:a,b=c.gguf", "mine", "a,b=c.gguf"),
        ("mine=file:x.gguf,kv=int8,ple=lru:5", "mine", "x.gguf"),
        ("mine=file:x.gguf,mlp=iq2_xxs,mlp.down_proj@0-2+5=ct_uint4-g128", "mine", "x.gguf"),
    ],
)
def test_a_published_file_is_named_and_reads_back(text, name, file):
    policy = PolicySpec.parse(text)
    assert (policy.name, policy.file) == (name, file)
    assert PolicySpec.parse(str(policy)) == policy
    assert ("kv=int8" in str(policy)) == ("kv=int8" in text)
    assert policy.without_folder.file in (file, "model-Q4_K_M.gguf", "x.gguf", "folder", "name-4.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:", "expected a path after file:"),
        ("x=file: ,kv=int8", "expected a path after file:"),
        ("mlp=iq2_xxs", "iq2_xxs is only read from published files"),
        ("mlp=mlx4-g64", "mlx4 is only read from published files"),
        ("file:x.gguf,kv=int99", "int99"),
    ],
)
def test_what_no_file_holds_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        PolicySpec.parse(text)

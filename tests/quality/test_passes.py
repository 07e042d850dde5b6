"""What goes together in a pass, what a pass takes, and the ablations."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import TokenError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.plan import plan_quality
from epic_quant.quality import Ablation, Variant, ablations, measure, noise_floor
from epic_quant.quality.passes import Memory, passes, quantized_numel, work
from epic_quant.quality.variants import with_reference
from epic_quant.spec import KV_CACHE, NAMED, NAMED_KV, REFERENCE, PolicySpec, TensorClass, WeightSpec

FACTS = Path(__file__).parents[2] / "benchmarks" / "facts"
E4B_JSON = json.loads((FACTS / "gemma-4-E4B.config.json").read_text(encoding="utf-8"))
E4B = TextConfig.from_json(E4B_JSON)
LAYER_WEIGHTS = {
    layer.index: sum(
        math.prod(tensor.shape)
        for tensor in expected_tensors(E4B)
        if tensor.layer == layer.index and len(tensor.shape) == 2 and not tensor.unused
    )
    for layer in E4B.layers
}


def some_variants():
    texts = ("mlp=int4", "full_attention=int4", "embedding=int4", "ple_table=int8", "kv=int4", "ple=lru:7", "mlp=int8")
    by_layer = {f"layer {layer}": Variant(PolicySpec.parse(f"mlp@{layer}=int4")) for layer in (0, 20, 41)}
    return {text: Variant(PolicySpec.parse(text)) for text in texts} | by_layer | {"bf16-compute": noise_floor()}


@settings(max_examples=25)
@given(st.sets(st.sampled_from(sorted(some_variants()))), st.integers(2, 8), st.integers(1, 4))
def test_every_policy_is_in_one_pass_that_fits(names, tenths, windows):
    variants = with_reference({name: some_variants()[name] for name in sorted(names)}, E4B)
    memory = Memory(E4B, windows, 2048)
    needs, allowed = memory.needs(variants), tenths * 5 * 10**8
    try:
        batches = passes(variants, memory, allowed)
    except TokenError:
        pairs = [memory.nbytes([needs[REFERENCE], needs[name]]) for name in variants]
        assert max(pairs) > allowed
        return
    assert all(batch[0] == REFERENCE for batch in batches)
    assert Counter(name for batch in batches for name in batch[1:]) == Counter(variants.keys() - {REFERENCE})
    assert all(memory.nbytes(needs[name] for name in batch) <= allowed for batch in batches)
    if memory.nbytes(needs.values()) <= allowed:
        assert len(batches) == 1


def test_work_is_shared_until_policies_differ():
    """Counted by hand: one state, and from the layer on in which a policy first differs one more."""
    tokens, window = 2 * 512, 512

    def layer_work(layer):
        # 128 queries at a time against the keys up to theirs.
        scores = 2 * 128 * (128 + 256 + 384 + 512) * E4B.layers[layer].attention.num_heads
        return tokens * LAYER_WEIGHTS[layer] + 2 * scores * E4B.layers[layer].attention.head_dim

    def states(*policies):
        *layers, head = work(list(with_reference({str(p): p for p in policies}, E4B).values()), E4B, 2, window)
        assert head % (tokens * 262144 * 2560) == 0
        return [work_ / layer_work(layer) for layer, work_ in enumerate(layers)], head // (tokens * 262144 * 2560)

    assert states() == ([1] * 42, 1)
    assert states(PolicySpec.parse("ple=lru:7")) == ([1] * 42, 1)
    assert states(PolicySpec.parse("mlp=int4")) == ([2] * 42, 2)
    assert states(PolicySpec.parse("full_attention=int4")) == ([1] * 5 + [2] * 37, 2)
    assert states(Variant(PolicySpec.parse("mlp@20=int4"))) == ([1] * 20 + [2] * 22, 2)
    # Layer 30 has no K and V of its own.
    assert states(Variant(PolicySpec.parse("kv@30=int4"))) == ([1] * 42, 1)
    assert states(PolicySpec.parse("kv=fp32/full.k=int4")) == ([1] * 5 + [2] * 37, 2)
    assert states(PolicySpec.parse("embedding=int4"), PolicySpec.parse("mlp=int4")) == ([3] * 42, 3)


def test_work_grows_linearly_with_policies_and_tokens():
    four = [Variant(PolicySpec.parse(f"mlp=int{bits}")) for bits in (3, 4, 5, 6)]
    assert work(four, E4B, 1, 512)[0] * 2 == work(four, E4B, 2, 512)[0]
    assert [2 * value for value in work(four[:2], E4B, 1, 512)] == work(four, E4B, 1, 512)


def test_a_weight_is_quantized_once_for_all_policies_that_agree_on_it():
    variants = [Variant(PolicySpec.parse(text)) for text in ("mlp=int4", "mlp=int4,embedding=int8", "ple_table=int8")]
    mlp = sum(math.prod(t.shape) for t in expected_tensors(E4B) if t.tensor_class is TensorClass.MLP)
    assert quantized_numel(variants, E4B) == {
        (WeightSpec("int4"), None): mlp,
        (WeightSpec("int8"), None): 262144 * 2560,
    }
    one = Variant(PolicySpec.parse("mlp@20=int4"))
    assert quantized_numel([one], E4B) == {(WeightSpec("int4"), None): mlp // 42}


def test_every_class_and_kv_spec_is_ablated_alone():
    found = ablations(E4B, [NAMED_KV["int4"], NAMED_KV["p-rope"]])
    assert len(found) == 7 * 6 + 2
    assert {ablation.what for ablation in found} == {*TensorClass, KV_CACHE}
    for ablation in found:
        policy = ablation.policy
        assert set(policy.quantized_classes) == {ablation.tensor_class} - {None}
        assert policy.kv == (ablation.spec if ablation.what == KV_CACHE else NAMED_KV["bf16"])
        assert policy.kv_layers == ()
    assert str(found[0]) == "sliding_attention int8-g128"
    assert str(found[-1]) == "kv_cache p-rope"


def test_by_layer_every_layer_that_has_the_class_is_ablated_alone():
    found = ablations(E4B, [NAMED_KV["int4"]], by_layer=True)
    layers = Counter(ablation.what for ablation in found if ablation.layer is not None)
    # 35 sliding and 7 full layers, 24 with K and V of their own; the two tables and the model projection are of none.
    assert layers == {"sliding_attention": 210, "full_attention": 42, "mlp": 252, "ple_projections": 252, KV_CACHE: 24}
    assert sum(ablation.layer is None for ablation in found) == 43
    one = Ablation(WeightSpec("int4", 128), TensorClass.MLP, 20).policy
    assert one == PolicySpec.parse("mlp@20=int4-g128")
    assert Ablation(NAMED_KV["int4"], None, 3).policy == PolicySpec.parse("kv@3=int4")


def test_groups_fit_the_rows_of_the_class(toy_checkpoint):
    """The toy's PLE table has rows of 96, its MLP of 48 and 80, its attention of 48, 64 and 128."""
    specs = {ablation.what: ablation.spec_name for ablation in ablations(TextConfig.read(toy_checkpoint))}
    assert specs["ple_table"] == "ternary-g128"  # a row shorter than the group is one
    assert specs["mlp"] == "ternary-g128"
    mini = TextConfig.from_json(
        E4B_JSON | {"text_config": E4B_JSON["text_config"] | {"hidden_size_per_layer_input": 32}}
    )
    assert {ablation.spec_name for ablation in ablations(mini) if ablation.what == "ple_table"} == {
        f"{name}-g64" for name in ("int8", "int6", "int5", "int4", "int3", "ternary")
    }


def test_the_plan_has_passes_time_ram_and_disk(toy_checkpoint):
    config = TextConfig.read(toy_checkpoint)
    lines = "\n".join(plan_quality("quality", config, {"x": PolicySpec.parse("mlp=int4")}, 3, 17, 10**9))
    assert "quality, 2 policies with the reference on 3 windows of 17 tokens: 1 pass over the file" in lines
    assert "M weights, about" in lines
    assert "1.00 GB allowed (--memory)" in lines
    assert "with --resume" in lines


TOKENS = 2048


@pytest.mark.slow
def test_four_policies_on_2048_tokens_of_e4bs_layers_take_less_than_6_gb(few_layers_of_e4b, peak, capsys):
    """The growth of the process's anonymous memory at its peak is what the plan allows for, which for E4B is less.

    With all 42 layers nothing grows but the PLE inputs: 2048 tokens × 42 layers × 256 × 4 bytes are 88 MB, and as much
    again while they are made. What waits of a policy is 2048 × (2560 × 4 of hidden state + 12288 of the K and V that
    layers 24 to 41 share) = 46 MB, so five with the reference take 0.23 GB; the largest layer is 97 M weights, 0.39 GB
    decoded to fp32 and at most 0.1 GB quantized under each spec. A larger vocabulary goes by in more slices as large.
    """
    windows = torch.randint(3, 2**15, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    windows[:, 0] = 2
    policies = {name: NAMED[name] for name in ("int8", "int4-g128", "original-4", "int3-g128")}

    def planned(config):
        memory = Memory(config, 1, TOKENS)
        return memory.nbytes(memory.needs(with_reference(policies, config)).values())

    with Checkpoint.open(few_layers_of_e4b) as checkpoint:
        few = planned(TextConfig.read(checkpoint))
        with peak:
            measure(checkpoint, policies, windows, memory_nbytes=6 * 10**9)
    with capsys.disabled():
        print(
            f"\npeak anonymous memory of 4 policies on {TOKENS} tokens of 3 layers of E4B's shape: "
            f"{peak.nbytes / 1e9:.2f} GB, planned {few / 1e9:.2f} GB; planned for all 42: {planned(E4B) / 1e9:.2f} GB"
        )
    assert peak.nbytes <= few
    assert planned(E4B) < 6 * 10**9

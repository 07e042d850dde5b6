import itertools

import pytest

from epic_quant.errors import RecipeError
from epic_quant.recipe.assignment import within_bits, within_resident
from epic_quant.records import JSON_KEY, Record
from epic_quant.results.reading import read_run
from epic_quant.results.sensitivities import class_specs, predicted_divergence

from .conftest import BITS, DIVERGENCES, PARTS, WHOLE, entry, sensitivity, stored


@pytest.fixture
def run(data, write):
    return read_run(write(data))


def every_assignment():
    """Spec by class, divergence, stored bytes, and resident bytes with all that is fixed, by hand."""
    alone = {
        name: [("bf16", 0.0, WHOLE[name])]
        + [(spec, kl, stored(WHOLE[name], spec)) for spec, kl in zip(BITS, DIVERGENCES[name], strict=True)]
        for name in WHOLE
    }
    for chosen in itertools.product(*alone.values()):
        nbytes = dict(zip(alone, (nbytes for _, _, nbytes in chosen), strict=True))
        resident = nbytes["full_attention"] + nbytes["mlp"] + -(-nbytes["ple_table"] // 4) + 500 + 10_000 + 8_000
        specs = dict(zip(alone, (spec for spec, _, _ in chosen), strict=True))
        yield specs, sum(kl for _, kl, _ in chosen), sum(nbytes.values()), resident


def specs_of(recipe):
    return {unit.tensor_class: choice.spec for unit, choice in recipe.parts}


@pytest.mark.parametrize("budget", [41_000, 45_000, 60_000, 90_000, 150_000, 10**9])
def test_no_other_assignment_of_as_many_resident_bytes_diverges_less(budget, run):
    recipe = within_resident(run, budget)
    _, best, _, _ = min((one for one in every_assignment() if one[3] <= budget), key=lambda one: one[1])
    assert recipe.predicted == pytest.approx(best)
    (counted,) = (one for one in every_assignment() if one[0] == specs_of(recipe))
    assert recipe.resident_nbytes == counted[3] <= budget
    assert recipe.nbytes == counted[2]


def test_what_is_kept_stays_as_it_is(run):
    recipe = within_resident(run, 160_000, keep=["mlp"])
    kept = [one for one in every_assignment() if one[0]["mlp"] == "bf16" and one[3] <= 160_000]
    assert recipe.predicted == pytest.approx(min(one[1] for one in kept))
    assert recipe.resident_nbytes == next(one[3] for one in kept if one[0].items() >= specs_of(recipe).items())
    assert "mlp" not in recipe.policy


def test_what_is_not_there_cannot_be_kept(run):
    with pytest.raises(RecipeError, match="no sensitivities of 'mpl' to leave out; there are of full_attention, mlp"):
        within_resident(run, 10**9, keep=["mpl"])


@pytest.mark.parametrize("bits", [2.0, 4.2, 5.5, 8.0, 16.0])
def test_bits_are_the_average_over_all_weights(bits, run):
    recipe = within_bits(run, bits)
    weights = sum(WHOLE.values()) / 2
    fitting = [one for one in every_assignment() if 8 * one[2] / weights <= bits]
    assert recipe.predicted == pytest.approx(min(one[1] for one in fitting))
    assert recipe.bits_per_weight == pytest.approx(8 * recipe.nbytes / weights)
    assert recipe.bits_per_weight <= bits


def test_the_smallest_budget_is_said_and_is_enough(run):
    with pytest.raises(RecipeError, match=r"39 bytes is too small: the least that these specs need is ([0-9,]+)$") as e:
        within_resident(run, 39)
    smallest = int(str(e.value).rpartition(" ")[2].replace(",", ""))
    assert smallest == min(one[3] for one in every_assignment())
    assert specs_of(within_resident(run, smallest)) == dict.fromkeys(WHOLE, "ternary-g128")
    with pytest.raises(RecipeError, match="too small"):
        within_resident(run, smallest - 1)


def test_the_fewest_bits_are_said_and_are_enough(run):
    with pytest.raises(RecipeError, match=r"1.5 bits a weight are too few: the least that these specs need is 1.75$"):
        within_bits(run, 1.5)
    assert within_bits(run, 1.75).bits_per_weight == 1.75


def test_the_policy_string_keeps_as_many_ple_rows_by_use(run):
    assert within_resident(run, 10**9).policy == "kv=bf16,ple=lru:5000"
    assert within_bits(run, 1.75).policy == (
        "full_attention=ternary-g128,mlp=ternary-g128,ple_table=ternary-g128,kv=bf16,ple=lru:5000"
    )


def test_a_kv_policy_is_chosen_by_its_bytes_in_ram_and_is_no_weight(data, write):
    record = sensitivity("kv_cache", "int4+had", 0.0002, 2_000, 8_000)
    record.details["spec"] = "int4+had512"
    data["benchmarks"].append(entry(record))
    run = read_run(write(data))
    tight = within_resident(run, 39_000)
    assert "kv=int4+had512," in tight.policy
    assert "kv=bf16" in within_resident(run, 10**9).policy
    assert "kv=bf16" in within_bits(run, 1.75).policy
    assert tight.resident_nbytes <= 39_000


def test_a_class_by_layer_gets_a_spec_for_each_layer(data, write):
    for layer, divergences in (("0", (0.001, 0.2)), ("2", (0.0001, 0.01))):
        for spec, divergence in zip(("int8-g128", "int4-g128"), divergences, strict=True):
            nbytes = stored(64_000, spec)
            data["benchmarks"].append(entry(sensitivity("mlp", spec, divergence, nbytes, 64_000, layer=layer)))
    data["benchmarks"].append(entry(sensitivity("kv_cache", "int4", 1e-9, 500, 1_000, layer="0")))
    run = read_run(write(data))
    recipe = within_resident(run, 91_500, by_layer=True)
    assert "kv_cache" not in {unit.tensor_class for unit, _ in recipe.parts}, "there is one KV policy for all layers"
    mlp = {unit.layer: choice.spec for unit, choice in recipe.parts if unit.tensor_class == "mlp"}
    assert mlp == {0: "int8-g128", 2: "int4-g128"}
    assert recipe.resident_nbytes <= 91_500
    specs = class_specs(recipe.policy)
    assert {specs.get("mlp@0", specs["mlp"]), specs.get("mlp@2", specs["mlp"])} == set(mlp.values())
    assert predicted_divergence(run, recipe.policy) == pytest.approx(recipe.predicted)
    assert [unit.layer for unit, _ in within_resident(run, 110_000).parts] == [None, None, None]


def test_without_a_footprint_resident_bytes_come_from_quality_or_not_at_all(data, write):
    footprint = data["benchmarks"].pop(0)
    with pytest.raises(RecipeError, match=r"resident bytes of bf16.*--bits.*pytest benchmarks/test_quality.py"):
        within_resident(read_run(write(data)), 60_000)
    assert within_bits(read_run(write(data)), 4.2).resident_nbytes is None
    parts = footprint["extra_info"][JSON_KEY]["details"]["parts"]
    assert parts == PARTS
    data["benchmarks"].append(entry(Record("quality", {"policy": "bf16"}, {"kl_divergence": 0.0}, {"parts": parts})))
    assert within_resident(read_run(write(data)), 60_000).resident_nbytes <= 60_000


@pytest.mark.parametrize("by_layer", [False, True])
def test_without_sensitivities_the_command_that_makes_them_is_told(by_layer, data, write):
    data["benchmarks"] = [
        one for one in data["benchmarks"] if one["extra_info"][JSON_KEY]["labels"].get("text") != "calibration"
    ]
    option = "--by-layer " if by_layer else ""
    with pytest.raises(RecipeError, match=f"pytest benchmarks/test_quality.py {option}--benchmark-json"):
        within_resident(read_run(write(data)), 60_000, by_layer)

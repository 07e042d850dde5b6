"""The figures of the report, each against a formula or a search over the same values."""

import math

import pytest

from epic_quant.records import JSON_KEY
from epic_quant.records.subjects import (
    PLEHitsRecord,
    PLEStartRecord,
    PLETextRecord,
    QualityRecord,
    SensitivityRecord,
    SyntheticRecord,
    WeightsRecord,
)
from epic_quant.report.analysis import footprint, kv, ple, policies, recipes, sensitivity, speed, weights
from epic_quant.report.analysis.pareto import front
from epic_quant.report.analysis.quality import proxies
from epic_quant.results.reading import parse_run
from epic_quant.results.run import Run
from epic_quant.spec import NOISE_FLOOR, PolicySpec, TensorClass, WeightSpec

from .conftest import RECIPE, entry, made, quality, recipe


@pytest.fixture
def run(run_json):
    return lambda *subjects: parse_run(run_json(*subjects), "x")


def of(*records, **facts):
    """A run of these records alone."""
    return Run(facts, tuple(record.to_record() for record in records))


def rated(**known):
    """Policies by (MB, error)."""
    return [policies.Rated(name, size * 1e6, error, 0.01) for name, (size, error) in known.items()]


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ([("a", 1, 3), ("b", 2, 2), ("c", 3, 1)], "abc"),
        ([("a", 1, 1), ("b", 2, 2)], "a"),
        ([("a", 1, 2), ("b", 1, 1)], "b"),
        ([("a", 1, 1), ("b", 2, 1)], "a"),
        ([], ""),
    ],
)
def test_a_front_has_what_nothing_as_small_equals(points, names):
    assert "".join(name for name, _, _ in front(points)) == names


def test_every_size_has_the_least_error_that_fits_in_it():
    known = {"big": (40, 0.1), "small": (10, 1.0), "worse": (20, 1.5), "middle": (15, 0.5), "off": (50, 0.2)}
    found = policies.choices(of(), rated(**known), None)
    assert [(one.rated.policy, one.upper) for one in found] == [("small", 15e6), ("middle", 40e6), ("big", math.inf)]
    # The same by trying: at any size, nothing that fits has less.
    for mb in range(10, 60):
        fitting = {name: error for name, (size, error) in known.items() if size <= mb}
        chosen = [one for one in found if one.rated.nbytes <= mb * 1e6 < one.upper]
        assert [one.rated.policy for one in chosen] == [min(fitting, key=fitting.get)]


def test_the_reason_is_the_gain_over_the_next_smaller_and_what_is_beaten():
    found = policies.choices(
        of(), rated(small=(10, 1.0), worse=(20, 1.5), middle=(15, 0.5), exact=(30, 0.0)), noise_floor=0.6
    )
    small, middle, exact = found
    assert (small.gain, small.more_nbytes, small.beaten) == (None, None, ())
    assert (middle.gain, middle.more_nbytes, middle.beaten) == (2.0, 5e6, (("worse", 3.0),))
    assert [one.is_within_noise for one in found] == [False, True, False]
    assert exact.gain is None


def test_a_gain_within_the_noise_is_not_worth_its_bytes():
    found = policies.choices(of(), rated(small=(10, 0.51), big=(20, 0.5), bigger=(30, 0.4)), None)
    assert [(one.rated.policy, one.upper) for one in found] == [("small", 30e6), ("bigger", math.inf)]


def test_what_stores_the_same_is_not_beaten_and_recipes_come_last():
    run = of(
        recipe("int8", "chosen", 10e6, 0.5),
        recipe("int8", "in bf16", 11e6, 0.9),
        quality("int4-g128", 12e6, 2.0),
        quality("int8", 13e6, 3.0),
        quality("mlp=int4", 12e6, 0.6, spec=PolicySpec.parse("mlp=int4")),
    )
    (one,) = policies.choices(run, policies.by_divergence(run), None)
    assert [name for name, _ in one.beaten] == ["int4-g128", "int8", "mlp=int4"]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.1, RECIPE), (0.03, RECIPE), (0.02, "int4-g128"), (0.01, "bf16")]
)
def test_the_smallest_policy_within_a_divergence(threshold, expected, run):
    rated = policies.by_divergence(run("quality"))
    assert policies.smallest_within(rated, threshold).policy == expected
    assert (
        min(one.nbytes for one in rated if one.error <= threshold) == policies.smallest_within(rated, threshold).nbytes
    )


def test_recipes_are_called_by_their_size_and_others_by_their_name():
    run = of(
        quality("bf16", 40e6, 0.0),
        quality(RECIPE, 25_440_000, 0.1, spec=PolicySpec.parse(RECIPE)),
        recipe("bf16", "chosen", 25_400_000, 0.1),
        recipe("int8", "in bf16", 25_400_000, 0.2),
        recipe("int4-g128", "chosen", 25_400_000, 0.1),
        policy_strings={"mlp=int4": "mlp=int4"},
    )
    assert policies.names(run) == {
        "mlp=int4": "recipe",
        "bf16": "bf16",
        RECIPE: "recipe, 25.44 MB",
        # Two that store the same are one recipe.
        "recipe at bf16, K and V chosen": "recipe, 25.40 MB",
        "recipe at int4-g128, K and V chosen": "recipe, 25.40 MB",
        "recipe at int8, K and V in bf16": "recipe with K and V in bf16, 25.4 MB",
    }


def test_different_recipes_never_share_a_name():
    texts = ("mlp=int4", "mlp=int5", "mlp=int6")
    run = of(*(quality(text, 25_400_000, 0.1, spec=PolicySpec.parse(text)) for text in texts))
    assert len(set(policies.names(run).values())) == len(texts)


def test_a_prediction_is_compared_with_what_was_measured_and_with_policies_of_as_many_bytes(run):
    _, (one, *_) = recipes.predictions(run("quality", "sensitivity"))
    assert one.record.policy == RECIPE
    assert one.predicted == pytest.approx(0.025)
    assert one.ratio == pytest.approx(1.2)
    assert one.is_near
    assert (one.rivals, one.better) == (("original-1.58",), ())


@pytest.mark.parametrize(("divergence", "better"), [(0.0299, ()), (0.028, ("int4-g128",))])
def test_a_better_policy_of_fewer_bytes_is_named_beyond_a_standard_error(divergence, better):
    given = quality(RECIPE, 26.5e6, 0.03, spec=PolicySpec.parse(RECIPE), kl_se=1e-3)
    _, (one,) = recipes.predictions(of(given, quality("int4-g128", 26.5e6, divergence, kl_se=1e-3)))
    assert one.better == better


def test_recipes_made_are_counted_by_what_was_done_with_k_and_v(run, run_json):
    data = run_json("quality", "sensitivity")
    # That a recipe takes a little less than the policy at whose bytes it was made is no excuse.
    records = [recipe("original-1.58", "in bf16", 25.7e6, 0.02), recipe("int4-g128", "in bf16", 26.65e6, 0.04)]
    data["benchmarks"] += [entry(record) for record in records]
    run = parse_run(data, "x")
    made_here, _ = recipes.predictions(run)
    assert [one.better for one in made_here] == [(), ("int4-g128",)]
    (group,) = recipes.groups(run, made_here)
    assert (group.kv, group.num_compared, group.num_no_worse, group.num_near) == ("in bf16", 2, 1, 1)
    assert group.ratios == pytest.approx((0.02 / 0.018, 0.04 / 0.018))
    assert group.originals == (("original-1.58", 0.5, 0.02),)


def test_a_policys_weight_error_weighs_classes_by_their_weights(run):
    (proxy,) = (one for one in proxies(run("quality", "weights")) if one.of == "policies")
    errors = {divergence: error for _, error, divergence in proxy.points}
    # Both classes have as many bytes and bits, so as many weights.
    assert errors[0.02] == pytest.approx(((0.0812**2 + 0.0931**2) / 2) ** 0.5)
    assert proxy.correlation is None, "of two points there is none"


def test_errors_of_single_classes_are_paired_with_their_divergence(run):
    (proxy,) = proxies(run("ladder", "sensitivity"))
    # Of the ladder's specs only int4-g128 is among the sensitivities; on the evaluation text.
    assert proxy.points == (
        ("sliding_attention", pytest.approx(0.108), pytest.approx(0.011)),
        ("mlp", pytest.approx(0.099), pytest.approx(0.0088)),
    )


def test_the_class_that_costs_most_for_each_mb(run):
    found = sensitivity.costs(run("sensitivity"))
    assert (found.costliest.tensor_class, found.costliest.spec) == ("sliding_attention", "int3-g128")
    # 0.01 · 1.7 · 1.1 nats for 5.2 · (1 - 3.125/16) MB.
    assert found.costliest.kl_per_mb == pytest.approx(0.0187 / (5.2 * (1 - 3.125 / 16)))
    assert (found.cheapest.tensor_class, found.cheapest.spec) == ("mlp", "int4-g128")
    assert found.by_width == (("int4", "sliding_attention"), ("int3", "sliding_attention"))


def test_a_layer_is_no_class():
    layer = made(SensitivityRecord, tensor_class="mlp", spec="int4", text="evaluation", layer=7, kl_per_mb=9.0)
    assert sensitivity.costs(of(layer)) is None


def alone(tensor_class, spec, divergence, kl_per_mb, **values):
    values = {"layer": None, "text": "evaluation"} | values
    return made(
        SensitivityRecord, tensor_class=tensor_class, spec=spec, kl_divergence=divergence, kl_per_mb=kl_per_mb, **values
    )


def test_what_people_ask_about_is_told_at_8_and_4_bits_beside_computing_in_bf16():
    """The best spec of that width, all of whose codes have it; others under the same spec by their median."""
    run = of(
        quality(NOISE_FLOOR, None, 2e-5),
        alone("ple_projections", "int8-g128", 1e-5, 0.06),
        alone("ple_projections", "int4-g128", 0.004, 0.9),
        alone("ple_projections", "codebook4", 0.003, 0.8),
        alone("ple_projections", "int4-g128", 1e-9, 1e-9, layer=3),
        *(alone(name, "int8-g64", 1e-5, cost) for name, cost in (("mlp", 0.01), ("embedding", 0.03))),
        alone("full_attention", "int8-g128", 1e-5, 0.02),
        alone("mlp", "codebook4", 0.1, 0.4),
        alone("kv_cache", "int8", 2.1e-5, 0.1),
        alone("kv_cache", "k=int8/v=int4", 1e-9, 0.1),
        alone("kv_cache", "int4+had512", 0.5, 0.1),
    )
    found, about = sensitivity.asked(run), pytest.approx
    assert {
        name: [(one.bits, one.record.spec, one.of_noise, one.of_others) for one in widths]
        for name, widths in found.items()
    } == {
        "kv_cache": [(8, "int8", about(1.05), None), (4, "int4+had512", about(25_000), None)],
        "ple_projections": [(8, "int8-g128", about(0.5), about(3)), (4, "codebook4", about(150), about(2))],
    }


def test_nothing_is_told_of_a_noise_floor_that_is_missing_or_nothing_or_of_another_text():
    record = alone("kv_cache", "int8", 1e-5, 0.1)
    assert sensitivity.asked(of(record)) == {}
    assert sensitivity.asked(of(record, quality(NOISE_FLOOR, None, 0.0))) == {}
    calibration = alone("kv_cache", "int8", 1e-5, 0.1, text="calibration")
    assert sensitivity.asked(of(calibration, quality(NOISE_FLOOR, None, 2e-5))) == {}


def test_published_figures_are_met_to_the_digit_or_not(run):
    found = {(record.policy, part): met for record, part, met in footprint.published(run("footprint"))}
    assert found == {
        ("bf16", "attention"): True,
        ("bf16", "ple_hot"): True,
        ("original-1.58", "attention"): False,
        ("original-1.58", "ple_hot"): True,
    }


def test_the_worst_of_the_weights(run):
    found = run("weights")
    assert [(one.policy, one.tensor_class) for one in weights.worst_classes(found)] == [
        ("original-1.58", "sliding_attention"),
        ("int4-g128", "mlp"),
    ]
    name, record, error = weights.worst_tensor(found)
    assert (name, record.policy, error) == ("layers.0.sliding_attention", "original-1.58", 1.108 * 1.01)


def test_speeds_are_bytes_over_the_median_time_beside_the_copy_or_the_slowest():
    def timed(policy, spec, seconds, op="quantize"):
        values = {"policy": policy, "tensor_class": TensorClass.MLP, "specs": (WeightSpec.parse(spec),), "op": op}
        return made(WeightsRecord, bytes_read=1e9, time_s=seconds, **values)

    run = of(*(timed(policy, "int4", seconds) for policy, seconds in (("a", 0.5), ("b", 1.0), ("c", 0.8))))
    records = [record.__class__.from_record(record.to_record()) for record in weights.timed(run, "quantize")]
    assert [weights.speed_gbs(record) for record in records] == [pytest.approx(1.25)]
    copies = [timed("x", "bf16", 0.25), timed("a", "int4", 0.5), timed("a", "int3", 1.0)]
    assert weights.reference_gbs(copies) == {"mlp": 4.0}
    assert weights.reference_gbs(copies[1:]) == {"mlp": 1.0}


def test_e4b_takes_its_bytes_over_the_speed(run):
    found = {str(one.spec): weights.e4b_seconds(one) for one in run("synthetic").of(SyntheticRecord)}
    # 10 MB in 10 and in 50 ms; three billion weights are 6 GB in bf16.
    assert found == {"absmax4": pytest.approx(6.0), "int4-g128": pytest.approx(30.0)}


@pytest.mark.parametrize(
    ("spec", "series"),
    [
        ("int4-g128", "integer"),
        ("int2-g32+had64+gptq", "integer+had+gptq"),
        ("absmax3-packed", "absmax"),
        ("ternary-g128", "ternary"),
    ],
)
def test_specs_that_differ_in_size_alone_are_one_series(spec, series):
    assert weights.series(WeightSpec.parse(spec)) == series


def test_the_fastest_and_slowest(run):
    sliding, full = speed.blocks(run("block"))
    assert (sliding.of, sliding.fastest, sliding.slowest) == ("sliding_attention", ("int4-g128", 0.5), ("fp32", 2.0))
    assert full.of == "full_attention"
    (product,) = speed.products(run("kernels"))
    assert product.fastest == ("int4 int8", pytest.approx(0.2))


def test_errors_of_attention_are_compared_on_full_layers(run):
    found = {(name, other): ratio for name, other, ratio in kv.error_ratios(run("kv"))}
    assert found == {
        ("p-rope", "original"): pytest.approx(0.4),
        ("p-rope", "original+ls"): pytest.approx(0.6),
        ("original-inverted", "original+ls"): pytest.approx(0.75),
    }
    assert kv.inverted_ratio(run("kv")) == pytest.approx(0.75)
    assert kv.inverted_ratio(of()) is None


def test_the_front_of_kv_specs_is_at_the_longest_context(run):
    assert kv.divergence_front(run("kv_divergence")) == [
        ("p-rope", 345, 0.1), ("int4", 530, 0.02), ("bf16", 2000, 2e-6), ("fp32", 4000, 2e-14)
    ]  # fmt: skip


def test_claims_stand_beside_what_is_stored(run):
    sliding, full = kv.claims(run("kv_bytes"))
    assert (sliding.claimed, sliding.by_its_arithmetic, sliding.stored) == (4.0, 4.0, pytest.approx(5.0))
    assert (full.claimed, full.by_its_arithmetic, full.stored) == (5.8, 6.4, pytest.approx(5.0))
    assert kv.claims(of()) == []


def test_rows_for_a_hit_rate_lie_on_the_line_over_the_logarithm(run):
    by_residency = {one.residency: one for one in run("ple_hits").of(PLEHitsRecord)}
    # 500 rows have 60%, 5,000 have 80% and 50,000 have 95%: 90% lie two thirds of the way.
    assert ple.reach(by_residency["lru"], 0.9).rows == pytest.approx(5000 * 10 ** (2 / 3))
    assert ple.reach(by_residency["lru"], 0.99) is None
    least = ple.reach(by_residency["optimum"], 0.9)
    assert (least.rows, least.is_least_tried) == (500, True)


def test_the_best_residency_does_not_know_the_future(run):
    found = run("ple_hits").of(PLEHitsRecord)
    assert [(way.target, way.record.residency) for way in ple.best(found)] == [(0.9, "lru"), (0.95, "lru")]
    assert ple.best(found)[0].of_optimum == pytest.approx(10 ** (2 / 3) * 10)
    assert ple.lowest_ids_rate(found) == 0.2


def test_published_texts_follow_the_measured_ones_once_each(run):
    found = ple.texts(run("ple_starts").of(PLETextRecord))
    assert [(text.name, text.is_measured, text.lowest_ids) for text in found] == [
        ("Zipf 1.0", True, 0.5), ("own.npy", True, 0.5), ("a manual", False, 0.32)
    ]  # fmt: skip
    assert found[-1].rows == {"90%": 1566, "95%": 3275}


def test_starts_are_compared_at_the_originals_rows_with_an_empty_one(run):
    records = run("ple_starts").of(PLEStartRecord, residency="lru")
    assert ple.starts(records) == {"nothing": 273.4, "the shipped list": 31.4}
    assert ple.starts(records[1:]) == ple.starts(records[:1]) == {}


@pytest.mark.parametrize(
    ("policy", "marked"),
    [
        ("ple_table=int4", [("ple_table", "int4", False, 0.25)]),
        ("ple_table=int4+gptq", [("ple_table", "int4+gptq", False, 0.25)]),
        ("ple_table=int8,ple_projections=int8-g32", []),
        # A part of the class, and specs that were not measured alone, count too.
        ("ple_projections@0-3=int4-g32", [("ple_projections", "int4-g32", True, None)]),
        ("ple_projections.per_layer_projection=ternary", [("ple_projections", "ternary", True, None)]),
        ("ple_projections=int4,ple_projections@2=int8", [("ple_projections", "int4", True, None)]),
        ("mlp=int4", []),
    ],
)
def test_policies_below_eight_bits_in_ple_tensors_are_marked(policy, marked, run_json):
    data = run_json("ple_guard")
    data[JSON_KEY]["policy_strings"] = {"mine": policy}
    data["benchmarks"].append(entry(recipe("int4-g128", "in bf16", 1, 0.1, spec=PolicySpec.parse(policy)), 1.0))
    run = parse_run(data, "x")
    found = ple.marked(run)
    assert [(one.tensor_class, str(one.spec), one.is_partial, one.kl_divergence) for one in found] == marked
    assert ple.num_recipes_marked(run) == bool(marked)


def test_the_noise_floor_is_no_policy(run):
    found = run("quality")
    assert policies.noise_floor(found) == 2e-5
    assert NOISE_FLOOR not in {one.policy for one in policies.by_divergence(found)}
    assert {one.policy for one in policies.quantized(found)} == {"original-1.58", "int4-g128", RECIPE}


def test_policies_come_in_the_runs_order(run_json):
    data = run_json("quality")
    data["benchmarks"].reverse()
    assert [one.policy for one in parse_run(data, "x").of(QualityRecord)][:3] == ["bf16", "original-1.58", "int4-g128"]

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.errors import GateError
from epic_quant.records import METRICS, Record
from epic_quant.results.gate import Condition, check_limits
from epic_quant.results.reading import parse_run
from epic_quant.results.run import Run

MACHINE = {"cpu": "a", "threads": 2, "platform": "x"}


def run_of(*records, **facts):
    return Run(MACHINE | facts, tuple(Record(subject, labels, metrics) for subject, labels, metrics in records))


def quality(divergence, policy="int4", **metrics):
    return "quality", {"policy": policy}, {"kl_divergence": divergence} | metrics


def one(text, run, baseline=None, **options):
    (result,) = check_limits([Condition.parse(text)], run, baseline, **options)
    return result


def error_of(text, run=None, baseline=None):
    with pytest.raises(GateError) as caught:
        check_limits([Condition.parse(text)], run or run_of(quality(0.1)), baseline)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run(run_json):
    return parse_run(run_json(), "out.json")


@pytest.mark.parametrize(
    ("text", "metric", "where", "limit", "relative"),
    [
        ("kl_divergence:0.05", "kl_divergence", {}, 0.05, False),
        ("rel_l2[class=mlp]:+5%", "rel_l2", {"tensor_class": "mlp"}, 0.05, True),
        ("nbytes:+0%", "nbytes", {}, 0.0, True),
        ("rel_l2[tensor_class=mlp, spec=int4]:-2.5%", "rel_l2", {"tensor_class": "mlp", "spec": "int4"}, -0.025, True),
        ("hit_rate[residency=static+lru]:0.9", "hit_rate", {"residency": "static+lru"}, 0.9, False),
        ("nbytes[subject=quality]:3.5GB", "nbytes", {"subject": "quality"}, 3.5e9, False),
        ("time_s:2ms", "time_s", {}, 0.002, False),
        ("time_s:2e-3", "time_s", {}, 0.002, False),
        ("shannon_gap_db:-0.5", "shannon_gap_db", {}, -0.5, False),
        (
            'kl_divergence[policy="mlp=int4,ple=lru:7",subject=quality]:1',
            "kl_divergence",
            {"policy": "mlp=int4,ple=lru:7", "subject": "quality"},
            1.0,
            False,
        ),
        ("kl_divergence[policy=ple=lru:7]:1", "kl_divergence", {"policy": "ple=lru:7"}, 1.0, False),
    ],
)
def test_conditions_are_read(text, metric, where, limit, relative):
    condition = Condition.parse(text)
    assert condition == Condition(text, METRICS[metric], where, pytest.approx(limit), relative)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_divergence", "is not a condition METRIC[label=value,…]:LIMIT, such as kl_divergence:0.05"),
        ("", "is not a condition"),
        ("kl_divergence[policy=a:1", "is not a condition"),
        ("kl_divergance:1", "unknown metric 'kl_divergance'; did you mean kl_divergence"),
        (":1", "unknown metric ''"),
        ("kl_divergence:", "'' is not a limit, such as 0.05, +5% or -2%"),
        ("kl_divergence:much", "'much' is not a limit"),
        ("kl_divergence:nan", "'nan' is not a limit"),
        ("kl_divergence:inf", "'inf' is not a limit"),
        ("kl_divergence:5%", "5% of what? Relative to the baseline it is +5% or -5%"),
        ("kl_divergence:+5.5.5%", "is not a limit"),
        ("nbytes:3.5XB", "'3.5XB' is not a limit, such as 3.5GB"),
        ("nbytes:-1", "is not a limit"),
        ("time_s:2min", "'2min' is not a limit, such as 2ms"),
        ("rel_l2[]:1", "expected label=value between the brackets"),
        ("rel_l2[class=mlp,]:1", "expected label=value between the brackets"),
        ("rel_l2[mlp]:1", "'mlp' is not label=value"),
        ("rel_l2[class=mlp,class=embedding]:1", "names class twice"),
        ("rel_l2[class=mlp,tensor_class=embedding]:1", "names tensor_class twice"),
        ('rel_l2[class="mlp]:1', "is not label=value"),
    ],
)
def test_what_is_no_condition_is_reported(text, message):
    with pytest.raises(GateError) as caught:
        Condition.parse(text)
    assert message in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_an_error(text):
    try:
        Condition.parse(f"kl_divergence[{text}]:1")
        Condition.parse(text)
    except GateError:
        pass


NUMBERS = st.floats(-1e6, 1e6)


@given(NUMBERS, NUMBERS)
def test_a_limit_is_on_the_bad_side(value, limit):
    """KL divergence is better lower, top-1 agreement higher."""
    run = run_of(quality(value, top1_agreement=value))
    assert one(f"kl_divergence:{limit!r}", run).fails == (value > limit)
    assert one(f"top1_agreement:{limit!r}", run).fails == (value < limit)


@given(NUMBERS, st.integers(1, 10**6), st.integers(-50, 50))
def test_a_relative_limit_is_counted_from_the_baseline(value, before, percent):
    limit = before * (1 + percent / 100)
    results = one(f"kl_divergence:{percent:+d}%", run_of(quality(value)), run_of(quality(before)))
    # Beside the limit itself, what is allowed for rounding: a millionth of the baseline.
    assert results.limit == pytest.approx(limit, rel=1e-9, abs=2e-6 * before)
    if abs(value - limit) > 1e-5 * before:
        assert results.fails == (value > limit)
    higher = one(
        f"top1_agreement:{percent:+d}%",
        run_of(quality(0.0, top1_agreement=value)),
        run_of(quality(0.0, top1_agreement=before)),
    )
    if abs(value - limit) > 1e-5 * before:
        assert higher.fails == (value < limit)


def test_a_negative_value_may_get_worse_by_a_part_of_its_magnitude():
    now, before = (run_of(("ladder", {"spec": "int4"}, {"shannon_gap_db": value})) for value in (-1.04, -1.0))
    assert not one("shannon_gap_db:+5%", now, before).fails
    assert one("shannon_gap_db:+5%", run_of(("ladder", {"spec": "int4"}, {"shannon_gap_db": -0.94})), before).fails


def test_a_byte_more_is_more_and_rounding_is_not():
    def bytes_of(nbytes):
        return run_of(("quality", {"policy": "int4"}, {"nbytes": nbytes}))

    assert one("nbytes:+0%", bytes_of(3_500_000_001), bytes_of(3_500_000_000)).fails
    assert not one("nbytes:+0%", bytes_of(3_500_000_000), bytes_of(3_500_000_000)).fails
    assert not one("kl_divergence:+0%", run_of(quality(0.1 + 1e-9)), run_of(quality(0.1))).fails
    assert not one("kl_divergence:+0%", run_of(quality(3e-14)), run_of(quality(1e-14))).fails
    assert one("kl_divergence:+0%", run_of(quality(0.1001)), run_of(quality(0.1))).fails


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_could_not_be_measured_fails(value):
    assert one("kl_divergence:1", run_of(quality(value))).fails
    assert one("kl_divergence:+1%", run_of(quality(value)), run_of(quality(0.1))).fails
    assert one("kl_divergence:+1%", run_of(quality(0.1)), run_of(quality(value))).fails


def test_labels_select(run):
    def selected(text):
        return [(one.subject, *one.labels.values()) for one in check_limits([Condition.parse(text)], run)]

    assert selected("rel_l2[class=mlp]:1") == [
        ("weights", "int4-g128", "mlp", "int4-g128", "quantize"),
        ("ladder", "int4", "mlp"),
    ]
    assert selected("rel_l2[class=mlp,policy=int4-g128]:1") == [
        ("weights", "int4-g128", "mlp", "int4-g128", "quantize")
    ]
    assert selected("rel_l2[subject=ladder]:1") == [("ladder", "int4", "mlp"), ("ladder", "int4", "embedding")]


def test_several_conditions_are_each_on_their_own(run):
    results = check_limits([Condition.parse("kl_divergence:0.01"), Condition.parse("nbytes:1GB")], run)
    assert {(one.condition.metric.name, one.fails) for one in results} == {
        ("kl_divergence", False),
        ("kl_divergence", True),
        ("nbytes", False),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hit_rate:0.5", "nothing in this run has the metric hit_rate; it has added_rel_l2, bits_per_weight"),
        ("kl_divergence[polcy=bf16]:1", "unknown label of kl_divergence 'polcy'; did you mean policy?"),
        ("kl_divergence[policy=int4-g12]:1", "unknown policy of kl_divergence 'int4-g12'; did you mean int4-g128?"),
        ("rel_l2[class=mpl]:1", "unknown tensor_class of rel_l2 'mpl'; did you mean mlp?"),
        ("kl_divergence[subject=block]:1", "unknown subject of kl_divergence 'block'; known: quality"),
        ("rel_l2[subject=ladder,policy=int4-g128]:1", "bears all these labels together"),
        ("nbytes[policy=mlp=int4,kv=int8]:1", "unknown policy of nbytes 'mlp=int4'"),
        ("nbytes[policy=bf16,kv=int8]:1", "unknown label of nbytes 'kv'; known: column"),
    ],
)
def test_what_selects_nothing_is_an_error(text, message, run):
    assert message in error_of(text, run)


def test_a_label_that_is_no_label_says_how_a_comma_is_written(run):
    assert "a value with a comma stands in double quotes" in error_of("nbytes[policy=bf16,kv=int8]:1", run)


def test_relative_limits_need_a_baseline():
    assert "Name an older run with --baseline" in error_of("kl_divergence:+5%")


def test_what_only_one_run_has_fails_a_relative_limit():
    now, before = run_of(quality(0.1, "new"), quality(0.1)), run_of(quality(0.1), quality(0.1, "gone"))
    results = {one.labels["policy"]: one for one in check_limits([Condition.parse("kl_divergence:+5%")], now, before)}
    assert {name: one.fails for name, one in results.items()} == {"new": True, "int4": False, "gone": True}
    assert (results["new"].before, results["new"].limit) == (None, None)
    assert (results["gone"].value, results["gone"].before) == (None, 0.1)


def test_a_metric_that_was_lost_fails_a_relative_limit():
    before = run_of(quality(0.1, perplexity=9.0))
    now = run_of(quality(0.1), quality(0.1, "other", perplexity=9.0))
    results = check_limits([Condition.parse("perplexity:+5%")], now, before)
    assert {one.labels["policy"]: one.fails for one in results} == {"other": True, "int4": True}


def test_times_of_another_machine_count_only_when_asked_for():
    now, before = (run_of(("block", {"policy": "x"}, {"time_s": 1.0}), cpu=cpu) for cpu in ("a", "b"))
    assert "with --compare-times they count" in error_of("time_s:+5%", now, before)
    assert not one("time_s:+5%", now, before, times=True).fails
    assert not one("time_s:+5%", now, now).fails
    assert not one("time_s:2", now, before).fails

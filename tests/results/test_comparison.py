import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.records import METRICS, Record
from epic_quant.results.comparison import Change, Difference, compare
from epic_quant.results.reading import parse_run
from epic_quant.results.run import Run


@pytest.fixture
def run(run_json):
    return parse_run(run_json(), "out.json")


def change(metric, before, now):
    return Change("quality", {}, METRICS[metric], before, now)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_verdict_is_the_metrics_direction(before, now):
    if abs(now - before) > 1e-5 * before:
        assert change("kl_divergence", before, now).verdict == ("better" if now < before else "worse")
        assert change("hit_rate", before, now).verdict == ("better" if now > before else "worse")
        assert change("kl_divergence", before, now).relative == pytest.approx(now / before - 1)


@pytest.mark.parametrize(
    ("metric", "before", "now", "verdict"),
    [
        ("nbytes", 10**10, 10**10 + 1, "worse"),
        ("nbytes", 0, 0, "same"),
        ("kl_divergence", 1e-14, 4e-14, "same"),
        ("rel_l2", 0.1, 0.1 + 1e-8, "same"),
        ("perplexity", float("inf"), float("inf"), "same"),
        ("perplexity", float("inf"), 3.0, "better"),
        ("time_s", 1.0, 1.09, "same"),
        ("time_s", 1.0, 0.89, "better"),
        ("time_s", 1.0, 1.2, "worse"),
        ("rel_l2", None, 0.1, None),
        ("rel_l2", 0.1, None, None),
    ],
)
def test_what_is_the_same_and_what_is_not(metric, before, now, verdict):
    assert change(metric, before, now).verdict == verdict


def test_a_run_is_the_same_as_itself(run):
    found = compare(run, run)
    assert found.differences == found.only_before == found.only_now == ()
    assert {one.verdict for one in found.changes} == {"same"}
    values = sum(value is not None for record in run.records for value in record.metrics.values())
    assert len(found.changes) == values


def test_facts_that_differ_are_reported_before_and_now(run, run_json):
    data = run_json()
    facts = data["epic_quant"]
    facts["versions"]["torch"] = "2.10.0"
    facts["checkpoint"]["fingerprint"] = "ffff"
    facts["policy_strings"] |= {"int4-g128": "mlp=int4-g64", "new": "mlp=int3"}
    facts["read_bandwidth_gbs"] = 21.0
    del facts["cpu"]
    assert compare(parse_run(data, "x"), run).differences == (
        Difference("checkpoint fingerprint", "0123abcd", "ffff"),
        Difference("policy_strings int4-g128", "mlp=int4-g128", "mlp=int4-g64"),
        Difference("versions torch", "2.9.0", "2.10.0"),
        Difference("cpu", "a processor", None),
        Difference("policy_strings new", None, "mlp=int3"),
    )


@pytest.mark.parametrize("fact", ["cpu", "threads", "platform"])
def test_times_are_compared_on_one_machine_or_when_asked_for(fact, run, run_json):
    data = run_json()
    data["epic_quant"][fact] = "another"
    other = parse_run(data, "x")

    def times(found):
        return sum(one.metric.name == "time_s" for one in found.changes)

    assert compare(run, run).with_times
    assert times(compare(run, run)) == times(compare(run, other, times=True)) > 0
    assert times(compare(run, other)) == 0
    assert not compare(run, other).with_times


def test_what_one_run_has_alone_is_named():
    labels = [{"policy": name} for name in ("old", "both", "new")]
    records = [Record("quality", each, {"kl_divergence": 0.1}) for each in labels]
    found = compare(Run({}, tuple(records[1:])), Run({}, tuple(records[:2])))
    assert [one.labels["policy"] for one in found.only_before] == ["old"]
    assert [one.labels["policy"] for one in found.only_now] == ["new"]
    assert [one.labels["policy"] for one in found.changes] == ["both"]


def test_labels_are_the_same_in_any_order():
    labels = {"policy": "x", "tokens": "1"}
    runs = [
        Run({}, (Record("block", dict(order), {"nbytes": 1}),)) for order in (labels.items(), reversed(labels.items()))
    ]
    assert len(compare(*runs).changes) == 1

import pytest

from epic_quant.records import Record
from epic_quant.report.blocks import Bullets, Heading, Table
from epic_quant.report.markdown import render
from epic_quant.report.sections import comparison
from epic_quant.report.sections.baseline import blocks, findings, where
from epic_quant.results.comparison import compare
from epic_quant.results.gate import Condition
from epic_quant.results.reading import parse_run
from epic_quant.results.run import Run

MACHINE = {"cpu": "a", "threads": 2, "platform": "x"}


def run_of(*records, **facts):
    return Run(MACHINE | facts, tuple(Record("quality", {"policy": name}, metrics) for name, metrics in records))


def tables(found):
    return {
        heading.text: next(block for block in found[index:] if isinstance(block, Table))
        for index, heading in enumerate(found)
        if isinstance(heading, Heading)
    }


@pytest.fixture
def moved():
    before = run_of(("a", {"kl_divergence": 0.1, "hit_rate": 0.5}), ("b", {"kl_divergence": 0.2, "hit_rate": 0.5}))
    now = run_of(("a", {"kl_divergence": 0.125, "hit_rate": 0.5}), ("b", {"kl_divergence": 0.1, "hit_rate": 0.5}))
    return compare(now, before)


def test_each_metric_that_moved_has_a_table_worst_first(moved):
    found = tables(blocks(moved))
    assert list(found) == ["kl_divergence", "Unchanged"]
    assert "1 worse, 1 better. KL divergence of" in render(blocks(moved))
    assert found["kl_divergence"].rows == (
        ("quality", "`policy=a`", "worse", "0.1000 nat", "0.1250 nat", "+25%"),
        ("quality", "`policy=b`", "better", "0.2000 nat", "0.1000 nat", "-50%"),
    )
    assert found["Unchanged"].rows == (("`hit_rate`", "2"),)


def test_the_findings_count_and_name_the_largest(moved):
    first, loss, gain = findings(moved)
    assert first == "Against the baseline: 1 worse, 1 better, 2 unchanged."
    assert "`kl_divergence` of quality `policy=a` went from 0.1000 nat to 0.1250 nat (+25%)" in loss
    assert "`policy=b`" in gain


def test_what_differs_comes_first():
    found = blocks(compare(run_of(versions={"torch": "2"}), run_of(versions={"torch": "1"})))
    assert isinstance(found[1], Table)
    assert found[1].rows == (("versions torch", "`1`", "`2`"),)


def test_times_that_are_not_compared_are_told():
    one, other = (run_of(("a", {"time_s": 1.0}), cpu=cpu) for cpu in "ab")
    assert "Times are not compared" in render(blocks(compare(one, other)))
    assert "Times are not compared" not in render(blocks(compare(one, other, times=True)))
    assert findings(compare(one, other)) == ["The baseline measured nothing that this run measured."]


def test_what_one_run_has_alone_is_named():
    found = blocks(
        compare(run_of(("a", {"nbytes": 1}), ("new", {"nbytes": 1})), run_of(("a", {"nbytes": 1}), ("old", {})))
    )
    assert [block.items for block in found if isinstance(block, Bullets)] == [
        ("quality: `policy=old`",),
        ("quality: `policy=new`",),
    ]


def test_a_value_that_is_no_longer_measured_is_told():
    found = tables(blocks(compare(run_of(("a", {"kl_per_mb": None})), run_of(("a", {"kl_per_mb": 0.5})))))
    assert found["kl_per_mb"].rows == (("quality", "`policy=a`", "—", "0.5000 nat/MB", "—", "—"),)


def test_labels_read_back_as_a_condition():
    labels = {"policy": "mlp=int4,ple=lru:7", "tensor_class": "mlp"}
    assert Condition.parse(f"rel_l2[{where(labels)}]:1").where == labels


def test_it_stands_in_the_report_only_where_there_is_a_baseline(run_json):
    run = parse_run(run_json("quality"), "x")
    assert "Against the baseline" not in render(comparison(run))
    text = render(comparison(run, compare(run, run)))
    assert "## Against the baseline" in text
    values = [name for record in run.records for name, value in record.metrics.items() if value is not None]
    times = values.count("time_s")
    assert f"- Against the baseline: {len(values) - times} unchanged." in text
    assert f"- Times against the baseline: {times} unchanged." in text

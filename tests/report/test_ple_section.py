"""What the report says of the PLE row cache."""

import pytest

from epic_quant.errors import ReportError
from epic_quant.records import JSON_KEY
from epic_quant.report.blocks import Figure, Findings, Paragraph, Table
from epic_quant.report.sections import comparison
from epic_quant.results.reading import read_run


@pytest.fixture
def report(write_json):
    return lambda data: comparison(read_run(write_json(data)))


def texts(blocks):
    return "\n".join(
        block.text if isinstance(block, Paragraph) else "\n".join(block.items)
        for block in blocks
        if isinstance(block, Paragraph | Findings)
    )


def tables(blocks):
    return [block for block in blocks if isinstance(block, Table)]


def test_sizes_for_a_hit_rate_lie_between_the_measured_ones(run_json, report):
    table = tables(report(run_json("ple_hits")))[0]
    by_policy = {row[0]: row[-3:] for row in table.rows}
    # From 0.8 at 5,000 rows to 0.95 at 50,000: two thirds of the way over the logarithm.
    assert by_policy["lru"] == (f"{5000 * 10 ** (2 / 3) * 21_504 / 1e6:,.1f}", "1,075.2", "—")
    assert by_policy["optimum"][0] == "≤ 10.8", "the fewest rows that were tried are enough"
    assert by_policy["static, lowest ids"] == ("—", "—", "—")


def test_findings_name_the_best_policy_and_the_originals_rule(run_json, report):
    said = texts(report(run_json("ple_hits")))
    assert "90% with 499.1 MB (lru, 46.4× the optimum's)" in said
    assert "lowest ids as the original kept give 20.0%" in said


def test_the_plot_has_every_policy_and_the_originals_point(run_json, report):
    (figure,) = (block for block in report(run_json("ple_hits")) if isinstance(block, Figure))
    for name in ("lru", "optimum", "static, lowest ids", "the original's point", "Zipf 1.0"):
        assert f">{name}</text>" in figure.svg


def test_speed_is_told_beside_dense_and_the_original(run_json, report):
    said = texts(report(run_json("ple_speed")))
    assert "0.500 of `index_select`'s throughput at 1" in said
    assert "200× the layer lookups a second of the original's way" in said
    assert "cold rows 64 at once 4.00× as fast as one by one" in said


def test_a_policy_below_eight_bits_is_marked_with_its_effect(run_json, report):
    data = run_json("ple_guard")
    data[JSON_KEY]["policy_strings"] = {"mine": "ple_table=int4,kv=bf16", "other": "ple_table=int8,ple=all"}
    said = texts(report(data))
    assert "`mine`, ple_table `int4`: 0.250" in said
    assert "`other`" not in said
    assert "No policy of this run" in texts(report(run_json("ple_guard")))


@pytest.mark.parametrize("curve", [[0.5], [0.1, 0.2, "x"], "abc", [0.1, 0.2, float("inf")]])
def test_a_damaged_curve_is_told(curve, run_json, report):
    data = run_json("ple_hits")
    data["benchmarks"][1]["extra_info"][JSON_KEY]["details"]["hit_rates"] = curve
    with pytest.raises(ReportError, match="no hit rate for each capacity"):
        report(data)

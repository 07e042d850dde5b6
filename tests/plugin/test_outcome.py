"""What stands at the end of a run: the table, the limits, the report; and what a run that is not timed says."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from epic_quant.plugin import outcome
from epic_quant.plugin.journal import Measured
from epic_quant.plugin.outcome import by_first_label, every_record
from epic_quant.records import JSON_KEY, Record
from epic_quant.report import terminal
from epic_quant.results.reading import read_run

REPOSITORY = Path(__file__).resolve().parents[2]
FOOTPRINT = "benchmarks/test_footprint.py"


@pytest.fixture
def footprint(model, run_pytest):
    """`footprint(*options)`: a short run under one policy besides bf16."""

    def run(*options, **where):
        return run_pytest(REPOSITORY / FOOTPRINT, "--checkpoint", model, "--policy", "original-4", *options, **where)

    return run


def table_of(printed):
    """The lines of the plugin's own part at the end."""
    return printed.rpartition(" epic_quant =")[2].splitlines()[1:]


def test_the_run_ends_with_a_table_of_100_columns_and_says_where_everything_is(finished):
    lines = table_of(finished.printed)
    end = lines.index(f"JSON: {finished.path}")
    assert max(map(len, lines[: lines.index("")])) <= 100
    assert any(re.match(r"weights +original-4 +rel_l2 +0\.\d+…0\.\d+ ", line) for line in lines[:end])
    assert "values within their limit" in "\n".join(lines[:end])
    assert f"report: {finished.report / 'COMPARISON.md'}" in lines[:end]


def test_the_report_made_by_the_run_is_that_of_its_json(finished, tmp_path, run_report):
    run_report(finished.path, "--out", tmp_path, "--fail-if", "rel_l2[subject=weights]:1")
    own, later = ((folder / "COMPARISON.md").read_text(encoding="utf-8") for folder in (finished.report, tmp_path))
    assert "mlp=ternary" in own
    assert "1,653.4" in own
    # The minute may have changed between the two.
    assert own.split("## Limits")[1] == later.split("## Limits")[1]


def test_a_run_that_ends_leaves_no_partial_file_and_misses_nothing(finished):
    assert sorted(path.name for path in finished.path.parent.iterdir()) == ["out.json", "report"]
    assert finished.json[JSON_KEY]["missing"] == finished.json[JSON_KEY]["failed"] == []


def test_a_value_over_its_limit_ends_pytest_with_status_1_and_the_json_is_there(footprint, tmp_path):
    out = tmp_path / "out.json"
    limits = ["--fail-if", "nbytes[model=E4B,column=resident]:4GB", "--fail-if", "nbytes[policy=bf16]:100GB"]
    status, printed = footprint(*limits, "--benchmark-json", out)
    assert status == 1
    lines = table_of(printed)
    assert "1 of 6 values past their limit" in lines
    assert any(line.startswith("nbytes  footprint  policy=bf16,model=E4B,column=resident") for line in lines)
    assert f"report: python -m epic_quant.report {out}" in lines
    assert len(read_run(out).records) == 8


def test_a_run_is_held_to_an_older_one(footprint, finished, tmp_path):
    """No JSON is asked for; the two runs share bf16 and original-4."""
    status, printed = footprint("--baseline", finished.path, "--fail-if", "nbytes[policy=original-4,model=E4B]:+0%")
    assert status == 0, printed
    assert "2 of 2 values within their limit" in printed
    assert "Against the baseline: " in printed
    older = json.loads(finished.path.read_text(encoding="utf-8"))
    for entry in older["benchmarks"]:
        metrics = entry["extra_info"][JSON_KEY]["metrics"]
        metrics["nbytes"] = metrics.get("nbytes", 0) - 1
    changed = tmp_path / "old.json"
    changed.write_text(json.dumps(older), encoding="utf-8")
    status, printed = footprint("--baseline", changed, "--fail-if", "nbytes[policy=original-4,model=E4B]:+0%")
    assert status == 1
    assert "2 of 2 values past their limit" in printed


def test_a_limit_that_selects_nothing_is_status_2(footprint):
    status, printed = footprint("--fail-if", "nbytes[modl=E4B]:1GB")
    assert status == 2
    assert "error: nbytes[modl=E4B]:1GB: unknown label of nbytes 'modl'; did you mean model?" in printed


def test_without_times_the_rest_is_measured_and_checked(footprint):
    status, printed = footprint("--benchmark-disable", "--fail-if", "nbytes[model=E4B]:1GB")
    assert status == 1
    assert "nothing was timed, since --benchmark-disable was given" in printed
    assert "of 4 values past their limit" in printed


def test_a_run_that_skips_everything_fails_its_limits(footprint):
    status, printed = footprint("--benchmark-skip", "--fail-if", "nbytes:1TB")
    assert status == 2
    assert "error: this run: holds no records of epic_quant" in printed


def test_in_several_processes_one_line_says_why_nothing_was_measured(footprint):
    pytest.importorskip("xdist")
    status, printed = footprint("-n", "1")
    assert status == 0, printed
    assert "nothing was measured, since tests run in several processes (-n)" in printed
    status, printed = footprint("-n", "1", "--fail-if", "nbytes:1GB")
    assert status == 4
    assert "no --report, --baseline or --fail-if: nothing is measured, since tests run in several processes" in printed


def test_saving_and_comparing_are_pytest_benchmarks_own(footprint, tmp_path):
    """The saved file is a report's too; one of another machine is compared all the same."""
    status, printed = footprint("--benchmark-save", "first", "--benchmark-only", cwd=tmp_path)
    assert status == 0, printed
    (saved,) = tmp_path.rglob("*_first.json")
    assert len(read_run(saved).records) == 8
    data = json.loads(saved.read_text(encoding="utf-8"))
    data["machine_info"]["node"] = "another"
    saved.write_text(json.dumps(data), encoding="utf-8")
    status, printed = footprint("--benchmark-compare", "--benchmark-autosave", cwd=tmp_path)
    assert status == 0, printed
    assert "(NOW)" in printed
    assert len(list(tmp_path.rglob("*.json"))) == 2


def configure(**options):
    """Configure the outcome as pytest would, with these options."""
    given = {"fail_if": [], "baseline": None, "report": None, "benchmark_disable": False} | options
    config = SimpleNamespace(
        option=argparse.Namespace(**given),
        stash=pytest.Stash(),
        getoption=lambda name, default=None: given.get(name, default),
    )
    outcome.pytest_configure(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail_if": ["kl_divergance:1"]}, "unknown metric 'kl_divergance'"),
        ({"fail_if": ["kl_divergence:1", "nbytes:+5%"]}, "Name an older run with --baseline"),
        ({"fail_if": ["nbytes"]}, "is not a condition"),
    ],
)
def test_an_invalid_limit_ends_pytest_before_it_begins(options, message):
    with pytest.raises(pytest.exit.Exception, match=message) as caught:
        configure(**options)
    assert caught.value.returncode == 2


def test_a_baseline_that_cannot_be_read_ends_pytest_before_it_begins(tmp_path):
    with pytest.raises(pytest.exit.Exception, match=r"none\.json: no such file") as caught:
        configure(baseline=tmp_path / "none.json")
    assert caught.value.returncode == 2


def test_a_folder_that_no_report_can_be_written_to_ends_pytest_before_it_begins(tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(pytest.exit.Exception, match="taken is no folder that can be written to") as caught:
            configure(report=folder)
        assert caught.value.returncode == 2
    configure(report=tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()


def measured(policy, tokens, error, median):
    stats = None if median is None else SimpleNamespace(stats=SimpleNamespace(median=median, rounds=3))
    metrics = {"added_rel_l2": error, "nbytes": 5_000_000, "kl_per_mb": None}
    return Measured(
        "test", Record("block", {"policy": policy, "tokens": tokens}, metrics), SimpleNamespace(stats=stats)
    )


def test_the_table_has_a_row_for_each_policy_with_its_range():
    records = [measured("a", "1", 0.1, 1e-3), measured("a", "16", 0.25, 2e-3), measured("b", "1", 0.5, None)]
    assert by_first_label(records).rows == (
        ("block", "a", "added_rel_l2", "0.100…0.250", "1.00…2.00 ms"),
        ("block", "b", "added_rel_l2", "0.500", "—"),
    )
    assert [row[1] for row in every_record(records).rows] == ["a 1", "a 16", "b 1"]


def test_the_divergence_is_what_a_row_shows_where_there_is_one():
    metrics = {"perplexity": 20.0, "kl_divergence": 0.02}
    records = [Measured("test", Record("quality", {"policy": "a"}, metrics), SimpleNamespace(stats=None))]
    assert by_first_label(records).rows == (("quality", "a", "kl_divergence", "0.0200 nat", "—"),)


def test_a_long_policy_does_not_make_the_table_wider():
    records = [measured("sliding_attention=ternary," * 9, "1", 0.1, 1e-3)]
    assert max(map(len, terminal.render(every_record(records)).splitlines())) <= 100

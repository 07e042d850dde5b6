"""The words of the report: one of a run with everything in it, whole, as Markdown.

A change of words shows as a difference here and nowhere else. To renew the snapshot, and then read what changed:

    RENEW_SNAPSHOT=1 pytest tests/report/test_snapshot.py; git diff tests/report/snapshots
"""

import copy
import os
from pathlib import Path

from epic_quant import __version__
from epic_quant.records import JSON_KEY
from epic_quant.records.subjects import SensitivityRecord
from epic_quant.report import markdown
from epic_quant.report.sections import comparison
from epic_quant.results.comparison import compare
from epic_quant.results.gate import Condition, check_limits
from epic_quant.results.reading import parse_run

from .conftest import entry, made, recipe

SNAPSHOT = Path(__file__).parent / "snapshots" / "report.md"


def whole(run_json):
    """A run with every subject and recipes, that did not end well, fails a limit, and is held against an older run."""
    data = run_json()
    for tensor_class, spec, divergence, saved in (
        ("kv_cache", "int8", 1.5e-5, 2_000_000),
        ("kv_cache", "int4", 0.012, 3_000_000),
        ("ple_projections", "int4-g128", 0.002, 400_000),
    ):
        record = made(
            SensitivityRecord,
            tensor_class=tensor_class,
            spec=spec,
            text="evaluation",
            kl_divergence=divergence,
            saved_nbytes=saved,
            kl_per_mb=1e6 * divergence / saved,
        )
        data["benchmarks"].append(entry(record, 1.0))
    for at, kv, nbytes, divergence in (
        ("original-1.58", "in bf16", 25_700_000, 0.02),
        ("original-1.58", "chosen", 25_600_000, 0.01),
        ("int4-g128", "in bf16", 26_650_000, 0.04),
    ):
        data["benchmarks"].append(entry(recipe(at, kv, nbytes, divergence), 1.0))
    data[JSON_KEY]["policy_strings"]["in few bits"] = "ple_table=int4,kv=bf16,ple=all"
    older = copy.deepcopy(data)
    data[JSON_KEY] |= {"missing": ["benchmarks/test_block.py::test_block[int4-1]"], "failed": ["test_kv.py::test_kv"]}
    older[JSON_KEY]["commit"] = "0123456789ab"
    for one in older["benchmarks"][1:]:
        metrics = one["extra_info"][JSON_KEY]["metrics"]
        if metrics.get("kl_divergence"):
            metrics["kl_divergence"] *= 0.9
        if metrics.get("hit_rate"):
            metrics["hit_rate"] *= 0.9
    del older["benchmarks"][-1]
    run, baseline = parse_run(data, "run"), parse_run(older, "older")
    conditions = [Condition.parse(text) for text in ("kl_divergence[subject=quality]:+5%", "top1_agreement:0.98")]
    return comparison(run, compare(run, baseline), check_limits(conditions, run, baseline))


def test_the_report_says_what_the_snapshot_says(run_json):
    text = markdown.render(whole(run_json)).replace(f"epic_quant {__version__}", "epic_quant VERSION")
    if os.environ.get("RENEW_SNAPSHOT"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(text, encoding="utf-8", newline="\n")
    assert text == SNAPSHOT.read_text(encoding="utf-8")

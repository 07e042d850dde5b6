"""How the report is made up: sections, tables and plots. `test_snapshot` has its words, `test_analysis` its figures."""

import ast
from pathlib import Path

import pytest

from epic_quant.records import JSON_KEY
from epic_quant.records.subjects import BlockRecord, QualityRecord, SensitivityRecord, WeightsRecord
from epic_quant.report import layer_map, plots, sections
from epic_quant.report.blocks import Figure, Heading, Paragraph, Table
from epic_quant.report.columns import Column, table
from epic_quant.report.sections import SECTIONS, comparison
from epic_quant.results.comparison import compare
from epic_quant.results.gate import Condition, labels_text
from epic_quant.results.reading import parse_run
from epic_quant.spec import WeightSpec

from .conftest import RECIPE, entry, made, quality, recipe


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What would be drawn: plots have tests of their own, and take most of the time."""
    found = []
    for name in ("scatter_svg", "heat_map_svg"):
        monkeypatch.setattr(plots, name, lambda plot: found.append(plot) or "<svg/>")
    monkeypatch.setattr(layer_map, "layer_map_svg", lambda plot: "<svg/>")
    return found


@pytest.fixture
def report(run_json):
    return lambda data: comparison(parse_run(data, "x"))


def under(blocks, title):
    """The blocks between a heading and the next of its level or above."""
    start = next(i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.text == title)
    found = []
    for block in blocks[start + 1 :]:
        if isinstance(block, Heading) and block.level <= blocks[start].level:
            break
        found.append(block)
    return found


def rows(blocks, title, index=0):
    """A table under a heading, as {first cell: {column: cell}}."""
    found = [block for block in under(blocks, title) if isinstance(block, Table)][index]
    return {row[0].strip("`"): dict(zip(found.columns, row, strict=True)) for row in found.rows}


def test_sections_come_in_order(run_json, report):
    titles = [block.text for block in report(run_json()) if isinstance(block, Heading) and block.level == 2]
    sections = [section.title for section in SECTIONS]
    assert titles == ["Which policy for how many MB", "What else to know", *sections, "How this was measured"]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_a_section_without_records_names_the_command(section, run_json, report):
    subject = "footprint" if section.title != "Footprint" else "block"
    (paragraph,) = under(report(run_json(subject, kind="user")), section.title)
    command = f"pytest {section.benchmark} --checkpoint benchmarks/mini_gemma4 --benchmark-json out.json"
    assert f"`{command}`" in paragraph.text


def test_a_table_is_declared_as_columns_over_rows():
    columns = (
        Column("name", lambda pair: pair[0], text=True),
        Column("value", lambda pair: pair[1], lambda value: f"{value:.1f}"),
        Column("remark", lambda pair: pair[0] * 2, text=True),
    )
    found = table(columns, [("a", 1), ("b", 2.25)])
    assert found.rows == (("a", "1.0", "aa"), ("b", "2.2", "bb"))
    assert [found.is_text(index) for index in range(3)] == [True, False, True]


def test_blocks_have_ratios_to_bf16_and_to_the_machine(run_json, report):
    blocks = report(run_json("block"))
    row = rows(blocks, "sliding_attention, 1 token")["int4-g128"]
    assert list(row.values()) == ["`int4-g128`", "0.100", "0.0100", "1.00", "0.500×", "5.0", "5.00", "25%"]
    assert "GB/s" not in rows(blocks, "sliding_attention, 16 tokens")["bf16"]
    assert list(rows(blocks, "sliding_attention, 1 token")) == ["bf16", "original-1.58", "int4-g128", "fp32"]


def test_an_unknown_bandwidth_is_missing_and_not_drawn(run_json, report, drawn):
    data = run_json("block")
    report(data)
    (line,) = drawn[-1].lines
    # 20 GB/s: MB over GB/s is ms.
    assert all(ms / 1e3 == pytest.approx(mb * 1e6 / 20e9) for mb, ms in line.points)
    data[JSON_KEY]["read_bandwidth_gbs"] = None
    assert rows(report(data), "full_attention, 1 token")["bf16"]["of read bandwidth"] == "—"
    assert drawn[-1].lines == []


def test_a_class_that_a_policy_does_not_quantize_has_no_value(run_json, report):
    row = rows(report(run_json("weights")), "Weights")["original-1.58"]
    assert row == {"policy": "`original-1.58`", "sliding_attention": "1.11", "mlp": "—"}


def test_a_class_with_several_specs_names_them_all(run_json, report):
    data = run_json("weights")
    specs = (WeightSpec("int4"), WeightSpec("int8"))
    record = made(WeightsRecord, policy="bf16", tensor_class="mlp", specs=specs, op="quantize", rel_l2=2.0)
    data["benchmarks"].append(entry(record, 1.0))
    assert "`int4, int8`" in under(report(data), "Weights")[0].items[0] + under(report(data), "Weights")[0].items[1]
    assert "int4, int8" in rows(report(data), "Speed of quantize")


def test_the_ladder_climbs_in_bits(run_json, report):
    assert list(rows(report(run_json("ladder")), "mlp")) == ["int2", "int4-g128", "bf16"]


def test_contexts_and_lengths_are_sorted_as_numbers(run_json, report):
    blocks = report(run_json("kv_divergence", "kv_bytes"))
    assert list(rows(blocks, "KV cache: divergence")["int4"])[3:] == ["at 128", "at 1024"]
    assert list(rows(blocks, "KV cache of E4B, MB")["bf16"])[1::2] == ["1,024 tokens", "131,072 tokens"]


def test_divergences_that_are_rounding_are_not_drawn(run_json, report, drawn):
    report(run_json("kv_divergence"))
    assert {point.series for point in drawn[0].points} == {"bf16", "int4", "original", "p-rope"}


def test_layers_have_a_panel_for_each_spec(run_json, report, drawn):
    data = run_json("sensitivity")
    record = made(
        SensitivityRecord, tensor_class="mlp", spec="int3-g128", text="evaluation", layer=7, kl_divergence=0.5
    )
    data["benchmarks"].append(entry(record))
    assert "mlp, layer 7 `int3-g128" in rows(report(data), "On the evaluation text")
    cells = drawn[-1]
    assert plots.Cell("int3-g128", "mlp", "7", 0.5) in cells
    assert {cell.value for cell in cells if (cell.row, cell.column) == ("mlp", "int4")} == {0.008 * 1.1}


def test_recipes_go_by_their_name_everywhere(run_json, report, drawn):
    data = run_json()
    data["benchmarks"].append(entry(recipe("original-1.58", "chosen", 25_600_000, 0.001), 1.0))
    blocks = report(data)
    choice = rows(blocks, "Which policy for how many MB")
    assert [row["choose"] for row in choice.values()] == ["`recipe, 25.6 MB`", "`bf16`"]
    strings = rows(blocks, "The recipes among these")
    assert strings["recipe, 25.6 MB"]["what `--policy` takes for it"].startswith("`sliding_attention=int4-g128,mlp=")
    assert "recipe, 26.5 MB" in rows(blocks, "Quality")
    assert rows(blocks, "Recipes")["original-1.58"]["recipe"] == "`recipe, 25.6 MB`"
    (plot,) = (plot for plot in drawn if isinstance(plot, plots.Scatter) and plot.x.label == "resident MB")
    assert {point.name for point in plot.points} >= {"recipe, 25.6 MB", "recipe, 26.5 MB", "int4-g128"}
    assert {point.series for point in plot.points} >= {"recipes", "recipe, 26.5 MB"}
    texts = [text for block in blocks for text in getattr(block, "items", [getattr(block, "text", "")])]
    named = [text for text in texts if RECIPE in text]
    assert all("`recipe, 26.5 MB`" in text for text in named)
    assert not any("recipe at" in text for text in texts)


def test_without_quality_a_block_decides_and_nothing_is_drawn(run_json, report):
    blocks = report(run_json("footprint", "block"))
    found = rows(blocks, "Which policy for how many MB")
    assert [row["choose"] for row in found.values()] == ["`original-1.58`", "`int4-g128`", "`bf16`"]
    assert "error of a block" in next(iter(found.values()))
    assert not any(isinstance(block, Figure) for block in under(blocks, "Which policy for how many MB"))


@pytest.mark.parametrize("subject", ["ladder", "block", "footprint"])
def test_without_a_size_or_an_error_the_command_is_named(subject, run_json, report):
    (paragraph,) = under(report(run_json(subject, kind="user")), "Which policy for how many MB")
    assert isinstance(paragraph, Paragraph)
    assert "`pytest benchmarks/test_quality.py --checkpoint benchmarks/mini_gemma4" in paragraph.text


def test_a_users_checkpoint_is_not_compared_with_e4b(run_json, report):
    titles = [
        next(iter(rows(report(run_json(kind=kind)), "Which policy for how many MB").values()))
        for kind in ("trained-small", "user")
    ]
    assert ["E4B's resident MB" in row for row in titles] == [True, False]


def test_every_figure_has_a_text_and_a_name_of_its_own(run_json, report):
    figures = [block for block in report(run_json()) if isinstance(block, Figure)]
    assert len(figures) == len({figure.file_name for figure in figures}) == 10
    assert all(len(figure.alt) > 40 for figure in figures)


def test_facts_that_are_not_there_are_missing(run_json, report):
    data = run_json("block")
    data[JSON_KEY] = {"schema_version": data[JSON_KEY]["schema_version"], "checkpoint": {"source": "x", "kind": "user"}}
    facts = rows(report(data), "How this was measured")
    assert {facts[name]["value"] for name in ("fingerprint", "bytes", "processor", "threads", "seed")} == {"—"}


def test_of_many_tests_that_are_missing_a_few_are_named(run_json, report):
    data = run_json("block")
    data[JSON_KEY]["missing"] = [f"benchmarks/test_kv.py::test_kv[int{number}]" for number in range(9)]
    (missing,) = (block for block in report(data) if isinstance(block, Table) and block.columns[0] == "test")
    assert missing.rows[0][1].endswith("`int5`, and 3 more")
    assert missing.rows[0][2] == "9"


def test_the_baseline_has_a_table_for_each_metric_that_moved_worst_first(run_json):
    def run_of(*divergences):
        data = run_json("block")
        data["benchmarks"] = [entry(quality(f"p{index}", 1e6, value)) for index, value in enumerate(divergences)]
        return parse_run(data, "x")

    now, before = run_of(0.125, 0.1), run_of(0.1, 0.2)
    blocks = comparison(now, compare(now, before))
    found = [block for block in under(blocks, "kl_divergence") if isinstance(block, Table)]
    assert found[0].rows == (
        ("quality", "`policy=p0`", "worse", "0.1000 nat", "0.1250 nat", "+25%"),
        ("quality", "`policy=p1`", "better", "0.2000 nat", "0.1000 nat", "-50%"),
    )
    assert "resident_nbytes" in rows(blocks, "Unchanged")


def test_labels_read_back_as_a_condition():
    labels = {"policy": "mlp=int4,ple=lru:7", "tensor_class": "mlp"}
    assert Condition.parse(f"rel_l2[{labels_text(labels)}]:1").where == labels


def test_records_without_metrics_leave_no_section_without_a_table(run_json, report):
    data = run_json("block")
    labels = {"policy": "bf16", "layer_type": "sliding_attention", "tokens": 1}
    data["benchmarks"] = [entry(made(BlockRecord, **labels)), entry(made(QualityRecord, policy="bf16", spec="kv=bf16"))]
    assert rows(report(data), "sliding_attention, 1 token")["bf16"]["ms"] == "—"
    assert rows(report(data), "Quality")["bf16"]["KL divergence"] == "—"


def test_sections_import_no_other_and_analysis_imports_no_block():
    package = Path(sections.__file__).parent
    parts = {path.stem for path in package.glob("*.py")} - {"__init__"}
    for path in package.glob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module == "epic_quant.report.sections"
            for alias in node.names
        }
        assert names == (parts if path.stem == "__init__" else set())
    for path in (package.parent / "analysis").glob("*.py"):
        assert "report.blocks" not in path.read_text("utf-8")

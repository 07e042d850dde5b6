import pytest

from epic_quant.errors import ReportError
from epic_quant.records import JSON_KEY
from epic_quant.report import plots
from epic_quant.report.blocks import Figure, Findings, Heading, Paragraph, Table
from epic_quant.report.sections import SECTIONS, comparison
from epic_quant.report.sections.weights import scheme
from epic_quant.results.reading import read_run


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Plots have tests of their own, and take most of the time."""
    monkeypatch.setattr(plots, "error_over_bits", lambda points: "<svg/>")
    monkeypatch.setattr(plots, "time_over_bytes", lambda points, bandwidth: "<svg/>")
    for name in ("quality_over_bytes", "divergence_over_errors", "heat_map"):
        monkeypatch.setattr(plots, name, lambda *drawn: "<svg/>")
    monkeypatch.setattr(plots, "divergence_over_bytes", lambda points: "<svg/>")


@pytest.fixture
def report(write_json):
    return lambda data: comparison(read_run(write_json(data)))


def under(blocks, title):
    """The blocks between a heading and the next of its level or above."""
    start = next(i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.text == title)
    found = []
    for block in blocks[start + 1 :]:
        if isinstance(block, Heading) and block.level <= blocks[start].level:
            break
        found.append(block)
    return found


def table(blocks, title, index=0):
    """A table under a heading, as {first cell: {column: cell}}."""
    found = [block for block in under(blocks, title) if isinstance(block, Table)][index]
    return {row[0].strip("`"): dict(zip(found.columns, row, strict=True)) for row in found.rows}


def findings(blocks):
    return list(dict.fromkeys(item for block in blocks if isinstance(block, Findings) for item in block.items))


def ablation_records(data, subject, change):
    for entry in data["benchmarks"]:
        record = entry["extra_info"].get(JSON_KEY)
        if record and record["subject"] == subject:
            change(entry, record)


def test_sections_come_in_order(run_json, report):
    titles = [block.text for block in report(run_json()) if isinstance(block, Heading) and block.level == 2]
    sections = ["Footprint", "Weights", "Ladder", "Synthetic weights", "Blocks", "Kernels"]
    sections += ["PLE row cache: hits", "PLE row cache: speed", "PLE below eight bits"]
    sections += ["KV cache: errors", "KV cache: divergence", "KV cache: bytes"]
    sections += ["Quality", "Sensitivity", "Recipes"]
    assert titles == ["Which policy for how many MB", "What else to know", *sections, "How this was measured"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("trained-small", "small model trained for this repository, not of Gemma 4 E4B"),
        ("synthetic", "synthetic"),
        ("user", "`benchmarks/mini_gemma4`"),
    ],
)
def test_the_first_line_says_whose_weights_they_are(kind, said, run_json, report):
    heading, first, *_ = report(run_json("block", kind=kind))
    assert isinstance(heading, Heading)
    assert said in first.text


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_a_subject_that_did_not_run_says_how_to_run_it(section, run_json, report):
    others = [other.subject for other in SECTIONS if other.subject != section.subject]
    (block,) = under(report(run_json(*others)), section.title)
    assert block == Paragraph(f"Not run. To run it: `pytest {section.benchmark} --benchmark-json out.json`")


def test_the_command_names_a_users_checkpoint(run_json, report):
    (block,) = under(report(run_json("block", kind="user")), "Weights")
    assert "--checkpoint benchmarks/mini_gemma4 --benchmark-json" in block.text


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_a_record_without_a_label_is_told(section, run_json, report):
    for label in section.labels:
        data = run_json(section.subject)
        ablation_records(data, section.subject, lambda _, record, label=label: record["labels"].pop(label))
        with pytest.raises(ReportError, match=f"{section.subject}.*lacks '{label}'"):
            report(data)


def test_records_of_an_unknown_subject_change_nothing(run_json, report):
    data = run_json("block")
    other = {"subject": "later", "labels": {}, "metrics": {}, "details": {}}
    expected = report(data)
    data["benchmarks"].append({"name": "t", "extra_info": {JSON_KEY: other}})
    assert report(data) == expected


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_without_values_every_number_prints_as_missing(section, run_json, report):
    data = run_json(section.subject)

    def empty(entry, record):
        entry.pop("stats", None)
        record["metrics"] = dict.fromkeys(record["metrics"])
        record["details"] = {}

    ablation_records(data, section.subject, empty)
    blocks = under(report(data), section.title)
    cells = [cell for block in blocks if isinstance(block, Table) for row in block.rows for cell in row[1:]]
    assert cells
    assert set(cells) == {"—"}
    assert not any(isinstance(block, Figure) for block in blocks)


def test_published_figures_stand_beside_computed_ones(run_json, report):
    rows = table(report(run_json("footprint")), "E4B, as published, MB")
    assert rows["bf16"] == {
        "policy": "`bf16`",
        "attention": "1,284.5 (1,284.5 ✓)",
        "ple_hot": "107.5 (107.5 ✓)",
        "total": "1,392.0",
        "of bf16": "1.00×",
    }
    assert rows["original-1.58"]["attention"] == "207.0 (207.1 ✗)"
    assert rows["original-1.58"]["of bf16"] == "0.226×"
    assert rows["int4-g128"]["attention"] == "330.0"


def test_bytes_that_no_layer_reads_are_told_apart(run_json, report):
    blocks = under(report(run_json("footprint")), "Footprint")
    assert any(isinstance(block, Paragraph) and "110.1 MB" in block.text for block in blocks)


def test_footprint_findings(run_json, report):
    found = findings(report(run_json("footprint")))
    assert "Least resident bytes of E4B: `original-1.58` with 207.0 MB, 0.161× that of `bf16`." in found
    assert any(text.startswith("3 of 4 published") and "`original-1.58` attention" in text for text in found)


def test_errors_and_bits_by_policy_and_class(run_json, report):
    blocks = report(run_json("weights"))
    errors, bits = table(blocks, "Weights", 0), table(blocks, "Weights", 1)
    assert errors["original-1.58"] == {"policy": "`original-1.58`", "sliding_attention": "1.11", "mlp": "—"}
    assert errors["int4-g128"]["mlp"] == "0.0931"
    assert bits["int4-g128"]["mlp"] == "4.125"


def test_speed_is_held_against_the_slowest_where_no_copy_was_timed(run_json, report):
    rows = table(report(run_json("weights")), "Speed of dequantize")
    assert rows["int4-g128"]["sliding_attention"] == "2.00 (2.00×)"
    assert rows["absmax-ternary"]["sliding_attention"] == "1.00 (1.00×)"
    assert rows["absmax-ternary"]["mlp"] == "—"


def test_speed_is_held_against_the_copy_where_it_was_timed(run_json, report):
    data = run_json("weights")
    for tensor_class in ("sliding_attention", "mlp"):
        labels = {"policy": "bf16", "tensor_class": tensor_class, "spec": "bf16", "op": "dequantize"}
        record = {"subject": "weights", "labels": labels, "metrics": {"bytes_read": 1e7}, "details": {}}
        data["benchmarks"].append({"name": "t", "extra_info": {JSON_KEY: record}, "stats": {"median": 0.0025}})
    blocks = report(data)
    assert table(blocks, "Speed of dequantize")["int4-g128"]["mlp"] == "2.00 (0.500×)"
    assert "(2.00×)" not in table(blocks, "Speed of quantize")["int4-g128"]["mlp"]


def test_weights_findings_name_the_worst_and_what_is_worse_than_zeros(run_json, report):
    found = findings(report(run_json("weights")))
    assert any("`original-1.58` sliding_attention (1.11), `int4-g128` mlp (0.0931)" in text for text in found)
    assert "Relative L2 above 1, so worse than storing zeros: `absmax-ternary` on sliding_attention (1.11)." in found
    assert any("`layers.0.sliding_attention` under `absmax-ternary` (1.12)" in text for text in found)


def test_where_nothing_is_worse_than_zeros_the_findings_say_so(run_json, report):
    data = run_json("weights")
    ablation_records(
        data, "weights", lambda _, record: record["metrics"].update(rel_l2=min(0.99, record["metrics"]["rel_l2"]))
    )
    found = findings(report(data))
    assert any(
        text.startswith("Under no policy is a whole class worse") and "`absmax-ternary`" in text for text in found
    )
    assert not any("above 1" in text for text in found)


def test_a_sample_of_rows_is_told(run_json, report):
    data = run_json("weights")
    data[JSON_KEY]["sampled_rows"] = 256
    assert "a seeded sample of 256 rows" in under(report(data), "Weights")[1].text


def test_the_ladder_climbs_in_bits(run_json, report):
    blocks = report(run_json("ladder"))
    assert list(table(blocks, "mlp")) == ["int2", "int4-g128", "bf16"]
    assert table(blocks, "mlp")["int2"] == {
        "spec": "`int2`",
        "bits per weight": "2.000",
        "relative L2": "0.440",
        "the same of Gaussian noise": "0.400",
        "output relative L2": "—",
        "over Shannon, dB": "4.51",
        "over Lloyd-Max, dB": "—",
    }
    assert table(blocks, "Ladder")["sliding_attention"]["kurtosis"] == "3.60"


def test_the_ladder_finding_leaves_the_control_out(run_json, report):
    (found,) = findings(report(run_json("ladder")))
    assert "on mlp (4.51 dB)" in found
    assert "gaussian control" not in found


def test_synthetic_weights_have_errors_by_distribution_and_an_estimate_for_e4b(run_json, report):
    blocks = report(run_json("synthetic"))
    errors, speeds = [block for block in blocks if isinstance(block, Table)][:2]
    assert errors.columns == ("spec", "bits per weight", "Shannon's bound", "Gaussian", "Laplace")
    assert errors.rows[0] == ("`absmax4`", "4.006", "0.0622", "0.100", "0.120")
    # 10 MB in 10 and in 50 ms; three billion weights are 6 GB in bf16.
    assert speeds.rows == (("`absmax4`", "1.00 (1.00×)", "0.10 min"), ("`int4-g128`", "0.200 (0.200×)", "0.50 min"))
    assert any("at most 0.50 min (`int4-g128`)" in finding for finding in findings(blocks))


def test_block_times_have_ratios_to_bf16_and_to_the_machine(run_json, report):
    blocks = report(run_json("block"))
    assert table(blocks, "sliding_attention, 1 token")["int4-g128"] == {
        "policy": "`int4-g128`",
        "error of what is added": "0.100",
        "error of the output": "0.0100",
        "ms": "1.00",
        "of bf16": "0.500×",
        "weights, MB": "5.0",
        "GB/s": "5.00",
        "of read bandwidth": "25%",
    }
    assert "GB/s" not in table(blocks, "sliding_attention, 16 tokens")["bf16"]


def test_block_tables_are_in_the_order_of_tokens_and_policies(run_json, report):
    blocks = under(report(run_json("block")), "Blocks")
    titles = [block.text for block in blocks if isinstance(block, Heading)]
    assert titles[:2] == ["sliding_attention, 1 token", "sliding_attention, 16 tokens"]
    assert list(table(blocks, titles[0])) == ["bf16", "original-1.58", "int4-g128", "fp32"]


def test_products_with_packed_weights_have_ratios_to_bf16_and_to_the_machine(run_json, report):
    blocks = report(run_json("kernels"))
    assert table(blocks, "up [10240, 2560], 1 token")["int4 int8"] == {
        "stored as, activations": "`int4 int8`",
        "computed by": "`avx2, int8 activations`",
        "error": "0.0070",
        "ms": "0.400",
        "of torch bf16": "0.200×",
        "GB/s": "10.0",
        "of read bandwidth": "50%",
    }
    assert "GB/s" not in table(blocks, "up [10240, 2560], 16 tokens")["int4 int8"]
    said = "One token by `up [10240, 2560]`: fastest is `int4 int8`, 5.00 times as fast as `torch bf16`."
    assert said in findings(blocks)


def test_tokens_that_are_no_number_are_told(run_json, report):
    data = run_json("block")
    data["benchmarks"][1]["extra_info"][JSON_KEY]["labels"]["tokens"] = "many"
    with pytest.raises(ReportError, match="'many'"):
        report(data)


def test_an_unknown_bandwidth_is_missing_and_not_drawn(run_json, report):
    data = run_json("block")
    data[JSON_KEY]["read_bandwidth_gbs"] = None
    blocks = report(data)
    assert table(blocks, "full_attention, 1 token")["bf16"]["of read bandwidth"] == "—"
    (figure,) = [block for block in blocks if isinstance(block, Figure)]
    assert "reading" not in figure.alt


def test_the_least_error_within_each_size_leaves_out_what_is_beaten(run_json, report):
    data = run_json("footprint", "block")

    def spoil(_, record):
        if record["labels"]["policy"] == "bf16":
            record["metrics"]["added_rel_l2"] = 0.5

    expected = "adds: `original-1.58` (207.0 MB, 0.900), `int4-g128` (330.0 MB, 0.100), `bf16` (1,284.5 MB, 0.00200)."
    assert any(text.endswith(expected) for text in findings(report(data)))
    ablation_records(data, "block", spoil)
    expected = "adds: `original-1.58` (207.0 MB, 0.900), `int4-g128` (330.0 MB, 0.100)."
    assert any(text.endswith(expected) for text in findings(report(data)))


def test_the_fastest_and_slowest_blocks_are_found(run_json, report):
    found = findings(report(run_json("block")))
    assert any(
        "sliding_attention" in text and "fastest `int4-g128` (0.500×), slowest `fp32` (2.00×)" in text for text in found
    )


def test_every_figure_has_a_text_and_a_name_of_its_own(run_json, report):
    figures = [block for block in report(run_json()) if isinstance(block, Figure)]
    assert len(figures) == len({figure.file_name for figure in figures}) == 8
    assert all(len(figure.alt) > 40 for figure in figures)


def test_how_this_was_measured(run_json, report):
    blocks = report(run_json("block"))
    facts = table(blocks, "How this was measured")
    assert facts["commit"]["value"] == "—"
    assert facts["processor"]["value"] == "`a processor | with a bar`"
    assert facts["read bandwidth"]["value"] == "20.0 GB/s"
    assert table(blocks, "How this was measured", 1)["torch"]["version"] == "`2.9.0`"
    assert table(blocks, "How this was measured", 2)["int4-g128"]["stands for"].startswith("`mlp=int4-g128")


def test_facts_that_are_not_there_are_missing(run_json, report):
    data = run_json("block")
    checkpoint = {"source": "x", "kind": "user"}
    data[JSON_KEY] = {"schema_version": 1, "checkpoint": checkpoint}
    facts = table(report(data), "How this was measured")
    assert {facts[name]["value"] for name in ("fingerprint", "bytes", "processor", "threads", "seed")} == {"—"}


@pytest.mark.parametrize(
    ("spec", "series"),
    [
        ("int4-g128", "int"),
        ("int4", "int"),
        ("int2-g32+had64+gptq", "int+had+gptq"),
        ("absmax3-packed", "absmax-packed"),
        ("ternary-g128", "ternary"),
    ],
)
def test_specs_that_differ_in_size_alone_are_one_series(spec, series):
    assert scheme(spec) == series

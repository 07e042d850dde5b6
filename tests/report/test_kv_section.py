"""What the report says of the KV cache."""

import pytest

from epic_quant.errors import ReportError
from epic_quant.records import JSON_KEY
from epic_quant.report import plots
from epic_quant.report.blocks import Figure, Findings, Heading, Table
from epic_quant.report.sections import comparison
from epic_quant.results.reading import read_run


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Only the test of the plot draws it."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(plots, "divergence_over_bytes", lambda points: "<svg/>")


@pytest.fixture
def report(write_json):
    return lambda data: comparison(read_run(write_json(data)))


def findings(blocks):
    return "\n".join(item for block in blocks if isinstance(block, Findings) for item in block.items)


def table(blocks, title):
    """The first table after a heading, as {first cell: row}."""
    start = next(i for i, block in enumerate(blocks) if isinstance(block, Heading) and block.text == title)
    found = next(block for block in blocks[start:] if isinstance(block, Table))
    return found.columns, {row[0].strip("`"): row for row in found.rows}


def without(data, **labels):
    """The data without the records that bear these labels."""
    kept = []
    for entry in data["benchmarks"]:
        said = entry["extra_info"].get(JSON_KEY, {}).get("labels", {})
        if not labels.items() <= said.items():
            kept.append(entry)
    return data | {"benchmarks": kept}


def test_errors_stand_beside_bytes_and_dense_times(run_json, report):
    columns, rows = table(report(run_json("kv")), "full_attention")
    assert rows["original"] == (
        "`original`", "88.00", "5.82×", "2.750", "0.600", "0.900", "1.50", "0.600", "20.0", "2.00×", "40.0", "40.0×"
    )  # fmt: skip
    assert len(columns) == len(rows["original"])
    _, strings = table(report(run_json("kv")), "KV cache: errors")
    assert strings["int4"] == ("`int4`", "`k=int4/v=int4`")


def test_findings_compare_full_layers_and_answer_for_the_unrotated_dims(run_json, report):
    said = findings(report(run_json("kv")))
    ratios = "`p-rope` 0.400× that of `original`, `p-rope` 0.600× that of `original+ls`, "
    assert f"{ratios}`original-inverted` 0.750× that of `original+ls`." in said
    assert "the error is 0.750×: by it, and so stored, dims that carry no position deserve more bits than those" in said


def test_where_fewer_bits_are_right_the_findings_say_so(run_json, report):
    data = run_json("kv")
    for entry in data["benchmarks"]:
        record = entry["extra_info"].get(JSON_KEY)
        if record and record["labels"]["kv_policy"] == "original-inverted":
            record["metrics"]["attention_rel_l2"] = 0.9
    assert "the error is 2.25×: by it, and so stored, dims that carry no position deserve no more bits" in str(
        findings(report(data))
    )


def test_divergences_climb_in_context_and_stand_beside_bytes(run_json, report):
    columns, rows = table(report(run_json("kv_divergence")), "KV cache: divergence")
    assert columns[1:] == ("bytes a token at 1024", "bf16's of these", "at 128", "at 1024")
    assert rows["original"] == ("`original`", "350.0", "5.71×", "0.200", "0.400")


def test_the_frontier_leaves_out_what_is_larger_and_worse(run_json, report):
    said = findings(report(run_json("kv_divergence")))
    assert (
        "at 1024 tokens: `p-rope` (345.0 bytes, 0.100), `int4` (530.0 bytes, 0.0200), `bf16` (2,000 bytes, 2.00e-06), "
        "`fp32` (4,000 bytes, rounding alone)." in said
    )


def test_the_plot_has_every_policy_but_those_that_only_round(run_json, report):
    (figure,) = (block for block in report(run_json("kv_divergence")) if isinstance(block, Figure))
    for name in ("bf16", "int4", "original", "p-rope", "128 tokens", "1024 tokens"):
        assert f">{name}</text>" in figure.svg
    assert ">fp32</text>" not in figure.svg


def test_owners_bytes_stand_beside_those_of_all_layers(run_json, report):
    columns, rows = table(report(run_json("kv_bytes")), "KV cache of E4B, MB")
    assert columns == ("KV policy", "1,024 tokens", "all layers", "131,072 tokens", "all layers")
    assert rows["bf16"] == ("`bf16`", "16.8", "29.4", "2,147.5", "3,758.1")
    assert "at 131,072 tokens in `bf16`: 2,147.5 MB; counting all layers would say 3,758.1 MB, 1.75×" in findings(
        report(run_json("kv_bytes"))
    )


def test_the_originals_claim_its_arithmetic_and_the_truth_are_one_row(run_json, report):
    columns, rows = table(report(run_json("kv_bytes")), "What the original claims, and what is stored")
    (row,) = rows.values()
    assert row[1:] == ("4.00×", "4.00×", "5.00×", "5.80×", "6.40×", "5.00×")
    assert columns[1] == "sliding_attention, claimed"
    assert "stores 5.00× less than `bf16`; 5.80× was claimed" in findings(report(run_json("kv_bytes")))


def test_without_the_original_there_is_no_row_of_its_claims(run_json, report):
    blocks = report(without(run_json("kv_bytes"), kv_policy="original"))
    assert not any(isinstance(block, Heading) and block.text.startswith("What the original") for block in blocks)
    assert "claimed" not in findings(blocks)


@pytest.mark.parametrize(("subject", "label"), [("kv_divergence", "context"), ("kv_bytes", "tokens")])
def test_a_length_that_is_no_number_is_told(subject, label, run_json, report):
    data = run_json(subject)
    data["benchmarks"][1]["extra_info"][JSON_KEY]["labels"][label] = "long"
    with pytest.raises(ReportError, match=f"'{subject}' record has 'long'"):
        report(data)

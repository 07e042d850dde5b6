"""A benchmark run with published files among its policies, as a user runs it."""

import json

import numpy as np
import pytest

from epic_quant.policy import PolicyWeights
from epic_quant.records import JSON_KEY, Record
from epic_quant.report.sections import quality
from epic_quant.results.run import Run
from epic_quant.spec import PolicySpec

MIXED = "mlp=q4_0,mlp.down_proj@0-3=q8_0,embedding=q8_0"


@pytest.fixture(scope="module")
def finished(mini, gguf_of, tmp_path_factory, run_pytest):
    """The folder of the files, what was printed, the JSON's text and its records."""
    folder = tmp_path_factory.mktemp("run")
    file = gguf_of(PolicyWeights(mini, PolicySpec.parse(MIXED)))
    same = file.write(folder / "same.gguf")
    norm, kind = file.tensors["norm.weight"]
    file.tensors["norm.weight"] = norm * np.float32(1.1), kind
    other = file.write(folder / "other.gguf")
    tests = [f"benchmarks/test_{name}" for name in ("footprint.py::test_resident", "weights.py::test_weights")]
    tests += ["-k", "resident or -mlp-dequantize"]
    policies = ["--policy", MIXED, "--policy", f"file:{same}", "--policy", f"qat=file:{other}"]
    out = folder / "out.json"
    status, printed = run_pytest(*tests, "--no-check", *policies, "--benchmark-json", out)
    assert status == 0, printed
    text = out.read_text(encoding="utf-8")
    entries = json.loads(text)["benchmarks"]
    return folder, printed, text, [Record.from_json(entry["extra_info"][JSON_KEY]) for entry in entries]


def test_the_file_has_the_error_and_bytes_of_the_policy_that_it_holds(finished):
    errors, bits, specs, parts = {}, {}, {}, {}
    for record in finished[3]:
        policy = record.labels["policy"]
        if record.subject == "footprint":
            if record.labels["model"] != "E4B":
                parts[policy] = record.details["parts"]["mlp"]
        elif record.labels["op"] == "dequantize" and record.labels["tensor_class"] == "mlp":
            errors[policy], bits[policy] = record.metrics["rel_l2"], record.metrics["bits_per_weight"]
            specs[policy] = record.labels["spec"]
    assert errors["same"] == errors[MIXED] == errors["qat"] > 0
    assert bits["same"] == bits[MIXED]
    assert specs["same"] == specs[MIXED]
    assert parts["same"] == parts[MIXED] < parts["bf16"]


def test_what_differs_from_the_checkpoint_is_told_and_no_folder_is(finished):
    folder, printed, text, _ = finished
    assert "published: same, GGUF" in printed
    (line,) = (line for line in printed.splitlines() if "published: qat" in line)
    assert "made from another checkpoint" in line
    assert "norm.weight" in line
    assert "file:same.gguf," in text
    assert str(folder) not in text


def test_the_report_says_what_differs():
    run = Run({"published_files": {"qat": ["GGUF", "made from another checkpoint"]}}, ())
    assert "`qat` is a published file, GGUF; made from another checkpoint." in str(quality.blocks(run))


@pytest.mark.parametrize("policy", ["file:nowhere.gguf", "int8=file:README.md"])
def test_a_file_that_cannot_be_read_ends_the_run_with_one_line(policy, run_pytest):
    status, printed = run_pytest("benchmarks/test_footprint.py", "--policy", policy)
    assert status == 2
    assert "Traceback" not in printed
    assert policy.partition("file:")[2] in printed

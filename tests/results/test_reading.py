import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_quant.errors import ReportError
from epic_quant.records import JSON_KEY, SCHEMA_VERSION
from epic_quant.records.subjects import BlockRecord, FootprintRecord
from epic_quant.results.reading import read_run

COMMAND = "pytest benchmarks --benchmark-json out.json"


def error_of(path):
    with pytest.raises(ReportError) as caught:
        read_run(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_records_come_in_order_and_other_entries_are_ignored(run_json, write_json):
    data = run_json()
    run = read_run(write_json(data))
    assert [record.to_json()["labels"] for record in run.records] == [
        entry["extra_info"][JSON_KEY]["labels"] for entry in data["benchmarks"][1:]
    ]
    assert run.facts == data[JSON_KEY]


def test_a_byte_order_mark_is_no_part_of_the_json(run_json, write_json):
    assert len(read_run(write_json("\ufeff" + json.dumps(run_json("block")))).records) == 6


def test_records_of_two_runs_put_together_are_refused_by_what_stands_twice(run_json, write_json):
    data = run_json("quality")
    data["benchmarks"] += run_json("quality")["benchmarks"]
    assert "has 2 records of quality policy=bf16; expected the records of one run" in error_of(write_json(data))


def test_records_of_two_checkpoints_put_together_are_refused_by_their_fingerprints(run_json, write_json):
    """Though nothing stands twice; and so are those of one that is not the facts'."""
    data = run_json("quality", "block")
    assert read_run(write_json(data)).records  # as an older epic_quant wrote it
    records = [entry["extra_info"][JSON_KEY] for entry in data["benchmarks"][1:]]
    for record in records:
        record["fingerprint"] = data[JSON_KEY]["checkpoint"]["fingerprint"]
    run = read_run(write_json(data))
    assert "fingerprint" not in run.records[0].to_json()
    for of_another in (records[-1:], records):
        for record in of_another:
            record["fingerprint"] = "feedbeef"
        said = error_of(write_json(data))
        assert "has records of 2 checkpoints, whose fingerprints are 0123abcd, feedbeef; expected" in said


def test_the_median_becomes_the_records_time(run_json, write_json):
    run = read_run(write_json(run_json("block")))
    assert run.one(BlockRecord, policy="fp32", layer_type="full_attention", tokens=1).time_s == 0.004


def test_a_record_without_stats_has_no_time(run_json, write_json):
    run = read_run(write_json(run_json("footprint")))
    assert run.one(FootprintRecord).time_s is None


def test_nan_is_missing_and_infinity_stays(run_json, write_json):
    data = run_json("ladder")
    data["benchmarks"][1]["extra_info"][JSON_KEY]["metrics"] |= {"rel_l2": math.nan, "kurtosis": math.inf}
    metrics = read_run(write_json(data)).records[0].metrics
    assert metrics["rel_l2"] is None
    assert metrics["kurtosis"] == math.inf


def test_a_missing_file_is_named_with_the_command_that_makes_one(tmp_path):
    text = error_of(tmp_path / "none.json")
    assert "no such file" in text
    assert COMMAND in text


def test_a_folder_cannot_be_read(tmp_path):
    assert "cannot be read" in error_of(tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_json_cut_off_anywhere_is_reported(run_json, write_json, data):
    text = json.dumps(run_json("footprint"))
    kept = data.draw(st.integers(0, len(text) - 1))
    assert "not JSON, or cut off" in error_of(write_json(text[:kept]))


@pytest.mark.parametrize(
    "text", ["", "policy,bytes\n", "[" * 100_000, "9" * 5000], ids=["empty", "csv", "deep", "long"]
)
def test_what_is_no_json_is_reported(text, write_json):
    assert "not JSON" in error_of(write_json(text))


def test_bytes_that_are_no_text_are_reported(tmp_path):
    path = tmp_path / "out.json"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "not JSON" in error_of(path)


@pytest.mark.parametrize("data", [[], 1, "text", None, {}, {"benchmarks": {}}, {JSON_KEY: {}}])
def test_json_of_another_kind_is_reported(data, write_json):
    text = error_of(write_json(json.dumps(data)))
    assert "not a JSON file of pytest-benchmark" in text
    assert COMMAND in text


def without_facts(data):
    del data[JSON_KEY]


def without_records(data):
    del data["benchmarks"][1:]


def with_entries_of_other_kinds(data):
    data["benchmarks"] = [1, {}, {"extra_info": []}, {"extra_info": {"other": 1}}]


@pytest.mark.parametrize("change", [without_facts, without_records, with_entries_of_other_kinds])
def test_a_run_without_our_records_is_reported(change, run_json, write_json):
    data = run_json("block")
    change(data)
    text = error_of(write_json(data))
    assert "holds no records of epic_quant" in text
    assert COMMAND in text


def test_an_older_schema_is_refused_in_one_line(run_json, write_json):
    data = run_json("block")
    data[JSON_KEY]["schema_version"] = 1
    assert "made by an older epic_quant (schema version 1); measure again" in error_of(write_json(data))


def test_a_newer_schema_is_reported_with_both_versions(run_json, write_json):
    data = run_json("block")
    data[JSON_KEY]["schema_version"] = SCHEMA_VERSION + 1
    text = error_of(write_json(data))
    assert f"schema version {SCHEMA_VERSION + 1}, newer than {SCHEMA_VERSION}" in text


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("schema_version", "1", "schema_version"),
        ("schema_version", None, "schema_version"),
        ("checkpoint", None, "whose weights"),
        ("checkpoint", {"source": "x"}, "whose weights"),
        ("checkpoint", {"source": "x", "kind": "user", "nbytes": "many"}, "nbytes"),
        ("policies", "bf16", "policies"),
        ("policies", [1], "policies"),
        ("versions", [], "versions"),
        ("policy_strings", "x", "policy_strings"),
        ("policy_strings", {"mine": "mpl=int4"}, "unknown tensor class 'mpl'"),
        ("policy_strings", {"mine": 4}, "damaged run facts"),
        ("read_bandwidth_gbs", "fast", "read_bandwidth_gbs"),
    ],
)
def test_damaged_facts_are_named(name, value, named, run_json, write_json):
    data = run_json("block")
    data[JSON_KEY][name] = value
    assert named in error_of(write_json(data))


@pytest.mark.parametrize(
    "change",
    [
        {"subject": 1},
        {"labels": ["policy"]},
        {"labels": {"policy": 4}},
        {"labels": {"policy": "bf16", "layer_type": "full_attention", "tokens": "many"}},
        {"metrics": None},
        {"metrics": {"rel_l2": "small"}},
        {"metrics": {"rel_l2": True}},
        {"metrics": {"no_such_metric": 1.0}},
        {"details": {"computed_by": "avx2"}},
        {"details": {"parts": {}}},
    ],
    ids=str,
)
def test_a_damaged_record_is_reported_with_its_benchmark(change, run_json, write_json):
    data = run_json("block")
    data["benchmarks"][2]["name"] = "test_block[bf16]"
    data["benchmarks"][2]["extra_info"][JSON_KEY] |= change
    assert "'test_block[bf16]' holds a damaged record" in error_of(write_json(data))


@pytest.mark.parametrize("part", ["subject", "labels", "metrics", "details"])
def test_a_record_that_lacks_a_part_is_reported(part, run_json, write_json):
    data = run_json("block")
    del data["benchmarks"][1]["extra_info"][JSON_KEY][part]
    assert part in error_of(write_json(data))


def test_a_record_that_is_no_object_is_reported(run_json, write_json):
    data = run_json("block")
    data["benchmarks"][1]["extra_info"][JSON_KEY] = 3
    assert "damaged record" in error_of(write_json(data))


@pytest.mark.parametrize(
    ("given", "measured"),
    [
        ("2026-11-24T14:07:59.123456+00:00", "2026-11-24 14:07 UTC"),
        ("2026-11-24T23:30:00-02:00", "2026-11-25 01:30 UTC"),
        ("yesterday", None),
        (17, None),
        (None, None),
    ],
)
def test_the_time_of_measuring_is_a_fact_where_it_is_given(given, measured, run_json, write_json):
    data = run_json("block") | {"datetime": given}
    assert read_run(write_json(data)).facts.get("measured") == measured


def test_half_a_surrogate_pair_is_reported_since_no_file_can_hold_it(run_json, write_json):
    data = run_json("block")
    data["benchmarks"][1]["extra_info"][JSON_KEY]["labels"]["policy"] = "\ud800"
    assert "damaged record" in error_of(write_json(data))

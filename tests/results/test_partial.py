import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epic_quant.errors import ReportError
from epic_quant.records import JSON_KEY, SCHEMA_VERSION, Record
from epic_quant.results.partial import FAILED, PASSED, SKIPPED, PartialWriter, partial_path
from epic_quant.results.reading import data_path, read_run

TESTS = tuple(f"benchmarks/test_x.py::test_x[{number}]" for number in range(5))


@pytest.fixture
def facts(run_json):
    return run_json()[JSON_KEY]


def record(number):
    labels = {"policy": str(number), "layer_type": "full_attention", "tokens": "1"}
    return Record("block", labels, {"added_rel_l2": number / 10})


@pytest.fixture
def stopped(tmp_path, facts):
    """A run of five tests: one passed, one failed, one skipped, one stopped while it was timed, one never begun."""
    path = tmp_path / "out.partial.jsonl"
    writer = PartialWriter(path, facts, TESTS)
    writer.record(TESTS[0], record(0))
    writer.finished(TESTS[0], PASSED, 0.25)
    writer.record(TESTS[1], record(1))
    writer.finished(TESTS[1], FAILED, None)
    writer.finished(TESTS[2], SKIPPED, None)
    writer.record(TESTS[3], record(3))
    writer.close()
    return path


def test_what_was_recorded_is_there_and_what_had_not_ended_is_named(stopped):
    run = read_run(stopped)
    assert [(one.labels["policy"], one.metrics) for one in run.records] == [
        ("0", {"added_rel_l2": 0.0, "time_s": 0.25}),
        ("3", {"added_rel_l2": 0.3}),
    ]
    assert run.facts["failed"] == [TESTS[1]]
    assert run.facts["missing"] == list(TESTS[3:])


def test_every_line_is_on_the_disk_when_it_is_written(tmp_path, facts):
    path = tmp_path / "out.partial.jsonl"
    writer = PartialWriter(path, facts, TESTS)
    for number in range(3):
        writer.record(TESTS[number], record(number))
        assert len(path.read_text(encoding="utf-8").splitlines()) == number + 2
    writer.close()


@pytest.mark.parametrize("name", ["out.json", "out"])
def test_it_stands_beside_the_json_and_for_it(name, stopped, tmp_path):
    path = tmp_path / name
    assert partial_path(path) == stopped
    assert read_run(path).facts["missing"] == list(TESTS[3:])


def test_it_stands_for_a_json_that_was_cut_off(stopped, write_json, run_json):
    path = write_json(json.dumps(run_json())[:-5])
    assert read_run(path).facts["missing"]


def test_a_whole_json_is_what_is_read(stopped, write_json, run_json):
    path = write_json(run_json())
    assert data_path(path) == path
    assert "missing" not in read_run(path).facts


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_cut_off_anywhere_it_holds_the_records_before_the_cut(stopped, tmp_path, data):
    text = stopped.read_text(encoding="utf-8")
    kept = data.draw(st.integers(0, len(text)))
    path = tmp_path / "cut.partial.jsonl"
    path.write_text(text[:kept], encoding="utf-8")
    lines = [json.loads(line) for line in text[:kept].split("\n")[:-1]]
    # Of the failed test the record is left out as soon as it is known to have failed.
    whole = [line["test"] for line in lines if "record" in line]
    if len(lines) >= 5:
        whole.remove(TESTS[1])
    if not whole:
        with pytest.raises(ReportError):
            read_run(path)
    else:
        assert [TESTS[int(one.labels["policy"])] for one in read_run(path).records] == whole


def test_a_new_run_takes_the_place_of_an_old_file_whole(stopped, facts):
    PartialWriter(stopped, facts | {"seed": 7}, TESTS[:1]).close()
    (line,) = (json.loads(line) for line in stopped.read_text(encoding="utf-8").splitlines())
    assert line | {"datetime": ""} == {"datetime": "", JSON_KEY: facts | {"seed": 7}, "planned": [TESTS[0]]}
    assert [path.name for path in stopped.parent.iterdir()] == [stopped.name]


def test_a_full_disk_is_reported_and_ends_nothing(tmp_path, facts):
    resource = pytest.importorskip("resource", reason="limits of a process are Unix'")
    path = tmp_path / "out.partial.jsonl"
    writer = PartialWriter(path, facts, TESTS)
    writer.record(TESTS[0], record(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        writer.record(TESTS[1], record(1))
        writer.finished(TESTS[1], PASSED, 0.25)
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.error == f"{path}: cannot be written: File too large"
    assert [one.labels["policy"] for one in read_run(path).records] == ["0"]


def test_a_folder_that_is_not_there_is_reported(tmp_path, facts):
    with pytest.raises(ReportError, match=r"none/out\.partial\.jsonl: cannot be written: No such file"):
        PartialWriter(tmp_path / "none" / "out.partial.jsonl", facts, TESTS)


def test_what_cannot_be_put_in_its_place_leaves_nothing(tmp_path, facts):
    taken = tmp_path / "out.partial.jsonl"
    taken.mkdir()
    with pytest.raises(ReportError, match="cannot be written"):
        PartialWriter(taken, facts, TESTS)
    assert list(tmp_path.iterdir()) == [taken]
    assert list(taken.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "does not begin with the facts of a run"),
        (['{"test": "x", "outcome": "passed"}'], "does not begin with the facts of a run"),
        ([None, "[]"], "line 2 is [], expected an object"),
        ([None, '{"test": "x", "rec'], "line 2 is not JSON"),
        ([None, '{"test": "x"}'], "neither a record nor the outcome"),
        ([None, '{"record": {}}'], "neither a record nor the outcome"),
        ([None, '{"test": "x", "record": {"subject": "block"}}'], "'x' holds a damaged record"),
    ],
)
def test_a_damaged_line_is_reported(lines, message, tmp_path, facts):
    first = json.dumps({JSON_KEY: facts, "planned": ["x"]})
    path = tmp_path / "out.partial.jsonl"
    path.write_text("".join(f"{line or first}\n" for line in lines), encoding="utf-8")
    with pytest.raises(ReportError) as caught:
        read_run(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_newer_schema_is_reported(tmp_path, facts):
    path = tmp_path / "out.partial.jsonl"
    writer = PartialWriter(path, facts | {"schema_version": SCHEMA_VERSION + 1}, ["x"])
    writer.record("x", record(1))
    writer.close()
    with pytest.raises(ReportError, match="newer than"):
        read_run(path)

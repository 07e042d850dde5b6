from epic_quant.records import JSON_KEY
from epic_quant.report.blocks import Heading, Paragraph, Table
from epic_quant.report.sections import comparison, unfinished
from epic_quant.results.reading import parse_run
from epic_quant.results.run import Run


def test_missing_and_failed_tests_are_told_first(run_json):
    data = run_json("quality")
    data[JSON_KEY] |= {
        "missing": ["benchmarks/test_block.py::test_block[int4-1]", "benchmarks/test_block.py::test_block[int4-16]"],
        "failed": ["benchmarks/test_kv.py::test_kv"],
    }
    found = comparison(parse_run(data, "x"))
    first = next(index for index, block in enumerate(found) if "2 of its tests" in getattr(block, "text", ""))
    assert isinstance(found[first], Paragraph)
    assert not any(isinstance(block, Heading) for block in found[1:first])
    assert "1 of its tests failed" in found[first + 2].text
    told = [block.rows for block in found if isinstance(block, Table)][:2]
    assert told == [
        (("`benchmarks/test_block.py::test_block`", "`int4-1`, `int4-16`", "2"),),
        (("`benchmarks/test_kv.py::test_kv`", "", "1"),),
    ]


def test_of_many_that_are_missing_a_few_are_named():
    missing = [f"benchmarks/test_kv.py::test_kv[int{number}]" for number in range(9)]
    _, table = unfinished.blocks(Run({"missing": missing}, ()))
    (row,) = table.rows
    assert row[1].endswith("`int5`, and 3 more")
    assert row[2] == "9"


def test_a_run_that_ended_well_says_nothing():
    assert unfinished.blocks(Run({"missing": [], "failed": []}, ())) == []
    assert unfinished.blocks(Run({}, ())) == []

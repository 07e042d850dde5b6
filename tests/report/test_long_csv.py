import csv
import io

from epic_quant.records import JSON_KEY, METRICS
from epic_quant.report import long_csv
from epic_quant.results.reading import read_run


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_every_metric_of_every_record_is_a_line_in_full_precision(run_json, write_json):
    data = run_json()
    entries = [entry for entry in data["benchmarks"] if entry["extra_info"]]
    expected = []
    for entry in entries:
        record = entry["extra_info"][JSON_KEY]
        times = {"time_s": entry["stats"]["median"]} if "stats" in entry else {}
        for metric, value in (record["metrics"] | times).items():
            expected.append((record["subject"], record["labels"], metric, value))
    found = []
    for row in rows(long_csv.render(read_run(write_json(data)))):
        metric = METRICS[row["metric"]]
        assert (row["unit"], row["better"]) == (metric.unit, metric.better)
        fixed = {"subject", "metric", "value", "unit", "better"}
        labels = {name: value for name, value in row.items() if name not in fixed and value}
        found.append((row["subject"], labels, row["metric"], float(row["value"]) if row["value"] else None))
    assert found == expected


def test_names_from_outside_stay_one_cell(run_json, write_json):
    data = run_json("quality")
    name = 'a,b "c"\nd'
    data["benchmarks"][1]["extra_info"][JSON_KEY]["labels"]["policy"] = name
    assert rows(long_csv.render(read_run(write_json(data))))[0]["policy"] == name

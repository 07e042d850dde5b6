"""What a record may hold."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.records import METRICS, Record

values = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    labels=st.dictionaries(st.text(), st.text()),
    metrics=st.dictionaries(st.sampled_from(sorted(METRICS)), values),
    details=st.dictionaries(st.text(), st.lists(values)),
)
def test_a_record_survives_json(labels, metrics, details):
    record = Record("weights", labels, metrics, details)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_metric_without_a_unit_and_a_direction_is_refused():
    with pytest.raises(ValueError, match="rel_l3"):
        Record("weights", {}, {"rel_l3": 1.0})


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_described(name):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.meaning
    assert metric.better in ("lower", "higher")

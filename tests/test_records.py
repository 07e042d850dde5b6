"""What a record may hold."""

import json
from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.errors import SpecError
from epic_quant.records import METRICS, Record
from epic_quant.records.subjects import SUBJECTS, KVRecord, PLEHitsRecord, PLEStartRecord, SensitivityRecord
from epic_quant.spec import NAMED_KV, KVSpec, PolicySpec, WeightSpec

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


def strategy_of(kind):
    """Values of a field's type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return st.none() | strategy_of(next(one for one in arguments if one is not type(None)))
    if origin is tuple:
        return st.lists(strategy_of(arguments[0]), min_size=1, max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(NAMES, strategy_of(arguments[1]), max_size=3)
    return VALUES[kind] if kind in VALUES else st.sampled_from(kind)


NAMES = st.text("abc 12=,é", min_size=1, max_size=8)
WEIGHT_SPECS = st.builds(WeightSpec, st.sampled_from(["int4", "ternary"]), st.none() | st.integers(1, 256))
VALUES = {
    str: NAMES,
    int: st.integers(0, 10**9),
    float: st.floats(0, 1e9),
    Any: st.recursive(st.none() | st.floats(0, 1e9) | NAMES, lambda inner: st.lists(inner, max_size=2), max_leaves=3),
    WeightSpec: WEIGHT_SPECS,
    KVSpec: st.sampled_from(list(NAMED_KV.values())),
    PolicySpec: st.builds(lambda spec: PolicySpec.of("x", {"mlp": spec}), WEIGHT_SPECS),
}


@pytest.mark.parametrize("kind", SUBJECTS.values(), ids=SUBJECTS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_subjects_record_survives_json(kind, data):
    types = get_type_hints(kind)
    values = {one.name: data.draw(strategy_of(types[one.name]), label=one.name) for one in fields(kind)}
    if kind in (PLEHitsRecord, PLEStartRecord):
        curves = {"hit_rates", "misses"} & set(values)
        values |= {name: tuple(1.0 for _ in values["capacities"]) for name in curves}
    if kind is SensitivityRecord:
        values["spec"] = str(data.draw(WEIGHT_SPECS))
        values["tensor_class"] = "mlp"
    record = kind(**values)
    written = json.loads(json.dumps(record.to_record().to_json()))
    assert kind.from_record(Record.from_json(written)) == record
    assert all(isinstance(text, str) for text in written["labels"].values())
    assert set(written["metrics"]) <= set(METRICS)


SENSITIVITY = {
    "labels": {"tensor_class": "mlp", "spec": "int4", "text": "evaluation"},
    "metrics": {"kl_divergence": 0.5, "kl_se": 0.1, "saved_nbytes": 10, "kl_per_mb": None},
    "details": {"nbytes": 5},
}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("labels", {"spec": None}, "lacks 'spec' among its labels"),
        ("labels", {"layer": "first"}, "layer is 'first', expected a number"),
        ("labels", {"spec": "int44"}, "unknown format 'int44'"),
        ("labels", {"kind": "x"}, "unknown 'kind' among its labels"),
        ("metrics", {"rel_l2": 0.5}, "unknown 'rel_l2' among its metrics"),
        ("details", {"nbytes": "many"}, "nbytes is 'many', expected a number"),
        ("details", {"nbytes": True}, "nbytes is True, expected a number"),
        ("details", {"kv": "int44"}, "int44"),
        ("details", {"kv": 4}, "kv is 4, expected str"),
    ],
)
def test_a_damaged_record_is_refused_by_name(part, change, message):
    parts = {name: dict(values) for name, values in SENSITIVITY.items()}
    parts[part] = {name: value for name, value in (parts[part] | change).items() if value is not None or name != "spec"}
    with pytest.raises((TypeError, ValueError, SpecError), match=message):
        SensitivityRecord.from_record(Record("sensitivity", **parts))


def test_a_metric_that_was_not_measured_is_written_and_one_that_does_not_apply_is_not():
    record = SensitivityRecord.from_record(Record("sensitivity", **SENSITIVITY))
    assert record.to_record().metrics == SENSITIVITY["metrics"]
    assert record.whole_nbytes == 15
    assert record.storage == WeightSpec("int4")


def test_records_of_the_same_labels_have_the_median_of_each_metric():
    records = [
        KVRecord(kv_policy="a", layer_type="b", spec=NAMED_KV["int4"], **dict.fromkeys(KVRecord.metric_names(), n))
        for n in (1.0, 5.0, 2.0, None)
    ]
    assert {getattr(KVRecord.median(records), name) for name in KVRecord.metric_names()} == {2.0}


def test_a_record_of_another_subject_is_refused():
    with pytest.raises(ValueError, match="'sensitivity' is none of 'kv'"):
        KVRecord.from_record(Record("sensitivity", **SENSITIVITY))

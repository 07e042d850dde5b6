import pytest

from epic_quant.errors import ReportError
from epic_quant.records import Record
from epic_quant.results.run import Run
from epic_quant.results.sensitivities import class_specs, predicted_divergence, sensitivities


def record(tensor_class, spec, divergence, text="calibration", details=None, **labels):
    labels = {"tensor_class": tensor_class, "spec": spec, "text": text} | labels
    return Record("sensitivity", labels, {"kl_divergence": divergence, "saved_nbytes": 70}, details or {"nbytes": 30})


RUN = Run(
    {},
    (
        record("mlp", "int4", 0.5),
        record("mlp", "int4", 9.0, layer="3"),
        record("mlp", "int4", 7.0, text="evaluation"),
        record("full_attention", "int4", 0.25),
        record("kv_cache", "int4+had", 0.125, details={"nbytes": 30, "spec": "int4+had512"}),
        record("embedding", "int4", None),
        record("ple_projections", "int4", 1.0),
        record("ple_projections", "int4", 2.0, layer="0"),
        record("ple_projections", "int4", 4.0, layer="1"),
        record("ple_projections", "int8", 8.0, layer="1"),
        record("ple_projections", "int4", 16.0, layer="2"),
    ),
)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("mlp=int4,kv=bf16,ple=all", 0.5),
        ("full_attention=int4,mlp=int4,kv=bf16,ple=lru:5000", 0.75),
        ("mlp=int4,embedding=bf16,kv=int4+had512", 0.625),
        ("kv=bf16,ple=static:5000", 0.0),
        ("ple_projections=int4", 1.0),
        ("ple_projections=int4,ple_projections@1=int8", 2.0 + 8.0 + 16.0),
        ("ple_projections=int4,ple_projections@1-2=bf16,mlp=int4", 2.0 + 0.5),
        ("ple_projections@0+2=int4", 2.0 + 16.0),
        ("ple_projections@0-1=int8", None),
        ("ple_projections@3=int4", None),
        ("mlp=int3", None),
        ("embedding=int4", None),
        ("mlp=int4,kv=full.k=int4@64/full.v=int4", None),
    ],
)
def test_a_prediction_is_the_sum_over_classes_or_unknown(policy, expected):
    assert predicted_divergence(RUN, policy) == expected


def test_each_text_predicts_for_itself():
    assert predicted_divergence(RUN, "mlp=int4", "evaluation") == 7.0


def test_a_kv_spec_may_hold_equals_signs():
    assert class_specs("kv=full.k=int4@64/v=int8,ple=all") == {"kv_cache": "full.k=int4@64/v=int8"}


def test_bytes_in_bf16_are_what_is_stored_and_what_is_saved():
    first, second = sensitivities(RUN, "calibration")[:2]
    assert (first.nbytes, first.whole_nbytes, first.layer, second.layer) == (30, 100, None, 3)


@pytest.mark.parametrize("labels", [{"layer": "first"}, {"spec": None}, {"tensor_class": None}])
def test_a_record_that_does_not_say_what_it_is_of_is_told(labels):
    damaged = record("mlp", "int4", 0.5)
    kept = {key: value for key, value in {**damaged.labels, **labels}.items() if value is not None}
    with pytest.raises(ReportError, match="no class, spec or number of a layer"):
        sensitivities(Run({}, (Record("sensitivity", kept, damaged.metrics, damaged.details),)), "calibration")

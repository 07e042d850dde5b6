"""A run made by hand, with known values."""

import json

import pytest

from epic_quant.records import JSON_KEY, SCHEMA_VERSION, Record

POLICIES = ("bf16", "original-1.58", "int4-g128")
SPECS = {"original-1.58": "absmax-ternary", "int4-g128": "int4-g128"}
CLASSES = ("sliding_attention", "mlp")


def _entry(record, median=None):
    stats = {} if median is None else {"stats": {"median": median, "rounds": 3}}
    return {"name": "test", "extra_info": {JSON_KEY: record.to_json()}, **stats}


def _footprint():
    attention = {"bf16": 1_284_505_600, "original-1.58": 206_974_976, "int4-g128": 330_000_000}
    for model in ("this checkpoint", "E4B"):
        for policy in POLICIES:
            parts = {"attention": attention[policy], "ple_hot": 107_520_000}
            details = {"parts": parts, "unused_nbytes": 110_111_232}
            if model == "E4B" and policy != "int4-g128":
                details["published"] = {"attention": {"bf16": 1284.5, "original-1.58": 207.1}[policy], "ple_hot": 107.5}
            labels = {"policy": policy, "model": model, "column": "as published"}
            yield _entry(Record("footprint", labels, {"nbytes": sum(parts.values())}, details))
            labels = {"policy": policy, "model": model, "column": "resident"}
            parts = {"mlp": attention[policy], "norms": 12_345}
            yield _entry(Record("footprint", labels, {"nbytes": sum(parts.values())}, {"parts": parts}))


def _weights():
    errors = {("original-1.58", "sliding_attention"): 1.108, ("int4-g128", "sliding_attention"): 0.0812}
    errors |= {("int4-g128", "mlp"): 0.0931}
    for (policy, tensor_class), error in errors.items():
        bits = 2.0078 if policy == "original-1.58" else 4.125
        for op, median in (("quantize", 0.02), ("dequantize", 0.005 if policy == "int4-g128" else 0.01)):
            labels = {"policy": policy, "tensor_class": tensor_class, "spec": SPECS[policy], "op": op}
            metrics = {"rel_l2": error, "bits_per_weight": bits, "nbytes": 1000, "bytes_read": 10_000_000}
            details = {"tensors": {f"layers.0.{tensor_class}": error * 1.01}} if op == "quantize" else {}
            yield _entry(Record("weights", labels, metrics, details), median)


def _ladder():
    for tensor_class, excess in (("gaussian control", 1.0), ("mlp", 1.1), ("sliding_attention", 1.2)):
        for spec, bits, error in (("int4-g128", 4.125, 0.09), ("int2", 2.0, 0.4), ("bf16", 16.0, 0.0)):
            metrics = {"rel_l2": error * excess, "bits_per_weight": bits, "kurtosis": 3.0 * excess}
            metrics |= {
                "shannon_gap_db": 4.1 * excess if error else None,
                "absmax_over_std": 5.25,
                "gaussian_rel_l2": error,
            }
            yield _entry(Record("ladder", {"spec": spec, "tensor_class": tensor_class}, metrics))


def _synthetic():
    for spec, bits, median in (("absmax4", 4.0063, 0.01), ("int4-g128", 4.125, 0.05)):
        for distribution, error in (("Gaussian", 0.1), ("Laplace", 0.12)):
            metrics = {"rel_l2": error, "bits_per_weight": bits, "bytes_read": 10_000_000}
            labels = {"spec": spec, "distribution": distribution}
            yield _entry(Record("synthetic", labels, metrics, {"e4b_weights": 3_000_000_000}), median)


def _block():
    for layer_type in ("sliding_attention", "full_attention"):
        for tokens, scale in (("16", 4), ("1", 1)):
            for policy, error, median, nbytes in (
                ("fp32", 0.0, 0.004, 40_000_000),
                ("bf16", 0.002, 0.002, 20_000_000),
                ("original-1.58", 0.9, 0.003, 6_000_000),
                ("int4-g128", 0.1, 0.001, 5_000_000),
            ):
                labels = {"policy": policy, "layer_type": layer_type, "tokens": tokens}
                metrics = {"added_rel_l2": error, "output_rel_l2": error / 10, "nbytes": nbytes}
                yield _entry(Record("block", labels, metrics), median * scale)


def _kernels():
    for tokens, scale in (("1", 1), ("16", 4)):
        for how, error, median, nbytes in (
            ("torch bf16", 0.002, 0.002, 40_000_000),
            ("int4 int8", 0.007, 0.0004, 4_000_000),
        ):
            labels = {"weight": "up [10240, 2560]", "tokens": tokens, "how": how}
            metrics = {"output_rel_l2": error, "nbytes": nbytes, "bytes_read": nbytes}
            details = {"computed_by": "avx2, int8 activations" if how == "int4 int8" else how}
            yield _entry(Record("kernels", labels, metrics, details), median * scale)


def _ple_hits():
    for residency, rates in (
        ("static, lowest ids", [0.1, 0.2, 0.3]),
        ("lru", [0.6, 0.8, 0.95]),
        ("optimum", [0.9, 0.97, 1.0]),
    ):
        details = {"capacities": [500, 5000, 50_000], "hit_rates": rates, "row_nbytes": 21_504}
        details |= {"tokens": 1000, "distinct": 800, "met_before": 0.96, "original_rows": 5000}
        labels = {"trace": "Zipf 1.0", "residency": residency}
        yield _entry(Record("ple_hits", labels, {"hit_rate": rates[1]}, details), 0.01)


def _ple_speed():
    for way, batch, median in (("cache", "1", 1e-5), ("index_select", "1", 5e-6), ("the original's", "1", 2e-3)):
        details = {"tokens": 1, "layers": 42} | ({"throughput_to_dense": 0.5} if way == "cache" else {})
        labels = {"table": "synthetic", "way": way, "heat": "hot", "batch": batch, "threads": "1"}
        yield _entry(Record("ple_speed", labels, {}, details), median)
    for batch, seconds in (("1", 0.2), ("64", 0.05)):
        metrics = {"p50_s": 2e-4, "p99_s": 9e-4, "bytes_read": 19_000_000, "fetched_nbytes": 22_000_000}
        labels = {"table": "synthetic", "way": "positioned", "heat": "cold", "batch": batch, "threads": "1"}
        yield _entry(Record("ple_speed", labels, metrics, {"tokens": 896, "pass_s": seconds}), seconds)
    labels = {"table": "synthetic", "way": "positioned", "heat": "resident", "batch": "64", "threads": "1"}
    yield _entry(
        Record("ple_speed", labels, {"nbytes": 22_000_000, "anonymous_nbytes": 23_100_000}, {"tokens": 64}), 0.01
    )


def _ple_guard():
    for spec, bits, divergence in (("int8", 8.05, 0.0001), ("int4", 4.05, 0.25)):
        labels = {"tensor_class": "ple_table", "spec": spec}
        metrics = {"rel_l2": divergence / 2, "bits_per_weight": bits, "kl_divergence": divergence}
        yield _entry(Record("ple_guard", labels, metrics), 0.01)


def _kv():
    for layer_type, worse in (("sliding_attention", 1.0), ("full_attention", 2.0)):
        for policy, bits, error in (
            ("bf16", 16.0, 0.001),
            ("int4", 4.25, 0.06),
            ("original", 2.75, 0.3),
            ("original+ls", 2.75, 0.2),
            ("original-inverted", 2.75, 0.15),
            ("p-rope", 2.7, 0.12),
        ):
            metrics = {"k_rel_l2": error * 2, "v_rel_l2": error * 3, "logit_rms": error * 5}
            metrics |= {"attention_rel_l2": error * worse, "nbytes": 32 * bits, "bits_per_value": bits}
            metrics |= {"append_s": 2e-5, "read_s": 4e-8}
            details = {"spec": f"k={policy}/v={policy}", "dense_append_s": 1e-5, "dense_read_s": 1e-9}
            yield _entry(Record("kv", {"kv_policy": policy, "layer_type": layer_type}, metrics, details), 1e-4)


def _kv_divergence():
    for policy, nbytes, divergence in (
        ("fp32", 8000, 1e-14),
        ("bf16", 4000, 1e-6),
        ("int4", 1060, 0.01),
        ("original", 700, 0.2),
        ("p-rope", 690, 0.05),
    ):
        # As text 1024 comes before 128; the section must know better.
        for context, factor in (("1024", 2.0), ("128", 1.0)):
            metrics = {"kl_divergence": divergence * factor, "nbytes": nbytes / factor}
            yield _entry(Record("kv_divergence", {"kv_policy": policy, "context": context}, metrics), 1e-3)


def _kv_bytes():
    published = {"sliding_attention_claimed": 4.0, "sliding_attention_arithmetic": 4.0}
    published |= {"full_attention_claimed": 5.8, "full_attention_arithmetic": 6.4}
    for model in ("this checkpoint", "E4B"):
        for policy, divisor in (("bf16", 1.0), ("original", 5.0)):
            for tokens in (131_072, 1024):
                nbytes = 16_384 * tokens / divisor
                details = {
                    "all_layers_nbytes": nbytes * 1.75,
                    "parts": {"sliding_attention": nbytes / 4, "full_attention": 3 * nbytes / 4},
                }
                details |= {"published": published} if (model, policy) == ("E4B", "original") else {}
                labels = {"kv_policy": policy, "model": model, "tokens": str(tokens)}
                yield _entry(Record("kv_bytes", labels, {"nbytes": nbytes}, details), 1e-3)


RECIPE = "sliding_attention=int3-g128,mlp=int4-g128,kv=bf16,ple=lru:5000"


def _quality():
    for policy, resident, divergence in (
        ("bf16", 42_900_000, 0.0),
        ("bf16-compute", None, 2e-5),
        ("original-1.58", 25_800_000, 0.5),
        ("int4-g128", 26_700_000, 0.02),
        (RECIPE, 26_500_000, 0.03),
    ):
        metrics = {"kl_divergence": divergence, "kl_se": divergence / 20, "kl_median": divergence / 2}
        metrics |= {"kl_p90": 3 * divergence, "kl_p99": 9 * divergence, "kl_max": 40 * divergence}
        metrics |= {"perplexity": 20.0 * (1 + divergence), "perplexity_se": 0.3, "top1_agreement": 0.97}
        metrics |= {"rms_delta_p": 0.015, "resident_nbytes": resident, "nbytes": 20_000_000}
        yield _entry(Record("quality", {"policy": policy}, metrics), 1.0)


def _sensitivity():
    for text, factor in (("evaluation", 1.1), ("calibration", 1.0)):
        for tensor_class, whole, divergence in (("sliding_attention", 5_200_000, 0.01), ("mlp", 14_200_000, 0.008)):
            for spec, bits, worse in (("int4-g128", 4.125, 1.0), ("int3-g128", 3.125, 1.7)):
                nbytes = round(whole * bits / 16)
                value, saved = divergence * worse * factor, whole - nbytes
                metrics = {"kl_divergence": value, "kl_se": value / 20}
                metrics |= {"saved_nbytes": saved, "kl_per_mb": 1e6 * value / saved}
                labels = {"tensor_class": tensor_class, "spec": spec, "text": text}
                yield _entry(Record("sensitivity", labels, metrics, {"nbytes": nbytes}), 1.0)


SUBJECTS = {
    "footprint": _footprint,
    "weights": _weights,
    "ladder": _ladder,
    "synthetic": _synthetic,
    "block": _block,
    "kernels": _kernels,
    "quality": _quality,
    "sensitivity": _sensitivity,
    "ple_hits": _ple_hits,
    "ple_speed": _ple_speed,
    "ple_guard": _ple_guard,
    "kv": _kv,
    "kv_divergence": _kv_divergence,
    "kv_bytes": _kv_bytes,
}


@pytest.fixture(scope="session")
def run_json():
    """`run_json("block", …)`: a whole JSON object with the records of these subjects, of all where none is said."""

    def make(*subjects, kind="trained-small"):
        return {
            "machine_info": {},
            JSON_KEY: {
                "schema_version": SCHEMA_VERSION,
                "checkpoint": {
                    "source": "benchmarks/mini_gemma4",
                    "fingerprint": "0123abcd",
                    "nbytes": 31_400_000,
                    "num_layers": 18,
                    "kind": kind,
                },
                "policies": list(POLICIES),
                "policy_strings": {"int4-g128": "mlp=int4-g128,kv=bf16,ple=lru:5000"},
                "versions": {"python": "3.12.1", "torch": "2.9.0"},
                "cpu": "a processor | with a bar",
                "threads": 2,
                "platform": "Linux x86_64",
                "read_bandwidth_gbs": 20.0,
                "seed": 0,
                "context": 8192,
                "commit": None,
                "arguments": "pytest benchmarks --benchmark-json out.json",
            },
            "benchmarks": [
                {"name": "of another plugin", "extra_info": {}, "stats": {"median": 1.0}},
                *(entry for subject in subjects or SUBJECTS for entry in SUBJECTS[subject]()),
            ],
        }

    return make


@pytest.fixture
def write_json(tmp_path):
    """Writes an object as JSON, or text as it is, and gives the path."""

    def write(data):
        path = tmp_path / "out.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return write

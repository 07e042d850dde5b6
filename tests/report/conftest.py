"""A run made by hand, with known values."""

import json
import random

import pytest

from epic_quant.records import JSON_KEY, SCHEMA_VERSION
from epic_quant.records.subjects import (
    BlockRecord,
    FootprintRecord,
    KernelsRecord,
    KVBytesRecord,
    KVDivergenceRecord,
    KVRecord,
    LadderRecord,
    PLEColdRecord,
    PLEGuardRecord,
    PLEHitsRecord,
    PLEHotRecord,
    PLEMemoryRecord,
    PLEStartRecord,
    PLETextRecord,
    PricesRecord,
    QualityRecord,
    SensitivityRecord,
    SyntheticRecord,
    WeightsRecord,
)
from epic_quant.spec import NAMED, NAMED_KV, NOISE_FLOOR, PolicySpec, WeightSpec

POLICIES = ("bf16", "original-1.58", "int4-g128")
SPECS = {"original-1.58": WeightSpec("absmax-ternary"), "int4-g128": WeightSpec("int4", 128)}
RECIPE = "sliding_attention=int3-g128,mlp=int4-g128,kv=bf16,ple=lru:5000"


def made(kind, **values):
    """A record in which the metrics that are not given were not measured."""
    return kind(**{name: None for name in kind.metric_names() if name != "time_s"} | values)


def entry(record, median=None):
    """A record as pytest-benchmark's JSON has it."""
    stats = {} if median is None else {"stats": {"median": median, "rounds": 3}}
    return {"name": "test", "extra_info": {JSON_KEY: record.to_record().to_json()}, **stats}


def _footprint():
    attention = {"bf16": 1_284_505_600, "original-1.58": 206_974_976, "int4-g128": 330_000_000}
    for model in ("this checkpoint", "E4B"):
        for policy in POLICIES:
            parts = {"attention": attention[policy], "ple_hot": 107_520_000}
            published = {}
            if model == "E4B" and policy != "int4-g128":
                published = {"attention": {"bf16": 1284.5, "original-1.58": 207.1}[policy], "ple_hot": 107.5}
            for column, counted in (
                ("as published", parts),
                ("resident", {"mlp": attention[policy], "norms": 12_345}),
            ):
                yield entry(
                    FootprintRecord(
                        policy=policy,
                        model=model,
                        column=column,
                        nbytes=sum(counted.values()),
                        parts=counted,
                        unused_nbytes=110_111_232,
                        published=published if column == "as published" else {},
                    )
                )


def _weights():
    errors = {("original-1.58", "sliding_attention"): 1.108, ("int4-g128", "sliding_attention"): 0.0812}
    errors |= {("int4-g128", "mlp"): 0.0931}
    for (policy, tensor_class), error in errors.items():
        bits = 2.0078 if policy == "original-1.58" else 4.125
        for op, median in (("quantize", 0.02), ("dequantize", 0.005 if policy == "int4-g128" else 0.01)):
            record = made(
                WeightsRecord,
                policy=policy,
                tensor_class=tensor_class,
                specs=(SPECS[policy],),
                op=op,
                rel_l2=error,
                bits_per_weight=bits,
                nbytes=1000,
                bytes_read=10_000_000,
                tensors={f"layers.0.{tensor_class}": error * 1.01} if op == "quantize" else {},
            )
            yield entry(record, median)


def _ladder():
    for tensor_class, excess in (("mlp", 1.1), ("sliding_attention", 1.2)):
        for spec, bits, error in (("int4-g128", 4.125, 0.09), ("int2", 2.0, 0.4), ("bf16", 16.0, 0.0)):
            yield entry(
                made(
                    LadderRecord,
                    spec=WeightSpec.parse(spec),
                    tensor_class=tensor_class,
                    rel_l2=error * excess,
                    bits_per_weight=bits,
                    kurtosis=3.0 * excess,
                    shannon_gap_db=4.1 * excess if error else None,
                    absmax_over_std=5.25,
                    gaussian_rel_l2=error,
                )
            )


def _synthetic():
    for spec, bits, median in (("absmax4", 4.0063, 0.01), ("int4-g128", 4.125, 0.05)):
        for distribution, error in (("Gaussian", 0.1), ("Laplace", 0.12)):
            record = SyntheticRecord(
                spec=WeightSpec.parse(spec),
                distribution=distribution,
                rel_l2=error,
                bits_per_weight=bits,
                bytes_read=10_000_000,
                e4b_weights=3_000_000_000,
            )
            yield entry(record, median)


def _block():
    for layer_type in ("sliding_attention", "full_attention"):
        for tokens, scale in ((16, 4), (1, 1)):
            for policy, error, median, nbytes in (
                ("fp32", 0.0, 0.004, 40_000_000),
                ("bf16", 0.002, 0.002, 20_000_000),
                ("original-1.58", 0.9, 0.003, 6_000_000),
                ("int4-g128", 0.1, 0.001, 5_000_000),
            ):
                record = BlockRecord(
                    policy=policy,
                    layer_type=layer_type,
                    tokens=tokens,
                    added_rel_l2=error,
                    output_rel_l2=error / 10,
                    nbytes=nbytes,
                )
                yield entry(record, median * scale)


def _kernels():
    for tokens, scale in ((1, 1), (16, 4)):
        for how, error, median, nbytes, computed_by in (
            ("torch bf16", 0.002, 0.002, 40_000_000, "torch bf16"),
            ("int4 int8", 0.007, 0.0004, 4_000_000, "avx2, int8 activations"),
        ):
            record = KernelsRecord(
                weight="up [10240, 2560]",
                tokens=tokens,
                how=how,
                output_rel_l2=error,
                nbytes=nbytes,
                bytes_read=nbytes,
                computed_by=computed_by,
            )
            yield entry(record, median * scale)


def _ple_hits():
    for residency, rates in (
        ("static, lowest ids", (0.1, 0.2, 0.3)),
        ("lru", (0.6, 0.8, 0.95)),
        ("optimum", (0.9, 0.97, 1.0)),
    ):
        record = PLEHitsRecord(
            trace="Zipf 1.0",
            residency=residency,
            hit_rate=rates[1],
            capacities=(500, 5000, 50_000),
            hit_rates=rates,
            row_nbytes=21_504,
            tokens=1000,
            distinct=800,
            met_before=0.96,
            original_rows=5000,
        )
        yield entry(record, 0.01)


def _ple_starts():
    published = {"a manual": {"tokens": 225_861, "lowest_ids": 0.32, "90%": 1566, "95%": 3275}}
    for text, source in (("Zipf 1.0", "a tokenizer; not checked"), ("own.npy", None)):
        record = PLETextRecord(
            text=text,
            hit_rate=0.5,
            tokens=2000,
            rows={"90%": 500, "95%": 1000},
            row_nbytes=21_504,
            original_rows=5000,
            source=source,
            published=published if source else {},
        )
        yield entry(record, 0.01)
    for start, residency, misses in (
        ("nothing", "lru", (300.0, 273.4)),
        ("the shipped list", "static", (80.0, 39.6)),
        ("the shipped list", "lru", (60.0, 31.4)),
    ):
        record = PLEStartRecord(
            trace="Zipf 1.0",
            residency=residency,
            start=start,
            hit_rate=0.982,
            capacities=(500, 5000),
            misses=misses,
            hit_rates=(0.95, 0.982),
            row_nbytes=21_504,
            tokens=1000,
            places=10,
            list_rows=0 if start == "nothing" else 7785,
            original_rows=5000,
        )
        yield entry(record, 0.01)


def _ple_speed():
    for way, median in (("cache", 1e-5), ("index_select", 5e-6), ("the original's", 2e-3)):
        ratio = 0.5 if way == "cache" else None
        yield entry(
            PLEHotRecord(table="synthetic", way=way, batch=1, tokens=1, layers=42, throughput_to_dense=ratio), median
        )
    for batch, seconds in ((1, 0.2), (64, 0.05)):
        record = PLEColdRecord(
            table="synthetic",
            way="positioned",
            batch=batch,
            threads=1,
            p50_s=2e-4,
            p99_s=9e-4,
            bytes_read=19_000_000,
            fetched_nbytes=22_000_000,
            tokens=896,
            pass_s=seconds,
        )
        yield entry(record, seconds)
    yield entry(PLEMemoryRecord(table="synthetic", nbytes=22_000_000, anonymous_nbytes=23_100_000), 0.01)


def _ple_guard():
    for spec, bits, divergence in (("int8", 8.05, 0.0001), ("int4", 4.05, 0.25)):
        record = PLEGuardRecord(
            tensor_class="ple_table",
            spec=WeightSpec(spec),
            rel_l2=divergence / 2,
            bits_per_weight=bits,
            kl_divergence=divergence,
        )
        yield entry(record, 0.01)


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
            record = KVRecord(
                kv_policy=policy,
                layer_type=layer_type,
                k_rel_l2=error * 2,
                v_rel_l2=error * 3,
                logit_rms=error * 5,
                attention_rel_l2=error * worse,
                nbytes=32 * bits,
                bits_per_value=bits,
                append_s=2e-5,
                read_s=4e-8,
                spec=NAMED_KV[policy],
                dense_append_s=1e-5,
                dense_read_s=1e-9,
            )
            yield entry(record, 1e-4)


def _kv_divergence():
    for policy, nbytes, divergence in (
        ("fp32", 8000, 1e-14),
        ("bf16", 4000, 1e-6),
        ("int4", 1060, 0.01),
        ("original", 700, 0.2),
        ("p-rope", 690, 0.05),
    ):
        for context, factor in ((1024, 2.0), (128, 1.0)):
            record = KVDivergenceRecord(
                kv_policy=policy, context=context, kl_divergence=divergence * factor, nbytes=nbytes / factor
            )
            yield entry(record, 1e-3)


def _kv_bytes():
    published = {"sliding_attention_claimed": 4.0, "sliding_attention_arithmetic": 4.0}
    published |= {"full_attention_claimed": 5.8, "full_attention_arithmetic": 6.4}
    for model in ("this checkpoint", "E4B"):
        for policy, divisor in (("bf16", 1.0), ("original", 5.0)):
            for tokens in (131_072, 1024):
                nbytes = 16_384 * tokens / divisor
                record = KVBytesRecord(
                    kv_policy=policy,
                    model=model,
                    tokens=tokens,
                    nbytes=nbytes,
                    all_layers_nbytes=nbytes * 1.75,
                    parts={"sliding_attention": nbytes / 4, "full_attention": 3 * nbytes / 4},
                    published=published if (model, policy) == ("E4B", "original") else {},
                )
                yield entry(record, 1e-3)


def quality(policy, nbytes, divergence, **values):
    """What a policy does, with all other measures following from the divergence."""
    values = {"kl_se": divergence / 20, "spec": NAMED.get(policy, NAMED["bf16"])} | values
    return QualityRecord(
        policy=policy,
        kl_divergence=divergence,
        kl_median=divergence / 2,
        kl_p90=3 * divergence,
        kl_p99=9 * divergence,
        kl_max=40 * divergence,
        perplexity=20.0 * (1 + divergence),
        perplexity_se=0.3,
        top1_agreement=0.97,
        rms_delta_p=0.015,
        resident_nbytes=nbytes,
        nbytes=20_000_000,
        **values,
    )


def _quality():
    for policy, resident, divergence in (
        ("bf16", 42_900_000, 0.0),
        (NOISE_FLOOR, None, 2e-5),
        ("original-1.58", 25_800_000, 0.5),
        ("int4-g128", 26_700_000, 0.02),
    ):
        yield entry(quality(policy, resident, divergence), 1.0)
    yield entry(quality(RECIPE, 26_500_000, 0.03, spec=PolicySpec.parse(RECIPE), predicted_kl_divergence=0.025), 1.0)


def recipe(at, kv, nbytes, divergence, **values):
    """A recipe that the benchmarks made at the bytes of a policy."""
    spec = PolicySpec.parse("sliding_attention=int4-g128,mlp=int4-g128,kv=bf16,ple=lru:5000")
    values = {"spec": spec, "recipe_at": at, "kv": kv, "predicted_kl_divergence": 0.018} | values
    return quality(f"recipe at {at}, K and V {kv}", nbytes, divergence, **values)


def _sensitivity():
    for text, factor in (("evaluation", 1.1), ("calibration", 1.0)):
        for tensor_class, whole, divergence in (("sliding_attention", 5_200_000, 0.01), ("mlp", 14_200_000, 0.008)):
            for spec, bits, worse, predicted in (("int4-g128", 4.125, 1.0, 0.9), ("int3-g128", 3.125, 1.7, 0.7)):
                nbytes = round(whole * bits / 16)
                value, saved = divergence * worse * factor, whole - nbytes
                record = SensitivityRecord(
                    tensor_class=tensor_class,
                    spec=spec,
                    text=text,
                    kl_divergence=value,
                    kl_se=value / 20,
                    predicted_kl_divergence=value * predicted,
                    saved_nbytes=saved,
                    kl_per_mb=1e6 * value / saved,
                    nbytes=nbytes,
                )
                yield entry(record, 1.0)


def synthetic_prices(num_layers=18, num_recipes=40):
    """Made-up prices of a model of this many layers, every sixth of full attention: no measurement."""
    chosen = random.Random(0)
    kinds = {"q_proj": 1024, "k_proj": 256, "v_proj": 256, "o_proj": 1024, "down_proj": 8192}
    kinds |= {"per_layer_projection": 64}
    shapes = {
        f"layers.{layer}.{kind}.weight": (
            "mlp" if kind == "down_proj" else "ple_projections" if "per_layer" in kind else _attention(layer),
            kind,
            layer,
            64 * numel,
        )
        for layer in range(num_layers)
        for kind, numel in kinds.items()
        if kind not in ("k_proj", "v_proj") or layer < 2 * num_layers // 3
    }
    shapes["embed_tokens.weight"] = ("embedding", None, None, 1_000_000)
    tensors = {}
    for name, (tensor_class, kind, layer, numel) in shapes.items():
        dear = 10 ** chosen.uniform(-6, -3)
        group = 64 if kind == "per_layer_projection" else 128
        tensors[name] = {
            "tensor_class": tensor_class,
            "kind": kind,
            "layer": layer,
            "numel": numel,
            "specs": {
                f"int{bits}-g{group}": [dear * 4.0 ** (4 - bits), dear / 20, numel * bits // 8 + 2 * numel // group]
                for bits in (8, 4, 3, 2)
            },
        }
    frontier = [
        {
            "resident_nbytes": 3_000_000 + 150_000 * index,
            "predicted": 0.5 * 0.85**index,
            "policy": ",".join(f"{name.removesuffix('.weight')}=int{2 + index // 10}-g64" for name in tensors),
            "bits": {"mlp": 2 + index / 10, "sliding_attention": 2 + index / 9, "embedding": 4 + index / 20},
        }
        for index in range(num_recipes)
    ]
    by = [
        {
            "bits": bits,
            "nbytes": round(400_000 * bits),
            "predicted": {"class": at, "kind": at / 1.6, "layer": at / 2, "tensor": at / 4},
        }
        for bits, at in ((3.0, 0.1), (4.0, 0.02))
    ]
    return PricesRecord(
        text="calibration", num_tokens=2048, samples=2, tensors=tensors, frontier=tuple(frontier), by=tuple(by)
    )


def _attention(layer):
    return "full_attention" if layer % 6 == 5 else "sliding_attention"


def _prices():
    yield entry(synthetic_prices(), 30.0)


SUBJECTS = {
    "footprint": _footprint,
    "weights": _weights,
    "ladder": _ladder,
    "synthetic": _synthetic,
    "block": _block,
    "kernels": _kernels,
    "quality": _quality,
    "sensitivity": _sensitivity,
    "prices": _prices,
    "ple_hits": _ple_hits,
    "ple_starts": _ple_starts,
    "ple_speed": _ple_speed,
    "ple_guard": _ple_guard,
    "kv": _kv,
    "kv_divergence": _kv_divergence,
    "kv_bytes": _kv_bytes,
}


@pytest.fixture(scope="session")
def run_json():
    """`run_json("block", …)`: a whole JSON object with the records of these subjects, of all where none is named."""

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

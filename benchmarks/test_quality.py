"""What each policy, and each tensor class alone, does to the model's predictions: perplexity and KL divergence.

Everything is evaluated in two streamed runs, one for the policies and one for the sensitivities, that tests then take
their records from. On a checkpoint over 1 GB the sensitivities are measured only where they are asked for: with
`-k sensitivity`, or with `--by-layer`, which adds those of every layer alone.

K and V are kept in the dtype computed in unless a policy quantizes them: what bf16 does is told by `bf16-compute`.
"""

import math
from dataclasses import asdict

import pytest

from epic_quant import footprint
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.policy import NAMED, Policy
from epic_quant.quality import KV_CACHE, NOISE_FLOOR, Variant, measure

EVALUATION, CALIBRATION = "evaluation", "calibration"

# The names that records have for the fields of a `Quality`.
METRICS = {"kl_divergence_se": "kl_se"}


@pytest.fixture(scope="session")
def evaluated(run, pytestconfig, moments_for):
    """`evaluated(name, variants, windows)`: the plan on the terminal, then all of them under a progress bar."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def evaluate(name, variants, windows):
        moments = moments_for(*{spec for variant in variants.values() for spec in specs_of(variant)})
        with capture.global_and_fixture_disabled():
            print("", *run.plan_of(name, variants, len(windows)), sep="\n", flush=True)
            return measure(
                run.checkpoint,
                variants,
                windows,
                moments=moments,
                memory_nbytes=run.memory_nbytes,
                resume=run.resume_file(name),
                progress=None,
            )

    return evaluate


def specs_of(variant):
    return variant.specs if isinstance(variant, Variant) else set(variant.specs.values())


@pytest.fixture(scope="session")
def qualities(run, evaluated):
    """What came out for every policy on the evaluation text."""
    return evaluated("quality", run.evaluated, run.quality_windows)


@pytest.fixture(scope="session")
def sensitivities(run, evaluated):
    """What came out for every change, on the windows of the evaluation text and after them those of the other."""
    return evaluated(
        "sensitivity", {name: change.variant() for name, change in run.changes.items()}, run.sensitivity_windows
    )


@pytest.fixture
def record_quality(run, qualities, record, benchmark):
    """Record what came out under a name, with the bytes of a policy; timed is the summing up of its tokens."""

    def write(name, policy):
        tokens = qualities.tokens[name]
        quality = asdict(tokens.quality())
        num_tokens = quality.pop("num_tokens")
        assert all(map(math.isfinite, quality.values()))
        parts = footprint.resident(policy, run.config, run.options.context)
        metrics = {METRICS.get(key, key): value for key, value in quality.items()} | {
            "resident_nbytes": sum(parts.values()),
            "nbytes": sum(
                footprint.tensor_nbytes(policy, tensor) for tensor in expected_tensors(run.config) if not tensor.dead
            ),
        }
        details = {"parts": parts, "num_tokens": num_tokens, "resumed_after": qualities.resumed_after}
        record("quality", {"policy": name}, metrics, details)
        benchmark.pedantic(tokens.quality)

    return write


def test_quality(policy, run, record_quality):
    """Every policy against the checkpoint's own weights in fp32."""
    if policy.name not in run.evaluated:
        pytest.skip("no --moments given, and gathering them on a checkpoint over 1 GB is a run of its own")
    record_quality(policy.name, policy)


def test_noise_floor(record_quality):
    """The same weights computed in bf16: what lies below it is noise."""
    record_quality(NOISE_FLOOR, NAMED["bf16"])


@pytest.mark.parametrize("text", [EVALUATION, CALIBRATION])
def test_sensitivity(change_name, text, run, sensitivities, record, benchmark):
    """One class, or the KV cache, quantized alone; on the text that is judged on, and on the one recipes are fitted to.

    Bytes saved are those against bf16, of the whole class, a table's rows on disk included.
    """
    change = run.changes[change_name]
    half = run.num_windows
    tokens = sensitivities.tokens[change_name].windows(slice(half) if text == EVALUATION else slice(half, None))
    quality = tokens.quality()
    assert math.isfinite(quality.kl_divergence)
    whole, nbytes = (stored_nbytes(change, policy, run) for policy in (Policy("bf16", {}), change.policy()))
    metrics = {
        "kl_divergence": quality.kl_divergence,
        "kl_se": quality.kl_divergence_se,
        "saved_nbytes": whole - nbytes,
        "kl_per_mb": quality.kl_divergence / ((whole - nbytes) / 1e6) if whole > nbytes else None,
    }
    labels = {"tensor_class": change.tensor_class, "spec": change.spec, "text": text}
    if change.layer is not None:
        labels["layer"] = str(change.layer)
    details = {"nbytes": nbytes, "num_tokens": quality.num_tokens, "resumed_after": sensitivities.resumed_after}
    if change.tensor_class == KV_CACHE:
        details["spec"] = str(change.policy().kv)
    record("sensitivity", labels, metrics, details)
    benchmark.pedantic(tokens.quality)


def stored_nbytes(change, policy, run):
    """Bytes of what the change is about under a policy; of the KV cache at the run's context."""
    if change.tensor_class != KV_CACHE:
        return sum(footprint.tensor_nbytes(policy, tensor) for tensor in change.tensors(run.config))
    if change.layer is None:
        return policy.kv.nbytes(run.config, run.options.context)
    return policy.kv.layer_nbytes(run.config.layers[change.layer], run.options.context)

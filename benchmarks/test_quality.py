"""What each policy, and each tensor class alone, does to the model's predictions: perplexity and KL divergence.

Everything is evaluated in three streamed runs, for the policies, for the sensitivities, and for the recipes that come
of them; tests then take their records from these. On a checkpoint over 1 GB sensitivities and recipes are measured only
where they are asked for: with `-k sensitivity`, `-k "quality or sensitivity"` for all of this file, or `--by-layer`,
which adds the sensitivities of every layer alone.

K and V are kept in the dtype computed in unless a policy quantizes them: what bf16 does is told by `bf16-compute`.
"""

import math
from dataclasses import asdict

import pytest

from epic_quant import footprint
from epic_quant.errors import RecipeError
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.policy import NAMED, Policy
from epic_quant.quality import KV_CACHE, NOISE_FLOOR, Variant, measure
from epic_quant.recipe.assignment import within_resident
from epic_quant.records import Record
from epic_quant.results.run import Run as Results

EVALUATION, CALIBRATION = "evaluation", "calibration"

# The names that records have for the fields of a `Quality`.
METRICS = {"kl_divergence_se": "kl_se"}

# What a recipe leaves as it is. The named policies keep K and V in bf16, and at a long context those outweigh a small
# model's weights: only a recipe that keeps them too spends the same bytes on the same things.
KEPT = {"in bf16": (KV_CACHE,), "chosen": ()}


@pytest.fixture(scope="session")
def evaluated(run, pytestconfig, hessians_for):
    """`evaluated(name, variants, windows)`: the plan on the terminal, then all of them under a progress bar."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def evaluate(name, variants, windows):
        hessians = hessians_for(*{spec for variant in variants.values() for spec in specs_of(variant)})
        with capture.global_and_fixture_disabled():
            print("", *run.plan_of(name, variants, len(windows)), sep="\n", flush=True)
            return measure(
                run.checkpoint,
                variants,
                windows,
                hessians=hessians,
                memory_nbytes=run.memory_nbytes,
                resume=run.resume_file(name),
                progress=None,
            )

    return evaluate


def specs_of(variant):
    return variant.specs if isinstance(variant, Variant) else variant.all_specs


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


@pytest.fixture(scope="session")
def recipes(run, sensitivities):
    """By policy and what is kept, the recipe of least predicted divergence at the policy's resident bytes.

    It is made of the calibration text's sensitivities; a RecipeError where there is none as small.
    """
    bf16 = run.policies["bf16"]
    plain = Record("quality", {"policy": "bf16"}, {}, {"policy": str(bf16), "parts": resident(run, bf16)})
    alone = [sensitivity_record(run, sensitivities, change, CALIBRATION) for change in run.changes.values()]
    results = Results({}, (plain, *alone))

    def made(policy, keep):
        try:
            return within_resident(results, sum(resident(run, policy).values()), keep=keep)
        except RecipeError as error:
            return error

    return {
        (name, kv): made(policy, keep)
        for name, policy in run.policies.items()
        if name != "bf16"
        for kv, keep in KEPT.items()
    }


@pytest.fixture(scope="session")
def recipe_qualities(run, evaluated, recipes):
    """What came out for every recipe on the evaluation text, by its policy string."""
    strings = {recipe.policy: None for recipe in recipes.values() if not isinstance(recipe, RecipeError)}
    return evaluated("recipe", {text: Policy.parse(text) for text in strings}, run.quality_windows)


@pytest.fixture
def record_quality(run, record, benchmark):
    """Record what came out under a name, with the bytes of the policy; timed is the summing up of its tokens."""

    def write(name, policy, evaluation, measured_as, metrics=None, details=None):
        tokens = evaluation.tokens[measured_as]
        quality = asdict(tokens.quality())
        num_tokens = quality.pop("num_tokens")
        assert all(map(math.isfinite, quality.values()))
        parts = resident(run, policy)
        metrics = {METRICS.get(key, key): value for key, value in quality.items()} | (metrics or {})
        metrics |= {
            "resident_nbytes": sum(parts.values()),
            "nbytes": sum(
                footprint.tensor_nbytes(policy, tensor) for tensor in expected_tensors(run.config) if not tensor.unused
            ),
        }
        details = (details or {}) | {"policy": str(policy), "parts": parts, "num_tokens": num_tokens}
        record("quality", {"policy": name}, metrics, details | {"resumed_after": evaluation.resumed_after})
        benchmark.pedantic(tokens.quality)

    return write


def resident(run, policy):
    return footprint.resident(policy, run.config, run.options.context)


def test_quality(policy, run, qualities, record_quality):
    """Every policy against the checkpoint's own weights in fp32."""
    if policy.name not in run.evaluated:
        pytest.skip("no --hessians given, and gathering them on a checkpoint over 1 GB is a run of its own")
    record_quality(policy.name, policy, qualities, policy.name)


def test_noise_floor(qualities, record_quality):
    """The same weights computed in bf16: what lies below it is noise."""
    record_quality(NOISE_FLOOR, NAMED["bf16"], qualities, NOISE_FLOOR)


@pytest.mark.parametrize("text", [EVALUATION, CALIBRATION])
def test_sensitivity(ablation_name, text, run, sensitivities, record, benchmark):
    """One class, or the KV cache, quantized alone; on the text that is judged on, and on the one recipes are fitted to.

    Bytes saved are those against bf16, of the whole class, a table's rows on disk included.
    """
    made = sensitivity_record(run, sensitivities, run.changes[ablation_name], text)
    assert math.isfinite(made.metrics["kl_divergence"])
    record(made.subject, made.labels, made.metrics, made.details)
    benchmark.pedantic(tokens_of(run, sensitivities, ablation_name, text).quality)


def tokens_of(run, sensitivities, ablation_name, text):
    half = run.num_windows
    return sensitivities.tokens[ablation_name].windows(slice(half) if text == EVALUATION else slice(half, None))


def sensitivity_record(run, sensitivities, change, text):
    quality = tokens_of(run, sensitivities, str(change), text).quality()
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
    return Record("sensitivity", labels, metrics, details)


@pytest.mark.parametrize("kv", KEPT)
def test_recipe(recipe_at, kv, run, recipes, recipe_qualities, record_quality):
    """The recipe at a policy's resident bytes, its prediction from one text, and what it does on the other."""
    recipe = recipes[recipe_at, kv]
    if isinstance(recipe, RecipeError):
        pytest.skip(str(recipe))
    metrics = {"predicted_kl_divergence": recipe.predicted}
    details = {"recipe_at": recipe_at, "kv": kv}
    policy = Policy.parse(recipe.policy)
    assert sum(resident(run, policy).values()) <= sum(resident(run, run.policies[recipe_at]).values())
    record_quality(f"recipe at {recipe_at}, K and V {kv}", policy, recipe_qualities, recipe.policy, metrics, details)


def stored_nbytes(change, policy, run):
    """Bytes of what the change is about under a policy; of the KV cache at the run's context."""
    if change.tensor_class != KV_CACHE:
        return sum(footprint.tensor_nbytes(policy, tensor) for tensor in change.tensors(run.config))
    if change.layer is None:
        return policy.kv.nbytes(run.config, run.options.context)
    return policy.kv.layer_nbytes(run.config.layers[change.layer], run.options.context)

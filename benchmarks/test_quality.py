"""What each policy, and each tensor class alone, does to the model's predictions: predicted and measured.

One backward pass over the calibration text prices every tensor under every spec. From the prices come recipes, and what
is predicted of every policy. Measured are, on the evaluation text, the policies, ablations, and recipes, each in one
streamed run. On a checkpoint over 1 GB prices, ablations and recipes are made only where they are asked for: with
`--prices`, or with `--by-layer`, which adds the ablations of every layer alone.

K and V are kept in the dtype computed in unless a policy quantizes them: `bf16-compute` measures what bf16 does.
"""

import math
import time
from dataclasses import asdict
from functools import cache, partial

import pytest
import torch
from safetensors import SafetensorError

from epic_quant import footprint, kv
from epic_quant.errors import RecipeError, ReportError, SpecError
from epic_quant.files import atomic
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.policy import tensor_nbytes
from epic_quant.prices import price
from epic_quant.quality import Variant, measure
from epic_quant.quant import Hessian
from epic_quant.recipe.assignment import BY, Problem
from epic_quant.recipe.inputs import ple_of
from epic_quant.records.subjects import CALIBRATION, EVALUATION, PricesRecord, QualityRecord, SensitivityRecord
from epic_quant.results.prices import write_prices
from epic_quant.spec import KV_CACHE, NAMED, NOISE_FLOOR, REFERENCE, PolicySpec

# What a recipe leaves as it is. The named policies keep K and V in bf16, and at a long context those outweigh a small
# model's weights: only a recipe that keeps them too spends the same bytes on the same things.
KEPT = {"in bf16": frozenset({KV_CACHE}), "chosen": frozenset()}

# Recipes by tensor at these mean bits a weight, and how many the frontier has.
RECIPE_BITS = (2, 3, 4, 5, 6)
FRONTIER = 40


@pytest.fixture(scope="session")
def evaluated(run, pytestconfig, hessians_for, request):
    """`evaluated(name, variants, windows)`: the plan on the terminal, then all of them under a progress bar."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def evaluate(name, variants, windows):
        policies = [one.policy if isinstance(one, Variant) else one for one in variants.values()]
        specs = {spec for policy in policies for spec in policy.weight_specs}
        if run.prices_importance and any(spec.imatrix for spec in specs):
            importance = request.getfixturevalue("prices")[0].importance
            hessians = {name: Hessian(partial(torch.from_numpy, its)) for name, its in importance.items()}
        else:
            hessians = hessians_for(*specs)
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


@pytest.fixture(scope="session")
def qualities(run, evaluated):
    """What came out for every policy on the evaluation text."""
    return evaluated("quality", run.evaluated, run.quality_windows)


@pytest.fixture(scope="session")
def sensitivities(run, evaluated):
    """What came out for every ablation on the evaluation text."""
    variants = {name: ablation.policy for name, ablation in run.ablations.items()}
    return evaluated("sensitivity", variants, run.quality_windows)


@pytest.fixture(scope="session")
def prices(run, pytestconfig, hessians_for):
    """The prices on the calibration text, which also lie in a file beside the JSON; and the seconds that they took."""
    if not run.wants_prices:
        pytest.skip("on a checkpoint over 1 GB only with --prices or --by-layer")
    specs = run.priced_specs
    hessians = {} if run.prices_importance else hessians_for(*specs)
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), run.progress("prices", run.config.num_layers * 2 + 3) as step:
        start = time.perf_counter()
        found = price(
            run.checkpoint,
            run.price_windows,
            specs,
            run.priced_kv,
            hessians=hessians,
            context=run.context_of(run.config),
            facts=run.price_facts,
            reduced_precision=run.is_large,
            memory_nbytes=run.memory_nbytes,
            folder=run.options.resume,
            progress=step,
        )
        elapsed_s = time.perf_counter() - start
    if (path := run.prices_file) is not None:
        try:
            with atomic(path) as unfinished:
                write_prices(found, unfinished)
        except (OSError, SafetensorError) as error:
            raise ReportError(f"{path}: cannot be written: {error}") from error
    return found, elapsed_s


@pytest.fixture(scope="session")
def problem(run, prices):
    """`problem(by, keep)`: what recipes are chosen from."""
    reference = run.policies[REFERENCE]

    @cache
    def made(by="tensor", keep=KEPT["in bf16"]):
        return Problem(prices[0], resident(run, reference), ple_of(reference), by, keep)

    return made


@pytest.fixture(scope="session")
def recipes(run, problem):
    """By what a recipe is made at, a policy's resident bytes or bits a weight, and what is done with K and V.

    A RecipeError where there is none as small.
    """

    def made(make):
        try:
            return make()
        except RecipeError as error:
            return error

    at_policies = {
        (name, treatment): made(lambda keep=keep, policy=policy: problem(keep=keep).within_resident(total(run, policy)))
        for name, policy in run.policies.items()
        if name != REFERENCE
        for treatment, keep in KEPT.items()
    }
    at_bits = {(f"{bits} bits", "in bf16"): made(lambda bits=bits: problem().within_bits(bits)) for bits in RECIPE_BITS}
    return at_policies | at_bits


@pytest.fixture(scope="session")
def recipe_qualities(run, evaluated, recipes):
    """What came out for every recipe on the evaluation text, by its policy string."""
    policies = {str(one.policy): one.policy for one in recipes.values() if not isinstance(one, RecipeError)}
    return evaluated("recipe", policies, run.quality_windows)


@pytest.fixture
def record_quality(run, record, benchmark):
    """Record what came out under a name, with the bytes of the policy; timed is the summing up of its tokens."""

    def write(name, policy, evaluation, measured_as, **recipe):
        tokens = evaluation.tokens[measured_as]
        quality = asdict(tokens.quality())
        num_tokens = quality.pop("num_tokens")
        assert all(map(math.isfinite, quality.values()))
        parts = resident(run, policy)
        record(
            QualityRecord(
                policy=name,
                kl_se=quality.pop("kl_divergence_se"),
                **quality,
                resident_nbytes=sum(parts.values()),
                nbytes=sum(
                    tensor_nbytes(policy, tensor) for tensor in expected_tensors(run.config) if not tensor.unused
                ),
                spec=policy.without_folder,
                parts=parts,
                num_tokens=num_tokens,
                resumed_after=evaluation.resumed_after,
                **recipe,
            )
        )
        benchmark.pedantic(tokens.quality)

    return write


def resident(run, policy):
    return footprint.resident(policy, run.config, run.context_of(run.config))


def total(run, policy):
    return sum(resident(run, policy).values())


@pytest.fixture
def predicted(request, run):
    """`predicted(policy)`: its divergence by the prices; None where there are none of one of its specs."""

    def predict(policy):
        if not run.wants_prices:
            return None
        try:
            return request.getfixturevalue("prices")[0].predict(policy).kl_divergence
        except SpecError:
            return None

    return predict


def test_quality(policy, run, qualities, predicted, record_quality):
    """Every policy against the checkpoint's own weights in fp32."""
    if policy.name not in run.evaluated:
        pytest.skip("no --hessians given, and gathering them on a checkpoint over 1 GB is a run of its own")
    record_quality(policy.name, policy, qualities, policy.name, predicted_kl_divergence=predicted(policy))


def test_noise_floor(qualities, record_quality):
    """The same weights computed in bf16: what lies below it is noise."""
    record_quality(NOISE_FLOOR, NAMED[REFERENCE], qualities, NOISE_FLOOR)


def test_prices(run, prices, problem, record, benchmark):
    """What every tensor costs under every spec, the frontier of recipes, and one spec a class, kind or layer."""
    found, elapsed_s = prices
    tensors = {
        one.name: {
            "tensor_class": one.target.tensor_class.value,
            "kind": one.target.kind,
            "layer": one.layer,
            "numel": one.numel,
            "specs": {
                spec: [*found.price(one, spec), nbytes] for spec, nbytes in zip(one.candidates, one.nbytes, strict=True)
            },
        }
        for one in found.tensors
    }
    assert all(math.isfinite(kl) for one in tensors.values() for kl, _, _ in one["specs"].values())
    compared = []
    for bits in RECIPE_BITS:
        try:
            made = {by: problem(by).within_bits(bits) for by in BY}
        except RecipeError:  # The scales of short rows may take more than that.
            continue
        nbytes = max(recipe.nbytes for recipe in made.values())
        compared.append(
            {"bits": bits, "nbytes": nbytes, "predicted": {by: recipe.predicted for by, recipe in made.items()}}
        )
    recipes = problem().frontier(FRONTIER)
    frontier = [
        {
            "resident_nbytes": one.resident_nbytes,
            "predicted": one.predicted,
            "policy": str(one.policy),
            "bits": one.bits_by_part,
        }
        for one in recipes
    ]
    record(
        PricesRecord(
            text=CALIBRATION,
            num_tokens=found.num_predicted,
            samples=int(found.facts["samples"]),
            elapsed_s=elapsed_s,
            file=None if run.prices_file is None else run.prices_file.name,
            tensors=tensors,
            frontier=tuple(frontier),
            by=tuple(compared),
            parts=resident(run, run.policies[REFERENCE]),
        )
    )
    benchmark.pedantic(found.predict, (recipes[-1].policy,), rounds=3)


def test_sensitivity(ablation_name, run, sensitivities, predicted, record, benchmark):
    """One class, or the KV cache, quantized alone, on the evaluation text; predicted from the calibration text.

    Bytes saved are those against bf16, of the whole class, a table's rows on disk included.
    """
    ablation = run.ablations[ablation_name]
    tokens = sensitivities.tokens[ablation_name]
    quality = tokens.quality()
    assert math.isfinite(quality.kl_divergence)
    whole, nbytes = (stored_nbytes(ablation, policy, run) for policy in (PolicySpec(REFERENCE), ablation.policy))
    record(
        SensitivityRecord(
            tensor_class=ablation.what,
            spec=ablation.spec_name,
            text=EVALUATION,
            layer=ablation.layer,
            kl_divergence=quality.kl_divergence,
            kl_se=quality.kl_divergence_se,
            predicted_kl_divergence=predicted(ablation.policy),
            saved_nbytes=whole - nbytes,
            kl_per_mb=quality.kl_divergence / ((whole - nbytes) / 1e6) if whole > nbytes else None,
            nbytes=nbytes,
            num_tokens=quality.num_tokens,
            resumed_after=sensitivities.resumed_after,
            kv=ablation.spec if ablation.what == KV_CACHE else None,
        )
    )
    benchmark.pedantic(tokens.quality)


def test_recipe(recipe_at, recipe_kv, run, recipes, recipe_qualities, record_quality):
    """The recipe at a policy's resident bytes, or some bits a weight: predicted from one text, measured on another."""
    recipe = recipes[recipe_at, recipe_kv]
    if isinstance(recipe, RecipeError):
        pytest.skip(str(recipe))
    if recipe_at in run.policies:
        assert total(run, recipe.policy) <= total(run, run.policies[recipe_at])
    record_quality(
        f"recipe at {recipe_at}, K and V {recipe_kv}",
        recipe.policy,
        recipe_qualities,
        str(recipe.policy),
        predicted_kl_divergence=recipe.predicted,
        recipe_at=recipe_at,
        kv=recipe_kv,
    )


def stored_nbytes(ablation, policy, run):
    """Bytes of what the ablation is about under a policy; of the KV cache at the run's context."""
    if ablation.what != KV_CACHE:
        return sum(tensor_nbytes(policy, tensor) for tensor in ablation.tensors(run.config))
    context = run.context_of(run.config)
    if ablation.layer is None:
        return footprint.kv_nbytes(policy, run.config, context)
    return kv.layer_nbytes(policy.kv_of(ablation.layer), run.config.layers[ablation.layer], context)

"""What recipes are chosen from: a run's JSON and the prices beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from epic_quant.errors import RecipeError
from epic_quant.recipe.assignment import By, Problem
from epic_quant.records.subjects import FootprintRecord, PricesRecord, QualityRecord
from epic_quant.results.prices import Priced, Prices
from epic_quant.results.run import Run
from epic_quant.spec import FORMATS, NAMED, REFERENCE, PLESpec, PolicySpec, WeightSpec


def problem_of(run: Run, prices: Prices, by: By = "tensor", keep: Collection[str] = ()) -> Problem:
    """The problem of a run; classes in `keep`, or the `kv_cache`, stay in bf16.

    Raises RecipeError where the run lacks the resident bytes of `bf16`, and on an unknown class to keep.
    """
    ple = ple_of(run.policies.get(REFERENCE, NAMED[REFERENCE]))
    return Problem(prices, _resident_parts(run), ple, by, frozenset(keep))


def in_ggml_types(prices: Prices) -> Prices:
    """The prices of ggml's types, and of what is the same in them; not those of K and V, which no file holds.

    Raises RecipeError where none was priced.
    """
    tensors = tuple(map(_in_ggml_types, prices.tensors))
    if not any(priced.candidates for priced in tensors):
        types = " ".join(f"--price {name}" for name, info in FORMATS.items() if info.block_nbytes)
        raise RecipeError(
            "the JSON has no prices of ggml's types; make them with: "
            f"pytest benchmarks/test_quality.py {types} --benchmark-json out.json"
        )
    return replace(prices, tensors=tensors, kv=())


def _in_ggml_types(priced: Priced) -> Priced:
    kept = [index for index, spec in enumerate(priced.candidates) if WeightSpec.parse(spec).ggml_type]
    return replace(
        priced,
        candidates=tuple(priced.candidates[index] for index in kept),
        nbytes=tuple(priced.nbytes[index] for index in kept),
        derivatives=priced.derivatives[kept],
        diagonal=None,
    )


def _resident_parts(run: Run) -> Mapping[str, float]:
    """Resident bytes of `bf16` by part, from its footprint, its quality or the prices, whichever ran."""
    footprint = run.value(FootprintRecord, "parts", policy=REFERENCE, model="this checkpoint", column="resident")
    quality = run.value(QualityRecord, "parts", policy=REFERENCE)
    if parts := footprint or quality or run.value(PricesRecord, "parts"):
        return dict(parts)
    raise RecipeError(
        "the JSON lacks the resident bytes of bf16 by part; make them with: "
        "pytest benchmarks/test_quality.py --benchmark-json out.json"
    )


def ple_of(reference: PolicySpec) -> PLESpec:
    """As many PLE rows as `bf16` keeps. Where those are fixed, the ones used last take the same bytes."""
    ple = reference.ple
    return PLESpec("lru", ple.capacity_rows) if ple.residency == "static" else ple

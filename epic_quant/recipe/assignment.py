"""From a run's sensitivities to the recipe of least predicted divergence within a budget."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from epic_quant.errors import RecipeError
from epic_quant.recipe.program import Option, assign, least_cost
from epic_quant.results.run import Run
from epic_quant.results.sensitivities import (
    CALIBRATION,
    KV_CACHE,
    MAKE_SENSITIVITIES,
    UNQUANTIZED,
    Sensitivity,
    sensitivities,
)
from epic_quant.spec.layers import format_layers

_BF16_NBYTES = 2
# What the parts of a footprint call a class, where it is not the class's own name.
_PARTS = {"ple_table": "ple_rows"}


@dataclass(frozen=True)
class Choice:
    """A spec for a unit: bytes stored, bytes of them that must be in RAM, and the divergence it causes alone."""

    spec: str
    nbytes: int
    resident_nbytes: int
    kl_divergence: float


@dataclass(frozen=True)
class Unit:
    """What is given one spec: a class, or its part in one layer. `choices` has bf16 among them."""

    tensor_class: str
    layer: int | None
    choices: tuple[Choice, ...]
    weights: int  # 0 for the KV cache, whose bits are not bits of a weight


@dataclass(frozen=True)
class Recipe:
    """The choice of every unit, and what comes with them.

    `resident_nbytes` counts all that the model needs in RAM, or is None where the run does not tell. `predicted` is in
    nats a token, on the text of calibration.
    """

    parts: tuple[tuple[Unit, Choice], ...]
    ple: str | None
    resident_nbytes: int | None
    predicted: float

    @property
    def nbytes(self) -> int:
        """Bytes stored of the weights that were chosen for."""
        return sum(choice.nbytes for unit, choice in self.parts if unit.weights)

    @property
    def bits_per_weight(self) -> float:
        """The average over all weights that were chosen for, whole tables among them."""
        weights = sum(unit.weights for unit, _ in self.parts)
        return 8 * self.nbytes / weights if weights else math.nan

    @property
    def policy(self) -> str:
        """The policy string: of a class by layer the commonest spec, and after it what other layers have."""
        layers: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        said = {}
        for unit, choice in self.parts:
            if unit.layer is None:
                said[unit.tensor_class] = choice.spec
            else:
                layers[unit.tensor_class][choice.spec].append(unit.layer)
        for tensor_class, by_spec in layers.items():
            commonest = max(by_spec, key=lambda spec: len(by_spec[spec]))
            said[tensor_class] = commonest
            said |= {
                f"{tensor_class}@{format_layers(numbers)}": spec
                for spec, numbers in by_spec.items()
                if spec != commonest
            }
        kv = said.pop(KV_CACHE, UNQUANTIZED)
        ple = [] if self.ple is None else [f"ple={self.ple}"]
        parts = [f"{key}={spec}" for key, spec in said.items() if spec != UNQUANTIZED or "@" in key]
        return ",".join([*parts, f"kv={kv}", *ple])


def within_resident(run: Run, budget: int, by_layer: bool = False, keep: Collection[str] = ()) -> Recipe:
    """The best recipe whose resident bytes are at most `budget`: weights, PLE rows, norms and KV cache.

    Classes in `keep`, or the `kv_cache`, stay as they are. The run must hold the resident bytes of `bf16` by part, of
    which some do not depend on the choices. Raises RecipeError where it does not, where there are no sensitivities, and
    on a budget below the smallest possible.
    """
    parts = _resident_parts(run)
    if parts is None:
        raise RecipeError(
            "the JSON does not tell the resident bytes of bf16 by part; give --bits, or make them with: "
            f"{MAKE_SENSITIVITIES}"
        )
    units = _units(run, by_layer, keep)
    fixed = _fixed_nbytes(parts, units)
    options = [[Option(c.resident_nbytes, c.kl_divergence) for c in unit.choices] for unit in units]
    smallest = fixed + least_cost(options)
    if budget < smallest:
        raise RecipeError(f"a budget of {budget:,} bytes is too small: the least that these specs need is {smallest:,}")
    return _recipe(run, units, assign(options, budget - fixed))


def within_bits(run: Run, bits: float, by_layer: bool = False, keep: Collection[str] = ()) -> Recipe:
    """The best recipe of at most `bits` bits a weight, on average over all classes that are not in `keep`.

    Tables count whole, wherever their rows are, and the KV cache stays as it is. Raises RecipeError where there are no
    sensitivities, and where that is below the smallest possible.
    """
    units = [unit for unit in _units(run, by_layer, keep) if unit.weights]
    if not units:
        raise RecipeError(f"the JSON holds sensitivities of the KV cache alone; make all with: {MAKE_SENSITIVITIES}")
    weights = sum(unit.weights for unit in units)
    options = [[Option(c.nbytes, c.kl_divergence) for c in unit.choices] for unit in units]
    budget, smallest = math.floor(Fraction(bits) * weights / 8), least_cost(options)
    if budget < smallest:
        least = math.ceil(8e4 * smallest / weights) / 1e4
        raise RecipeError(f"{bits:g} bits a weight are too few: the least that these specs need is {least:g}")
    return _recipe(run, units, assign(options, budget))


def _recipe(run: Run, units: Sequence[Unit], chosen: Sequence[int]) -> Recipe:
    parts = tuple((unit, unit.choices[index]) for unit, index in zip(units, chosen, strict=True))
    fixed = _resident_parts(run)
    resident = (
        None if fixed is None else _fixed_nbytes(fixed, units) + sum(choice.resident_nbytes for _, choice in parts)
    )
    return Recipe(parts, _ple(run), resident, math.fsum(choice.kl_divergence for _, choice in parts))


def _units(run: Run, by_layer: bool, keep: Collection[str]) -> list[Unit]:
    """A unit for each class, or with `by_layer` for each layer of the classes that were measured by layer."""
    found = sensitivities(run, CALIBRATION)
    known = {one.tensor_class: None for one in found}
    if strange := [name for name in keep if name not in known]:
        raise RecipeError(f"there are no sensitivities of {strange[0]!r} to leave out; there are of {', '.join(known)}")
    found = [one for one in found if one.tensor_class not in keep]
    # One KV policy holds for all layers, here as in llama.cpp.
    layered = {one.tensor_class for one in found if one.layer is not None and one.tensor_class != KV_CACHE}
    layered = layered if by_layer else set()
    if by_layer and not layered:
        command = MAKE_SENSITIVITIES.replace(" --", " --by-layer --", 1)
        raise RecipeError(f"the JSON holds no sensitivities by layer; make them with: {command}")
    grouped: dict[tuple[str, int | None], list[Sensitivity]] = defaultdict(list)
    for one in found:
        counted = one.whole_nbytes is not None and one.nbytes is not None
        if counted and (one.layer is not None) == (one.tensor_class in layered):
            grouped[one.tensor_class, one.layer].append(one)
    if not grouped:
        raise RecipeError(
            f"the JSON holds no sensitivities measured on the text of calibration; make them with: {MAKE_SENSITIVITIES}"
        )
    whole: dict[str, int] = defaultdict(int)
    for (tensor_class, _), alone in grouped.items():
        whole[tensor_class] += _whole_nbytes(alone)
    parts = _resident_parts(run) or {}
    units = []
    for (tensor_class, layer), alone in grouped.items():
        # Of a table whose rows are cached only a part is in RAM.
        resident = parts.get(_PARTS.get(tensor_class, tensor_class), whole[tensor_class])
        share = Fraction(round(resident), max(1, whole[tensor_class]))
        units.append(_unit(tensor_class, layer, alone, share))
    return units


def _unit(tensor_class: str, layer: int | None, alone: Sequence[Sensitivity], share: Fraction) -> Unit:
    def choice(spec: str, nbytes: int, kl_divergence: float) -> Choice:
        return Choice(spec, nbytes, math.ceil(nbytes * share), kl_divergence)

    nbytes = _whole_nbytes(alone)
    choices = {one.spec: choice(one.spec, one.nbytes or 0, one.kl_divergence) for one in alone}
    unquantized = choice(UNQUANTIZED, nbytes, 0.0)
    weights = 0 if tensor_class == KV_CACHE else nbytes // _BF16_NBYTES
    return Unit(tensor_class, layer, tuple({UNQUANTIZED: unquantized, **choices}.values()), weights)


def _whole_nbytes(alone: Sequence[Sensitivity]) -> int:
    return alone[0].whole_nbytes or 0


def _resident_parts(run: Run) -> Mapping[str, float] | None:
    """Resident bytes of `bf16` by part, from its footprint or, where that did not run, from its quality."""
    labels = {"policy": UNQUANTIZED, "model": "this checkpoint", "column": "resident"}
    for record in [*run.select("footprint", **labels), *run.select("quality", policy=UNQUANTIZED)]:
        parts: Mapping[str, float] | None = record.details.get("parts")
        if parts:
            return parts
    return None


def _fixed_nbytes(parts: Mapping[str, float], units: Sequence[Unit]) -> int:
    """Bytes of what nothing is chosen for: norms, and classes without sensitivities."""
    chosen = {_PARTS.get(unit.tensor_class, unit.tensor_class) for unit in units}
    return sum(round(nbytes) for part, nbytes in parts.items() if part not in chosen)


def _ple(run: Run) -> str | None:
    """As many PLE rows as `bf16` keeps in this run. Where those are fixed, the ones used last take the same bytes."""
    found = re.search(r"(?:^|,)ple=([^,]+)", run.policy_string(UNQUANTIZED))
    return found[1].replace("static:", "lru:") if found else None

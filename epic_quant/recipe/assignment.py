"""From prices to the recipe of least predicted divergence within a budget of bytes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from epic_quant.errors import RecipeError, unknown
from epic_quant.recipe.exchange import Shares, improved
from epic_quant.recipe.program import Option, assign
from epic_quant.results.prices import Priced, Prices
from epic_quant.spec import (
    BF16,
    KV_CACHE,
    KVSpec,
    PLESpec,
    PolicySpec,
    Target,
    TensorClass,
    WeightSpec,
    recipe_name,
)

# What has one spec: each tensor, a class in a layer, a kind in all layers, or a whole class.
By = Literal["tensor", "layer", "kind", "class"]
BY: tuple[By, ...] = ("tensor", "layer", "kind", "class")

# What the parts of a footprint call a class, where it is not the class's own name.
PARTS = {TensorClass.PLE_TABLE.value: "ple_rows"}

# Bytes for the factors of RoPE, which are a tensor in a GGUF file.
_GGUF_SPARE = 4096


@dataclass(frozen=True, eq=False)
class Choice:
    """A spec for a unit: bytes stored, bytes of them that must be in RAM, and derivatives [tokens] of its error."""

    spec: WeightSpec | KVSpec
    nbytes: int
    resident_nbytes: int
    derivatives: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Unit:
    """What is given one spec: tensors, or K and V of all layers (`targets` is empty). `choices` has bf16 among them."""

    name: str
    part: str  # what a footprint counts it as
    targets: tuple[Target, ...]
    choices: tuple[Choice, ...]
    numel: int  # weights; 0 for K and V, whose bits are not bits of a weight


@dataclass(frozen=True, eq=False)
class Recipe:
    """The choice of every unit, and what comes with them.

    `resident_nbytes` counts all that the model needs in RAM. `predicted` is in nats a token, on the calibration text,
    with the cross terms between units; `alone` is without them. `gap` is how far, as a part of it, the sum of the
    units' own prices can have been above the least before exchanges were made.
    """

    policy: PolicySpec
    parts: tuple[tuple[Unit, Choice], ...]
    resident_nbytes: int
    predicted: float
    alone: float
    gap: float

    @property
    def nbytes(self) -> int:
        """Bytes stored of the weights that were chosen for, whole tables included."""
        return sum(choice.nbytes for unit, choice in self.parts if unit.numel)

    @property
    def bits_by_part(self) -> dict[str, float]:
        """The mean bits a weight of each class."""
        found: dict[str, list[int]] = {}
        for unit, choice in self.parts:
            if unit.numel:
                nbytes, numel = found.setdefault(unit.targets[0].tensor_class.value, [0, 0])
                found[unit.targets[0].tensor_class.value] = [nbytes + choice.nbytes, numel + unit.numel]
        return {name: 8 * nbytes / numel for name, (nbytes, numel) in found.items()}

    @property
    def bits_per_weight(self) -> float:
        """The average over all weights that were chosen for."""
        numel = sum(unit.numel for unit, _ in self.parts)
        return 8 * self.nbytes / numel if numel else math.nan


@dataclass(frozen=True, eq=False)
class Problem:
    """What recipes are chosen from: prices, the resident bytes of bf16 by part, and how PLE rows are held."""

    prices: Prices
    resident_parts: Mapping[str, float]
    ple: PLESpec = field(default_factory=PLESpec)
    by: By = "tensor"
    keep: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.prices.tensors:
            raise RecipeError("there are no prices to choose by")
        known = [*dict.fromkeys(str(one.target.tensor_class) for one in self.prices.tensors if one.target), KV_CACHE]
        for name in self.keep:
            if name not in known:
                raise RecipeError(unknown("tensor class to keep", name, known))

    def within_resident(self, budget: int) -> Recipe:
        """The best recipe whose resident bytes are at most `budget`: weights, PLE rows, norms and K and V.

        Raises RecipeError on a budget below the least.
        """
        units = self.units
        costs = [[choice.resident_nbytes for choice in unit.choices] for unit in units]
        return self._within(units, costs, self._fixed_nbytes(units), budget)

    def frontier(self, count: int) -> list[Recipe]:
        """About so many recipes from the fewest resident bytes up, each the best at its own: no exchanges are made.

        They are the assignments of least loss + λ · bytes, for λ from large to small.
        """
        units = self.units
        costs = [np.array([choice.resident_nbytes for choice in unit.choices], dtype=np.float64) for unit in units]
        losses = [np.array([self.prices.cost(choice.derivatives)[0] for choice in unit.choices]) for unit in units]
        # The prices of a byte at which any unit changes from one option to the next.
        steps = [
            (loss[low] - loss[high]) / (cost[high] - cost[low])
            for cost, loss in zip(costs, losses, strict=True)
            for low in range(len(cost))
            for high in range(len(cost))
            if cost[high] > cost[low] and loss[high] < loss[low]
        ]
        found: dict[tuple[int, ...], None] = {}
        for byte_price in np.geomspace(2 * max(steps, default=1.0), min(steps, default=1.0) / 2, 4 * count):
            chosen = [int(np.argmin(loss + byte_price * cost)) for cost, loss in zip(costs, losses, strict=True)]
            found[tuple(chosen)] = None
        every = list(found)
        kept = dict.fromkeys(every[round(index)] for index in np.linspace(0, len(every) - 1, min(count, len(every))))
        return [self._recipe(units, chosen) for chosen in kept]

    def within_gguf(self, budget: int) -> Recipe:
        """The best recipe whose tensors take at most `budget` bytes in a GGUF file; K and V stay bf16.

        Tables count whole, and norms in fp32, as such files have them. Raises RecipeError on a budget below the least.
        """
        units = [unit for unit in self.units if unit.numel]
        fixed = (
            _GGUF_SPARE
            + 2 * round(self.resident_parts.get("norms", 0))
            + sum(priced.whole_nbytes for priced in self.prices.tensors if self._is_kept(priced))
        )
        return self._within(units, [[choice.nbytes for choice in unit.choices] for unit in units], fixed, budget)

    def within_bits(self, bits: float) -> Recipe:
        """The best recipe of at most `bits` bits a weight, on average over what is chosen for; K and V stay bf16.

        Tables count whole. Raises RecipeError where that is below the least.
        """
        units = [unit for unit in self.units if unit.numel]
        numel = sum(unit.numel for unit in units)
        costs = [[choice.nbytes for choice in unit.choices] for unit in units]
        budget, least = math.floor(Fraction(bits) * numel / 8), sum(map(min, costs))
        if budget < least:
            needed = math.ceil(8e4 * least / max(1, numel)) / 1e4
            raise RecipeError(f"{bits:g} bits a weight are too few: these specs need {needed:g} at least")
        return self._solved(units, costs, budget)

    @cached_property
    def units(self) -> list[Unit]:
        """What is chosen for, with the candidates that all tensors of a unit have."""
        grouped: dict[Target, list[Priced]] = defaultdict(list)
        for priced in self.prices.tensors:
            if not self._is_kept(priced):
                grouped[self._unit_of(priced)].append(priced)
        units = [self._unit(target, members) for target, members in grouped.items()]
        if self.prices.kv and KV_CACHE not in self.keep and KV_CACHE in self.resident_parts:
            units.append(self._kv_unit())
        return units

    def _is_kept(self, priced: Priced) -> bool:
        return priced.target is not None and priced.target.tensor_class.value in self.keep

    def _unit_of(self, priced: Priced) -> Target:
        assert priced.target is not None
        tensor_class, kind, layer = priced.target
        return {
            "tensor": priced.target,
            "layer": Target(tensor_class, None, layer),
            "kind": Target(tensor_class, kind),
            "class": Target(tensor_class),
        }[self.by]

    def _unit(self, target: Target, members: Sequence[Priced]) -> Unit:
        part = PARTS.get(target.tensor_class.value, target.tensor_class.value)
        whole = {m.name: m.whole_nbytes for m in self.prices.tensors if m.target and m.target[0] == target.tensor_class}
        # Of a table whose rows are cached only a part is in RAM.
        share = Fraction(round(self.resident_parts.get(part, sum(whole.values()))), max(1, sum(whole.values())))
        shared = [one for one in members[0].candidates if all(one in member.candidates for member in members)]

        def choice(spec: WeightSpec, nbytes: int, derivatives: NDArray[np.float32]) -> Choice:
            return Choice(spec, nbytes, math.ceil(nbytes * share), derivatives)

        zeros = np.zeros(members[0].derivatives.shape[1], dtype=np.float32)
        choices = [choice(BF16, sum(member.whole_nbytes for member in members), zeros)]
        for candidate in shared:
            at = [(member, member.index(candidate)) for member in members]
            nbytes = sum(member.nbytes[index] for member, index in at)
            derivatives = _total([member.derivatives[index] for member, index in at])
            choices.append(choice(WeightSpec.parse(candidate), nbytes, derivatives))
        targets = tuple(member.target for member in members if member.target is not None)
        return Unit(str(target), part, targets, tuple(choices), sum(member.numel for member in members))

    def _kv_unit(self) -> Unit:
        """One KV spec holds for all layers, here as in llama.cpp."""
        layers, zeros = self.prices.kv, np.zeros(self.prices.kv[0].derivatives.shape[1], dtype=np.float32)
        whole = round(self.resident_parts[KV_CACHE])
        choices = [Choice(KVSpec(), whole, whole, zeros)]
        for index, candidate in enumerate(layers[0].candidates):
            nbytes = sum(layer.nbytes[index] for layer in layers)
            derivatives = _total([layer.derivatives[index] for layer in layers])
            choices.append(Choice(KVSpec.parse(candidate), nbytes, nbytes, derivatives))
        return Unit(KV_CACHE, KV_CACHE, (), tuple(choices), 0)

    def _fixed_nbytes(self, units: Sequence[Unit]) -> int:
        """Resident bytes of what nothing is chosen for: norms, and what is kept."""
        chosen = {unit.part for unit in units}
        return sum(round(nbytes) for part, nbytes in self.resident_parts.items() if part not in chosen)

    def _within(self, units: Sequence[Unit], costs: Sequence[Sequence[int]], fixed: int, budget: int) -> Recipe:
        """The best recipe of `budget` bytes, `fixed` of which nothing is chosen for."""
        least = fixed + sum(map(min, costs))
        if budget < least:
            raise RecipeError(f"a budget of {budget:,} bytes is too small: these specs need {least:,} at least")
        return self._solved(units, costs, budget - fixed)

    def _solved(self, units: Sequence[Unit], costs: Sequence[Sequence[int]], budget: int) -> Recipe:
        """The sum of the units' own prices is minimised, and improved by exchanges that see the cross terms."""
        losses = [[self.prices.cost(choice.derivatives)[0] for choice in unit.choices] for unit in units]
        options = [list(map(Option, *both)) for both in zip(costs, losses, strict=True)]
        shares = [
            Shares(np.array(its, dtype=np.int64), np.stack([choice.derivatives for choice in unit.choices]))
            for its, unit in zip(costs, units, strict=True)
        ]
        assignment = assign(options, budget)
        return self._recipe(units, improved(shares, assignment.chosen, budget), assignment.gap)

    def _recipe(self, units: Sequence[Unit], chosen: Sequence[int], gap: float = 0.0) -> Recipe:
        parts = tuple((unit, unit.choices[index]) for unit, index in zip(units, chosen, strict=True))
        predicted = self.prices.cost(_total([choice.derivatives for _, choice in parts]))[0] if parts else 0.0
        resident = self._fixed_nbytes(units) + sum(choice.resident_nbytes for _, choice in parts)
        return Recipe(
            policy=self._policy(parts).renamed(recipe_name(resident)),
            parts=parts,
            resident_nbytes=resident,
            predicted=predicted,
            alone=math.fsum(self.prices.cost(choice.derivatives)[0] for _, choice in parts),
            gap=gap,
        )

    def _policy(self, parts: Iterable[tuple[Unit, Choice]]) -> PolicySpec:
        specs: dict[Target, WeightSpec] = {}
        kv = KVSpec()
        for unit, choice in parts:
            if isinstance(choice.spec, KVSpec):
                kv = choice.spec
            else:
                specs |= dict.fromkeys(unit.targets, choice.spec)
        return PolicySpec("", tuple(_short(specs, self.by).items()), kv, self.ple)


def _short(specs: Mapping[Target, WeightSpec], by: By) -> dict[Target, WeightSpec]:
    """The same with the commonest spec of a class, and of a kind in it, given once: a shorter text."""
    short: dict[Target, WeightSpec] = {}
    for tensor_class in dict.fromkeys(target.tensor_class for target in specs):
        own = {target: spec for target, spec in specs.items() if target.tensor_class == tensor_class}
        short[Target(tensor_class)] = _commonest(own.values())
        if by == "layer":
            short |= {Target(tensor_class, None, target.layer): spec for target, spec in own.items()}
            continue
        for kind in dict.fromkeys(target.kind for target in own if target.kind is not None):
            of_kind = {target: spec for target, spec in own.items() if target.kind == kind}
            short[Target(tensor_class, kind)] = _commonest(of_kind.values())
            short |= of_kind
    return short


def _total(derivatives: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    if len(derivatives) == 1:
        return derivatives[0]  # and no copy: there are as many as tensors and specs
    total: NDArray[np.float32] = np.stack(derivatives).sum(axis=0)
    return total


def _commonest(specs: Iterable[WeightSpec]) -> WeightSpec:
    return Counter(specs).most_common(1)[0][0]

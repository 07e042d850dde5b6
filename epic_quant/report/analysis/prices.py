"""What every tensor costs alone, what recipes of these prices save, and how far predictions are off."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from epic_quant.errors import ReportError, SpecError
from epic_quant.records.subjects import CALIBRATION, PricesRecord, QualityRecord, SensitivityRecord
from epic_quant.report.analysis.correlation import spearman
from epic_quant.report.analysis.sensitivity import reported
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run, distinct
from epic_quant.spec import WeightSpec

# A prediction is in range where it is within these bounds of what was measured.
LEAST, MOST = 0.8, 1.25

# What one spec is given to, from the simplest recipe to the finest.
GRANULARITIES = ("class", "kind", "layer", "tensor")

# Tensors are compared at the width that most of them have between these bits a weight, scales included; at `int4` where
# several widths are as common.
_ABOUT_FOUR_BITS, _USUAL = (3.5, 4.75), "int4"


@dataclass(frozen=True)
class Price:
    """The divergence in nats a token that a tensor alone is predicted to cause under a spec, and its bytes there."""

    spec: str
    kl_divergence: float
    kl_se: float | None
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor and its prices by spec; `kind` and `layer` are None for a global."""

    name: str
    tensor_class: str
    kind: str | None
    layer: int | None
    numel: int
    prices: Mapping[str, Price]


@dataclass(frozen=True)
class Offer:
    """One tensor's price, and what it saves from bf16."""

    tensor: Tensor
    price: Price

    @property
    def saved_nbytes(self) -> int:
        """Bytes saved from bf16."""
        return 2 * self.tensor.numel - self.price.nbytes

    @property
    def kl_per_mb(self) -> float | None:
        """Nats a token for each MB of 1e6 bytes saved; None where none is saved."""
        return 1e6 * self.price.kl_divergence / self.saved_nbytes if self.saved_nbytes > 0 else None


@dataclass(frozen=True)
class Kind:
    """The tensors of a class of one kind, such as `mlp.down_proj`, and the sum of their prices at each width."""

    name: str
    num_tensors: int
    prices: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """A recipe by tensor: its resident bytes, predicted divergence, policy, and the mean bits a weight by class."""

    resident_nbytes: int
    predicted: float
    policy: str
    bits: Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """The predicted divergence by granularity, at the bytes that all weights would have at so many bits."""

    bits: float
    nbytes: int
    predicted: Mapping[str, float]

    def times_less(self, granularity: str) -> float | None:
        """How many times less divergence than one spec a class."""
        return quotient(self.predicted.get("class"), self.predicted.get(granularity))


@dataclass(frozen=True)
class Beside:
    """A prediction beside what was measured."""

    record: SensitivityRecord | QualityRecord
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """The predicted over the measured divergence."""
        return self.predicted / self.measured

    @property
    def in_range(self) -> bool:
        """Whether the prediction is near what was measured."""
        return LEAST <= self.ratio <= MOST


def priced(run: Run) -> PricesRecord:
    """The prices of the run, those of the calibration text where there are several."""
    found = run.of(PricesRecord)
    return next((one for one in found if one.text == CALIBRATION), found[0])


def tensors(record: PricesRecord) -> list[Tensor]:
    """The tensors as the record has them. Raises ReportError where it is damaged."""
    with _details():
        return [_tensor(name, one) for name, one in record.tensors.items()]


def frontier(record: PricesRecord) -> list[Recipe]:
    """The recipes, from the fewest resident bytes up. Raises ReportError where the record is damaged."""
    with _details():
        found = [
            Recipe(int(one["resident_nbytes"]), _finite(one["predicted"]), str(one["policy"]), _numbers(one["bits"]))
            for one in record.frontier
        ]
    return sorted(found, key=lambda recipe: recipe.resident_nbytes)


def budgets(record: PricesRecord) -> list[Budget]:
    """What the granularities cost at equal bytes. Raises ReportError where the record is damaged."""
    with _details():
        return [Budget(_finite(one["bits"]), int(one["nbytes"]), _numbers(one["predicted"])) for one in record.by]


def at_equal_bits(found: Sequence[Tensor]) -> tuple[str, list[Offer]]:
    """The spec of about four bits that most tensors have, and each tensor's price there.

    Where a tensor has that spec with another group only, such as one of shorter rows, its price is of that; a tensor
    without either is left out.
    """
    counts: Counter[str] = Counter()
    for tensor in found:
        bits = {spec: 8 * price.nbytes / tensor.numel for spec, price in tensor.prices.items()}
        low, high = _ABOUT_FOUR_BITS
        counts.update(distinct(_width(spec) for spec, width in bits.items() if low <= width <= high))
    if not counts:
        return "", []
    width = max(counts, key=lambda name: (counts[name], name == _USUAL))
    specs = Counter(spec for tensor in found for spec in tensor.prices if _width(spec) == width)
    usual = max(specs, key=lambda name: specs[name])
    offers = []
    for tensor in found:
        alike = [spec for spec in tensor.prices if _width(spec) == width]
        if alike:
            spec = usual if usual in alike else min(alike, key=lambda name: tensor.prices[name].nbytes)
            offers.append(Offer(tensor, tensor.prices[spec]))
    return usual, offers


def kinds(found: Sequence[Tensor]) -> list[Kind]:
    """Tensors by class and kind, those of no kind by class, with the widths that all tensors of a kind are priced at.

    Each tensor's price is of the spec with the fewest bytes at a width. Cross terms between tensors are left out.
    """
    by_name: dict[str, list[Tensor]] = {}
    for tensor in found:
        by_name.setdefault(f"{tensor.tensor_class}.{tensor.kind}" if tensor.kind else tensor.tensor_class, []).append(
            tensor
        )
    made = []
    for name, alike in by_name.items():
        sums: dict[str, list[float]] = {}
        for tensor in alike:
            smallest = {_width(one.spec): one for one in sorted(tensor.prices.values(), key=lambda one: -one.nbytes)}
            for width, price in smallest.items():
                sums.setdefault(width, []).append(price.kl_divergence)
        whole = {width: sum(values) for width, values in sums.items() if len(values) == len(alike)}
        made.append(Kind(name, len(alike), whole))
    return made


def by_cost(offers: Sequence[Offer]) -> list[Offer]:
    """From the costliest for each MB saved to the cheapest; what saves nothing is left out."""
    found = [offer for offer in offers if offer.kl_per_mb is not None]
    return sorted(found, key=lambda offer: -(offer.kl_per_mb or 0.0))


def classes_beside(run: Run) -> list[Beside]:
    """The predicted beside the measured divergence of each class, or layer of a class, and spec."""
    return _beside(reported(run))


def policies_beside(run: Run) -> list[Beside]:
    """The predicted beside the measured divergence of each policy and recipe."""
    return _beside(run.of(QualityRecord))


def correlation(pairs: Sequence[Beside]) -> float | None:
    """Spearman's rank correlation of predicted and measured; None where it is not defined."""
    return spearman([(one.predicted, one.measured) for one in pairs])


def _beside(records: Sequence[SensitivityRecord] | Sequence[QualityRecord]) -> list[Beside]:
    return [
        Beside(one, one.predicted_kl_divergence, one.kl_divergence)
        for one in records
        if one.predicted_kl_divergence is not None and one.kl_divergence is not None and one.kl_divergence > 0
    ]


def _width(spec: str) -> str:
    return str(WeightSpec.parse(spec).without_group)


def _tensor(name: str, one: Mapping[str, Any]) -> Tensor:
    prices = {}
    for spec, (divergence, error, nbytes) in one["specs"].items():
        WeightSpec.parse(spec)
        prices[spec] = Price(spec, _finite(divergence), None if error is None else _finite(error), int(nbytes))
    layer = one["layer"]
    if name.startswith("layers.") if layer is None else not name.startswith(f"layers.{layer}."):
        raise ValueError(f"{name} is not in layer {layer!r:.20}")
    numel = int(one["numel"])
    if numel <= 0:
        raise ValueError(f"{name} has {numel} weights")
    return Tensor(name, str(one["tensor_class"]), one["kind"], layer, numel, prices)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _finite(value) for name, value in values.items()}


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


@contextmanager
def _details() -> Iterator[None]:
    """Turns errors in reading a record's details, plain JSON, into ReportError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, SpecError) as error:
        raise ReportError(f"damaged record of 'prices': {type(error).__name__}: {error}") from error

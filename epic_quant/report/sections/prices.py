"""What every tensor costs: prices from one backward pass, the recipes made of them, and predictions beside measures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from epic_quant.records.subjects import QualityRecord, SensitivityRecord
from epic_quant.report import plots
from epic_quant.report.analysis import prices
from epic_quant.report.analysis.policies import names
from epic_quant.report.analysis.prices import GRANULARITIES, LEAST, MOST, Beside, Budget, Offer, Recipe
from epic_quant.report.analysis.sensitivity import width
from epic_quant.report.blocks import Block, Heading, Paragraph, Slider, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, ratio, significant, with_error
from epic_quant.report.layer_map import LayerMap, Square, layer_map
from epic_quant.report.wording import RECIPE_COMMAND, ablation
from epic_quant.results.run import Run, distinct
from epic_quant.spec import TensorClass

_MOST_OFFERS = 10

# The order of computing; kinds that are not here come after.
_KINDS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    *("per_layer_input_gate", "per_layer_projection"),
)

_OFFERS: tuple[Column[Offer], ...] = (
    Column("tensor", lambda one: one.tensor.name, code, text=True),
    Column("spec", lambda one: one.price.spec, code, text=True),
    Column("price, nats a token", lambda one: with_error(one.price.kl_divergence, one.price.kl_se)),
    Column("saved, MB", lambda one: one.saved_nbytes, megabytes),
    Column("nats a token for each MB saved", lambda one: one.kl_per_mb, significant),
)


def _granularity(name: str, budget: Budget) -> str:
    value = budget.predicted.get(name)
    less = None if name == "class" else budget.times_less(name)
    return significant(value) + (f" ({ratio(less)})" if value is not None and less is not None else "")


_BUDGETS: tuple[Column[Budget], ...] = (
    Column("bits a weight", lambda one: one.bits, significant),
    Column("weights, MB", lambda one: one.nbytes, megabytes),
    *(Column(f"one spec a {name}", partial(_granularity, name)) for name in GRANULARITIES),
)
_BESIDE: tuple[Column[Beside], ...] = (
    Column("measured", lambda one: with_error(one.measured, one.record.kl_se)),
    Column("predicted", lambda one: one.predicted, significant),
    Column("predicted / measured", lambda one: f"{significant(one.ratio)} {'✓' if one.in_range else '✗'}"),
)


def blocks(run: Run) -> list[Block]:
    """The heat map, recipes by resident bytes, tables of tensors and granularities, and the check of predictions."""
    record = prices.priced(run)
    usual, offers = prices.at_equal_bits(prices.tensors(record))
    ranked = prices.by_cost(offers)
    found: list[Block] = [
        Paragraph(
            "The price of a tensor is the KL divergence in nats a token that it alone is predicted to cause when it is "
            f"quantized and all else stays in bf16. All prices come from one backward pass over {record.num_tokens:,} "
            f"tokens of the {record.text} text"
            + (f", averaged over {record.samples} samples of labels" if record.samples > 1 else "")
            + ". A price is quadratic in the error of the weights: it is meant for small errors."
        ),
        *_heat_map(usual, offers),
        *_slider(prices.frontier(record)),
    ]
    if ranked:
        most = min(_MOST_OFFERS, len(ranked))
        found += [
            Heading(3, f"The {most} costliest tensors for each MB saved from bf16"),
            table(_OFFERS, ranked[:most]),
            Heading(3, f"The {most} cheapest tensors for each MB saved from bf16"),
            table(_OFFERS, ranked[::-1][:most]),
        ]
    if budgets := prices.budgets(record):
        found += [
            Heading(3, "One spec a class, a kind, a layer or a tensor"),
            Paragraph(
                "Predicted KL divergence in nats a token of the best recipes at equal bytes, and in brackets how many "
                "times less that is than with one spec a class."
            ),
            table(_BUDGETS, budgets),
        ]
    return [*found, *_check(run)]


def findings(run: Run) -> list[str]:
    """The costliest and the cheapest tensor, what a spec for each tensor saves, and how far predictions are off."""
    record = prices.priced(run)
    usual, offers = prices.at_equal_bits(prices.tensors(record))
    found = []
    if ranked := prices.by_cost(offers):
        found.append(
            f"At {code(usual)}, the costliest tensor for each MB saved is {_cost(ranked[0])}, the cheapest "
            f"{_cost(ranked[-1])}."
        )
    compared = [(one, less) for one in prices.budgets(record) if (less := one.times_less("tensor")) is not None]
    if compared:
        low, high = (choose(less for _, less in compared) for choose in (min, max))
        spread = f"{significant(low)} to {significant(high)}" if low != high else significant(low)
        bits = [one.bits for one, _ in compared]
        at = f"{significant(min(bits))} to {significant(max(bits))}" if len(bits) > 1 else significant(bits[0])
        found.append(
            f"A spec for each tensor is predicted to have {spread} times less KL divergence than one for each class at "
            f"equal bytes, at {at} bits a weight."
        )
    if pairs := prices.classes_beside(run):
        found.append(_range_found(pairs))
    return found


def _cost(offer: Offer) -> str:
    return f"{code(offer.tensor.name)} ({significant(offer.kl_per_mb)} nats a token and MB)"


def _heat_map(usual: str, offers: Sequence[Offer]) -> list[Block]:
    order = {kind: place for place, kind in enumerate(_KINDS)}
    squares, full = [], set()
    for one in sorted(offers, key=lambda one: order.get(one.tensor.kind or "", len(order))):
        tensor = one.tensor
        if tensor.layer is not None and tensor.tensor_class == TensorClass.FULL_ATTENTION:
            full.add(tensor.layer)
        tip = f"{tensor.name}: {significant(one.price.kl_divergence)} nats a token under {one.price.spec}"
        row = tensor.name.removesuffix(".weight") if tensor.layer is None else tensor.kind or tensor.tensor_class
        squares.append(Square(row, tensor.layer, one.price.kl_divergence, tip))
    plot = LayerMap(
        f"What every tensor costs when it alone is stored as {usual}",
        "predicted KL divergence, nats a token (logarithmic): darker is costlier",
        squares,
        full,
        "full attention, all others sliding attention",
    )
    return layer_map("prices-heat-map.svg", "What every tensor costs at equal bits, in nats a token", plot)


def _slider(recipes: Sequence[Recipe]) -> list[Block]:
    if not recipes:
        return []
    classes = distinct(name for one in recipes for name in one.bits)
    columns: list[Column[Recipe]] = [
        Column("resident, MB", lambda one: one.resident_nbytes, megabytes),
        Column("predicted KL divergence, nats a token", lambda one: one.predicted, significant),
    ]
    columns += [Column(f"{name}, bits a weight", partial(_bits, name), significant) for name in classes]
    rows = table(columns, recipes, "Recipes by tensor, from the fewest resident bytes to the most")
    return [
        Paragraph(
            f"{len(recipes)} recipes that give each tensor its own spec, each of the least predicted divergence at its "
            f"resident bytes; bits are the mean of a class. To make one within any other budget: {code(RECIPE_COMMAND)}"
        ),
        Slider("Recipe by resident MB", rows, tuple(one.policy for one in recipes), "policy"),
    ]


def _bits(name: str, recipe: Recipe) -> float | None:
    return recipe.bits.get(name)


def _check(run: Run) -> list[Block]:
    """Predictions beside measures, for classes and for policies; nothing where nothing has both."""
    classes, policies = prices.classes_beside(run), prices.policies_beside(run)
    found: list[Block] = []
    if classes or policies:
        found.append(Heading(3, "Predicted beside measured"))
    if classes:
        text = classes[0].record.text if isinstance(classes[0].record, SensitivityRecord) else MISSING
        what: Column[Beside] = Column("quantized alone", _alone, text=True)
        found += [
            Paragraph(
                f"Prices are of the {prices.priced(run).text} text, measures of the {text} text. ✓ where predicted / "
                f"measured is from {LEAST:g} to {MOST:g}. {_out_of_range(classes)}"
            ),
            *_scatter(classes),
            table([what, *_BESIDE], classes),
        ]
    if policies:
        called = names(run)
        policy: Column[Beside] = Column(
            "policy",
            lambda one: called[one.record.policy] if isinstance(one.record, QualityRecord) else MISSING,
            code,
            text=True,
        )
        found += [
            Paragraph("The same of policies and recipes, which quantize many tensors together."),
            table([policy, *_BESIDE], policies),
        ]
    return found


def _alone(one: Beside) -> str:
    assert isinstance(one.record, SensitivityRecord)
    return ablation(one.record)


def _range_found(pairs: Sequence[Beside]) -> str:
    ratios = [one.ratio for one in pairs]
    rank = prices.correlation(pairs)
    correlation = f"; Spearman's rank correlation {significant(rank)}" if rank is not None else ""
    return (
        f"Predicted / measured KL divergence of {len(pairs)} classes and specs: {significant(min(ratios))} to "
        f"{significant(max(ratios))}, median {significant(statistics.median(ratios))}, "
        f"{sum(one.in_range for one in pairs)} of them from {LEAST:g} to {MOST:g}{correlation}."
    )


def _out_of_range(pairs: Sequence[Beside]) -> str:
    """Where predictions fail: too low, as the quadratic form does for large errors, and too high."""
    sentences = []
    for word, found in (
        ("underestimated", [one for one in pairs if one.ratio < LEAST]),
        ("overestimated", [one for one in pairs if one.ratio > MOST]),
    ):
        if found:
            inside = [one.measured for one in pairs if one.in_range]
            cases = ", ".join(f"{_alone(one)} ({significant(one.ratio)})" for one in found)
            least, most = (choose(one.measured for one in found) for choose in (min, max))
            text = (
                f"Out of its range, the prediction has {word} {len(found)} of {len(pairs)}, whose measured divergence "
                f"is {significant(least)} to {significant(most)} nats a token: {cases}."
            )
            if word == "underestimated" and inside and least > max(inside):
                text += (
                    f" All have larger divergence than any within range ({significant(max(inside))} at most), where "
                    "a quadratic form falls short."
                )
            sentences.append(text)
    return " ".join([*sentences, "These predictions are not corrected."]) if sentences else "All are within range."


def _scatter(pairs: Sequence[Beside]) -> list[Block]:
    points = []
    for one in pairs:
        if isinstance(one.record, SensitivityRecord):
            name = f"{one.record.tensor_class} {one.record.spec}"
            points.append(plots.Point("", width(one.record), one.measured, one.predicted, name))
    drawn = [point.x for point in points if plots.drawable(point.x) and plots.drawable(point.y)]
    if not drawn:
        return []
    ends = plots.padded(drawn)
    # Decades that are many leave no room for more ticks.
    ticks = (1.0,) if ends[1] / ends[0] > 100 else (1.0, 2.0, 5.0)
    plot = plots.Scatter(
        plots.Axis("measured KL divergence, nats a token", lambda x: f"measured {significant(x)}", ticks=ticks),
        plots.Axis("predicted KL divergence, nats a token", lambda y: f"predicted {significant(y)}", ticks=ticks),
        points,
        lines=[
            plots.Line("predicted = measured", [(x, x) for x in ends]),
            plots.Line(f"{LEAST:g} of measured", [(x, LEAST * x) for x in ends], dashed=True),
            plots.Line(f"{MOST:g} of measured", [(x, MOST * x) for x in ends], dashed=True),
        ],
        size=(5.0, 4.2),
    )
    return plots.scatter("prices-predicted-measured.svg", plot)

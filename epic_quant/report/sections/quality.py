"""What each policy does to the model's predictions, over its bytes, and whether cheaper measures would have told."""

from __future__ import annotations

import math

from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Heading, Paragraph, Table, code
from epic_quant.report.correlation import spearman
from epic_quant.report.formatting import megabytes, significant
from epic_quant.report.pareto import Sized, front
from epic_quant.report.sections.recipe import made_recipes
from epic_quant.results.run import Run
from epic_quant.results.sensitivities import EVALUATION, class_divergences

NOISE_FLOOR = "bf16-compute"

# A relation this strong or stronger sorts policies nearly as the divergence does.
_STRONG = 0.9

_QUANTILES = {"kl_median": "median", "kl_p90": "p90", "kl_p99": "p99", "kl_max": "largest"}


def blocks(run: Run) -> list[Block]:
    """The plot and the table of all policies, then how well other errors sort them."""
    found: list[Block] = [
        Paragraph(
            "KL divergence of the next token's distribution from that of the checkpoint's own weights in fp32, in nats "
            f"a token of the evaluation text{_judged(run)}. `{NOISE_FLOOR}` is the same weights computed in bf16: what "
            "lies below it is noise. ± is one standard error, over tokens as if they were independent."
        ),
        _table(run),
    ]
    proxies = _proxies(run)
    if proxies:
        found += [
            Heading(3, "Do cheaper errors tell?"),
            Paragraph(
                "Spearman's rank correlation with KL divergence: 1 where an error puts all in the same order. Of a "
                "policy the weights' relative L2 is the root mean square over its quantized classes by number of "
                "weights, and the block's error the larger of both layer types."
            ),
            *_proxy_figure(proxies),
            Table(
                ("error", "over", "points", "Spearman's correlation"),
                tuple(
                    (name, of, str(len(points)), significant(spearman([(x, y) for _, x, y in points])))
                    for (name, of), points in proxies.items()
                ),
                num_text_columns=2,
            ),
        ]
    return found


def findings(run: Run) -> list[str]:
    """The least divergence within each size, what is within the noise, and which other errors sort as it does."""
    found = []
    if least := front(sized(run)):
        steps = ", ".join(f"{code(name)} ({megabytes(x)} MB, {significant(y)})" for name, x, y in least)
        found.append(f"Least KL divergence within each size, by resident bytes and nats a token: {steps}.")
    floor = run.value("quality", "kl_divergence", policy=NOISE_FLOOR)
    below = [
        code(policy)
        for policy in _quantized(run)
        if floor is not None
        and (value := run.value("quality", "kl_divergence", policy=policy)) is not None
        and value <= floor
    ]
    if floor is not None:
        which = f"those of {', '.join(below)} are no larger" if below else "every quantized policy's is larger"
        found.append(f"Computing in bf16 alone gives a KL divergence of {significant(floor)} nats a token; {which}.")
    told = []
    for (name, of), points in _proxies(run).items():
        if (value := spearman([(x, y) for _, x, y in points])) is not None:
            verdict = "sorts them nearly as KL divergence does" if value >= _STRONG else "does not replace it"
            told.append(f"{name} over {len(points)} {of} {significant(value)} ({verdict})")
    if told:
        found.append(f"Spearman's correlation with KL divergence: {'; '.join(told)}.")
    return found


def _judged(run: Run) -> str:
    """On how many tokens, where that is known."""
    counts = {record.details.get("num_tokens") for record in run.select("quality")} - {None}
    return f", of which {' or '.join(sorted(map(str, counts)))} are predicted" if counts else ""


def _quantized(run: Run) -> list[str]:
    others = ("bf16", NOISE_FLOOR, *made_recipes(run))
    return [policy for policy in run.labels("quality", "policy") if policy not in others]


def sized(run: Run) -> list[Sized]:
    """Policy, resident bytes and divergence, where both are known."""
    found = []
    for policy in run.labels("quality", "policy"):
        nbytes, divergence = (
            run.value("quality", metric, policy=policy) for metric in ("resident_nbytes", "kl_divergence")
        )
        if nbytes is not None and divergence is not None and policy != NOISE_FLOOR:
            found.append((policy, nbytes, divergence))
    return found


def _table(run: Run) -> Table:
    rows, made = [], made_recipes(run)
    for policy in run.labels("quality", "policy"):
        if policy in made:  # those have a table of their own
            continue
        values = {
            name: run.value("quality", name, policy=policy)
            for name in (
                "resident_nbytes",
                "nbytes",
                "kl_divergence",
                "kl_se",
                *_QUANTILES,
                "perplexity",
                "perplexity_se",
                "top1_agreement",
                "rms_delta_p",
            )
        }
        rows.append(
            (
                code(policy),
                megabytes(values["resident_nbytes"]),
                megabytes(values["nbytes"]),
                with_error(values["kl_divergence"], values["kl_se"]),
                *(significant(values[name]) for name in _QUANTILES),
                with_error(values["perplexity"], values["perplexity_se"], 4),
                *(significant(_hundredfold(values[name])) for name in ("top1_agreement", "rms_delta_p")),
            )
        )
    columns = ("policy", "resident, MB", "weights, MB", "KL divergence", *_QUANTILES.values())
    columns += ("perplexity", "same first choice, %", "rms change of p, %")
    return Table(columns, tuple(rows))


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """A value and its standard error, where that is known."""
    if value is None or error is None:
        return significant(value, digits)
    return f"{significant(value, digits)} ± {significant(error, 2)}"


def _hundredfold(value: float | None) -> float | None:
    return None if value is None else 100 * value


_Points = list[tuple[str, float, float]]


def _proxies(run: Run) -> dict[tuple[str, str], _Points]:
    """By name of an error and what it is over: series, error and divergence of everything that has both."""
    policies = _quantized(run)
    divergences = {policy: run.value("quality", "kl_divergence", policy=policy) for policy in policies}
    alone = class_divergences(run, EVALUATION)
    found: dict[tuple[str, str], _Points] = {}
    for name, errors in (
        ("relative L2 of weights", {policy: _weight_error(run, policy) for policy in policies}),
        ("error of a block", {policy: _block_error(run, policy) for policy in policies}),
    ):
        points = [
            ("policies", error, divergence)
            for policy, error in errors.items()
            if error is not None and (divergence := divergences[policy]) is not None
        ]
        if points:
            found[name, "policies"] = points
    for name, metric in (("relative L2 of weights", "rel_l2"), ("relative L2 of outputs", "output_rel_l2")):
        points = [
            (tensor_class, error, divergence)
            for (tensor_class, spec), divergence in alone.items()
            if (error := run.value("ladder", metric, tensor_class=tensor_class, spec=spec)) is not None
        ]
        if points:
            found[name, "single classes"] = points
    return found


def _weight_error(run: Run, policy: str) -> float | None:
    """Root mean square of the classes' relative L2, each by its number of weights; None where one is not known."""
    squares = weights = 0.0
    for tensor_class in run.labels("weights", "tensor_class", policy=policy):
        error, nbytes, bits = (
            run.value("weights", metric, policy=policy, tensor_class=tensor_class)
            for metric in ("rel_l2", "nbytes", "bits_per_weight")
        )
        if error is None or nbytes is None or not bits:
            return None
        number = 8 * nbytes / bits
        squares, weights = squares + number * error**2, weights + number
    return math.sqrt(squares / weights) if weights else None


def _block_error(run: Run, policy: str) -> float | None:
    errors = [record.metrics.get("added_rel_l2") for record in run.select("block", policy=policy)]
    return max((error for error in errors if error is not None), default=None)


def _proxy_figure(proxies: dict[tuple[str, str], _Points]) -> list[Block]:
    points = [
        plots.Point(f"{name}, {of}", series, error, divergence)
        for (name, of), inside in proxies.items()
        for series, error, divergence in inside
        if plots.drawable(error) and plots.drawable(divergence)
    ]
    if not points:
        return []
    panels = ", ".join(dict.fromkeys(point.panel for point in points))
    alt = (
        f"KL divergence in nats a token over a cheaper error, both logarithmic, a panel for each of {panels}; "
        + plots.extremes(points, lambda point: f"{point.series} in {point.panel}", "nats")
    )
    return [Figure("quality-divergence-over-proxies.svg", alt, plots.divergence_over_errors(points))]

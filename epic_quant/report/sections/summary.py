"""Which policy to choose for how many MB, and why; then the findings that a choice rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from epic_quant.report import plots
from epic_quant.report.blocks import Block, Figure, Findings, Heading, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, megabytes, significant, times
from epic_quant.report.pareto import Sized, front
from epic_quant.report.sections import block, kv, ple, provenance, quality, recipe, sensitivity
from epic_quant.report.sections.footprint import E4B, resident_nbytes
from epic_quant.results.run import Run

# Of the policies that a choice is better than, so many are told by name.
_MOST_TOLD = 2

# Nats a token that a smallest policy is named for: from plainly worse to hardly to be seen.
_THRESHOLDS = (0.1, 0.03, 0.01, 0.001)


@dataclass(frozen=True)
class _Judged:
    """What policies are judged by: their points, what the second coordinate is called, and its standard errors."""

    points: list[Sized]
    error: str
    errors: Callable[[str], float | None]

    def worth_their_bytes(self) -> list[Sized]:
        """The Pareto front, less those that one standard error hides from a smaller one."""
        found: list[Sized] = []
        for point in front(self.points):
            if not found or found[-1][2] - point[2] > math.hypot(
                *(self.errors(p[0]) or 0.0 for p in (found[-1], point))
            ):
                found.append(point)
        return found


def blocks(run: Run) -> list[Block]:
    """The choice as a table and a plot, then the findings; what there are no records for is left out."""
    found: list[Block] = [Heading(2, "Which policy for how many MB")]
    if judged := _judged(run):
        found += [*_choice(run, judged), *_figure(run), *_strings(run, judged)]
    else:
        command = provenance.command(run, "benchmarks/test_quality.py")
        found.append(Paragraph(f"Nothing was run that tells. To run it: {code(command)}"))
    findings = [*_thresholds(run)]
    for subject, tell in (
        ("sensitivity", sensitivity.findings),
        ("ple_hits", ple.rows_findings),
        ("kv_divergence", kv.divergence_findings),
        ("quality", recipe.findings),
    ):
        if run.select(subject):
            findings += tell(run)
    if findings:
        found += [Heading(2, "What else to know"), Findings(tuple(findings))]
    return found


def _judged(run: Run) -> _Judged | None:
    """By divergence; where quality was not run, by the error of a block; None where that was not run either."""
    if points := quality.sized(run):
        return _Judged(points, "KL divergence", lambda name: run.value("quality", "kl_se", policy=name))
    if points := block.sized(run):
        return _Judged(points, "error of a block", lambda name: None)
    return None


def _choice(run: Run, judged: _Judged) -> list[Block]:
    least = judged.worth_their_bytes()
    e4b = {} if run.facts["checkpoint"]["kind"] == "user" else resident_nbytes(run, E4B)
    # A column in which little is known says less than it takes room.
    e4b = e4b if 2 * sum(name in e4b for name, _, _ in least) > len(least) else {}
    measures = {"perplexity": ("perplexity", 4, 1.0), "top1_agreement": ("same first choice, %", 3, 100.0)}
    measures = measures if run.select("quality") else {}
    columns = ["resident MB you have", "choose", judged.error, *(title for title, _, _ in measures.values())]
    columns += [*(["E4B's resident MB"] if e4b else []), "why"]
    rows = []
    for index, (name, nbytes, error) in enumerate(least):
        upper = least[index + 1][1] if index + 1 < len(least) else math.inf
        row = [
            f"{megabytes(nbytes)} to {megabytes(upper)}" if math.isfinite(upper) else f"{megabytes(nbytes)} or more",
            code(recipe.brief(run, name)),
            quality.with_error(error, judged.errors(name)),
        ]
        for metric, (_, digits, factor) in measures.items():
            value = run.value("quality", metric, policy=name)
            row.append(significant(None if value is None else factor * value, digits))
        row += [megabytes(e4b.get(name))] if e4b else []
        rows.append((*row, _why(run, judged, least[:index], (name, nbytes, error), upper)))
    said = (
        "KL divergence from the checkpoint's own predictions, in nats a token of the evaluation text"
        if judged.error == "KL divergence"
        else "the largest error of a block's output relative to what the block adds, since quality was not run"
    )
    only = " E4B's MB are counted from its own shapes; its errors were not measured." if e4b else ""
    return [
        Paragraph(
            f"Find the resident MB that you have: of {len(judged.points)} policies measured, the row names the "
            "one with the least error that fits, and the smallest of those that one standard error does not tell apart."
        ),
        Table(tuple(columns), tuple(rows), num_text_columns=2, has_remark=True),
        Paragraph(
            f"Resident is all that must be in RAM: weights, PLE rows, norms and KV cache. Error is {said}.{only}"
        ),
    ]


def _why(run: Run, judged: _Judged, smaller: list[Sized], chosen: Sized, upper: float) -> str:
    """What choosing this one gains over the next smaller, and what it is chosen instead of."""
    name, nbytes, error = chosen
    reasons = []
    if smaller:
        _, before_nbytes, before_error = smaller[-1]
        gain = f"{significant(before_error / error)}× less error" if error else "no error"
        reasons.append(gain + f" for {megabytes(nbytes - before_nbytes)} MB more than the next smaller")
    else:
        reasons.append("the smallest that was measured")
    floor = run.value("quality", "kl_divergence", policy=quality.NOISE_FLOOR)
    if judged.error == "KL divergence" and floor is not None and 0 < error <= floor:
        reasons.append("no more than computing in bf16 changes")
    beaten = [
        point
        for point in judged.points
        if nbytes <= point[1] < upper and run.policy_string(point[0]) != run.policy_string(name)
    ]
    if beaten:
        # Those that a reader knows by name come first, and of these the best.
        beaten.sort(key=lambda point: (recipe.is_recipe(run, point[0]), point[2]))
        worse = [
            code(recipe.brief(run, other)) + ("" if ratio == MISSING else f" ({ratio} the error)")
            for other, _, theirs in beaten[:_MOST_TOLD]
            for ratio in [times(theirs, error)]
        ]
        worse += [f"{len(beaten) - _MOST_TOLD} more"] if len(beaten) > _MOST_TOLD else []
        reasons.append(f"better than {' and '.join(filter(None, [', '.join(worse[:-1]), worse[-1]]))}, no smaller")
    return "; ".join(reasons)


def _strings(run: Run, judged: _Judged) -> list[Block]:
    """What `--policy` takes for each recipe that is chosen; a named policy's name does."""
    chosen = [name for name, _, _ in judged.worth_their_bytes() if recipe.is_recipe(run, name)]
    rows = tuple((code(recipe.brief(run, name)), code(run.policy_string(name))) for name in chosen)
    table = Table(("choose", "what `--policy` takes for it"), rows, num_text_columns=2)
    return [Heading(3, "The recipes among these"), table] if rows else []


def _thresholds(run: Run) -> list[str]:
    """The smallest policy within each of some divergences."""
    points = quality.sized(run)
    said = []
    for threshold in _THRESHOLDS:
        within = [(nbytes, name) for name, nbytes, divergence in points if divergence <= threshold]
        if within:
            nbytes, name = min(within)
            said.append(f"{threshold:g}: {code(recipe.brief(run, name))} ({megabytes(nbytes)} MB)")
    return [f"Smallest policy within a KL divergence, in nats a token, of {', of '.join(said)}."] if said else []


def _figure(run: Run) -> list[Block]:
    points = [
        plots.Point("", recipe.short_name(run, policy), nbytes / 1e6, divergence, policy)
        for policy, nbytes, divergence in quality.sized(run)
        if plots.drawable(nbytes) and plots.drawable(divergence)
    ]
    if not points:
        return []
    least = [
        plots.Point("", recipe.brief(run, policy), nbytes / 1e6, divergence)
        for policy, nbytes, divergence in front(quality.sized(run))
        if plots.drawable(nbytes) and plots.drawable(divergence)
    ]
    floor = run.value("quality", "kl_divergence", policy=quality.NOISE_FLOOR)
    steps = ", ".join(f"{point.series} {significant(point.x)} MB {significant(point.y)}" for point in least)
    alt = (
        "KL divergence in nats a token, logarithmic, over resident MB, a colour and a marker for each of "
        f"{len(points)} policies, with the Pareto front, which goes from small to large through {steps}"
    )
    if plots.drawable(floor):
        alt += f", and the noise of bf16 compute at {significant(floor)}"
    svg = plots.quality_over_bytes(points, least, floor if plots.drawable(floor) else None)
    return [Figure("quality-divergence-over-bytes.svg", alt, svg)]

"""Which policy to choose for how many MB, and why; then the findings behind the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from epic_quant.records.subjects import E4B, QualityRecord
from epic_quant.report import plots
from epic_quant.report.analysis import policies
from epic_quant.report.analysis.policies import Choice, Rated
from epic_quant.report.blocks import Block, Findings, Heading, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import megabytes, ratio, scaled, significant, with_error
from epic_quant.report.wording import context_tokens, front_steps, measuring_command, sized
from epic_quant.results.run import Run

# Of the policies that a choice is better than, this many are named.
_MOST_NAMED = 2

# Divergences, in nats a token, for which the smallest policy is named: from clearly worse to barely measurable.
_THRESHOLDS = (0.1, 0.03, 0.01, 0.001)


def blocks(run: Run, key_findings: Sequence[str]) -> list[Block]:
    """The choice as a table and a plot, then the findings; parts without records are left out."""
    found: list[Block] = [Heading(2, "Which policy for how many MB")]
    called, by_divergence = policies.names(run), policies.by_divergence(run)
    if rated := by_divergence or policies.by_block_error(run):
        floor = policies.noise_floor(run) if by_divergence else None
        choices = policies.choices(run, rated, floor)
        found += [*_choice(run, choices, len(rated), bool(by_divergence), called), *_figure(run, by_divergence, called)]
        found += _recipes(run, choices, called)
    else:
        command = code(measuring_command(run, "benchmarks/test_quality.py"))
        found.append(Paragraph(f"This needs quality, which was not measured. To measure it: {command}"))
    findings = [*_smallest(by_divergence, called), *key_findings]
    if findings:
        found += [Heading(2, "What else to know"), Findings(tuple(findings))]
    return found


def _choice(
    run: Run, choices: Sequence[Choice], num_rated: int, by_divergence: bool, called: Mapping[str, str]
) -> list[Block]:
    e4b = {} if run.facts["checkpoint"]["kind"] == "user" else policies.resident_nbytes(run, E4B)
    # A column in which little is known says less than it takes room.
    e4b = e4b if 2 * sum(one.rated.policy in e4b for one in choices) > len(choices) else {}
    quality = {one.policy: one for one in run.of(QualityRecord)}
    columns: list[Column[Choice]] = [
        Column("resident MB you have", _range, text=True),
        Column("choose", lambda one: called[one.rated.policy], code, text=True),
        Column("KL divergence" if by_divergence else "error of a block", _error),
    ]
    if quality:
        columns += [
            Column("perplexity", lambda one: quality[one.rated.policy].perplexity, lambda value: significant(value, 4)),
            Column("same first choice, %", lambda one: quality[one.rated.policy].top1_agreement, scaled(100)),
        ]
    if e4b:
        columns.append(Column("E4B's resident MB", lambda one: e4b.get(one.rated.policy), megabytes))
    columns.append(Column("why", lambda one: _why(one, called), text=True))
    error = (
        "KL divergence from the checkpoint's own predictions, in nats a token of the evaluation text"
        if by_divergence
        else "the largest error of a block's output relative to what the block adds, since quality was not measured"
    )
    only = " E4B's MB are counted from its own shapes; its errors were not measured." if e4b else ""
    return [
        Paragraph(
            f"Find the resident MB that you have: of {num_rated} policies measured, the row names the one with the "
            "least error that fits. Of policies that one standard error does not separate, it names the smallest."
        ),
        table(columns, choices),
        Paragraph(
            f"Resident is all that must be in RAM: weights, PLE rows, norms and a KV cache of {context_tokens(run)} "
            f"tokens. Error is {error}.{only}"
        ),
    ]


def _range(one: Choice) -> str:
    least = megabytes(one.rated.nbytes)
    return f"{least} to {megabytes(one.upper)}" if math.isfinite(one.upper) else f"{least} or more"


def _error(one: Choice) -> str:
    return with_error(one.rated.error, one.rated.standard_error)


def _why(one: Choice, called: Mapping[str, str]) -> str:
    """What this choice gains over the next smaller one, and which policies it beats."""
    if one.more_nbytes is None:
        reasons = ["the smallest that was measured"]
    else:
        gain = "no error" if one.gain is None else f"{ratio(one.gain)} less error"
        reasons = [f"{gain} for {megabytes(one.more_nbytes)} MB more than the next smaller"]
    if one.is_within_noise:
        reasons.append("no more than computing in bf16 changes")
    if one.beaten:
        worse = [
            code(called[policy]) + ("" if times is None else f" ({ratio(times)} the error)")
            for policy, times in one.beaten[:_MOST_NAMED]
        ]
        more = len(one.beaten) - _MOST_NAMED
        worse += [f"{more} more"] if more > 0 else []
        reasons.append(f"better than {' and '.join(filter(None, [', '.join(worse[:-1]), worse[-1]]))}, no smaller")
    return "; ".join(reasons)


def _recipes(run: Run, choices: Sequence[Choice], called: Mapping[str, str]) -> list[Block]:
    """What `--policy` takes for each recipe that is chosen; a named policy's name does."""
    chosen = [one.rated.policy for one in choices if policies.is_recipe(run, one.rated.policy)]
    columns: tuple[Column[str], ...] = (
        Column("choose", lambda policy: called[policy], code, text=True),
        Column("what `--policy` takes for it", lambda policy: str(policies.policy_spec(run, policy)), code, text=True),
    )
    return [Heading(3, "The recipes among these"), table(columns, chosen)] if chosen else []


def _smallest(rated: Sequence[Rated], called: Mapping[str, str]) -> list[str]:
    """The smallest policy within each of some divergences."""
    found = [(most, one) for most in _THRESHOLDS if (one := policies.smallest_within(rated, most))]
    sizes = (f"{most:g}: {sized(one, called)}" for most, one in found)
    return [f"Smallest policy within a KL divergence, in nats a token, of {', of '.join(sizes)}."] if found else []


def _figure(run: Run, rated: Sequence[Rated], called: Mapping[str, str]) -> list[Block]:
    points = [
        plots.Point(
            "",
            policies.legend_name(run, one.policy, called[one.policy]),
            one.nbytes / 1e6,
            one.error,
            called[one.policy],
        )
        for one in rated
        if plots.drawable(one.nbytes) and plots.drawable(one.error)
    ]
    if not points:
        return []
    # Names of the front stand at its lower left, where no point can be; they need room there.
    left, right = min(point.x for point in points), max(point.x for point in points)
    limits = left - 0.3 * (right - left) - 0.05 * left, right + 0.08 * (right - left) + 0.01 * right
    front = [one for one in policies.pareto_front(rated) if plots.drawable(one.error)]
    lines = [
        plots.Line(
            "Pareto front",
            [(one.nbytes / 1e6, one.error) for one in front],
            names=[called[one.policy] for one in front],
        )
    ]
    floor = policies.noise_floor(run)
    if plots.drawable(floor):
        lines.append(plots.Line("bf16 compute", [(end, floor) for end in limits], dashed=True))
    steps = front_steps(front, called)
    plot = plots.Scatter(
        x=plots.Axis("resident MB", lambda value: f"{megabytes(1e6 * value)} MB", log=False, limits=limits),
        y=plots.Axis("KL divergence, nats a token", lambda value: f"{significant(value)} nats a token", ticks=(1.0,)),
        points=points,
        lines=lines,
        size=(7.4, 4.4),
    )
    return plots.scatter(
        "quality-divergence-over-bytes.svg", plot, f"the front goes from small to large through {steps}"
    )

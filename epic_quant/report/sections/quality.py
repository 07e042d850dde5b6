"""What each policy does to the model's predictions, over its bytes, and whether cheaper errors sort policies alike."""

from __future__ import annotations

from epic_quant.records.subjects import QualityRecord
from epic_quant.report import plots
from epic_quant.report.analysis import policies
from epic_quant.report.analysis.quality import STRONG, Proxy, proxies
from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import megabytes, scaled, significant, with_error
from epic_quant.report.wording import front_steps
from epic_quant.results.run import Run
from epic_quant.spec import NOISE_FLOOR

_PROXIES: tuple[Column[Proxy], ...] = (
    Column("error", lambda one: one.name, text=True),
    Column("over", lambda one: one.of, text=True),
    Column("points", lambda one: len(one.points)),
    Column("Spearman's correlation", lambda one: one.correlation, significant),
)


def blocks(run: Run) -> list[Block]:
    """The table of all policies, then how well other errors sort them."""
    found: list[Block] = [
        Paragraph(
            "KL divergence of the next token's distribution from that of the checkpoint's own weights in fp32, in nats "
            f"a token of the evaluation text{_tokens(run)}. `{NOISE_FLOOR}` is the same weights computed in bf16: what "
            "lies below it is noise. ± is one standard error, over tokens as if they were independent."
        ),
        _table(run),
        *_published(run),
    ]
    if cheaper := proxies(run):
        found += [
            Heading(3, "Do cheaper errors sort policies alike?"),
            Paragraph(
                "Spearman's rank correlation with KL divergence: 1 where an error sorts all in the same order. The "
                "weights' relative L2 of a policy is the root mean square over its quantized classes, by number of "
                "weights; its block error is the larger of both layer types."
            ),
            *_proxy_figure(cheaper),
            table(_PROXIES, cheaper),
        ]
    return found


def findings(run: Run) -> list[str]:
    """The least divergence within each size, what is within the noise, and which other errors sort as it does."""
    found, called = [], policies.names(run)
    if front := policies.pareto_front(policies.by_divergence(run)):
        found.append(
            f"Least KL divergence within each size, by resident bytes and nats a token: {front_steps(front, called)}."
        )
    if (floor := policies.noise_floor(run)) is not None:
        below = [
            code(called[one.policy])
            for one in policies.quantized(run)
            if one.kl_divergence is not None and one.kl_divergence <= floor
        ]
        which = (
            f"{', '.join(below)} {'has' if len(below) == 1 else 'have'} no more"
            if below
            else "every quantized policy has more"
        )
        found.append(f"Computing in bf16 alone has a KL divergence of {significant(floor)} nats a token; {which}.")
    ranks = []
    for one in proxies(run):
        if (value := one.correlation) is not None:
            verdict = "sorts them nearly as KL divergence does" if value >= STRONG else "does not replace it"
            ranks.append(f"{one.name} over {len(one.points)} {one.of} {significant(value)} ({verdict})")
    if ranks:
        found.append(f"Spearman's correlation with KL divergence: {'; '.join(ranks)}.")
    return found


def _published(run: Run) -> list[Block]:
    """What is known of each published file beside its matrices."""
    called = policies.names(run)
    return [
        Paragraph(f"{code(called[name])} is a published file, {'; '.join(map(str, lines))}.")
        for name, lines in (run.facts.get("published_files") or {}).items()
    ]


def _tokens(run: Run) -> str:
    """On how many tokens, where that is known."""
    counts = {record.num_tokens for record in run.of(QualityRecord)} - {None}
    return f", of which {' or '.join(sorted(map(str, counts)))} are predicted" if counts else ""


def _table(run: Run) -> Table:
    called, made = policies.names(run), policies.made_recipes(run)
    columns: tuple[Column[QualityRecord], ...] = (
        Column("policy", lambda one: called[one.policy], code, text=True),
        Column("resident, MB", lambda one: one.resident_nbytes, megabytes),
        Column("weights, MB", lambda one: one.nbytes, megabytes),
        Column("KL divergence", lambda one: with_error(one.kl_divergence, one.kl_se)),
        Column("median", lambda one: one.kl_median, significant),
        Column("p90", lambda one: one.kl_p90, significant),
        Column("p99", lambda one: one.kl_p99, significant),
        Column("largest", lambda one: one.kl_max, significant),
        Column("perplexity", lambda one: with_error(one.perplexity, one.perplexity_se, 4)),
        Column("same first choice, %", lambda one: one.top1_agreement, scaled(100)),
        Column("rms change of p, %", lambda one: one.rms_delta_p, scaled(100)),
    )
    # Recipes made here have a table of their own.
    return table(columns, [one for one in run.of(QualityRecord) if one.policy not in made])


def _proxy_figure(cheaper: list[Proxy]) -> list[Block]:
    plot = plots.Scatter(
        # Each error has a range of its own.
        x=plots.Axis("the cheaper error", lambda value: f"error {significant(value)}", shared=False),
        y=plots.Axis("KL divergence, nats a token", lambda value: f"{significant(value)} nats a token", ticks=(1.0,)),
        points=[
            plots.Point(f"{one.name}, {one.of}", series, error, divergence)
            for one in cheaper
            for series, error, divergence in one.points
        ],
        size=(4.6, 3.2),
    )
    return plots.scatter("quality-divergence-over-proxies.svg", plot)

"""What few bits do to the PLE table and the PLE projections."""

from __future__ import annotations

from epic_quant.records.subjects import PLEGuardRecord
from epic_quant.report.analysis import ple
from epic_quant.report.analysis.policies import made_recipes, names
from epic_quant.report.blocks import Block, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import significant
from epic_quant.results.run import Run
from epic_quant.spec import REFERENCE

_EFFECTS: tuple[Column[PLEGuardRecord], ...] = (
    Column("one class alone", lambda one: f"{one.tensor_class} {code(str(one.spec))}", text=True),
    Column("bits per weight", lambda one: one.bits_per_weight, significant),
    Column("relative L2", lambda one: one.rel_l2, significant),
    Column("KL divergence, nats a token", lambda one: one.kl_divergence, significant),
)


def blocks(run: Run) -> list[Block]:
    """The effect of every spec, and the policies that store these tensors below eight bits."""
    found: list[Block] = [
        Paragraph(
            f"One class quantized and all else in `{REFERENCE}`, on a short window of the evaluation text. Others "
            "report that quality collapses below 8 bits here."
        ),
        table(_EFFECTS, run.of(PLEGuardRecord)),
    ]
    if marked := ple.marked(run):
        called = names(run)
        columns: tuple[Column[ple.Marked], ...] = (
            Column("policy", lambda one: f"{code(called[one.policy])}, {_what(one)}", text=True),
            Column("KL divergence, nats a token", lambda one: one.kl_divergence, significant),
        )
        found.append(Paragraph("Policies of this run that store these tensors below 8 bits, and what that alone does:"))
        found.append(table(columns, marked))
    else:
        found.append(Paragraph("No named policy stores the PLE table or the PLE projections below 8 bits."))
    if made := made_recipes(run):
        below = ple.num_recipes_marked(run)
        found.append(Paragraph(f"Recipes made here that store some of them so: {below} of {len(made)}."))
    return found


def findings(run: Run) -> list[str]:
    """The policies that go below eight bits, with the effect that was measured."""
    called = names(run)
    marked = "; ".join(
        f"{code(called[one.policy])}, {_what(one)}: {significant(one.kl_divergence)}" for one in ple.marked(run)
    )
    return [f"Below 8 bits in the PLE table or projections, KL divergence in nats: {marked}."] if marked else []


def _what(one: ple.Marked) -> str:
    return f"{one.tensor_class}{' (some tensors)' if one.is_partial else ''} {code(str(one.spec))}"

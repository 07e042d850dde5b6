"""Bytes of every policy, beside the figures that were published."""

from __future__ import annotations

from functools import partial

from epic_quant.records.subjects import RESIDENT, FootprintRecord
from epic_quant.report.analysis import footprint
from epic_quant.report.analysis.policies import names, resident_nbytes
from epic_quant.report.blocks import Block, Bullets, Heading, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, times
from epic_quant.results.run import Run, distinct
from epic_quant.spec import REFERENCE

_EXPLANATION = (
    "As published: the original's sum. It counts K and V projections that no layer reads, and leaves out the "
    "embedding, the PLE model projection, the norms and the KV cache. The published figure stands in brackets, with ✓ "
    "where the computed one equals it to the digit and ✗ where it does not.",
    "Resident: what must be in RAM to run the text model.",
)


def blocks(run: Run) -> list[Block]:
    """For each model and way of counting, a table of policies by parts."""
    found: list[Block] = [Bullets(_EXPLANATION)]
    for model in distinct(one.model for one in run.of(FootprintRecord)):
        records = run.of(FootprintRecord, model=model)
        for column in distinct(one.column for one in records):
            found += [
                Heading(3, f"{model}, {column}, MB"),
                _table(run, run.of(FootprintRecord, model=model, column=column)),
            ]
        nbytes = next((one.unused_nbytes for one in records if one.unused_nbytes is not None), None)
        found.append(Paragraph(f"K and V projections that no layer reads, in bf16: {megabytes(nbytes)} MB."))
    return found


def findings(run: Run) -> list[str]:
    """The least resident bytes, and whether the published figures were reproduced."""
    found, called = [], names(run)
    for model in distinct(one.model for one in run.of(FootprintRecord, column=RESIDENT)):
        nbytes = resident_nbytes(run, model)
        if nbytes:
            least = min(nbytes, key=lambda policy: nbytes[policy])
            ratio = times(nbytes[least], nbytes.get(REFERENCE))
            of_bf16 = "" if ratio == MISSING else f", {ratio} those of `{REFERENCE}`"
            name = code(called[least])
            found.append(f"Least resident bytes of {model}: {name} with {megabytes(nbytes[least])} MB{of_bf16}.")
    if compared := footprint.published(run):
        wrong = [f"{code(record.policy)} {part}" for record, part, is_equal in compared if not is_equal]
        differing = f"; not those of {', '.join(wrong)}" if wrong else ""
        num_equal = len(compared) - len(wrong)
        found.append(f"{num_equal} of {len(compared)} published footprint figures are met to the digit{differing}.")
    return found


def _table(run: Run, records: list[FootprintRecord]) -> Table:
    reference, called = next((one.nbytes for one in records if one.policy == REFERENCE), None), names(run)
    columns: list[Column[FootprintRecord]] = [Column("policy", lambda one: called[one.policy], code, text=True)]
    for part in distinct([*(part for one in records for part in one.parts), footprint.TOTAL]):
        columns.append(Column(part, partial(_cell, part=part)))
    columns.append(Column(f"of {REFERENCE}", lambda one: times(one.nbytes, reference)))
    return table(columns, records)


def _cell(record: FootprintRecord, *, part: str) -> str:
    text = megabytes(footprint.computed(record, part))
    if part not in record.published:
        return text
    return f"{text} ({record.published[part]:,.1f} {'✓' if footprint.is_as_published(record, part) else '✗'})"

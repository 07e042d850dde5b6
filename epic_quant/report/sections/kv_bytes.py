"""What is stored of the KV cache, beside what counting all layers would say and what the original claims."""

from __future__ import annotations

from functools import partial

from epic_quant.records.subjects import E4B, KVBytesRecord
from epic_quant.report.analysis import kv
from epic_quant.report.blocks import Block, Heading, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, ratio, times
from epic_quant.results.run import Run, distinct
from epic_quant.spec import REFERENCE


def blocks(run: Run) -> list[Block]:
    """For each model MB by spec and length, of the layers that store K and V and of all; then the original's claim."""
    found: list[Block] = [
        Paragraph(
            "Layers that share K and V store none. The second column of a length counts all layers as if each did."
        )
    ]
    for model in distinct(one.model for one in run.of(KVBytesRecord)):
        columns: list[Column[str]] = [Column("KV policy", str, code, text=True)]
        for tokens in sorted({one.tokens for one in run.of(KVBytesRecord, model=model)}):
            columns.append(Column(f"{tokens:,} tokens", partial(_value, run, "nbytes", model, tokens), megabytes))
            columns.append(Column("all layers", partial(_value, run, "all_layers_nbytes", model, tokens), megabytes))
        found += [
            Heading(3, f"KV cache of {model}, MB"),
            table(columns, distinct(one.kv_policy for one in run.of(KVBytesRecord, model=model))),
        ]
    if claims := kv.claims(run):
        found += [Heading(3, "What the original claims, and what is stored"), _claims(claims)]
    return found


def findings(run: Run) -> list[str]:
    """The cache at the longest context beside what counting all layers would say, and the original's ratios."""
    found = []
    for model in distinct(one.model for one in run.of(KVBytesRecord)):
        longest = max(one.tokens for one in run.of(KVBytesRecord, model=model))
        for one in run.of(KVBytesRecord, model=model, tokens=longest, kv_policy=REFERENCE):
            if (more := times(one.all_layers_nbytes, one.nbytes)) != MISSING:
                found.append(
                    f"KV cache of {model} at {longest:,} tokens in {code(REFERENCE)}: {megabytes(one.nbytes)} MB; "
                    f"counting all layers would say {megabytes(one.all_layers_nbytes)} MB, {more}."
                )
    for claim in kv.claims(run):
        if claim.claimed is not None and claim.stored is not None:
            found.append(
                f"{code(kv.ORIGINAL)} on {E4B}'s {claim.layer_type} layers stores {ratio(claim.stored)} less than "
                f"{code(REFERENCE)}; it claims {ratio(claim.claimed)}."
            )
    return found


def _value(run: Run, field: str, model: str, tokens: int, name: str) -> float | None:
    value: float | None = run.value(KVBytesRecord, field, kv_policy=name, model=model, tokens=tokens)
    return value


def _claims(claims: list[kv.Claim]) -> Table:
    columns: tuple[Column[kv.Claim], ...] = (
        Column(f"{kv.ORIGINAL} on {E4B}, times less than {REFERENCE}", lambda one: one.layer_type, text=True),
        Column("claimed", lambda one: one.claimed, ratio),
        Column("by its own arithmetic", lambda one: one.by_its_arithmetic, ratio),
        Column("stored", lambda one: one.stored, ratio),
    )
    return table(columns, claims)

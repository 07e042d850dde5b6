"""Divergence in decoding with a stored KV cache, over its bytes."""

from __future__ import annotations

from functools import partial

from epic_quant.records.subjects import KVDivergenceRecord
from epic_quant.report import plots
from epic_quant.report.analysis import kv
from epic_quant.report.blocks import Block, Paragraph, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import significant, times
from epic_quant.results.run import Run, distinct
from epic_quant.spec import REFERENCE


def blocks(run: Run) -> list[Block]:
    """The plot, then a row for each spec with its divergence at every context length."""
    contexts, longest = sorted({one.context for one in run.of(KVDivergenceRecord)}), kv.longest_context(run)
    reference = _value(run, "nbytes", longest, REFERENCE)
    columns: list[Column[str]] = [
        Column("KV policy", str, code, text=True),
        Column(
            f"bytes a token at {longest}",
            partial(_value, run, "nbytes", longest),
            lambda nbytes: significant(nbytes, 4),
        ),
        Column(f"{REFERENCE}'s of these", lambda name: times(reference, _value(run, "nbytes", longest, name))),
        *(Column(f"at {context}", partial(_value, run, "kl_divergence", context), significant) for context in contexts),
    ]
    return [
        Paragraph(
            "KL divergence of the next token's distribution from that of a forward without a cache, in nats a token, "
            "over the tokens just before each context length. The text before them is prefilled exactly and stored; "
            "they are decoded with the cache, so errors of one layer reach the next. Bytes a token are those of all "
            "layers that store K and V."
        ),
        *_figure(run),
        table(columns, distinct(one.kv_policy for one in run.of(KVDivergenceRecord))),
    ]


def findings(run: Run) -> list[str]:
    """The least divergence within each size, at the longest context."""
    steps = ", ".join(
        f"{code(name)} ({significant(nbytes, 4)} bytes, "
        f"{significant(divergence) if divergence >= kv.LEAST_DIVERGENCE else 'rounding alone'})"
        for name, nbytes, divergence in kv.divergence_front(run)
    )
    tokens = kv.longest_context(run)
    return (
        [f"Least KL divergence within each size of the KV cache, by bytes a token at {tokens} tokens: {steps}."]
        if steps
        else []
    )


def _value(run: Run, field: str, context: int, name: str) -> float | None:
    value: float | None = run.value(KVDivergenceRecord, field, kv_policy=name, context=context)
    return value


def _figure(run: Run) -> list[Block]:
    points = [
        plots.Point(f"{one.context} tokens", one.kv_policy, one.nbytes, one.kl_divergence)
        for one in sorted(run.of(KVDivergenceRecord), key=lambda one: one.context)
        if one.nbytes is not None and one.kl_divergence is not None and one.kl_divergence >= kv.LEAST_DIVERGENCE
    ]
    plot = plots.Scatter(
        x=plots.Axis("bytes a token of the KV cache", lambda value: f"{significant(value, 4)} bytes a token"),
        y=plots.Axis("KL divergence, nats a token", lambda value: f"{significant(value)} nats", ticks=(1.0,)),
        points=points,
    )
    about = f"below {kv.LEAST_DIVERGENCE:g} nats, where fp32 rounds, none is drawn"
    return plots.scatter("kv-divergence-over-bytes.svg", plot, about)

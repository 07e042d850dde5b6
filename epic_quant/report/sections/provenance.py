"""The measured weights, and the software and machine that measured them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from epic_quant import __version__
from epic_quant.report.analysis.policies import names
from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.report.formatting import MISSING, megabytes, significant
from epic_quant.results.run import Run

_SMALL_MODEL = (
    "The weights are those of the small model trained for this repository, not of Gemma 4 E4B: errors and times hold "
    "for this model only. Footprints named E4B come from E4B's own shapes."
)


def at_the_head(run: Run) -> list[Block]:
    """The first lines of a report: the checkpoint, and the software and machine that measured it."""
    facts, checkpoint = run.facts, run.facts["checkpoint"]
    name = code(checkpoint["source"])
    statement = f"The weights are those of {name}." if checkpoint["kind"] == "user" else _SMALL_MODEL
    if checkpoint.get("dtype") not in (None, "bfloat16"):
        statement += (
            f" The file stores {_text(checkpoint['dtype'])}; all is measured against its weights rounded to bf16."
        )
    versions = facts.get("versions") or {}
    parts = [
        f"checkpoint {name}",
        _labelled("", _with_unit(megabytes(checkpoint.get("nbytes")), "MB")),
        _labelled("fingerprint ", _text(checkpoint.get("fingerprint"))),
        _labelled("", _text(facts.get("cpu"))),
        _labelled("", _with_unit(_plain(facts.get("threads")), "threads")),
        _labelled("", _text(facts.get("platform"))),
        *(_labelled(f"{library} ", _text(versions.get(library))) for library in ("epic_quant", "torch")),
        _labelled("commit ", _text(facts.get("commit"))),
        _labelled("on ", _text(facts.get("measured"))),
    ]
    return [Paragraph(statement), Paragraph(f"Measured: {', '.join(part for part in parts if part)}.")]


def blocks(run: Run) -> list[Block]:
    """A table of the run's facts, the versions, and what each policy's name stands for."""
    facts, checkpoint = run.facts, run.facts["checkpoint"]
    rows = {
        "checkpoint": _text(checkpoint["source"]),
        "fingerprint": _text(checkpoint.get("fingerprint")),
        "bytes": _with_unit(megabytes(checkpoint.get("nbytes")), "MB"),
        "stored in": _text(checkpoint.get("dtype")),
        "layers": _text(checkpoint.get("num_layers")),
        "rows of each tensor whose error is measured": _text(facts.get("sampled_rows") or "all"),
        "tokens in the KV cache": _text(facts.get("context")),
        "processor": _text(facts.get("cpu")),
        "threads": _text(facts.get("threads")),
        "kernels for packed weights": _text(facts.get("isa")),
        "read bandwidth": _with_unit(significant(facts.get("read_bandwidth_gbs")), "GB/s"),
        "platform": _text(facts.get("platform")),
        "seed": _text(facts.get("seed")),
        "commit": _text(facts.get("commit")),
        "measured on": _text(facts.get("measured")),
        "command": _text(facts.get("arguments")),
        "report made by": _text(f"epic_quant {__version__}"),
    }
    called = names(run)
    versions = [(code(str(name)), _text(value)) for name, value in (facts.get("versions") or {}).items()]
    policies = [(code(called[name]), _text(policy)) for name, policy in run.policies.items()]
    tables: list[Block] = [_pairs("fact", "value", rows.items(), "Facts of the run")]
    if versions:
        tables.append(_pairs("library", "version", versions, "Versions"))
    if policies:
        tables.append(_pairs("policy", "stands for", policies, "What the policies stand for"))
    return [*tables, Paragraph("MB are 1e6 bytes and GB/s 1e9 bytes a second; — is what was not measured.")]


def _pairs(first: str, second: str, rows: Iterable[tuple[str, str]], caption: str) -> Table:
    columns: tuple[Column[tuple[str, str]], ...] = (
        Column(first, lambda row: row[0], text=True),
        Column(second, lambda row: row[1], text=True),
    )
    return table(columns, rows, caption)


def _text(value: Any) -> str:
    return MISSING if value is None or value == "" else code(str(value))


def _plain(value: Any) -> str:
    return MISSING if value is None else str(value)


def _labelled(label: str, text: str) -> str:
    """Nothing where the text is missing."""
    return "" if text == MISSING else label + text


def _with_unit(number: str, unit: str) -> str:
    return number if number == MISSING else f"{number} {unit}"

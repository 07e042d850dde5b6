"""Whose weights were measured, by what and on what."""

from __future__ import annotations

from typing import Any

from epic_quant import __version__
from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, megabytes, significant
from epic_quant.results.run import Run

_NOT_E4B = {
    "trained-small": "The weights are those of the small model trained for this repository, not of Gemma 4 E4B: "
    "errors and times hold for this model only. Footprints named E4B come from E4B's own shapes.",
    "synthetic": "The weights are synthetic, not those of Gemma 4 E4B: their errors say nothing of trained weights.",
}


def whose_weights(run: Run) -> list[Block]:
    """The first lines of a report."""
    checkpoint = run.facts["checkpoint"]
    statement = _NOT_E4B.get(checkpoint["kind"], f"The weights are those of {code(checkpoint['source'])}.")
    return [Paragraph(statement)]


def blocks(run: Run) -> list[Block]:
    """A table of the run's facts, the versions, and what each policy's name stands for."""
    facts, checkpoint = run.facts, run.facts["checkpoint"]
    rows = {
        "checkpoint": _text(checkpoint["source"]),
        "fingerprint": _text(checkpoint.get("fingerprint")),
        "bytes": _with_unit(megabytes(checkpoint.get("nbytes")), "MB"),
        "layers": _text(checkpoint.get("num_layers")),
        "rows of each tensor whose error is taken": _text(facts.get("sampled_rows") or "all"),
        "tokens that the KV cache holds": _text(facts.get("context")),
        "processor": _text(facts.get("cpu")),
        "threads": _text(facts.get("threads")),
        "kernels for packed weights": _text(facts.get("isa")),
        "read bandwidth": _with_unit(significant(facts.get("read_bandwidth_gbs")), "GB/s"),
        "platform": _text(facts.get("platform")),
        "seed": _text(facts.get("seed")),
        "commit": _text(facts.get("commit")),
        "command": _text(facts.get("arguments")),
        "report made by": _text(f"epic_quant {__version__}"),
    }
    tables: list[Block] = [Table(("fact", "value"), tuple(rows.items()), num_text_columns=2)]
    for column, fact in (("library", "versions"), ("policy", "policy_strings")):
        named = facts.get(fact) or {}
        if named:
            second = "version" if fact == "versions" else "stands for"
            rows_of = tuple((code(str(name)), _text(value)) for name, value in named.items())
            tables.append(Table((column, second), rows_of, num_text_columns=2))
    return [*tables, Paragraph("MB are 1e6 bytes and GB/s 1e9 bytes a second; — is what was not measured.")]


def _text(value: Any) -> str:
    return MISSING if value is None or value == "" else code(str(value))


def _with_unit(number: str, unit: str) -> str:
    return number if number == MISSING else f"{number} {unit}"

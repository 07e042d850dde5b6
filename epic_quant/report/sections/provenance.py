"""Whose weights were measured, by what and on what."""

from __future__ import annotations

import shlex
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


def at_the_head(run: Run) -> list[Block]:
    """The first lines of a report: whose weights these are, and by what they were measured."""
    facts, checkpoint = run.facts, run.facts["checkpoint"]
    name = code(checkpoint["source"])
    statement = _NOT_E4B.get(checkpoint["kind"], f"The weights are those of {name}.")
    versions = facts.get("versions") or {}
    said = [
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
    return [Paragraph(statement), Paragraph(f"Measured: {', '.join(part for part in said if part)}.")]


def command(run: Run, benchmark: str) -> str:
    """What measures a benchmark's subjects on the run's checkpoint."""
    checkpoint = run.facts["checkpoint"]
    chosen = ["--checkpoint", checkpoint["source"]] if checkpoint["kind"] == "user" else []
    return shlex.join(["pytest", benchmark, *chosen, "--benchmark-json", "out.json"])


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
        "read bandwidth": _with_unit(significant(facts.get("read_bandwidth_gbs")), "GB/s"),
        "platform": _text(facts.get("platform")),
        "seed": _text(facts.get("seed")),
        "commit": _text(facts.get("commit")),
        "measured on": _text(facts.get("measured")),
        "command": _text(facts.get("arguments")),
        "report made by": _text(f"epic_quant {__version__}"),
    }
    tables: list[Block] = [
        Table(("fact", "value"), tuple(rows.items()), num_text_columns=2, caption="Facts of the run")
    ]
    for columns, fact, caption in (
        (("library", "version"), "versions", "Versions"),
        (("policy", "stands for"), "policy_strings", "What the policies stand for"),
    ):
        named = facts.get(fact) or {}
        if named:
            rows_of = tuple((code(str(name)), _text(value)) for name, value in named.items())
            tables.append(Table(columns, rows_of, 2, caption))
    return [*tables, Paragraph("MB are 1e6 bytes and GB/s 1e9 bytes a second; — is what was not measured.")]


def _text(value: Any) -> str:
    return MISSING if value is None or value == "" else code(str(value))


def _plain(value: Any) -> str:
    return MISSING if value is None else str(value)


def _labelled(label: str, text: str) -> str:
    """Nothing where the text is missing."""
    return "" if text == MISSING else label + text


def _with_unit(number: str, unit: str) -> str:
    return number if number == MISSING else f"{number} {unit}"

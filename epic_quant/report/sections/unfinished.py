"""The tests without records, of a run that stopped early or had failures."""

from __future__ import annotations

from collections.abc import Sequence

from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.report.columns import Column, table
from epic_quant.results.run import Run

# Of one function; a run has a few hundred in all.
_MOST_NAMED = 6

_Tests = tuple[str, list[str]]  # a function and its parameters
_COLUMNS: tuple[Column[_Tests], ...] = (
    Column("test", lambda tests: tests[0], code, text=True),
    Column("of", lambda tests: _named(tests[1]), text=True),
    Column("number", lambda tests: len(tests[1])),
)


def blocks(run: Run) -> list[Block]:
    """Which planned tests had not ended when it stopped, and which failed; nothing of a run that ended well."""
    missing, failed = (run.facts.get(name) or [] for name in ("missing", "failed"))
    found: list[Block] = []
    if missing:
        found += [
            Paragraph(
                f"This run stopped before its end: {len(missing)} of its tests have no result. The report shows what "
                "had been measured by then. Missing:"
            ),
            _table(missing),
        ]
    if failed:
        found += [Paragraph(f"{len(failed)} of its tests failed:"), _table(failed)]
    return found


def _table(tests: Sequence[str]) -> Table:
    """Tests by their function, with some of the parameters in brackets after its name."""
    of: dict[str, list[str]] = {}
    for test in tests:
        function, _, parameters = test.partition("[")
        of.setdefault(function, []).append(parameters.removesuffix("]"))
    return table(_COLUMNS, of.items())


def _named(names: Sequence[str]) -> str:
    shown = [code(name) for name in names[:_MOST_NAMED] if name]
    more = len(names) - _MOST_NAMED
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown)

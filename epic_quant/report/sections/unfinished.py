"""What a run that did not end, or did not end well, has no records of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.results.run import Run

# Of one function; a run names a few hundred in all.
_MOST_NAMED = 6


def blocks(run: Run) -> list[Block]:
    """Which planned tests had not ended when it stopped, and which failed; nothing of a run that ended well."""
    missing, failed = (run.facts.get(name) or [] for name in ("missing", "failed"))
    found: list[Block] = []
    if missing:
        found += [
            Paragraph(
                f"This run stopped before its end: {len(missing)} of its tests have no result. What is below is what "
                "it had measured by then. Missing:"
            ),
            _table(missing),
        ]
    if failed:
        found += [Paragraph(f"{len(failed)} of its tests failed:"), _table(failed)]
    return found


def _table(tests: Iterable[str]) -> Table:
    """Tests by their function, with what is in brackets after its name, as far as that is no longer than a few."""
    of: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        function, _, parameters = test.partition("[")
        of[function].append(parameters.removesuffix("]"))
    rows = tuple((code(function), _named(names), str(len(names))) for function, names in of.items())
    return Table(("test", "of", "number"), rows, num_text_columns=2)


def _named(names: Sequence[str]) -> str:
    shown = [code(name) for name in names[:_MOST_NAMED] if name]
    more = len(names) - _MOST_NAMED
    return ", ".join([*shown, f"and {more} more"] if more > 0 else shown)

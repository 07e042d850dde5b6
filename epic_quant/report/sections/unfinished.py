"""What a run that did not end, or did not end well, has no records of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from epic_quant.report.blocks import Block, Paragraph, Table, code
from epic_quant.results.run import Run


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
    """Tests by their function, with what is in brackets after its name."""
    counts: Counter[str] = Counter()
    of: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        function, bracket, parameters = test.partition("[")
        counts[function] += 1
        if bracket:
            of[function].append(code(parameters.removesuffix("]")))
    rows = tuple((code(function), ", ".join(of[function]), str(count)) for function, count in counts.items())
    return Table(("test", "of", "number"), rows, num_text_columns=2)

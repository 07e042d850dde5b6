"""Bytes by part beside the figures that were published."""

from __future__ import annotations

from epic_quant.records.subjects import FootprintRecord
from epic_quant.results.run import Run

TOTAL = "total"


def computed(record: FootprintRecord, part: str) -> float | None:
    """Bytes of a part, or of all."""
    return record.nbytes if part == TOTAL else record.parts.get(part)


def is_as_published(record: FootprintRecord, part: str) -> bool:
    """Whether bytes, in MB to one decimal as figures are published, are the published MB."""
    nbytes = computed(record, part)
    return nbytes is not None and f"{nbytes / 1e6:.1f}" == f"{record.published[part]:.1f}"


def published(run: Run) -> list[tuple[FootprintRecord, str, bool]]:
    """Every published figure: its record, its part, and whether it was reproduced."""
    return [
        (record, part, is_as_published(record, part)) for record in run.of(FootprintRecord) for part in record.published
    ]

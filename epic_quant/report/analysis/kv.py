"""What KV specs cost: errors compared, divergence over bytes, and what is stored beside what was claimed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from epic_quant.records.subjects import E4B, KVBytesRecord, KVDivergenceRecord, KVRecord
from epic_quant.report.analysis.pareto import Sized, front
from epic_quant.report.formatting import quotient
from epic_quant.results.run import Run
from epic_quant.spec import REFERENCE

ORIGINAL = "original"
# The original's bits with least-squares scales, as all specs but its own have.
FITTED = "original+ls"
INVERTED = "original-inverted"
SLIDING, FULL = "sliding_attention", "full_attention"

# Below this a divergence is the rounding of fp32 and no effect of a spec.
LEAST_DIVERGENCE = 1e-9

_COMPARED = (("p-rope", ORIGINAL), ("p-rope", FITTED), ("p-rope-4", "int4"), (INVERTED, FITTED))


@dataclass(frozen=True)
class Claim:
    """How many times less than bf16 the original stores of E4B's layers of a type."""

    layer_type: str
    claimed: float | None
    by_its_arithmetic: float | None
    stored: float | None


def error_ratios(run: Run) -> Iterator[tuple[str, str, float]]:
    """Specs whose errors of the attention output on full layers are compared, and the ratio of the two."""
    for name, other in _COMPARED:
        if (found := _error_ratio(run, name, other)) is not None:
            yield name, other, found


def inverted_ratio(run: Run) -> float | None:
    """The error with more bits for the unrotated dims, over that with more bits for the rotated ones."""
    return _error_ratio(run, INVERTED, FITTED)


def longest_context(run: Run) -> int:
    """The most tokens that a divergence was measured at."""
    return max(record.context for record in run.of(KVDivergenceRecord))


def divergence_front(run: Run) -> list[Sized]:
    """The least divergence within each size, at the longest context: name, bytes a token, divergence."""
    return front(
        (record.kv_policy, record.nbytes, record.kl_divergence)
        for record in run.of(KVDivergenceRecord, context=longest_context(run))
        if record.nbytes is not None and record.kl_divergence is not None
    )


def claims(run: Run) -> list[Claim]:
    """The original's claims beside what it stores at most tokens; nothing where it was not counted on E4B."""
    originals = run.of(KVBytesRecord, kv_policy=ORIGINAL, model=E4B)
    if not originals:
        return []
    longest = max(record.tokens for record in run.of(KVBytesRecord, model=E4B))
    published = next((record.published for record in originals if record.published), {})
    stored = [run.one(KVBytesRecord, kv_policy=name, model=E4B, tokens=longest) for name in (REFERENCE, ORIGINAL)]
    return [
        Claim(
            layer_type,
            published.get(f"{layer_type}_claimed"),
            published.get(f"{layer_type}_arithmetic"),
            quotient(*(record.parts.get(layer_type) if record else None for record in stored)),
        )
        for layer_type in (SLIDING, FULL)
    ]


def _error_ratio(run: Run, name: str, other: str) -> float | None:
    errors = (run.value(KVRecord, "attention_rel_l2", kv_policy=one, layer_type=FULL) for one in (name, other))
    return quotient(*errors)

"""Bytes of every policy, beside the figures that were published."""

from __future__ import annotations

from epic_quant.records import Record
from epic_quant.report.blocks import Block, Bullets, Heading, Paragraph, Table, code
from epic_quant.report.formatting import MISSING, megabytes, times
from epic_quant.results.run import Run

E4B = "E4B"

_EXPLANATION = (
    "As published: the original's sum, which counts the K and V projections that no layer reads, and leaves out the "
    "embedding, the PLE model projection, the norms and the KV cache. In brackets is the published figure, with ✓ "
    "where the computed one is equal to its digit and ✗ where it is not.",
    "Resident: what must be in RAM to run the text model.",
)


def blocks(run: Run) -> list[Block]:
    """For each model and way of counting, a table of policies by parts."""
    found: list[Block] = [Bullets(_EXPLANATION)]
    for model in run.labels("footprint", "model"):
        for column in run.labels("footprint", "column", model=model):
            found += [Heading(3, f"{model}, {column}, MB"), _table(run, model, column)]
        unused = [record.details.get("unused_nbytes") for record in run.select("footprint", model=model)]
        # The figure is of the model, so all records that have it have the same.
        nbytes = next((value for value in unused if value is not None), None)
        found.append(Paragraph(f"K and V projections that no layer reads, in bf16: {megabytes(nbytes)} MB."))
    return found


def findings(run: Run) -> list[str]:
    """How far resident bytes can fall, and whether the published figures were met."""
    found = []
    for model in run.labels("footprint", "model", column="resident"):
        nbytes = resident_nbytes(run, model)
        if nbytes:
            least = min(nbytes, key=lambda policy: nbytes[policy])
            ratio = times(nbytes[least], nbytes.get("bf16"))
            of_bf16 = "" if ratio == MISSING else f", {ratio} that of `bf16`"
            found.append(f"Least resident bytes of {model}: {code(least)} with {megabytes(nbytes[least])} MB{of_bf16}.")
    compared = [
        (record, part, _is_equal(_computed(record, part), figure))
        for record in run.select("footprint")
        for part, figure in _published(record).items()
    ]
    if compared:
        wrong = [f"{code(record.labels['policy'])} {part}" for record, part, equal in compared if not equal]
        differing = f"; not those of {', '.join(wrong)}" if wrong else ""
        num_equal = len(compared) - len(wrong)
        found.append(f"{num_equal} of {len(compared)} published footprint figures come out to the digit{differing}.")
    return found


def resident_nbytes(run: Run, model: str) -> dict[str, float]:
    """Resident bytes of a model by policy, where they are known."""
    policies = run.labels("footprint", "policy", model=model, column="resident")
    values = {name: run.value("footprint", "nbytes", policy=name, model=model, column="resident") for name in policies}
    return {name: value for name, value in values.items() if value is not None}


def _table(run: Run, model: str, column: str) -> Table:
    policies = run.labels("footprint", "policy", model=model, column=column)
    records = {name: run.select("footprint", policy=name, model=model, column=column)[0] for name in policies}
    parts = list(dict.fromkeys(part for record in records.values() for part in record.details.get("parts", {})))
    reference = records["bf16"].metrics.get("nbytes") if "bf16" in records else None
    rows = (
        (
            code(name),
            *(_cell(record, part) for part in [*parts, "total"]),
            times(record.metrics.get("nbytes"), reference),
        )
        for name, record in records.items()
    )
    return Table(("policy", *parts, "total", "of bf16"), tuple(rows))


def _computed(record: Record, part: str) -> float | None:
    return record.metrics.get("nbytes") if part == "total" else record.details.get("parts", {}).get(part)


def _published(record: Record) -> dict[str, float]:
    return {part: figure for part, figure in record.details.get("published", {}).items() if figure is not None}


def _cell(record: Record, part: str) -> str:
    nbytes, figure = _computed(record, part), _published(record).get(part)
    if figure is None:
        return megabytes(nbytes)
    return f"{megabytes(nbytes)} ({figure:,.1f} {'✓' if _is_equal(nbytes, figure) else '✗'})"


def _is_equal(nbytes: float | None, figure: float) -> bool:
    """Whether bytes, in MB to one decimal as figures are published, are the published MB."""
    return nbytes is not None and f"{nbytes / 1e6:.1f}" == f"{figure:.1f}"

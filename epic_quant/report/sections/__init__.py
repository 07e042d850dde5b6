"""The sections of a report. A new one is a module with its blocks and its findings, and a row in `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epic_quant.errors import ReportError
from epic_quant.report.blocks import Block, Findings, Heading, Paragraph, code
from epic_quant.report.sections import (
    baseline,
    block,
    footprint,
    kernels,
    kv,
    ladder,
    limits,
    ple,
    provenance,
    quality,
    recipe,
    sensitivity,
    summary,
    synthetic,
    unfinished,
    weights,
)
from epic_quant.results.comparison import Comparison
from epic_quant.results.gate import Judgement
from epic_quant.results.run import Run


@dataclass(frozen=True)
class Section:
    """What the records of one subject say: its place in the report begins with `findings`, and `blocks` follow.

    Both are called only where there are records, and every record bears the `labels`.
    """

    title: str
    subject: str
    labels: tuple[str, ...]
    benchmark: str
    blocks: Callable[[Run], list[Block]]
    findings: Callable[[Run], list[str]]


SECTIONS = (
    Section(
        "Footprint",
        "footprint",
        ("policy", "model", "column"),
        "benchmarks/test_footprint.py",
        footprint.blocks,
        footprint.findings,
    ),
    Section(
        "Weights",
        "weights",
        ("policy", "tensor_class", "spec", "op"),
        "benchmarks/test_weights.py",
        weights.blocks,
        weights.findings,
    ),
    Section(
        "Ladder",
        "ladder",
        ("spec", "tensor_class"),
        "benchmarks/test_weights.py",
        ladder.blocks,
        ladder.findings,
    ),
    Section(
        "Synthetic weights",
        "synthetic",
        ("spec", "distribution"),
        "benchmarks/test_weights.py",
        synthetic.blocks,
        synthetic.findings,
    ),
    Section(
        "Blocks",
        "block",
        ("policy", "layer_type", "tokens"),
        "benchmarks/test_block.py",
        block.blocks,
        block.findings,
    ),
    Section(
        "Kernels",
        "kernels",
        ("weight", "tokens", "how"),
        "benchmarks/test_kernels.py",
        kernels.blocks,
        kernels.findings,
    ),
    Section(
        "PLE row cache: hits",
        "ple_hits",
        ("trace", "residency"),
        "benchmarks/test_ple.py",
        ple.hits_blocks,
        ple.hits_findings,
    ),
    Section(
        "PLE row cache: speed",
        "ple_speed",
        ("table", "way", "heat", "batch", "threads"),
        "benchmarks/test_ple.py",
        ple.speed_blocks,
        ple.speed_findings,
    ),
    Section(
        "PLE below eight bits",
        "ple_guard",
        ("tensor_class", "spec"),
        "benchmarks/test_ple.py",
        ple.guard_blocks,
        ple.guard_findings,
    ),
    Section(
        "KV cache: errors",
        "kv",
        ("kv_policy", "layer_type"),
        "benchmarks/test_kv.py",
        kv.error_blocks,
        kv.error_findings,
    ),
    Section(
        "KV cache: divergence",
        "kv_divergence",
        ("kv_policy", "context"),
        "benchmarks/test_kv.py",
        kv.divergence_blocks,
        kv.divergence_findings,
    ),
    Section(
        "KV cache: bytes",
        "kv_bytes",
        ("kv_policy", "model", "tokens"),
        "benchmarks/test_kv.py",
        kv.bytes_blocks,
        kv.bytes_findings,
    ),
    Section("Quality", "quality", ("policy",), "benchmarks/test_quality.py", quality.blocks, quality.findings),
    Section(
        "Sensitivity",
        "sensitivity",
        ("tensor_class", "spec", "text"),
        "benchmarks/test_quality.py",
        sensitivity.blocks,
        sensitivity.findings,
    ),
    Section("Recipes", "quality", ("policy",), "benchmarks/test_quality.py", recipe.blocks, recipe.findings),
)


def comparison(run: Run, compared: Comparison | None = None, judged: Sequence[Judgement] = ()) -> list[Block]:
    """The whole report of a run, beside an older one and with the limits that it was held to where these are given.

    Raises ReportError on a record without the labels of its section.
    """
    ran = [section for section in SECTIONS if run.select(section.subject)]
    for section in ran:
        _check_labels(section, run)
    blocks: list[Block] = [Heading(1, "Compression policies compared"), *provenance.at_the_head(run)]
    blocks += unfinished.blocks(run)
    if judged:
        blocks += [Heading(2, "Limits"), *limits.blocks(judged)]
    if compared:
        blocks += [Heading(2, "Since the baseline"), Findings(tuple(baseline.findings(compared)))]
    blocks += summary.blocks(run)
    for section in SECTIONS:
        blocks.append(Heading(2, section.title))
        if section not in ran:
            blocks.append(_not_run(section, run))
            continue
        if findings := section.findings(run):
            blocks.append(Findings(tuple(findings)))
        blocks += section.blocks(run)
    if compared:
        blocks += [Heading(2, "Against the baseline"), *baseline.blocks(compared)]
    return [*blocks, Heading(2, "How this was measured"), *provenance.blocks(run)]


def _check_labels(section: Section, run: Run) -> None:
    for record in run.select(section.subject):
        missing = [label for label in section.labels if label not in record.labels]
        if missing:
            raise ReportError(
                f"a {section.subject!r} record lacks {missing[0]!r} among its labels {dict(record.labels)}"
            )


def _not_run(section: Section, run: Run) -> Paragraph:
    return Paragraph(f"Not run. To run it: {code(provenance.command(run, section.benchmark))}")

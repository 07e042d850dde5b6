"""The sections of a report. A new one is a module with its blocks and its findings, and a row in `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epic_quant.report.blocks import Block, Findings, Heading, Paragraph, code
from epic_quant.report.sections import (
    baseline,
    block,
    footprint,
    kernels,
    kv_bytes,
    kv_divergence,
    kv_errors,
    ladder,
    limits,
    ple_guard,
    ple_hits,
    ple_speed,
    prices,
    provenance,
    quality,
    recipe,
    sensitivity,
    summary,
    synthetic,
    unfinished,
    weights,
)
from epic_quant.report.wording import measuring_command
from epic_quant.results.comparison import Comparison
from epic_quant.results.gate import LimitResult
from epic_quant.results.run import Run

_Findings = Callable[[Run], list[str]]


@dataclass(frozen=True)
class Section:
    """The section of some records: `findings` first, then `blocks`.

    Both are called only where there are records.
    """

    title: str
    subjects: tuple[str, ...]
    benchmark: str
    blocks: Callable[[Run], list[Block]]
    findings: _Findings


_WEIGHTS, _PLE = "benchmarks/test_weights.py", "benchmarks/test_ple.py"
_KV, _QUALITY = "benchmarks/test_kv.py", "benchmarks/test_quality.py"
_PLE_HITS, _PLE_SPEED = ("ple_hits", "ple_text", "ple_start"), ("ple_hot", "ple_cold", "ple_memory")

SECTIONS = (
    Section("Footprint", ("footprint",), "benchmarks/test_footprint.py", footprint.blocks, footprint.findings),
    Section("Weights", ("weights",), _WEIGHTS, weights.blocks, weights.findings),
    Section("Ladder", ("ladder",), _WEIGHTS, ladder.blocks, ladder.findings),
    Section("Synthetic weights", ("synthetic",), _WEIGHTS, synthetic.blocks, synthetic.findings),
    Section("Blocks", ("block",), "benchmarks/test_block.py", block.blocks, block.findings),
    Section("Kernels", ("kernels",), "benchmarks/test_kernels.py", kernels.blocks, kernels.findings),
    Section("PLE row cache: hits", _PLE_HITS, _PLE, ple_hits.blocks, ple_hits.findings),
    Section("PLE row cache: speed", _PLE_SPEED, _PLE, ple_speed.blocks, ple_speed.findings),
    Section("PLE below eight bits", ("ple_guard",), _PLE, ple_guard.blocks, ple_guard.findings),
    Section("KV cache: errors", ("kv",), _KV, kv_errors.blocks, kv_errors.findings),
    Section("KV cache: divergence", ("kv_divergence",), _KV, kv_divergence.blocks, kv_divergence.findings),
    Section("KV cache: bytes", ("kv_bytes",), _KV, kv_bytes.blocks, kv_bytes.findings),
    Section("Quality", ("quality",), _QUALITY, quality.blocks, quality.findings),
    Section("Sensitivity", ("sensitivity",), _QUALITY, sensitivity.blocks, sensitivity.findings),
    Section("What every tensor costs", ("prices",), _QUALITY, prices.blocks, prices.findings),
    Section("Recipes", ("quality",), _QUALITY, recipe.blocks, recipe.findings),
)

# The findings that the report also shows at its head: a subject and its findings.
KEY_FINDINGS: tuple[tuple[str, _Findings], ...] = (
    ("sensitivity", sensitivity.findings),
    ("prices", prices.findings),
    ("ple_text", ple_hits.text_findings),
    ("ple_hits", ple_hits.key_findings),
    ("kv_divergence", kv_divergence.findings),
    ("quality", recipe.findings),
)


def comparison(run: Run, compared: Comparison | None = None, results: Sequence[LimitResult] = ()) -> list[Block]:
    """The whole report of a run, with its comparison with an older one and the results of its limits, if given."""
    subjects = {record.subject for record in run.records}
    blocks: list[Block] = [Heading(1, "Compression policies compared"), *provenance.at_the_head(run)]
    blocks += unfinished.blocks(run)
    if results:
        blocks += [Heading(2, "Limits"), *limits.blocks(results)]
    if compared:
        blocks += [Heading(2, "Since the baseline"), Findings(tuple(baseline.findings(compared)))]
    key_findings = [finding for subject, findings in KEY_FINDINGS if subject in subjects for finding in findings(run)]
    blocks += summary.blocks(run, key_findings)
    for section in SECTIONS:
        blocks.append(Heading(2, section.title))
        if subjects.isdisjoint(section.subjects):
            blocks.append(Paragraph(f"Not run. To run it: {code(measuring_command(run, section.benchmark))}"))
            continue
        if findings := section.findings(run):
            blocks.append(Findings(tuple(findings)))
        blocks += section.blocks(run)
    if compared:
        blocks += [Heading(2, "Against the baseline"), *baseline.blocks(compared)]
    return [*blocks, Heading(2, "How this was measured"), *provenance.blocks(run)]

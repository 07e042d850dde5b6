"""Words that several sections share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from epic_quant.records.subjects import SensitivityRecord
from epic_quant.report.analysis.policies import Rated
from epic_quant.report.blocks import code
from epic_quant.report.formatting import MISSING, megabytes, significant
from epic_quant.results.run import Run

RECIPE_COMMAND = "python -m epic_quant.recipe out.json --budget 3.5GB"


def measuring_command(run: Run, benchmark: str) -> str:
    """The command line that measures a benchmark's subjects on the run's checkpoint."""
    checkpoint = run.facts["checkpoint"]
    chosen = ["--checkpoint", checkpoint["source"]] if checkpoint["kind"] == "user" else []
    return shlex.join(["pytest", benchmark, *chosen, "--benchmark-json", "out.json"])


def context_tokens(run: Run) -> str:
    """The tokens that the KV cache of the resident bytes holds."""
    context = run.facts.get("context")
    return MISSING if context is None else f"{context:,}"


def ablation(record: SensitivityRecord) -> str:
    """The class that is quantized alone, its layer where there is one, and its spec."""
    layer = "" if record.layer is None else f", layer {record.layer}"
    return f"{record.tensor_class}{layer} {code(record.spec)}"


def front_steps(front: Sequence[Rated], called: Mapping[str, str]) -> str:
    """Policies from small to large, each with its MB and its error."""
    return ", ".join(sized(one, called, significant(one.error)) for one in front)


def sized(one: Rated, called: Mapping[str, str], also: str = "") -> str:
    """A policy with its MB in brackets, where its name does not have them, and what else stands there."""
    name, size = called[one.policy], f"{megabytes(one.nbytes)} MB"
    beside = ", ".join(filter(None, ["" if name.endswith(" MB") else size, also]))
    return code(name) + (f" ({beside})" if beside else "")

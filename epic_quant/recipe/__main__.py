"""`python -m epic_quant.recipe out.json --budget 3.5GB`: the recipe's command line."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from epic_quant import command_line
from epic_quant.recipe.assignment import Recipe, within_bits, within_resident
from epic_quant.recipe.llama_cpp import BITS, nearest_type, tensor_type_arguments
from epic_quant.results.reading import read_run
from epic_quant.results.run import Run
from epic_quant.results.sensitivities import KV_CACHE, UNQUANTIZED, class_specs
from epic_quant.units import parse_nbytes


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the recipe; 0, or 2 with one line on stderr where none can be made."""
    options = _parser().parse_args(arguments)
    by_layer = options.by == "layer"
    run = read_run(options.json)
    if options.budget is not None:
        recipe = within_resident(run, options.budget, by_layer, options.keep)
    else:
        recipe = within_bits(run, options.bits, by_layer, options.keep)
    lines = list(_policy(run, recipe) if options.format == "policy" else _llama_cpp(run, recipe))
    print("\n".join(lines))
    return 0


def _policy(run: Run, recipe: Recipe) -> Iterator[str]:
    """The policy string, and below it what it is predicted and measured to do."""
    yield recipe.policy
    yield ""
    yield from _told(recipe)
    measured = _measured(run, recipe.policy)
    if measured is None:
        yield f"measured divergence: none in this JSON; to measure it: {_measuring_command(run, recipe.policy)}"
        return
    kl, error = measured
    ratio = f", {kl / recipe.predicted:.3g} times the predicted" if recipe.predicted > 0 else ""
    beside = "" if error is None else f" ± {error:.2g}"
    yield f"measured divergence:  {kl:.4g}{beside} nats a token, on the evaluation text{ratio}"


def _llama_cpp(run: Run, recipe: Recipe) -> Iterator[str]:
    """Arguments, one a line, and below them what becomes of the recipe."""
    types = {
        (unit.tensor_class, unit.layer): nearest_type(choice.spec, 8 * choice.nbytes / unit.weights)
        for unit, choice in recipe.parts
        if unit.weights
    }
    for argument in tensor_type_arguments(types, run.facts.get("layer_types")):
        yield f"--tensor-type {shlex.quote(argument)}"
    yield ""
    weights = {(unit.tensor_class, unit.layer): unit.weights for unit, _ in recipe.parts if unit.weights}
    nbits = sum(BITS[types[key]] * number for key, number in weights.items())
    yield (
        f"# {nbits / sum(weights.values()):.4g} bits a weight with these types, {recipe.bits_per_weight:.4g} with the "
        "recipe's own; the predicted divergence is that of the recipe's own"
    )
    yield from (f"# {line}" for line in _told(recipe))
    yield "# the last arguments of llama-quantize name a type for all else, which here is nothing: such as q8_0"
    yield "# per_layer_model_proj: llama-quantize never quantizes it"
    for unit, choice in recipe.parts:
        if unit.tensor_class == KV_CACHE and choice.spec != UNQUANTIZED:
            yield f"# KV cache {choice.spec}: no tensor of the file; see --cache-type-k and --cache-type-v at run time"


def _told(recipe: Recipe) -> Iterator[str]:
    yield f"predicted divergence: {recipe.predicted:.4g} nats a token, the sum of what each class does alone"
    if recipe.resident_nbytes is not None:
        yield f"resident: {recipe.resident_nbytes:,} bytes, all weights, PLE rows, norms and KV cache"
    yield f"weights: {recipe.nbytes:,} bytes, {recipe.bits_per_weight:.4g} bits a weight"


def _measured(run: Run, policy: str) -> tuple[float, float | None] | None:
    """Divergence on the evaluation text and its standard error, of a policy of the run that stores the same."""
    for name in run.labels("quality", "policy"):
        if class_specs(run.policy_string(name)) == class_specs(policy):
            kl = run.value("quality", "kl_divergence", policy=name)
            if kl is not None:
                return kl, run.value("quality", "kl_se", policy=name)
    return None


def _measuring_command(run: Run, policy: str) -> str:
    checkpoint = run.facts["checkpoint"]
    chosen = ["--checkpoint", checkpoint["source"]] if checkpoint["kind"] == "user" else []
    words = ["pytest", "benchmarks/test_quality.py", *chosen]
    return shlex.join([*words, "--policy", policy, "--benchmark-json", "recipe.json"])


def _nbytes(text: str) -> int:
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bits(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bits a weight, such as 4.2")
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        "recipe",
        "Find the specs of least predicted divergence within a budget, from a run's sensitivities.",
        [
            "pytest benchmarks/test_quality.py --benchmark-json out.json",
            "python -m epic_quant.recipe out.json --budget 3.5GB",
            "python -m epic_quant.recipe out.json --bits 4.2 --format llama.cpp",
        ],
        "0; 2 where no recipe can be made.",
    )
    parser.add_argument("json", type=Path, metavar="out.json", help="what --benchmark-json wrote")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget", type=_nbytes, metavar="BYTES", help="resident bytes at most, such as 3.5GB")
    budget.add_argument("--bits", type=_bits, metavar="BITS", help="bits a weight at most, on average, such as 4.2")
    parser.add_argument(
        "--format",
        choices=("policy", "llama.cpp"),
        default="policy",
        help="a string for --policy, or arguments of llama.cpp's llama-quantize with its nearest types",
    )
    parser.add_argument(
        "--by",
        choices=("class", "layer"),
        default="class",
        help="one spec for each class, or for each layer of it (needs a run with --by-layer)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="CLASS",
        help="leave this class, or the kv_cache, in bf16 (repeatable)",
    )
    return parser


if __name__ == "__main__":
    command_line.leave(main)

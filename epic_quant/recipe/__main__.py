"""`python -m epic_quant.recipe out.json --budget 3.5GB`: the recipe's command line."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from epic_quant import command_line
from epic_quant.errors import RecipeError
from epic_quant.files import atomic, user_path
from epic_quant.recipe.assignment import BY, Recipe
from epic_quant.recipe.inputs import in_ggml_types, problem_of
from epic_quant.results.predictions import measured_line, predicted_lines, prices_of
from epic_quant.results.prices import Prediction, prices_path
from epic_quant.results.reading import read_run
from epic_quant.results.run import Run
from epic_quant.units import parse_nbytes


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the recipe; 0, or 2 with one line on stderr where none can be made."""
    options = _parser().parse_args(arguments)
    run = read_run(options.json)
    prices = prices_of(run, options.json)
    if options.format == "gguf":
        prices = in_ggml_types(prices)
    problem = problem_of(run, prices, options.by, options.keep)
    if options.bits is not None:
        recipe = problem.within_bits(options.bits)
    elif options.format == "gguf":
        recipe = problem.within_gguf(options.budget)
    else:
        recipe = problem.within_resident(options.budget)
    prediction = prices.predict(recipe.policy)
    lines = [*_description(recipe, prediction), _measured(run, recipe, prediction, options)]
    if options.format == "gguf":
        lines.append(_export(run, recipe, options))
    if options.out is None:
        lines = [str(recipe.policy), "", *lines]
    else:
        _write([str(recipe.policy)], options.out)
    print("\n".join(lines))
    return 0


def _write(lines: Iterable[str], path: Path) -> None:
    try:
        with atomic(path) as unfinished:
            unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from error


def _description(recipe: Recipe, prediction: Prediction) -> Iterator[str]:
    yield recipe.policy.name
    yield from predicted_lines(prediction)
    yield f"optimality gap: at most {recipe.gap:.2g} of the least sum without cross terms, before exchanges for them"
    yield f"resident: {recipe.resident_nbytes:,} bytes, all weights, PLE rows, norms and KV cache"
    yield f"weights: {recipe.nbytes:,} bytes, {recipe.bits_per_weight:.4g} bits a weight"


def _measured(run: Run, recipe: Recipe, prediction: Prediction, options: argparse.Namespace) -> str:
    """What was measured, or the command that measures it."""
    if line := measured_line(run, recipe.policy, prediction):
        return line
    checkpoint = run.facts["checkpoint"]
    chosen = ["--checkpoint", checkpoint["source"], *_hessians(recipe, options)] if checkpoint["kind"] == "user" else []
    file = options.out or Path("recipe.policy")
    words = ["pytest", "benchmarks/test_quality.py", *chosen, f"--policy=@{file}", "--benchmark-json", "recipe.json"]
    write = "" if options.out else f"write it with --out {file}, then "
    return f"measured divergence:  none in this JSON; to measure it: {write}{shlex.join(words)}"


def _export(run: Run, recipe: Recipe, options: argparse.Namespace) -> str:
    """The command that writes the file."""
    file = options.out or Path("recipe.policy")
    source = run.facts["checkpoint"]["source"]
    words = ["python", "-m", "epic_quant.export", source, f"--policy=@{file}", "--format", "gguf", f"{file.stem}.gguf"]
    return f"GGUF: {shlex.join([*words, *_hessians(recipe, options)])}"


def _hessians(recipe: Recipe, options: argparse.Namespace) -> list[str]:
    """The option that names what the recipe is fitted to, where it is: for importance the prices are enough."""
    if not recipe.policy.needs_hessians:
        return []
    whole = any(spec.compensated for spec in recipe.policy.weight_specs)
    return ["--hessians", "hessians.safetensors" if whole else str(prices_path(options.json))]


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
        "Find the specs of least predicted divergence within a budget, from a run's prices.",
        [
            "pytest benchmarks/test_quality.py --benchmark-json out.json",
            "python -m epic_quant.recipe out.json --budget 3.5GB",
            "python -m epic_quant.recipe out.json --budget 3.5GB --out recipe.policy   (for --policy=@recipe.policy)",
            "python -m epic_quant.recipe out.json --bits 4.5 --format gguf --out small.policy",
        ],
        "0; 2 where no recipe can be made.",
    )
    parser.add_argument("json", type=user_path, metavar="out.json", help="what --benchmark-json wrote")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--budget", type=_nbytes, metavar="BYTES", help="resident bytes, or those of a GGUF, at most: 3.5GB"
    )
    budget.add_argument("--bits", type=_bits, metavar="BITS", help="bits a weight at most, on average, such as 4.2")
    parser.add_argument(
        "--format",
        choices=("any", "gguf"),
        default="any",
        help="gguf: of ggml's types alone, for a file that python -m epic_quant.export writes and llama.cpp runs",
    )
    parser.add_argument(
        "--by",
        choices=BY,
        default="tensor",
        help="one spec for each tensor, class in a layer, kind of tensor (all down_proj) or class (default: tensor)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="CLASS",
        help="leave this class, or the kv_cache, in bf16 (repeatable)",
    )
    parser.add_argument("--out", type=user_path, metavar="FILE", help="write the policy to this file")
    return parser


if __name__ == "__main__":
    command_line.leave(main)

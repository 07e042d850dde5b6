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
from epic_quant.recipe.inputs import problem_of
from epic_quant.recipe.llama_cpp import BITS, nearest_type, tensor_type_arguments
from epic_quant.results.predictions import measured_line, predicted_lines, prices_of
from epic_quant.results.prices import Prediction, Prices
from epic_quant.results.reading import read_run
from epic_quant.results.run import Run
from epic_quant.spec import Target
from epic_quant.units import parse_nbytes


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the recipe; 0, or 2 with one line on stderr where none can be made."""
    options = _parser().parse_args(arguments)
    run = read_run(options.json)
    prices = prices_of(run, options.json)
    problem = problem_of(run, prices, options.by, options.keep)
    if options.budget is not None:
        recipe = problem.within_resident(options.budget)
    else:
        recipe = problem.within_bits(options.bits)
    prediction = prices.predict(recipe.policy)
    if options.format == "policy":
        printed = [str(recipe.policy)]
        lines = [*_description(recipe, prediction), _measured(run, recipe, prediction, options.out)]
    else:
        types = _types(prices, recipe)
        printed = [f"--tensor-type {shlex.quote(argument)}" for argument in tensor_type_arguments(types)]
        lines = [f"# {line}" for line in (*_description(recipe, prediction), *_llama_cpp_notes(prices, recipe, types))]
    if options.out is None:
        lines = [*printed, "", *lines]
    else:
        _write(printed, options.out)
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


def _measured(run: Run, recipe: Recipe, prediction: Prediction, out: Path | None) -> str:
    """What was measured, or the command that measures it."""
    if line := measured_line(run, recipe.policy, prediction):
        return line
    checkpoint = run.facts["checkpoint"]
    chosen = ["--checkpoint", checkpoint["source"]] if checkpoint["kind"] == "user" else []
    file = out or Path("recipe.policy")
    words = ["pytest", "benchmarks/test_quality.py", *chosen, f"--policy=@{file}", "--benchmark-json", "recipe.json"]
    write = "" if out else f"write it with --out {file}, then "
    return f"measured divergence:  none in this JSON; to measure it: {write}{shlex.join(words)}"


def _types(prices: Prices, recipe: Recipe) -> dict[Target, str]:
    """The nearest of llama.cpp's types for every tensor, those that were kept in bf16 among them."""
    nbytes = prices.nbytes_by_tensor(recipe.policy)
    return {
        priced.target: nearest_type(recipe.policy.spec_of(priced.target), 8 * nbytes[priced.name] / priced.numel)
        for priced in prices.tensors
        if priced.target is not None
    }


def _llama_cpp_notes(prices: Prices, recipe: Recipe, types: dict[Target, str]) -> Iterator[str]:
    nbits = sum(BITS[types[priced.target]] * priced.numel for priced in prices.tensors if priced.target)
    own = 8 * prices.nbytes(recipe.policy)
    yield (
        f"{nbits / prices.numel:.4g} bits a weight with these types, {own / prices.numel:.4g} with the recipe's own, "
        "over all matrices; the predicted divergence is that of the recipe's own"
    )
    yield "the last arguments of llama-quantize name a type for all else, which here is nothing: such as q8_0"
    yield "per_layer_model_proj: llama-quantize never quantizes it"
    if not recipe.policy.kv.is_plain:
        yield f"KV cache {recipe.policy.kv}: no tensor of the file; see --cache-type-k and --cache-type-v at run time"


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
            "python -m epic_quant.recipe out.json --bits 4.2 --format llama.cpp",
        ],
        "0; 2 where no recipe can be made.",
    )
    parser.add_argument("json", type=user_path, metavar="out.json", help="what --benchmark-json wrote")
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
    parser.add_argument(
        "--out", type=user_path, metavar="FILE", help="write the policy, or the arguments, to this file"
    )
    return parser


if __name__ == "__main__":
    command_line.leave(main)

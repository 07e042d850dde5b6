"""`python -m epic_quant.predict out.json --policy NAME`: what a policy does to the predictions, without the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from epic_quant import command_line
from epic_quant.files import user_path
from epic_quant.results.predictions import measured_line, predicted_lines, prices_of
from epic_quant.results.prices import Prices
from epic_quant.results.reading import read_run
from epic_quant.results.run import Run
from epic_quant.spec import PolicySpec


@command_line.reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print each policy's prediction; 0, or 2 with one line on stderr where none can be made."""
    options = _parser().parse_args(arguments)
    policies = [command_line.policy_of(text) for text in options.policy]
    run = read_run(options.json)
    prices = prices_of(run, options.json)
    print("\n\n".join("\n".join(_lines(run, prices, policy)) for policy in policies))
    return 0


def _lines(run: Run, prices: Prices, policy: PolicySpec) -> Iterator[str]:
    prediction = prices.predict(policy)
    yield policy.name
    yield from (f"  {line}" for line in predicted_lines(prediction))
    nbytes = prices.nbytes(policy)
    yield f"  weights: {nbytes:,} bytes, {8 * nbytes / prices.numel:.4g} bits a weight"
    yield f"  {measured_line(run, policy, prediction) or 'measured divergence:  none in this JSON'}"


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser(
        "predict",
        "Predict what a policy does to the model's predictions, from a run's prices and without the model.",
        [
            "python -m epic_quant.predict out.json --policy int4-g128",
            "python -m epic_quant.predict out.json --policy mlp=int3-g128,kv=bf16 --policy=@recipe.policy",
        ],
        "0; 2 where nothing can be predicted.",
    )
    parser.add_argument("json", type=user_path, metavar="out.json", help="what --benchmark-json wrote")
    parser.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="POLICY",
        help="a policy's name, its string, or @FILE that holds one (repeatable)",
    )
    return parser


if __name__ == "__main__":
    command_line.leave(main)

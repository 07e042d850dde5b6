"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from epic_quant.files import user_path
from epic_quant.results import gate
from epic_quant.units import parse_nbytes


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; is a variable of the shell not set?")
    return text


def _path(text: str) -> Path:
    return user_path(_text(text))


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError
    return value


def _nbytes(text: str) -> int:
    """A size as people write it, of at least one byte."""
    value = parse_nbytes(text)
    if not value:
        raise ValueError
    return value


def _rows(text: str) -> int | str:
    return text if text == "all" else _positive(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line of the benchmarks."""
    group = parser.getgroup("epic_quant", "what is measured")
    group.addoption(
        "--checkpoint", type=_text, metavar="SOURCE", help="file, folder or hub id (default: the small trained model)"
    )
    group.addoption("--config", type=_path, metavar="FILE", help="config.json, where it is not beside the checkpoint")
    group.addoption(
        "--tokenizer", type=_path, metavar="FILE", help="tokenizer.json, where it is not beside the checkpoint"
    )
    group.addoption("--download", action="store_true", help="download a hub id that is not in the local cache")
    group.addoption(
        "--policy",
        action="append",
        type=_text,
        default=[],
        metavar="NAME_OR_STRING",
        help="measure this policy (repeatable; default: all named ones), such as int4-g128 or mlp=int4,ple=lru:5000; "
        "--policy=@FILE takes it from a file, which names it; [NAME=]file:PATH is a published quantized file",
    )
    group.addoption("--context", type=_positive, default=8192, metavar="TOKENS", help="length that the KV cache holds")
    group.addoption(
        "--kv-policy",
        action="append",
        type=_text,
        default=[],
        metavar="NAME_OR_STRING",
        help="measure this KV policy (repeatable; default: all named ones), such as int4+had or k=int4-b64/v=int4",
    )
    group.addoption(
        "--kv-context", type=_positive, default=4096, metavar="TOKENS", help="longest text that goes into a KV cache"
    )
    group.addoption("--rows", type=_rows, metavar="N|all", help="rows of each tensor whose error is taken")
    group.addoption("--text", type=_path, metavar="FILE", help="evaluation text (default: the small model's eval.txt)")
    group.addoption(
        "--calibration-text",
        type=_path,
        metavar="FILE",
        help="text that +gptq, +imatrix and +yaqa are fitted to, never evaluated on",
    )
    group.addoption(
        "--hessians",
        type=_path,
        metavar="FILE",
        help="Hessians that python -m epic_quant.calibration made; for +imatrix alone, a run's out.prices.safetensors",
    )
    group.addoption(
        "--windows",
        type=_positive,
        metavar="N",
        help="windows of each text that quality is measured on (default: 3; 1 on a checkpoint over 1 GB)",
    )
    group.addoption(
        "--window-tokens",
        type=_positive,
        metavar="N",
        help="tokens of each window, BOS included (default: four times what a sliding layer sees)",
    )
    group.addoption("--by-layer", action="store_true", help="ablations of every layer alone too, on any checkpoint")
    group.addoption(
        "--prices",
        action="store_true",
        help="price every tensor, and measure ablations and recipes, on a checkpoint over 1 GB too",
    )
    group.addoption(
        "--price",
        action="append",
        type=_text,
        default=[],
        metavar="SPEC",
        help="price tensors under this spec (repeatable; default: the best at each width), such as int4-g64",
    )
    group.addoption(
        "--memory",
        type=_nbytes,
        metavar="SIZE",
        help="RAM for evaluating quality, as 6GB (default: half of what is free)",
    )
    group.addoption(
        "--resume", type=_path, metavar="FOLDER", help="keep the state of long evaluations there, and go on from it"
    )
    group.addoption("--ple-trace", type=_path, metavar="FILE", help="text or .npy ids to evaluate the PLE row cache on")
    group.addoption(
        "--no-check", action="store_true", help="do not read all weights first for NaN, infinity and overflow"
    )
    group.addoption("--plan", action="store_true", help="print what would be measured and how long it takes, and stop")
    _add_outcome(parser)


def _add_outcome(parser: pytest.Parser) -> None:
    group = parser.getgroup("epic_quant outcome", "results")
    group.addoption("--fail-if", action="append", type=_text, default=[], metavar=gate.METAVAR, help=gate.HELP)
    group.addoption(
        "--baseline", type=_path, metavar="FILE", help="JSON of an older run, to compare every value and limit with"
    )
    group.addoption("--compare-times", action="store_true", help="compare times of different machines too")
    group.addoption("--report", type=_path, metavar="DIR", help="make the report there when the run ends")

"""What a run will take, told before it starts: time from a short probe of each scheme, RAM, disk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from epic_quant import machine
from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.policy import Policy
from epic_quant.quant import quantizer

_PROBE_WEIGHTS = 2**20


def sampled_shape(tensor: TextTensor, sampled_rows: int | None) -> tuple[int, int]:
    """The rows and columns of a tensor whose error is taken."""
    rows, cols = tensor.shape
    return (rows if sampled_rows is None else min(rows, sampled_rows)), cols


def plan(checkpoint: Checkpoint, config: TextConfig, policies: Iterable[Policy], sampled_rows: int | None) -> list[str]:
    """Lines for people: weights to quantize for each scheme and how long that takes, RAM, disk."""
    matrices = [tensor for tensor in expected_tensors(config) if tensor.tensor_class is not None and not tensor.dead]
    pairs = {
        (policy.specs[tensor_class], tensor_class) for policy in policies for tensor_class in policy.quantized_classes
    }
    lines, total_s = [], 0.0
    for spec in sorted({spec for spec, _ in pairs}):
        sampled = [
            math.prod(sampled_shape(tensor, sampled_rows))
            for tensor in matrices
            if (spec, tensor.tensor_class) in pairs
        ]
        seconds = sum(sampled) * _seconds_a_weight(spec)
        total_s += seconds
        lines.append(f"  {spec}: {sum(sampled) / 1e6:,.1f} M weights, about {seconds:,.0f} s")
    # The largest tensor in fp32 with its decoded copy and their difference, in fp64, and a few of the search's own.
    ram = max(math.prod(sampled_shape(tensor, sampled_rows)) for tensor in matrices) * (4 + 4 + 8 + 8)
    available = machine.available_nbytes()
    free = "—" if available is None else f"{available / 1e9:,.1f} GB"
    return [
        f"errors of {len(pairs)} pairs of scheme and tensor class, about {total_s:,.0f} s:",
        *lines,
        f"RAM beyond the mapped file: about {ram / 1e9:,.2f} GB; free: {free}",
        "disk: nothing but the JSON",
    ]


def _seconds_a_weight(spec: str) -> float:
    """Quantizing and decoding, a weight, measured on Gaussian noise."""
    weight = torch.randn(_PROBE_WEIGHTS // 1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    probe = quantizer(spec.removesuffix("+gptq"))
    probe.quantize(weight[:1]).dequantize()  # what a first call sets up is paid once, not for each weight
    start = time.perf_counter()
    probe.quantize(weight).dequantize()
    return (time.perf_counter() - start) / _PROBE_WEIGHTS

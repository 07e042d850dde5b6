"""Pure functions on tensors, computed in fp64 so that the measure adds no error of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_norm(x: Tensor) -> float:
    """‖x‖², of a tensor of any shape and float dtype."""
    return float(x.double().square().sum())


def relative(squared_error: float, squared_reference: float) -> float:
    """The root of their quotient, for sums over many tensors; 0 if both are zero, infinity if only the latter is."""
    if squared_reference == 0.0:
        return 0.0 if squared_error == 0.0 else math.inf
    return math.sqrt(squared_error / squared_reference)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, both of one shape; for zeros see `relative`."""
    return relative(squared_norm(actual.double() - expected.double()), squared_norm(expected))


def squared_output_norm(weight: Tensor, hessian: Tensor) -> float:
    """‖XWᵀ‖² / n of a weight [rows, cols] on n inputs X, from their Hessians E = XᵀX / n, [cols, cols].

    It is tr(W E Wᵀ), so it is exact for the inputs that the hessian were gathered from.
    """
    weight = weight.double()
    return max(0.0, float(((weight @ hessian.double()) * weight).sum()))


def kurtosis(x: Tensor) -> float:
    """The fourth central moment over the squared variance, of all values together; 3 for a Gaussian."""
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def decibels(ratio: float) -> float:
    """20 log10 of a ratio of norms; minus infinity for zero."""
    return 20.0 * math.log10(ratio) if ratio > 0.0 else -math.inf


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ other) in nats of the softmax over the last dim: [..., vocab] twice gives [...], fp64."""
    reference = torch.log_softmax(reference_logits.double(), dim=-1)
    other = torch.log_softmax(logits.double(), dim=-1)
    return (reference.exp() * (reference - other)).sum(dim=-1)

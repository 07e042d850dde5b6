"""Measures against NumPy and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epic_quant.metrics import decibels, kl_divergence, relative_l2

seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_relative_l2_agrees_with_numpy(seed):
    rng = np.random.default_rng(seed)
    actual, expected = rng.standard_normal((2, 3, 5))
    ratio = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert relative_l2(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(ratio, rel=1e-12)


def test_relative_l2_of_zeros():
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert relative_l2(zeros, zeros) == 0.0
    assert relative_l2(ones, zeros) == math.inf
    assert relative_l2(zeros, ones) == 1.0


def test_a_tenth_is_minus_twenty_decibels():
    assert decibels(0.1) == pytest.approx(-20.0)
    assert decibels(0.0) == -math.inf


@given(seeds)
def test_kl_divergence_agrees_with_the_sum_over_probabilities(seed):
    rng = np.random.default_rng(seed)
    p_logits, q_logits = rng.standard_normal((2, 4, 6)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p_logits, q_logits))
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(kl_divergence(torch.tensor(p_logits), torch.tensor(q_logits)), expected, atol=1e-12)


def test_kl_divergence_of_a_distribution_from_itself_is_zero():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits + 5.0).abs().max() < 1e-6

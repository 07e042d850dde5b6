"""Measures of two distributions against the formulas, written in NumPy and scipy."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_quant.quality.measures import Divergence, ReferenceSlice, Softmax, TokenMeasures

SHAPE, VOCABULARY = (2, 9), 40


def random_logits(seed, scale):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*SHAPE, VOCABULARY, generator=rng, dtype=torch.float64)


def right_tokens(seed):
    return torch.randint(VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(seed))


def measured(reference, other, right, rows, tokens):
    """Both distributions seen by slices of so many ids and tokens."""
    softmax, divergence = Softmax(right), Divergence(right)
    for first in range(0, VOCABULARY, rows):
        ids = slice(first, first + rows)
        for window in range(SHAPE[0]):
            for start in range(0, SHAPE[1], tokens):
                at = window, slice(start, start + tokens)
                beside = ReferenceSlice(softmax, at, first, reference[at][..., ids])
                divergence.add(at, first, beside, other[at][..., ids])
    return divergence.measures(softmax)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.01, 1.0, 30.0, 400.0]), st.integers(7, 41), st.integers(2, 10))
def test_every_token_is_measured_as_the_formulas_say(seed, scale, rows, tokens):
    """However the vocabulary and the tokens are sliced; logits of 400 are far beyond what exp can take alone."""
    reference, right = random_logits(seed, scale), right_tokens(seed)
    other = reference + 0.1 * random_logits(seed + 1, scale)
    ours = measured(reference, other, right, rows, tokens)
    p, q = (scipy.special.log_softmax(logits.numpy(), axis=-1) for logits in (reference, other))
    np.testing.assert_allclose(ours.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-9, atol=1e-10)
    index = right.numpy()[..., None]
    np.testing.assert_allclose(ours.log_prob, np.take_along_axis(q, index, -1)[..., 0], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(ours.reference_log_prob, np.take_along_axis(p, index, -1)[..., 0], rtol=1e-9, atol=1e-10)
    assert np.array_equal(ours.same_top, p.argmax(-1) == q.argmax(-1))


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(7, 41))
def test_equal_logits_diverge_by_nothing_at_all(seed, rows):
    reference = random_logits(seed, 30.0)
    ours = measured(reference, reference.clone(), right_tokens(seed), rows, 4)
    assert not ours.kl.any()
    assert ours.same_top.all()


@pytest.fixture
def tokens():
    reference = random_logits(5, 2.0)
    return measured(reference, reference + random_logits(6, 0.5), right_tokens(5), VOCABULARY, SHAPE[1])


def test_the_summary_is_that_of_numpy(tokens):
    loss, kl = -tokens.log_prob.numpy().ravel(), tokens.kl.numpy().ravel()
    quality = tokens.quality()
    assert quality.perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-12)
    # The delta method: the error of exp(x) is exp(x) times that of x.
    assert quality.perplexity_se == pytest.approx(np.exp(loss.mean()) * loss.std(ddof=1) / np.sqrt(18), rel=1e-12)
    assert quality.kl_divergence == pytest.approx(kl.mean(), rel=1e-12)
    assert quality.kl_divergence_se == pytest.approx(kl.std(ddof=1) / np.sqrt(18), rel=1e-12)
    assert [quality.kl_median, quality.kl_p90, quality.kl_p99, quality.kl_max] == pytest.approx(
        [np.median(kl), np.percentile(kl, 90), np.percentile(kl, 99), kl.max()], rel=1e-12
    )
    assert quality.top1_agreement == pytest.approx(tokens.same_top.numpy().mean())
    delta = np.exp(tokens.log_prob.numpy()) - np.exp(tokens.reference_log_prob.numpy())
    assert quality.rms_delta_p == pytest.approx(np.sqrt((delta**2).mean()), rel=1e-12)
    assert quality.num_tokens == 18


def test_windows_can_be_taken_one_by_one(tokens):
    first, second = tokens.windows(slice(0, 1)), tokens.windows(slice(1, 2))
    assert first.quality().num_tokens == second.quality().num_tokens == 9
    mean = (first.quality().kl_divergence + second.quality().kl_divergence) / 2
    assert tokens.quality().kl_divergence == pytest.approx(mean, rel=1e-12)


def test_one_token_has_no_standard_error():
    one = torch.tensor([[-1.0]], dtype=torch.float64)
    quality = TokenMeasures(one, one, torch.zeros_like(one), torch.ones(1, 1, dtype=torch.bool)).quality()
    assert math.isnan(quality.perplexity_se)
    assert math.isnan(quality.kl_divergence_se)
    assert all(math.isfinite(value) for value in (quality.perplexity, *astuple(quality)[4:]))

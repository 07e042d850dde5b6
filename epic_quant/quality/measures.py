"""How far a model's predictions are from the reference's: for every token, and for all of them together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """What a policy does to the predictions of `num_tokens` tokens, against the reference's own distributions.

    Divergences are KL(reference ‖ policy) in nats a token. Standard errors take tokens as independent, as llama.cpp's
    perplexity tool does, so they are somewhat too small; perplexity's is its own times that of the mean loss.
    """

    perplexity: float
    perplexity_se: float
    kl_divergence: float
    kl_divergence_se: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    top1_agreement: float  # share of tokens with the same most probable next one
    rms_delta_p: float  # root mean square of the change in the probability of the right token
    num_tokens: int


@dataclass(frozen=True)
class TokenMeasures:
    """The same, a token each: all [windows, tokens to predict], fp64 but for `same_top`, which is bool."""

    log_prob: Tensor  # of the right token, in nats
    reference_log_prob: Tensor
    kl: Tensor
    same_top: Tensor

    def windows(self, which: slice) -> TokenMeasures:
        """Those of some windows alone."""
        return TokenMeasures(self.log_prob[which], self.reference_log_prob[which], self.kl[which], self.same_top[which])

    def quality(self) -> Quality:
        """All tokens together. Standard errors are NaN for a single token."""
        loss, kl = -self.log_prob.flatten(), self.kl.flatten()
        perplexity = float(loss.mean().exp())
        delta = self.log_prob.exp() - self.reference_log_prob.exp()
        median, p90, p99 = (float(value) for value in np.quantile(kl.numpy(), (0.5, 0.9, 0.99)))
        return Quality(
            perplexity=perplexity,
            perplexity_se=perplexity * _standard_error(loss),
            kl_divergence=float(kl.mean()),
            kl_divergence_se=_standard_error(kl),
            kl_median=median,
            kl_p90=p90,
            kl_p99=p99,
            kl_max=float(kl.max()),
            top1_agreement=float(self.same_top.double().mean()),
            rms_delta_p=math.sqrt(float(delta.square().mean())),
            num_tokens=kl.numel(),
        )


def _standard_error(values: Tensor) -> float:
    """Of the mean: s / √n, with n - 1 under s."""
    return math.nan if values.numel() < 2 else float(values.std()) / math.sqrt(values.numel())


class Softmax:
    """The softmax of [windows, tokens] tokens over a vocabulary of which a slice is seen at a time; all fp64."""

    def __init__(self, right: Tensor) -> None:
        """`right` [windows, tokens] are the ids of the tokens that come next."""
        self._right = right
        self.log_sum = torch.full(right.shape, -math.inf, dtype=torch.float64)  # log Σ exp z so far
        self.right_logit = torch.zeros(right.shape, dtype=torch.float64)
        self.top_logit = torch.full(right.shape, -math.inf, dtype=torch.float64)
        self.top = torch.zeros_like(right)

    @property
    def log_prob(self) -> Tensor:
        """Of the right token, once all slices have been seen."""
        return self.right_logit - self.log_sum

    def add(self, at: tuple[int, slice], first: int, logits: Tensor) -> None:
        """The `logits` [n, ids] fp64 of ids from `first` on, of the n tokens that `at` names."""
        self.log_sum[at] = torch.logaddexp(self.log_sum[at], logits.logsumexp(-1))
        here = self._right[at] - first
        inside = (here >= 0) & (here < logits.shape[-1])
        found = logits.gather(-1, here.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        self.right_logit[at] = torch.where(inside, found, self.right_logit[at])
        value, top = logits.max(-1)
        larger = value > self.top_logit[at]
        self.top[at] = torch.where(larger, top + first, self.top[at])
        self.top_logit[at] = torch.where(larger, value, self.top_logit[at])


class Divergence:
    """KL(reference ‖ other) of two softmaxes, as Σ p (z - z') - log Σ exp z + log Σ exp z' with p the reference's.

    Of equal logits it is 0 and not merely small, as both differences are.
    """

    def __init__(self, right: Tensor) -> None:
        self.softmax = Softmax(right)
        self._mean_difference = torch.zeros(right.shape, dtype=torch.float64)  # Σ p (z - z') so far

    def add(self, at: tuple[int, slice], first: int, reference: ReferenceSlice, logits: Tensor) -> None:
        """The `logits` [n, ids] of a slice, beside the reference's of the same."""
        difference = (reference.shares * (reference.logits - logits)).sum(-1)
        self._mean_difference[at] = self._mean_difference[at] * reference.before + difference * reference.weight
        self.softmax.add(at, first, logits)

    def measures(self, reference: Softmax) -> TokenMeasures:
        """What came out, once all slices have been seen."""
        kl = self._mean_difference - reference.log_sum + self.softmax.log_sum
        return TokenMeasures(self.softmax.log_prob, reference.log_prob, kl, self.softmax.top == reference.top)


class ReferenceSlice:
    """The reference's logits [n, ids] fp64 of one slice, and what all divergences from it need.

    `shares` are the probabilities within the slice; `before` and `weight` [n] are the parts that the slices before it,
    and it, have of all seen so far.
    """

    def __init__(self, softmax: Softmax, at: tuple[int, slice], first: int, logits: Tensor) -> None:
        """Adds the slice to `softmax`, the reference's."""
        log_before, log_sum = softmax.log_sum[at].clone(), logits.logsumexp(-1)
        softmax.add(at, first, logits)
        self.logits, self.shares = logits, (logits - log_sum[:, None]).exp()
        self.before, self.weight = (log_before - softmax.log_sum[at]).exp(), (log_sum - softmax.log_sum[at]).exp()

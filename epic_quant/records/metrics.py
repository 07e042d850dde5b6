"""The metrics that records carry: a unit, which way is better, and what each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A quantity that records carry: its unit ("" for a ratio) and which way is better."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    meaning: str


_METRICS = (
    Metric("rel_l2", "", "lower", "‖W - Ŵ‖ / ‖W‖ over all tensors of the class together"),
    Metric("bits_per_weight", "bit", "lower", "stored bits, scales and all other metadata included, a weight"),
    Metric("nbytes", "B", "lower", "bytes really stored"),
    Metric("resident_nbytes", "B", "lower", "bytes that must be in RAM to run the text model"),
    Metric("added_rel_l2", "", "lower", "error of a block's output relative to what the block adds to the stream"),
    Metric("output_rel_l2", "", "lower", "error of a block's or a linear layer's output relative to that output"),
    Metric("time_s", "s", "lower", "median time of the measured call"),
    Metric("bytes_read", "B", "higher", "bytes that the timed call must read at least"),
    Metric("shannon_gap_db", "dB", "lower", "error over Shannon's bound for a Gaussian at the same bits a weight"),
    Metric(
        "lloyd_max_gap_db", "dB", "lower", "error over the best scalar quantizer with as many levels, on a Gaussian"
    ),
    Metric("gaussian_rel_l2", "", "lower", "rel_l2 of the same scheme on Gaussian noise of the same shape"),
    Metric("kurtosis", "", "lower", "fourth moment of the weights over their squared variance; 3 for a Gaussian"),
    Metric("absmax_over_std", "", "lower", "largest magnitude of the weights over their standard deviation"),
    Metric("hit_rate", "", "higher", "lookups of tokens that a row cache answers from RAM, of all lookups"),
    Metric(
        "kl_divergence", "nat", "lower", "KL divergence of the next token's distribution from that of bf16, a token"
    ),
    Metric("predicted_kl_divergence", "nat", "lower", "the same, predicted from prices with their cross terms"),
    Metric("kl_se", "nat", "lower", "standard error of kl_divergence, over tokens as if they were independent"),
    Metric("kl_median", "nat", "lower", "median of the KL divergence of a token"),
    Metric("kl_p90", "nat", "lower", "KL divergence that 90 of 100 tokens stay within"),
    Metric("kl_p99", "nat", "lower", "KL divergence that 99 of 100 tokens stay within"),
    Metric("kl_max", "nat", "lower", "largest KL divergence of any token"),
    Metric("perplexity", "", "lower", "exponential of the mean negative log likelihood of a token"),
    Metric("perplexity_se", "", "lower", "its standard error"),
    Metric("top1_agreement", "", "higher", "share of tokens with the same most probable next one as bf16"),
    Metric("rms_delta_p", "", "lower", "root mean square of the change in the right token's probability"),
    Metric("saved_nbytes", "B", "higher", "bytes that a class takes less than in bf16"),
    Metric("kl_per_mb", "nat/MB", "lower", "KL divergence a MB of 1e6 bytes saved"),
    Metric("k_rel_l2", "", "lower", "‖K - K̂‖ / ‖K‖ of what a KV cache returns, over all layers of a type"),
    Metric("v_rel_l2", "", "lower", "‖V - V̂‖ / ‖V‖ of the same"),
    Metric("logit_rms", "", "lower", "root mean square error of the attention logits, in units of the logit"),
    Metric("attention_rel_l2", "", "lower", "error of softmax(q Kᵀ) V relative to it, with real queries"),
    Metric("bits_per_value", "bit", "lower", "stored bits of a KV cache, all metadata included, a value of K or V"),
    Metric("append_s", "s", "lower", "time of putting a token's K and V into one layer's cache"),
    Metric("read_s", "s", "lower", "time of reading one layer's K and V back, a token"),
    Metric("p50_s", "s", "lower", "median time of a call, each on rows that are read for the first time"),
    Metric("p99_s", "s", "lower", "time that 99 of 100 such calls stay within"),
    Metric("fetched_nbytes", "B", "lower", "bytes that the system fetched from the disk for them"),
    Metric("anonymous_nbytes", "B", "lower", "memory that it added to the process, as the system reports"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _METRICS}

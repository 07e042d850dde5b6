"""What a policy does to the model's predictions: perplexity and KL divergence, the model streamed a layer at a time."""

from epic_quant.quality.evaluation import Evaluation, evaluate, measure, noise_floor
from epic_quant.quality.measures import Quality, TokenMeasures
from epic_quant.quality.sensitivity import KV_CACHE, Ablation, changes
from epic_quant.quality.variants import NOISE_FLOOR, REFERENCE, Variant

__all__ = [
    "KV_CACHE",
    "NOISE_FLOOR",
    "REFERENCE",
    "Ablation",
    "Evaluation",
    "Quality",
    "TokenMeasures",
    "Variant",
    "changes",
    "evaluate",
    "measure",
    "noise_floor",
]

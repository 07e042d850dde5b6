"""What a policy does to the model's predictions: perplexity and KL divergence, the model streamed a layer at a time."""

from epic_quant.quality.evaluation import Evaluation, evaluate, measure, run_pass
from epic_quant.quality.measures import Quality, TokenMeasures
from epic_quant.quality.sensitivity import Ablation, ablations
from epic_quant.quality.variants import Variant, noise_floor

__all__ = [
    "Ablation",
    "Evaluation",
    "Quality",
    "TokenMeasures",
    "Variant",
    "ablations",
    "evaluate",
    "measure",
    "noise_floor",
    "run_pass",
]

"""Bytes of a policy by tensor class, from a config alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from epic_quant import kv
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.policy import tensor_nbytes
from epic_quant.spec import KV_CACHE, PolicySpec, TensorClass

# The part of the original's published table that each tensor class is counted in.
PUBLISHED_PARTS = {
    TensorClass.SLIDING_ATTENTION: "attention",
    TensorClass.FULL_ATTENTION: "attention",
    TensorClass.MLP: "mlp",
    TensorClass.PLE_PROJECTIONS: "ple_projections",
}


def resident(policy: PolicySpec, config: TextConfig, context: int) -> dict[str, int]:
    """What must be in RAM to run the text model at `context` tokens, bytes by part.

    All text weights in use, of the PLE table only the rows that the policy keeps, and K and V of the KV source layers.
    """
    parts: dict[str, int] = {}
    for tensor in _used(expected_tensors(config)):
        part = "norms" if tensor.tensor_class is None else tensor.tensor_class.value
        nbytes = tensor_nbytes(policy, tensor)
        if tensor.tensor_class is TensorClass.PLE_TABLE:
            part, nbytes = "ple_rows", nbytes // tensor.shape[0] * policy.ple.resident_rows(tensor.shape[0])
        parts[part] = parts.get(part, 0) + nbytes
    return parts | {KV_CACHE: kv_nbytes(policy, config, context)}


def kv_nbytes(policy: PolicySpec, config: TextConfig, context: int) -> int:
    """Bytes of K and V at `context` tokens: the KV source layers', each as the policy stores it."""
    return sum(
        kv.layer_nbytes(policy.kv_of(layer.index), layer, context) for layer in config.layers if layer.is_kv_source
    )


def as_published(policy: PolicySpec, config: TextConfig) -> dict[str, int]:
    """The parts that the original's table counts, bytes by part.

    It counts the unused K and V projections and the rows of the PLE cache, and leaves out the embedding, the PLE model
    projection, the norms and the KV cache.
    """
    parts: dict[str, int] = {}
    for tensor in expected_tensors(config):
        if tensor.tensor_class in PUBLISHED_PARTS:
            part = PUBLISHED_PARTS[tensor.tensor_class]
            parts[part] = parts.get(part, 0) + tensor_nbytes(policy, tensor)
        elif tensor.tensor_class is TensorClass.PLE_TABLE:
            rows = tensor.shape[0]
            parts["ple_hot"] = tensor_nbytes(policy, tensor) // rows * policy.ple.resident_rows(rows)
    return parts


def unused_nbytes(config: TextConfig) -> int:
    """Bytes, in bf16, of the K and V tensors that a file may carry for layers that never use them."""
    return sum(
        torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta").nbytes
        for tensor in expected_tensors(config)
        if tensor.unused
    )


def _used(tensors: Iterable[TextTensor]) -> Iterable[TextTensor]:
    return (tensor for tensor in tensors if not tensor.unused)

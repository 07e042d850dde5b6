"""Bytes of a policy by tensor class, from a config alone.

A few rows of each distinct shape are really quantized and their bytes multiplied, since every scheme stores rows
apart and `nbytes` is linear in rows. So nothing here knows how a scheme lays out its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TensorClass, TextTensor, expected_tensors
from epic_quant.policy import Policy
from epic_quant.quant import quantizer

_PROBE_ROWS = 4

# The part of the original's published table that each tensor class is counted in.
PUBLISHED_PARTS = {
    TensorClass.SLIDING_ATTENTION: "attention",
    TensorClass.FULL_ATTENTION: "attention",
    TensorClass.MLP: "mlp",
    TensorClass.PLE_PROJECTIONS: "ple_projections",
}


@cache
def row_nbytes(spec: str, cols: int) -> float:
    """Bytes a row of `cols` weights takes under `spec`, from rows of Gaussian noise really quantized.

    Error compensation (`+gptq`) changes which codes are stored, not how, so it is left out of the probe.
    """
    weight = torch.randn(_PROBE_ROWS, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    return quantizer(spec.removesuffix("+gptq")).quantize(weight).nbytes / _PROBE_ROWS


def tensor_nbytes(policy: Policy, tensor: TextTensor) -> int:
    """Bytes of one tensor under a policy; what is in no class (norms, scalars) stays bf16."""
    if tensor.tensor_class is None:
        return torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta").nbytes
    rows, cols = tensor.shape
    return round(rows * row_nbytes(policy.spec_of(tensor), cols))


def resident(policy: Policy, config: TextConfig, context: int) -> dict[str, int]:
    """What must be in RAM to run the text model at `context` tokens, bytes by part.

    All live text weights, of the PLE table only the rows that the policy keeps, and K and V of the owning layers.
    """
    parts: dict[str, int] = {}
    for tensor in _live(expected_tensors(config)):
        part = "norms" if tensor.tensor_class is None else tensor.tensor_class.value
        nbytes = tensor_nbytes(policy, tensor)
        if tensor.tensor_class is TensorClass.PLE_TABLE:
            part, nbytes = "ple_rows", nbytes // tensor.shape[0] * policy.ple.resident_rows(tensor.shape[0])
        parts[part] = parts.get(part, 0) + nbytes
    return parts | {"kv_cache": policy.kv.nbytes(config, context)}


def as_published(policy: Policy, config: TextConfig) -> dict[str, int]:
    """The parts that the original's table counts, bytes by part.

    It counts the unused K and V projections and the rows of the PLE cache, and leaves out the embedding, the PLE model
    projection, the norms and the KV cache.
    """
    parts: dict[str, int] = {}
    for tensor in expected_tensors(config):
        if tensor.tensor_class in PUBLISHED_PARTS:
            part = PUBLISHED_PARTS[tensor.tensor_class]
            parts[part] = parts.get(part, 0) + tensor_nbytes(policy, tensor)
    rows = policy.ple.resident_rows(config.ple_vocab_size)
    hot = rows * row_nbytes(policy.specs[TensorClass.PLE_TABLE], config.num_layers * config.ple_dim)
    return parts | {"ple_hot": round(hot)}


def unused_nbytes(config: TextConfig) -> int:
    """Bytes, in bf16, of the K and V tensors that a file may carry for layers that never use them."""
    return sum(
        torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta").nbytes
        for tensor in expected_tensors(config)
        if tensor.unused
    )


def _live(tensors: Iterable[TextTensor]) -> Iterable[TextTensor]:
    return (tensor for tensor in tensors if not tensor.unused)

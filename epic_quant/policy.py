"""A checkpoint's weights under a policy, and the bytes that they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import QuantizationError, SpecError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.gemma4.weights import CheckpointWeights, Weights
from epic_quant.kv import layer_nbytes
from epic_quant.published import PublishedWeights, open_published
from epic_quant.quant import Hessian, Weight, quantize
from epic_quant.quant.stored import row_chunks
from epic_quant.spec import BF16, KVSpec, PolicySpec, WeightSpec

_PROBE_ROWS = 4
# Weights of a piece: 64 MB in fp32.
_PIECE = 2**24


class PolicyWeights(Weights):
    """A checkpoint's weights with every matrix stored as the policy says.

    Nothing is held: a tensor is read and quantized when it is asked for, rows of a table alike. `hessians`, by
    canonical tensor name, are for specs with `+gptq`, `+yaqa` or `+imatrix`. Raises as `CheckpointWeights` and `check`.
    """

    def __init__(
        self, checkpoint: Checkpoint, policy: PolicySpec, hessians: Mapping[str, Hessian] | None = None
    ) -> None:
        self._source = CheckpointWeights(checkpoint)
        super().__init__(self._source.config, self._source.tensors)
        check(policy, self.config)
        self._policy, self._hessians = policy, hessians or {}

    def get(self, name: str) -> Weight:
        """A tensor by its canonical name; raises QuantizationError, naming it, where it cannot be quantized."""
        return self._stored(name, self._source.get(name))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows [n, cols] of a matrix, decoded. Every format keeps rows apart, so only these are quantized."""
        weight = self._stored(name, self._source.rows(name, ids))
        return weight if isinstance(weight, Tensor) else weight.dequantize()

    def pieces(self, name: str) -> Iterator[Weight]:
        """A tensor as it is stored, some rows at a time, so that a large one never stands in RAM as a whole.

        Raises QuantizationError as `get`.
        """
        weight, spec = self._source.get(name), self.spec_of(name)
        if spec is None:
            yield weight
            return
        whole = self._stored(name, weight) if spec.yaqa else None  # its rows make up for each other's errors
        for rows in row_chunks(len(weight), weight.shape[1], _PIECE):
            if whole is None or isinstance(whole, Tensor):
                yield self._stored(name, weight[rows], f"{name}[{rows.start}:{rows.stop}]")
            else:
                yield whole.rows(torch.arange(rows.start, rows.stop))

    def spec_of(self, name: str) -> WeightSpec | None:
        """The spec that a tensor is stored in; None where it stays as it is in the file, as those in bf16 do."""
        spec = spec_of(self._policy, self.tensors[name])
        return None if spec == BF16 else spec

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as stored."""
        return tensor_nbytes(self._policy, self.tensors[name])

    def _stored(self, name: str, weight: Tensor, place: str | None = None) -> Weight:
        """All or some rows of a tensor as stored; an error calls them `place`."""
        if (spec := self.spec_of(name)) is None:
            return weight
        try:
            return quantize(weight, spec, self._hessians.get(name))
        except QuantizationError as error:
            raise QuantizationError(f"{place or name}: {error}") from error


def weights_of(checkpoint: Checkpoint, policy: PolicySpec, hessians: Mapping[str, Hessian] | None = None) -> Weights:
    """The weights of a policy: the checkpoint's, stored as it says, or a published file's. Raises as both do."""
    if policy.file is None:
        return PolicyWeights(checkpoint, policy, hessians)
    config = TextConfig.read(checkpoint)
    check(policy, config)
    return PublishedWeights(open_published(policy.file), config)


def opened(policy: PolicySpec, config: TextConfig) -> PolicySpec:
    """The policy with the specs that its published file holds; itself where it has none.

    Raises as `open_published`, and ConfigError or CheckpointError where the file is not of such a model.
    """
    if policy.file is None:
        return policy
    file = open_published(policy.file)
    file.check(config)
    return replace(policy, weights=tuple(file.specs(config).items()))


def spec_of(policy: PolicySpec, tensor: TextTensor) -> WeightSpec | None:
    """The spec that a tensor is stored in; None where it is in no class (norms, scalars) and stays as it is."""
    if tensor.target is None:
        return None
    if policy.file is None:
        return policy.spec_of(tensor.target)
    found = open_published(policy.file).tensors.get(tensor.name)
    return None if found is None else found.spec


def check(policy: PolicySpec, config: TextConfig) -> None:
    """Raise SpecError where a policy does not fit the model.

    That is a layer or kind of tensor that the model does not have, a group or block that does not divide the rows, or a
    KV spec that does not fit the heads. A policy of a published file raises as `opened`.
    """
    if policy.file is not None and policy.weights not in ((), opened(policy, config).weights):
        raise SpecError(f"{policy.name}: {policy.file} does not hold what this policy says of its weights")
    tensors = [tensor for tensor in expected_tensors(config) if tensor.target is not None]
    there = {wider for tensor in tensors if tensor.target is not None for wider in tensor.target.covering}
    for target, spec in policy.weights if policy.file is None else ():
        if target not in there and (target.kind is not None or target.layer is not None):
            raise SpecError(f"{target}={spec}: this model of {config.num_layers} layers has no such tensor")
    for layer, kv in policy.kv_layers:
        if not 0 <= layer < config.num_layers:
            raise SpecError(f"kv@{layer}={kv}: this model has layers 0 to {config.num_layers - 1}")
    for tensor in tensors:
        found = spec_of(policy, tensor) if policy.file is None else None
        if found is not None and (misfit := found.misfit(tensor.shape[1])):
            raise SpecError(f"{found}: {misfit} ({tensor.name})")
    own = dict(policy.kv_layers)
    for layer, kv in own.items():
        check_kv(kv, replace(config, layers=(config.layers[layer],)))
    check_kv(policy.kv, replace(config, layers=tuple(spec for spec in config.layers if spec.index not in own)))


def check_kv(spec: KVSpec, config: TextConfig) -> None:
    """Raise SpecError where a KV spec does not fit the heads: a group that does not divide them, too many directions.

    Layers of a type have heads alike, so the first of each that has K and V of its own stands for all.
    """
    first = {layer.layer_type: layer for layer in reversed(config.layers) if layer.is_kv_source}
    for layer in first.values():
        layer_nbytes(spec, layer, 0)


def tensor_nbytes(policy: PolicySpec, tensor: TextTensor) -> int:
    """Bytes of one tensor under a policy, from its shape alone; what is in no class counts as bf16.

    Of a published file, what it has of the tensor.
    """
    if policy.file is not None:
        found = open_published(policy.file).tensors.get(tensor.name)
        return 0 if found is None else found.nbytes
    spec = spec_of(policy, tensor)
    if spec is None:
        return torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta").nbytes
    rows, cols = tensor.shape
    return round(rows * row_nbytes(spec, cols))


@cache
def row_nbytes(spec: WeightSpec, num_cols: int) -> float:
    """Bytes of a row under `spec`: a few rows of Gaussian noise are really quantized.

    So nothing here knows how a format lays out its bytes; every format stores rows apart, so bytes are linear in rows.
    What a Hessian is for changes which codes are stored, not how, so the probe goes without.
    """
    weight = torch.randn(_PROBE_ROWS, num_cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    return quantize(weight, spec.without_hessian).nbytes / _PROBE_ROWS

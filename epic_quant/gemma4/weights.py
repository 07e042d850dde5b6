"""Where the model's math takes its weights from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping

import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors, text_tensors
from epic_quant.quant import Weight


class Weights(ABC):
    """The text model's weights, read on request, however they are stored."""

    def __init__(self, config: TextConfig, names: Container[str]) -> None:
        """`names` are the canonical names of the text tensors that there are, unused ones included."""
        self.config = config
        self.tensors: Mapping[str, TextTensor] = {t.name: t for t in expected_tensors(config) if t.name in names}

    @abstractmethod
    def get(self, name: str) -> Weight:
        """A tensor by its canonical name: `norm.weight`, `layers.0.mlp.up_proj.weight`."""

    @abstractmethod
    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a matrix, decoded: ids [n] of integers give [n, cols]. No other row is read."""

    @abstractmethod
    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as stored."""

    def layer(self, index: int) -> Mapping[str, Weight]:
        """The weights that a layer uses, by their name inside it: `self_attn.q_proj.weight`, `layer_scalar`."""
        return {t.local_name: self.get(t.name) for t in self.tensors.values() if t.layer == index and not t.unused}


class CheckpointWeights(Weights):
    """The weights of the checkpoint in bf16, which everything is held against.

    From a file in bf16 they are views of its map, so that nothing is held; from one in fp16, fp32 or fp64 each is
    rounded when it is asked for. Raises ConfigError and CheckpointError as `TextConfig.read` and `text_tensors` do.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = TextConfig.read(checkpoint)
        self._checkpoint, self._file_names = checkpoint, text_tensors(checkpoint, config)
        super().__init__(config, self._file_names)

    def file_name(self, name: str) -> str:
        """What the file calls a tensor."""
        return self._file_names[name]

    def get(self, name: str) -> Tensor:
        """A tensor by its canonical name, in bf16."""
        return self._checkpoint.tensor(self._file_names[name]).bfloat16()

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows [n, cols] of a matrix, in bf16; no other row is read."""
        return self._checkpoint.rows(self._file_names[name], ids).bfloat16()

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in bf16."""
        return torch.bfloat16.itemsize * math.prod(self.tensors[name].shape)

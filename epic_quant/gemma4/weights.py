"""Where the model's math takes its weights from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors, text_tensors
from epic_quant.quant import Weight


class Weights(Protocol):
    """The text model's weights, handed out as they are asked for."""

    @property
    def config(self) -> TextConfig:
        """The config that they fit."""
        ...

    def layer(self, index: int) -> Mapping[str, Weight]:
        """A layer's live weights by their name inside it: `self_attn.q_proj.weight`, `layer_scalar`."""
        ...

    def get(self, name: str) -> Weight:
        """A global weight by its canonical name: `norm.weight`, `embed_tokens.weight`."""
        ...

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a table, decoded: ids [n] of integers give [n, cols]."""
        ...


class CheckpointWeights:
    """The weights as the checkpoint has them: views of its mapped file, so that nothing is held.

    Raises ConfigError and CheckpointError as `TextConfig.read` and `text_tensors` do.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._config = TextConfig.read(checkpoint)
        self._file_names = text_tensors(checkpoint, self._config)
        self._tensors = {t.name: t for t in expected_tensors(self._config) if t.name in self._file_names}

    @property
    def config(self) -> TextConfig:
        """The checkpoint's text config."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, TextTensor]:
        """The text tensors that the file has, by canonical name, unused ones included."""
        return self._tensors

    def layer(self, index: int) -> Mapping[str, Weight]:
        """A layer's live weights by their name inside it."""
        return {t.local_name: self.get(t.name) for t in self._tensors.values() if t.layer == index and not t.unused}

    def get(self, name: str) -> Tensor:
        """A weight by its canonical name."""
        return self._checkpoint.tensor(self._file_names[name])

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows [n, cols] of a table, in the file's dtype; no other row is read."""
        return self._checkpoint.rows(self._file_names[name], ids)

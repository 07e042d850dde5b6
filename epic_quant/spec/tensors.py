"""The targets of specs in a policy: classes of tensors, kinds of tensors within a class, and layers of either."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class TensorClass(StrEnum):
    """The classes that a policy gives specs to. Every text tensor of two dims is in exactly one class."""

    SLIDING_ATTENTION = "sliding_attention"
    FULL_ATTENTION = "full_attention"
    MLP = "mlp"
    PLE_PROJECTIONS = "ple_projections"
    PLE_MODEL_PROJECTION = "ple_model_projection"
    PLE_TABLE = "ple_table"
    EMBEDDING = "embedding"


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# The kinds of tensors that a layer has of a class: the last part of their name, without `.weight`. Classes that are in
# no layer are one tensor.
KINDS: Mapping[TensorClass, tuple[str, ...]] = {
    TensorClass.SLIDING_ATTENTION: _ATTENTION,
    TensorClass.FULL_ATTENTION: _ATTENTION,
    TensorClass.MLP: ("gate_proj", "up_proj", "down_proj"),
    TensorClass.PLE_PROJECTIONS: ("per_layer_input_gate", "per_layer_projection"),
    TensorClass.PLE_MODEL_PROJECTION: (),
    TensorClass.PLE_TABLE: (),
    TensorClass.EMBEDDING: (),
}


class Target(NamedTuple):
    """Tensors of a class: all of them, one kind (`down_proj`), one layer's, or one kind in one layer."""

    tensor_class: TensorClass
    kind: str | None = None
    layer: int | None = None

    def __str__(self) -> str:
        kind = "" if self.kind is None else f".{self.kind}"
        return f"{self.tensor_class}{kind}" + ("" if self.layer is None else f"@{self.layer}")

    @property
    def covering(self) -> tuple[Target, ...]:
        """The targets that cover this one, from the narrowest, which is itself, to its class."""
        tensor_class, kind, layer = self
        return self, Target(tensor_class, kind), Target(tensor_class, None, layer), Target(tensor_class)

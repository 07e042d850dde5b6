"""The pass over a toy in small steps, and the same loss through `transformers` in one graph."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers.models.gemma4 import modeling_gemma4

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.prices import backward as module
from epic_quant.prices.backward import Backward

WINDOWS = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(0))


class Recorded(Backward):
    """A pass that remembers the labels that it drew: int64 [N, T]."""

    def _labels(self, x):
        labels, log_sum = super()._labels(x)
        self.labels = labels.view(self._windows.shape)
        return labels, log_sum


@dataclass
class Truth:
    """What `transformers` computes in fp64: inputs of linear layers, and gradients at what the pass captures."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)


@pytest.fixture
def small_steps(monkeypatch):
    """A window at a time through the layers, and slices of the head that divide neither ids nor tokens."""
    monkeypatch.setattr(module, "_BATCH_TOKENS", WINDOWS.shape[1])
    monkeypatch.setattr(module, "_HEAD_ROWS", 50)
    monkeypatch.setattr(module, "_HEAD_TOKENS", 7)


@pytest.fixture
def weights(toy, request):
    """The weights of the toy that the test names, of `e4b` where it names none."""
    with Checkpoint.open(toy(getattr(request, "param", "e4b"))) as checkpoint:
        yield CheckpointWeights(checkpoint)


@pytest.fixture
def truth(reference, monkeypatch):
    """`truth(name, labels)`: everything that there is a gradient at, of -Σ log p(label) in one graph."""

    def computed(name, labels):
        model, found = reference(name, torch.float64), Truth()
        attention = modeling_gemma4.eager_attention_forward

        def watched(layer, query, key, value, *args, **kwargs):
            if not layer.is_kv_shared_layer:
                for into, x in ((found.keys, key), (found.values, value)):
                    x.retain_grad()
                    into[layer.layer_idx] = x
            return attention(layer, query, key, value, *args, **kwargs)

        def linear(name):
            def hook(_, args, output):
                output.retain_grad()
                found.inputs[name], found.outputs[name] = args[0].detach(), output

            return hook

        monkeypatch.setattr(modeling_gemma4, "eager_attention_forward", watched)
        tables = {key: weight for key, weight in model.model.named_parameters() if key.startswith("embed_tokens")}
        linears = {f"{key}.weight": m for key, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
        hooks = [m.register_forward_hook(linear(key)) for key, m in linears.items()]
        for weight in tables.values():
            weight.requires_grad_()
        logits = model(WINDOWS, output_hidden_states=True, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, :-1].flatten(), reduction="sum").backward()
        found.tables = {key: weight.grad for key, weight in tables.items()}
        for hook in hooks:
            hook.remove()
        for weight in tables.values():
            weight.grad = None
            weight.requires_grad_(False)
        return found

    return computed

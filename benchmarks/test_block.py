"""The error of a decoder block's output under each policy on real hidden states, and the block's speed."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from epic_quant.gemma4.config import LayerSpec
from epic_quant.gemma4.kv_store import ForwardKV
from epic_quant.gemma4.model import Forward, attention_masks, begin, rope_tables
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.metrics import relative_l2
from epic_quant.plan import plan_forwards, plan_quantizing
from epic_quant.policy import weights_of
from epic_quant.records.subjects import BlockRecord

# A fast block's rounds fill this time; a slow one's, as on a large model, are pytest-benchmark's five at least.
pytestmark = pytest.mark.benchmark(max_time=0.2)

WINDOW_TOKENS = 512
# The tokens measured begin here: after BOS, whose hidden state is an outlier.
FIRST_TOKEN = 128
TOKENS = (1, 16, 256)


def plan(run, counts):
    """For `--plan`: a few layers of a forward, their weights quantized under every policy, and the rounds timed."""
    layers = {spec.layer_type: spec.index for spec in reversed(run.config.layers)}.values()
    quantizing_s = plan_quantizing(run.config, run.policies.values(), set(layers))
    share = (max(layers) + 1) / run.config.num_layers
    forward_s = plan_forwards(run.config, WINDOW_TOKENS)
    rounds_s = 8 * forward_s / run.config.num_layers * sum(TOKENS) / len(TOKENS) / WINDOW_TOKENS
    seconds = share * forward_s + quantizing_s + counts.total() * (0.3 + rounds_s)
    yield f"about {seconds:,.0f} s, {quantizing_s:,.0f} s of it quantizing"


@dataclass(frozen=True)
class Inputs:
    """One layer's real input: the hidden state before it and what its forward needs, all in fp32."""

    spec: LayerSpec
    hidden: Tensor  # [1, WINDOW_TOKENS, hidden_size]
    forward: Forward

    def run(self, weights, tokens, dtype):
        """A call of the block on `tokens` of the text that see each other alone, in `dtype`: -> [1, tokens, hidden]."""
        part = slice(FIRST_TOKEN, FIRST_TOKEN + tokens)
        config, ple = self.forward.config, self.forward.per_layer_inputs
        hidden = self.hidden[:, part].to(dtype)
        forward = replace(
            self.forward,
            per_layer_inputs=None if ple is None else ple[:, part].to(dtype),
            rope=rope_tables(config, torch.arange(part.start, part.stop), dtype),
            masks=attention_masks(config, tokens),
        )

        def call():
            return replace(forward, kv=ForwardKV(config)).layer(hidden, weights, self.spec)

        return call


@pytest.fixture(scope="session")
def block_inputs(run):
    """The input of a layer of each type, on the evaluation text: in E4B the first full one and the one before it."""
    weights = CheckpointWeights(run.checkpoint)
    hidden, forward = begin(weights, run.windows(1, WINDOW_TOKENS))
    inputs = {}
    for spec in run.config.layers:
        inputs[spec.layer_type] = Inputs(spec, hidden, forward)
        if len(inputs) == len(run.layer_types):
            break
        hidden = forward.layer(hidden, weights.layer(spec.index), spec)
    return inputs


@pytest.fixture(scope="session")
def block_weights(run, block_inputs, hessians_for):
    """A block's weights as they are stored, kept for the tests of one policy after another."""
    latest = {}

    def stored(policy, layer_type):
        key = (policy, layer_type)
        if key not in latest:
            latest.clear()
            weights = weights_of(run.checkpoint, policy, hessians_for(*policy.weight_specs))
            latest[key] = weights.layer(block_inputs[layer_type].spec.index)
        return latest[key]

    return stored


def cast(weights, dtype):
    """Plain weights in the dtype they are computed in: converting them is no part of a forward."""
    return {name: weight.to(dtype) if isinstance(weight, Tensor) else weight for name, weight in weights.items()}


@pytest.fixture(scope="session")
def reference(run, block_inputs):
    """The block's output in fp32 from the checkpoint's own weights, and what the block adds to the stream."""
    outputs = {}

    def measure(layer_type, tokens):
        if (layer_type, tokens) not in outputs:
            inputs = block_inputs[layer_type]
            weights = CheckpointWeights(run.checkpoint).layer(inputs.spec.index)
            output = inputs.run(weights, tokens, torch.float32)()
            stream = inputs.hidden[:, FIRST_TOKEN : FIRST_TOKEN + tokens] * weights["layer_scalar"].float()
            outputs[layer_type, tokens] = output, output - stream
        return outputs[layer_type, tokens]

    return measure


@pytest.fixture(params=TOKENS)
def tokens(request):
    return request.param


@pytest.fixture
def measure(layer_type, tokens, block_inputs, reference, record, benchmark):
    """Error against the fp32 block, relative to what the block adds and to its output; then the block is timed."""

    def of(name, weights, dtype):
        call = block_inputs[layer_type].run(weights, tokens, dtype)
        with torch.inference_mode():
            output, (expected, added) = call().float(), reference(layer_type, tokens)
            assert output.isfinite().all()
            error = relative_l2(output, expected)
            packed = [weight for weight in weights.values() if not isinstance(weight, Tensor)]
            record(
                BlockRecord(
                    policy=name,
                    layer_type=layer_type,
                    tokens=tokens,
                    # The layer's scalar, last in the block, multiplies what it adds and the error alike.
                    added_rel_l2=error * float(expected.norm() / added.norm()),
                    output_rel_l2=error,
                    nbytes=sum(weight.nbytes for weight in weights.values()),
                    computed_by=tuple(sorted({weight.computed_by() for weight in packed})),
                )
            )
            benchmark(call)
        return error

    return of


def test_block(policy, layer_type, block_weights, measure):
    """Every policy: bf16 computes in bf16, all others in fp32 from their packed weights."""
    dtype = torch.bfloat16 if policy.name == "bf16" else torch.float32
    measure(policy.name, cast(block_weights(policy, layer_type), dtype), dtype)


def test_block_fp32(run, layer_type, block_inputs, measure):
    """The checkpoint's own weights, held and computed in fp32: the reference, so there is no error but rounding."""
    weights = CheckpointWeights(run.checkpoint).layer(block_inputs[layer_type].spec.index)
    assert measure("fp32", cast(weights, torch.float32), torch.float32) < 1e-6

"""What a run will take, estimated before it starts: time from a short probe of each scheme, RAM, disk."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from epic_quant import machine
from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.block import decoder_block, num_scores
from epic_quant.gemma4.config import LayerSpec, TextConfig
from epic_quant.gemma4.kv_store import ForwardKV
from epic_quant.gemma4.model import attention_masks, rope_tables
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.kv.layer import LayerStore
from epic_quant.metrics import squared_norm
from epic_quant.policy import spec_of
from epic_quant.prices import ROUNDED_ERROR, needed_nbytes
from epic_quant.published import open_published
from epic_quant.published.source import decoded
from epic_quant.quality import Variant
from epic_quant.quality.passes import Memory, layer_numel, passes, quantized_numel, work
from epic_quant.quality.variants import with_reference
from epic_quant.quant import OutputHessian, linear, quantize
from epic_quant.quant.gptq import SWEEPS
from epic_quant.spec import BF16, KVSpec, PolicySpec, WeightSpec
from epic_quant.values import read_values

_PROBE_WEIGHTS = 2**20
# As long as so many weights take those of a trellis whose errors are compensated, about.
_SURVIVORS_TAKE = 32
_PROBE_TOKENS = 256

# Of a published file: a matrix is decoded once to be checked and once to be computed with.
_DECODINGS = 2

# What the passes and a spec's product take in reduced precision, in products of fp32: three in bf16 (0.45 each), and
# one of 8 bits (0.26), with what is added up. Measured where AVX-512 multiplies both.
_REDUCED_PRODUCTS = (1.5, 0.3)


def sampled_shape(tensor: TextTensor, sampled_rows: int | None) -> tuple[int, int]:
    """The rows and columns of a tensor whose error is taken."""
    rows, cols = tensor.shape
    return (rows if sampled_rows is None else min(rows, sampled_rows)), cols


def plan_check(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """A line for people: what reading these tensors for NaN and infinity takes, by the first rows of the largest."""
    total = sum(map(checkpoint.nbytes, names))
    largest = checkpoint.tensor(max(names, key=checkpoint.nbytes))
    probe = largest[: max(1, _PROBE_WEIGHTS * 8 // largest[0].numel())]
    start = time.perf_counter()
    read_values("", probe)
    seconds = (time.perf_counter() - start) / probe.nbytes * total
    return [f"check of all weights, one read of {total / 1e9:,.2f} GB: about {seconds:,.0f} s (not with --no-check)"]


def plan_forwards(config: TextConfig, tokens: int, forwards: int = 1) -> float:
    """Seconds of so many forwards of the whole model in fp32 on a text of `tokens`, the head not counted."""
    multiplications = forwards * tokens * sum(layer_numel(config))
    return multiplications * _seconds_a_multiplication(config, tokens)


def plan_steps(config: TextConfig, tokens: int) -> float:
    """Seconds of a forward of few tokens through bf16 weights, which takes as long as casting them does."""
    # Larger than the caches, as a large model's are.
    rows, x = torch.ones(_PROBE_WEIGHTS * 16 // 2048, 2048, dtype=torch.bfloat16), torch.ones(tokens, 2048)
    numel = sum(layer_numel(config)) + config.vocab_size * config.hidden_size
    return _seconds(lambda: linear(x, rows)) / rows.numel() * numel


def plan_quantizing(config: TextConfig, policies: Iterable[PolicySpec], layers: Collection[int | None]) -> float:
    """Seconds of quantizing these layers' matrices (None: those of no layer), or decoding a file's, of each policy."""
    matrices = [t for t in expected_tensors(config) if t.layer in layers and t.target is not None and not t.unused]
    numel: Counter[tuple[WeightSpec, str | None]] = Counter()
    for policy in policies:
        for tensor in matrices:
            if (spec := spec_of(policy, tensor)) not in (None, BF16) or policy.file is not None:
                assert spec is not None
                numel[spec, policy.file] += math.prod(tensor.shape)
    return sum(count * _seconds_a_weight(*stored) for stored, count in numel.items())


def plan_kv(spec: KVSpec, layer: LayerSpec, tokens: int, step: int) -> tuple[float, float]:
    """Seconds of storing `step` tokens of a layer under a spec after so many, and of comparing all that it has."""
    heads, dims = layer.attention.num_kv_heads, layer.attention.head_dim
    x = torch.randn(1, heads, tokens, dims, generator=torch.Generator().manual_seed(0))
    store = LayerStore(layer, spec.of(layer.layer_type), torch.float32)
    store.append(x, x)

    def compare() -> None:
        for kept in (store.keys(), store.values()):
            squared_norm(kept - kept)
            squared_norm(kept)

    return _seconds(lambda: store.append(x[:, :, :step], x[:, :, :step])), _seconds(compare)


def plan(config: TextConfig, policies: Iterable[PolicySpec], sampled_rows: int | None) -> list[str]:
    """Lines for people: the weights to quantize under each scheme, and the time, RAM and disk that this takes."""
    matrices = [tensor for tensor in expected_tensors(config) if tensor.tensor_class is not None and not tensor.unused]
    stored = {(spec_of(policy, tensor), policy.file, tensor) for policy in policies for tensor in matrices}
    quantized = {(spec, file, tensor) for spec, file, tensor in stored if spec is not None and (file or spec != BF16)}
    pairs = {(spec, file, tensor.tensor_class) for spec, file, tensor in quantized}
    lines, total_s = [], 0.0
    for spec, file in sorted({(spec, file) for spec, file, _ in pairs}, key=str):
        sampled = [math.prod(sampled_shape(one, sampled_rows)) for *other, one in quantized if other == [spec, file]]
        seconds = sum(sampled) * _seconds_a_weight(spec, file)
        total_s += seconds
        of_file = "" if file is None else f" in {file}"
        lines.append(f"  {spec}{of_file}: {sum(sampled) / 1e6:,.1f} M weights, about {seconds:,.0f} s")
    # The largest tensor in fp32 with its decoded copy and their difference, in fp64, and a few of the search's own.
    ram = max(math.prod(sampled_shape(tensor, sampled_rows)) for tensor in matrices) * (4 + 4 + 8 + 8)
    available = machine.available_nbytes()
    free = "—" if available is None else f"{available / 1e9:,.1f} GB"
    return [
        f"errors of {len(pairs)} pairs of scheme and tensor class, about {total_s:,.0f} s:",
        *lines,
        f"RAM beyond the mapped file: about {ram / 1e9:,.2f} GB; free: {free}",
        "disk: nothing but the JSON",
    ]


def plan_quality(
    what: str,
    config: TextConfig,
    policies: Mapping[str, PolicySpec | Variant],
    num_windows: int,
    window_tokens: int,
    memory_nbytes: int,
) -> list[str]:
    """Lines for people: the passes over the file that evaluating these policies takes, their time, RAM and disk.

    The time is that of layers in fp32, of quantizing weights and of decoding those of published files, each from a
    short probe; what quantizing K and V takes is left out. Raises as `quality.passes.passes`.
    """
    variants = with_reference(policies, config)
    memory = Memory(config, num_windows, window_tokens)
    needs = memory.needs(variants)
    batches = passes(variants, memory, memory_nbytes)
    together = [[variants[name] for name in batch] for batch in batches]
    multiplications = sum(sum(work(batch, config, num_windows, window_tokens)) for batch in together)
    layers_s = multiplications * _seconds_a_multiplication(config, window_tokens)
    weights = {"quantizing": [0, 0.0], "decoding published files": [0, 0.0]}
    for batch in together:
        for (spec, file), numel in quantized_numel(batch, config).items():
            of_kind = weights["quantizing" if file is None else "decoding published files"]
            of_kind[0] += numel
            of_kind[1] += numel * _seconds_a_weight(spec, file)
    ram = max(memory.nbytes(needs[name] for name in batch) for batch in batches)
    waiting = max(len({needs[name].state for name in batch}) for batch in batches) * memory.state_nbytes
    read = 2 * _multiplied_numel(config)
    return [
        f"{what}, {len(variants)} policies with the reference on {num_windows} windows of {window_tokens} tokens: "
        f"{len(batches)} {'pass' if len(batches) == 1 else 'passes'} over the file, {read / 1e9:,.2f} GB each, "
        f"about {layers_s + sum(seconds for _, seconds in weights.values()):,.0f} s",
        f"  layers: {multiplications:.3g} multiplications, about {layers_s:,.0f} s",
        *(f"  {what}: {n / 1e6:,.1f} M weights, about {seconds:,.0f} s" for what, (n, seconds) in weights.items() if n),
        f"  RAM beyond the mapped file: at most {ram / 1e9:,.2f} GB, {memory_nbytes / 1e9:,.2f} GB allowed (--memory)",
        f"  disk: {waiting / 1e9:,.2f} GB with --resume, else nothing",
    ]


def plan_prices(
    config: TextConfig, specs: Collection[WeightSpec], num_windows: int, window_tokens: int, reduced_precision: bool
) -> list[str]:
    """Lines for people: the time and RAM of pricing these specs on so many windows.

    Counted are the forward, each layer again with its backward pass, the summed gradient, a product for every spec,
    quantizing, in reduced precision the error once more, and error compensation.
    """
    tokens = num_windows * window_tokens
    numel = _multiplied_numel(config)
    a_multiplication_s = _seconds_a_multiplication(config, window_tokens)
    passes, a_spec = _REDUCED_PRODUCTS if reduced_precision else (4, 1)
    passes_s = tokens * numel * (passes + a_spec * len(specs)) * a_multiplication_s
    quantizing_s = sum(numel * _seconds_a_weight(spec) for spec in specs)
    if reduced_precision:
        quantizing_s += len(specs) * numel * _seconds_a_weight(ROUNDED_ERROR)
    quantizing_s += _compensation(config, specs) * a_multiplication_s
    needed, borders = needed_nbytes(config, tokens, specs, reduced_precision)
    return [
        f"prices, {len(specs)} specs on {num_windows} windows of {window_tokens} tokens: one forward and one backward "
        f"pass over the file, about {passes_s + quantizing_s:,.0f} s, {quantizing_s:,.0f} s of it quantizing",
        f"  RAM beyond the mapped file: at most {needed / 1e9:,.2f} GB, {borders / 1e9:,.2f} GB of it hidden states, "
        "which --resume keeps in a file",
    ]


def _compensation(config: TextConfig, specs: Collection[WeightSpec]) -> float:
    """Multiplications of `+gptq`: half of cols³ for the factor of each matrix and rotation; of each spec rows·cols².

    Matrix products are half of the latter, and what is done column by column takes about as long. `+yaqa` does that for
    few rows at a time, which takes some three times as long again, and rounds once more; column by column that takes
    about three times as long as its products.
    """
    fitted = [spec for spec in specs if spec.compensated]
    rotations = len({spec.hadamard_block for spec in fitted})
    shapes = [t.shape for t in expected_tensors(config) if t.layer is not None and t.tensor_class and not t.unused]
    total = sum(rotations * cols**3 / 2 + len(fitted) * rows * cols**2 for rows, cols in shapes)
    if two_sided := sum(spec.yaqa for spec in specs):
        for rows, cols in shapes:
            size = OutputHessian.shape(rows)[1]
            total += rows * size**2 / 3 + two_sided * rows * cols * (3 * cols + size / 2 + 4 * SWEEPS * (cols + size))
    return total


def _multiplied_numel(config: TextConfig) -> int:
    """The weights that a token is multiplied by: those of the layers and of the head."""
    return sum(layer_numel(config)) + config.vocab_size * config.hidden_size


def _seconds_a_multiplication(config: TextConfig, window_tokens: int) -> float:
    return _seconds_a_multiplication_of(config, min(window_tokens, _PROBE_TOKENS))


@cache
def _seconds_a_multiplication_of(config: TextConfig, tokens: int) -> float:
    """A multiplication in a layer, what is no matrix product included: the first layer's shapes on random numbers."""
    windows = max(1, _PROBE_TOKENS // tokens)
    spec, rng = config.layers[0], torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {
        tensor.local_name: torch.randn(tensor.shape, generator=rng) * tensor.shape[-1] ** -0.5
        for tensor in expected_tensors(config)
        if tensor.layer == spec.index
    }
    hidden = torch.randn(windows, tokens, config.hidden_size, generator=rng)
    rope = rope_tables(config, torch.arange(tokens), hidden.dtype)[spec.layer_type]
    mask = attention_masks(config, tokens)[spec.layer_type]
    ple = torch.randn(windows, tokens, config.ple_dim, generator=rng) if config.ple_dim else None

    def run() -> None:
        kv = ForwardKV(config)
        decoder_block(hidden, weights, spec, config=config, ple=ple, rope=rope, mask=mask, kv=kv)

    attention = 2 * num_scores(spec.attention.sliding_window, tokens)
    attention *= spec.attention.num_heads * spec.attention.head_dim
    return _seconds(run) / (windows * (tokens * layer_numel(config)[spec.index] + attention))


@cache
def _seconds_a_weight(spec: WeightSpec, file: str | None = None) -> float:
    """Quantizing and decoding, a weight, on Gaussian noise; of a published file reading and decoding one of its own."""
    if file is not None:
        tensors = open_published(file).tensors.values()
        found = next(tensor for tensor in tensors if tensor.spec == spec and len(tensor.shape) == 2)
        stored, ids = found.read(), torch.arange(max(1, min(found.shape[0], _PROBE_WEIGHTS // found.shape[1])))
        return _DECODINGS * _seconds(lambda: decoded(stored, ids).float()) / (len(ids) * found.shape[1])
    # What a trellis' survivors take is no matter of matrix products, as other compensation is.
    survive = spec.compensated and spec.info.state_bits
    rows = _PROBE_WEIGHTS // 1024 // (_SURVIVORS_TAKE if survive else 1)
    weight = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded, hessian = replace(spec, gptq=bool(survive), yaqa=False), torch.eye(1024)
    return _seconds(lambda: quantize(weight, rounded, hessian).dequantize()) / weight.numel()


def _seconds(run: Callable[[], object]) -> float:
    """The best of three calls, since others use the machine too, after one for what is set up once."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)

"""What every tensor and every KV spec costs, from one backward pass: see `results.prices` for what the numbers are."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from epic_quant import kv
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import QuantizationError, SpecError, TokenError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.policy import row_nbytes
from epic_quant.prices.backward import EMBEDDING, Backward, HeadRows, KeysValues, Linear, Rows
from epic_quant.quant import Hessian, OutputHessian, StoredMatrix, Weight, from_tensors, quantize
from epic_quant.quant.stored import row_chunks
from epic_quant.results.prices import Priced, Prices
from epic_quant.spec import KVSpec, TensorClass, WeightSpec

# The best formats that there are at each width, from eight bits down.
CANDIDATES = tuple(
    WeightSpec.parse(text)
    for text in (
        "int8-g128",
        "int6-g128",
        "int5-g128",
        "int4-g128",
        "int3-g128",
        "int2-g128",
        "ternary-g128",
        "codebook4+had256",
        "codebook3+had256",
        "codebook2+had256",
        "trellis4+had256",
        "trellis3+had256",
        "trellis2+had256",
        "codebook4+had256+gptq",
        "codebook3+had256+gptq",
        "codebook2+had256+gptq",
    )
)
# What errors are rounded to in reduced precision, so many weights at a time; and the weights that the diagonal form is
# taken on then, in whole rows.
ROUNDED_ERROR = WeightSpec.parse("int8")
_CHUNK = 2**19
_DIAGONAL_NUMEL = 2**20
_TABLES = (TensorClass.PLE_TABLE, TensorClass.EMBEDDING)


@dataclass
class _Tensor:
    """The sums of one tensor: [candidates, tokens], and the diagonal form of each candidate."""

    tensor: TextTensor
    specs: tuple[WeightSpec, ...]
    derivatives: Tensor
    diagonal: list[float] = field(default_factory=list)


def price(
    checkpoint: Checkpoint,
    windows: Tensor,
    specs: Sequence[WeightSpec] = CANDIDATES,
    kv_specs: Iterable[KVSpec] = (),
    *,
    hessians: Mapping[str, Hessian] | None = None,
    context: int = 8192,
    samples: int = 1,
    seed: int = 0,
    reduced_precision: bool = False,
    memory_nbytes: int | None = None,
    folder: Path | None = None,
    facts: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda where: None,
) -> Prices:
    """Price every matrix under every spec that fits it, and K and V of every source layer under every KV spec.

    `windows` int64 [N, T], BOS first, are of the text to calibrate on, never of the evaluation text; the loss is of
    `samples` labels for each token. Specs with `+gptq`, `+yaqa` or `+imatrix` are priced where `hessians` has the
    tensor's, which should be of other windows; without any, `+imatrix` takes the importance that the pass itself finds.
    Bytes of K and V are those at `context` tokens. Hidden states wait in RAM, or in a file in `folder`.

    With `reduced_precision` layers and head multiply in bf16 where that is faster here, errors of weights and their
    inputs are rounded to 8 bits before they are multiplied, and the diagonal form is taken on a sample of rows.

    Raises TokenError for windows too short, or where more memory is needed than `memory_nbytes`; SpecError for a spec
    that fits no tensor; and as `Backward.run`.
    """
    weights = CheckpointWeights(checkpoint)
    config = weights.config
    if windows.dim() != 2 or windows.shape[1] < 2:
        raise TokenError(f"windows of shape {list(windows.shape)} have nothing to predict; expected 2 tokens or more")
    windows = windows.long().repeat(samples, 1)
    _check_memory(config, windows, specs, reduced_precision, memory_nbytes, folder)
    num_tokens, hessians = windows.numel(), hessians or {}
    quantized_kv = [spec for spec in kv_specs if not spec.is_plain]
    sums = {
        tensor.name: _Tensor(tensor, fitting, torch.zeros(len(fitting), num_tokens), [0.0] * len(fitting))
        for tensor, fitting in _fitting(weights, specs, hessians)
    }
    backward = Backward(weights, windows, seed, folder, _fastest_dtype() if reduced_precision else torch.float32)
    found_kv: list[Priced] = []
    importance: dict[str, Tensor] = {}
    for captured in backward.run(progress):
        if isinstance(captured, KeysValues):
            found_kv.append(_price_kv(captured, config, quantized_kv, context))
            continue
        name = EMBEDDING if isinstance(captured, HeadRows) else captured.name
        its = sums[name]
        if not isinstance(captured, Rows) and name not in importance:  # Not again for every slice of the head.
            importance[name] = captured.x.square().mean(0)
        hessian = hessians.get(name) if hessians else Hessian(partial(importance.__getitem__, name))
        try:
            if isinstance(captured, Rows):
                _add_rows(its, captured, hessian, backward)
                continue
            if isinstance(captured, HeadRows):  # The tied embedding's other end: s = Σ over ids of δ ΔE x.
                first = captured.first
                weight = weights.rows(EMBEDDING, torch.arange(first, first + len(captured.weight)))
            else:
                weight = weights.get(name)
            _add_products(its, captured, weight, hessian, backward.num_predicted, reduced_precision)
        except QuantizationError as error:
            raise QuantizationError(f"{its.tensor.name}: {error}") from error
    return Prices(
        tuple(_priced(its) for its in sums.values()),
        tuple(sorted(found_kv, key=lambda priced: priced.layer or 0)),
        backward.num_predicted,
        {
            **(facts or {}),
            "checkpoint": checkpoint.fingerprint,
            "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16],
            "num_tokens": num_tokens,
            "samples": samples,
            "seed": seed,
        },
        {name: its.numpy() for name, its in importance.items()},
    )


def needed_nbytes(
    config: TextConfig, num_tokens: int, specs: Collection[WeightSpec], reduced_precision: bool
) -> tuple[int, int]:
    """Anonymous memory that pricing takes at most, and the part of it that hidden states at the borders are."""
    borders = 4 * num_tokens * config.hidden_size * (config.num_layers + 1)
    ple = 3 * 4 * num_tokens * config.num_layers * config.ple_dim
    matrices = [tensor for tensor in expected_tensors(config) if tensor.layer is not None and tensor.tensor_class]
    layers = [sum(math.prod(t.shape) for t in matrices if t.layer == layer.index) for layer in config.layers]
    largest = max(math.prod(tensor.shape) for tensor in matrices)
    # Of a layer and its largest matrix: in fp32 both, the squared gradient, an error and what makes it; or the matrix
    # and its error as stored, in at most 9 bits.
    working = 3 * largest if reduced_precision else 4 * max(layers) + 4 * 4 * largest
    # Inputs and gradients, and the outputs of one matrix.
    wide = sum(sum(tensor.shape) for tensor in matrices) // config.num_layers + max(t.shape[0] for t in matrices)
    derivatives = 4 * num_tokens * len(specs) * (len(matrices) + 3)
    # A layer's inverse Cholesky factors, one for each rotation, and what making the largest takes.
    rotations = len({spec.hadamard_block for spec in specs if spec.compensated})
    squares = [[t.shape[1] ** 2 for t in matrices if t.layer == layer.index] for layer in config.layers]
    factors = 4 * (rotations * max(map(sum, squares)) + 4 * max(map(max, squares))) if rotations else 0
    if any(spec.yaqa for spec in specs):  # A layer's roots of outputs' Hessians, and the errors of its largest matrix.
        blocks = [(t.layer, math.prod(OutputHessian.shape(t.shape[0]))) for t in matrices]
        factors += 4 * (2 * max(sum(n for at, n in blocks if at == layer.index) for layer in config.layers) + largest)
    return math.ceil(1.2 * (borders + ple + working + factors + 2 * 4 * num_tokens * wide + derivatives)), borders


def _check_memory(
    config: TextConfig,
    windows: Tensor,
    specs: Collection[WeightSpec],
    reduced_precision: bool,
    memory_nbytes: int | None,
    folder: Path | None,
) -> None:
    needed, borders = needed_nbytes(config, windows.numel(), specs, reduced_precision)
    needed -= 0 if folder is None else borders
    if memory_nbytes is not None and needed > memory_nbytes:
        ways = "take fewer windows or more memory" + ("" if folder else ", or keep hidden states in a folder")
        raise TokenError(
            f"pricing {windows.numel():,} tokens needs {needed / 1e9:,.2f} GB of RAM, but "
            f"{memory_nbytes / 1e9:,.2f} GB are allowed; {ways}"
        )


@functools.cache
def _fastest_dtype() -> torch.dtype:
    """What matrices multiply fastest in: bf16 where the processor has instructions for it, else fp32."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)


def _fitting(
    weights: CheckpointWeights, specs: Sequence[WeightSpec], hessians: Mapping[str, Hessian]
) -> Iterable[tuple[TextTensor, tuple[WeightSpec, ...]]]:
    """Every matrix in use with the specs that fit it.

    A group of a power of two is halved until it divides the rows of the tensor's whole class, so that a class can have
    one spec.
    """
    used = [tensor for tensor in weights.tensors.values() if tensor.tensor_class is not None and not tensor.unused]
    cols: dict[TensorClass, set[int]] = {}
    for tensor in used:
        assert tensor.tensor_class is not None
        cols.setdefault(tensor.tensor_class, set()).add(tensor.shape[1])
    nowhere = dict.fromkeys(specs)
    found = []
    for tensor in used:
        assert tensor.tensor_class is not None
        fitting = []
        for spec in specs:
            if spec.needs_hessian and not _has_inputs(tensor, spec, hessians):
                if spec.compensated and not hessians:
                    nowhere.pop(spec, None)  # Without Hessians it is left out everywhere, which is no mistake.
                continue
            divided = spec.with_dividing_group(cols[tensor.tensor_class])
            if divided is not None:
                fitting.append(divided)
                nowhere.pop(spec, None)
        found.append((tensor, tuple(dict.fromkeys(fitting))))
    if nowhere:
        raise SpecError(f"{next(iter(nowhere))} fits no tensor of this model")
    return found


def _has_inputs(tensor: TextTensor, spec: WeightSpec, hessians: Mapping[str, Hessian]) -> bool:
    """Whether there is what a spec is fitted to: the Hessian, or of `+imatrix` without any what the pass finds.

    Error compensation does nothing for rows that are looked up. The embedding is the head too, which has inputs.
    """
    if spec.compensated and tensor.tensor_class in _TABLES:
        return False
    return tensor.name in hessians or (not hessians and not spec.compensated and tensor.tensor_class is not _TABLES[0])


def _priced(its: _Tensor) -> Priced:
    rows, cols = its.tensor.shape
    return Priced(
        name=its.tensor.name,
        target=its.tensor.target,
        layer=its.tensor.layer,
        numel=rows * cols,
        candidates=tuple(map(str, its.specs)),
        nbytes=tuple(round(rows * row_nbytes(spec, cols)) for spec in its.specs),
        derivatives=its.derivatives.numpy(),
        diagonal=tuple(its.diagonal),
    )


def _add_products(
    its: _Tensor,
    captured: Linear | HeadRows,
    weight: Weight,
    hessian: Hessian | None,
    num_predicted: int,
    reduced_precision: bool,
) -> None:
    """S = δᵀ ΔW x of every token, for every candidate; `weight` is what is quantized, as the checkpoint has it."""
    assert isinstance(weight, Tensor)
    x, gradient = captured.x, captured.gradient
    # G², the summed gradient squared, of every so many rows.
    every = max(1, weight.numel() // _DIAGONAL_NUMEL) if reduced_precision else 1
    sampled = torch.arange(0, len(weight), every)
    squared = (gradient[:, sampled].T @ x).square_() * (len(weight) / len(sampled))
    for index, spec in enumerate(its.specs):
        stored = quantize(weight, spec, hessian)
        if reduced_precision:
            outputs = _rounded_error(stored, weight).matmul(x, "int8")
            error = stored.rows(sampled).dequantize().sub_(weight[sampled])
        else:
            error = stored.dequantize().sub_(weight)
            outputs = x @ error.T
        its.derivatives[index] += torch.einsum("tr,tr->t", outputs, gradient)
        its.diagonal[index] += 0.5 * float(torch.linalg.vecdot(squared, error.square_()).sum()) / num_predicted


def _rounded_error(stored: StoredMatrix, weight: Tensor) -> StoredMatrix:
    """ΔW in 8 bits with a scale for each row, made some rows at a time, which stay in a core's cache."""
    chunks = [
        quantize(
            stored.rows(torch.arange(rows.start, rows.stop)).dequantize().sub_(weight[rows]), ROUNDED_ERROR
        ).tensors()
        for rows in row_chunks(*stored.shape, _CHUNK)
    ]
    return from_tensors(
        ROUNDED_ERROR, {name: torch.cat([one[name] for one in chunks]) for name in chunks[0]}, stored.shape
    )


def _add_rows(its: _Tensor, looked_up: Rows, hessian: Hessian | None, backward: Backward) -> None:
    """The same for rows that are looked up: s = δᵀ Δrow."""
    ids, where = looked_up.ids.unique(return_inverse=True)
    rows = backward.weights.rows(looked_up.name, ids)
    gradient = torch.zeros(len(ids), rows.shape[1]).index_add_(0, where, looked_up.gradient)
    for index, spec in enumerate(its.specs):
        error = quantize(rows, spec, hessian).dequantize().sub_(rows.float())
        its.derivatives[index] += torch.linalg.vecdot(error[where], looked_up.gradient)
        its.diagonal[index] += 0.5 * float((gradient * error).square().sum()) / backward.num_predicted


def _price_kv(captured: KeysValues, config: TextConfig, specs: Sequence[KVSpec], context: int) -> Priced:
    """S of every token's K and V: what its stored values differ by, times the gradients at them.

    An error that all keys of a window and head have in common shifts all scores of a query alike, and costs nothing:
    gradients at keys sum to zero. Between single tokens that would not cancel, so it is taken off first.
    """
    derivatives = torch.zeros(len(specs), captured.k.shape[0] * captured.k.shape[2])
    for index, spec in enumerate(specs):
        cache = kv.KVCache(config, spec, batch_size=len(captured.k))
        k, v = cache.update(captured.layer, captured.k, captured.v)
        k_error = k - captured.k
        k_error -= k_error.mean(2, keepdim=True)
        at_k = torch.linalg.vecdot(k_error, captured.k_gradient).sum(1)  # [N, T]
        at_v = torch.linalg.vecdot(v - captured.v, captured.v_gradient).sum(1)
        derivatives[index] = (at_k + at_v).flatten()
    return Priced(
        name=f"kv.{captured.layer}",
        target=None,
        layer=captured.layer,
        numel=0,
        candidates=tuple(map(str, specs)),
        nbytes=tuple(kv.layer_nbytes(spec, config.layers[captured.layer], context) for spec in specs),
        derivatives=derivatives.numpy(),
    )

"""What each policy's scheme does to the weights of each tensor class, and how long that takes."""

import json
import math
from functools import cache, partial
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from torch import Tensor

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import expected_tensors
from epic_quant.metrics import decibels, kurtosis, relative, relative_l2, squared_norm, squared_output_norm
from epic_quant.policy import spec_of, weights_of
from epic_quant.quant import Hessian, OutputHessian, lloyd_max_rel_l2, quantize
from epic_quant.records.subjects import GAUSSIAN, LadderRecord, SyntheticRecord, WeightsRecord
from epic_quant.spec import TensorClass, WeightSpec

SEED = 0

# Timed on at most this many weights of one tensor: enough to leave the caches, little enough to repeat.
TIMED_WEIGHTS = 2**24


@pytest.fixture(scope="session")
def class_tensors(run):
    """The tensors in use of a class: their canonical names and the weights whose error is taken."""

    def tensors(tensor_class):
        for tensor in run.tensors_of(tensor_class):
            yield tensor.name, run.sample(tensor)

    return tensors


@pytest.fixture(scope="session")
def errors(class_tensors, hessians_for):
    """Error and bytes of a class under a spec for each of its tensors, found once for all policies that agree."""
    found = {}

    def measure(specs, tensor_class):
        if (specs, tensor_class) not in found:
            found[specs, tensor_class] = _measure(specs, class_tensors(tensor_class), hessians_for(*set(specs)))
        return found[specs, tensor_class]

    return measure


def _measure(specs, tensors, hessians):
    error = norm = nbytes = weights = 0
    by_tensor = {}
    for spec, (name, weight) in zip(specs, tensors, strict=True):
        quantized = quantize(weight, spec, hessians.get(name))
        tensor_error = squared_norm(quantized.dequantize() - weight.float())
        tensor_norm = squared_norm(weight)
        by_tensor[name] = relative(tensor_error, tensor_norm)
        error, norm = error + tensor_error, norm + tensor_norm
        nbytes, weights = nbytes + quantized.nbytes, weights + weight.numel()
    metrics = {"rel_l2": relative(error, norm), "bits_per_weight": 8 * nbytes / weights, "nbytes": nbytes}
    return metrics, by_tensor


@pytest.fixture(scope="session")
def file_errors(run, class_tensors):
    """As `errors`, of a published file's tensors: the error of the same rows as it holds them."""

    @cache
    def measure(policy, tensor_class):
        weights = weights_of(run.checkpoint, policy)
        error = norm = nbytes = numel = 0
        by_tensor = {}
        for tensor, (name, weight) in zip(run.tensors_of(tensor_class), class_tensors(tensor_class), strict=True):
            tensor_error = squared_norm(weights.rows(name, run.sampled_ids(tensor)).float() - weight.float())
            tensor_norm = squared_norm(weight)
            by_tensor[name] = relative(tensor_error, tensor_norm)
            error, norm = error + tensor_error, norm + tensor_norm
            nbytes, numel = nbytes + weights.nbytes(name), numel + math.prod(tensor.shape)
        return {"rel_l2": relative(error, norm), "bits_per_weight": 8 * nbytes / numel, "nbytes": nbytes}, by_tensor

    return measure


def as_read(hessians, name):
    """A tensor's Hessian for what is timed: with nothing made of it yet."""
    if name not in hessians:
        return None
    output = hessians[name].output
    return Hessian(hessians[name].read, output and OutputHessian(output.read))


@pytest.fixture
def timed_weight(class_tensors, tensor_class):
    """The class's first tensor, or as many of its rows as are timed, and its name."""
    name, weight = next(iter(class_tensors(TensorClass(tensor_class))))
    return name, weight[: max(1, TIMED_WEIGHTS // weight.shape[1])].contiguous()


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_weights(
    op,
    policy,
    tensor_class,
    run,
    class_tensors,
    errors,
    file_errors,
    hessians_for,
    timed_weight,
    record,
    benchmark,
):
    """Relative L2 over every tensor of the class in every layer; then one tensor's conversion is timed."""
    if policy.file is not None and op == "quantize":
        pytest.skip("a published file is quantized already")
    specs = tuple(spec_of(policy, tensor) for tensor in run.tensors_of(TensorClass(tensor_class)))
    by_file = policy.file is not None
    two_sided = not by_file and any(spec.yaqa for spec in specs)
    if two_sided and run.sampled_rows is not None:
        pytest.skip("+yaqa rounds whole matrices, and only some of their rows are taken (--rows)")
    part = TensorClass(tensor_class)
    metrics, tensors = file_errors(policy, part) if by_file else errors(specs, part)
    assert math.isfinite(metrics["rel_l2"])
    name, weight = next(iter(class_tensors(part))) if two_sided else timed_weight
    record(
        WeightsRecord(
            policy=policy.name,
            tensor_class=tensor_class,
            specs=tuple(dict.fromkeys(specs)),
            op=op,
            **metrics,
            bytes_read=weight.nbytes,  # what either way must move at least, in bf16 so that formats compare
            tensors=tensors if by_file or op == "quantize" else {},
        )
    )
    if by_file:
        stored = weights_of(run.checkpoint, policy).get(name)
        stored = stored[: len(weight)] if isinstance(stored, Tensor) else stored.rows(torch.arange(len(weight)))
        timed = partial(stored.to if isinstance(stored, Tensor) else stored.dequantize, torch.bfloat16)
        benchmark.pedantic(timed, rounds=3, warmup_rounds=1)
        return
    timed = partial(quantize, weight, specs[0], as_read(hessians_for(specs[0]), name))
    if op == "dequantize":
        timed = partial(timed().dequantize, torch.bfloat16)
    benchmark.pedantic(timed, rounds=3, warmup_rounds=1)


# The ladder: the original's schemes, and what the same bits can do, from ternary up.
LADDER = tuple(
    map(
        WeightSpec.parse,
        (
            "absmax-ternary",
            "ternary",
            "ternary+had256",
            "int2-g128",
            "codebook2+had256",
            "codebook2+had256+gptq",
            "trellis2+had256",
            "absmax3-packed",
            "int3-g128",
            "int3-g128+gptq",
            "codebook3+had256",
            "codebook3+had256+gptq",
            "trellis3+had256",
            "absmax4",
            "int4",
            "int4-g128",
            "int4-g128+gptq",
            "int4-g32",
            "codebook4+had256",
            "codebook4+had256+gptq",
            "trellis4+had256",
            "int5-g128",
            "int6-g128",
            "int8-g128",
        ),
    )
)
# What a linear layer multiplies; the two tables are looked up, so they have no Hessians.
MULTIPLIED = tuple(part for part in TensorClass if part not in (TensorClass.PLE_TABLE, TensorClass.EMBEDDING))


@pytest.fixture(scope="session")
def evaluation_hessians(run, tmp_path_factory):
    """The Hessians that give the output error."""
    return run.evaluation_hessians(tmp_path_factory.mktemp("hessians"))


@pytest.fixture(scope="session")
def shapes_of(class_tensors):
    """How far a class's weights are from Gaussian: the mean over its tensors of kurtosis and of absmax / std."""

    @cache
    def measure(tensor_class):
        weights = [weight.float() for _, weight in class_tensors(tensor_class)]
        peaks = [float(weight.abs().max() / weight.std()) for weight in weights]
        return {"kurtosis": mean(map(kurtosis, weights)), "absmax_over_std": mean(peaks)}

    return measure


E4B_CONFIG = Path(__file__).parent / "facts" / "gemma-4-E4B.config.json"
E4B_WEIGHTS = sum(
    math.prod(tensor.shape)
    for tensor in expected_tensors(TextConfig.from_json(json.loads(E4B_CONFIG.read_text(encoding="utf-8"))))
    if tensor.tensor_class in MULTIPLIED and not tensor.unused
)


def lloyd_max_gap_db(rel_l2, num_levels):
    """None above 64 levels, where nobody looks for a better scalar quantizer, and finding the best one takes long."""
    return decibels(rel_l2 / lloyd_max_rel_l2(num_levels)) if num_levels <= 64 else None


def gaussian(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).bfloat16()


@pytest.mark.parametrize("tensor_class", TensorClass)
@pytest.mark.parametrize("spec", LADDER, ids=str)
def test_ladder(
    spec, tensor_class, run, class_tensors, shapes_of, hessians_for, evaluation_hessians, record, benchmark
):
    """One rung: error of the weights and of the output on real activations, and the distance to the limits."""
    if spec.needs_hessian and tensor_class not in MULTIPLIED:
        pytest.skip("a table that is looked up has no inputs to fit to")
    if tensor_class not in run.classes:
        pytest.skip("this model has no such tensors")
    misfits = (spec.misfit(tensor.shape[1]) for tensor in run.tensors_of(tensor_class))
    if misfit := next(filter(None, misfits), None):
        pytest.skip(misfit)
    hessians = hessians_for(spec)
    if spec.needs_hessian and not hessians:
        pytest.skip("no --hessians given, and gathering them on a checkpoint over 1 GB is a run of its own")

    evaluated = evaluation_hessians is not None and tensor_class in MULTIPLIED
    error = norm = output_error = output_norm = nbytes = weights = 0
    for name, weight in class_tensors(tensor_class):
        quantized = quantize(weight, spec, hessians.get(name))
        decoded = quantized.dequantize()
        error, norm = error + squared_norm(decoded - weight.float()), norm + squared_norm(weight)
        nbytes, weights = nbytes + quantized.nbytes, weights + weight.numel()
        if evaluated:
            hessian = evaluation_hessians[name].read()
            output_error += squared_output_norm(decoded - weight.float(), hessian)
            output_norm += squared_output_norm(weight, hessian)

    control = gaussian(weight.shape)
    bits, rel_l2 = 8 * nbytes / weights, relative(error, norm)
    assert math.isfinite(rel_l2)
    record(
        LadderRecord(
            spec=spec,
            tensor_class=tensor_class,
            rel_l2=rel_l2,
            bits_per_weight=bits,
            nbytes=nbytes,
            output_rel_l2=relative(output_error, output_norm) if evaluated else None,
            gaussian_rel_l2=relative_l2(quantize(control, spec.without_hessian).dequantize(), control),
            shannon_gap_db=decibels(rel_l2 / 2**-bits),
            lloyd_max_gap_db=lloyd_max_gap_db(rel_l2, spec.info.num_levels),
            **shapes_of(tensor_class),
            bytes_read=weight.nbytes,
        )
    )
    benchmark.pedantic(quantize, (weight, spec, as_read(hessians, name)))


# What each distribution's values are made of, seeded: [rows, cols] at unit variance.
DISTRIBUTIONS = {
    GAUSSIAN: lambda rng, shape: rng.standard_normal(shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Student t, 5 degrees": lambda rng, shape: rng.standard_t(5, shape),
}
SYNTHETIC_SHAPE = (512, 2560)


@pytest.mark.benchmark(min_rounds=3, max_time=0.2)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("spec", [spec for spec in LADDER if not spec.needs_hessian], ids=str)
def test_synthetic(spec, distribution, record, benchmark):
    """A scheme on synthetic weights of known distribution, and how fast it quantizes them."""
    values = DISTRIBUTIONS[distribution](np.random.default_rng(SEED), SYNTHETIC_SHAPE)
    weight = torch.from_numpy(values).bfloat16()
    quantized = quantize(weight, spec)
    record(
        SyntheticRecord(
            spec=spec,
            distribution=distribution,
            rel_l2=relative_l2(quantized.dequantize(), weight),
            bits_per_weight=quantized.bits_per_weight,
            bytes_read=weight.nbytes,
            e4b_weights=E4B_WEIGHTS,
        )
    )
    benchmark.pedantic(quantize, (weight, spec), rounds=3)

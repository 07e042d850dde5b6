"""The subjects of measurements: one dataclass each, filled by a benchmark and read by the report and the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from epic_quant.records.record import SubjectRecord, detail, label, metric
from epic_quant.spec import KV_CACHE, KVSpec, PolicySpec, TensorClass, WeightSpec

# The models whose bytes are counted, and the two ways of counting.
THIS_CHECKPOINT, E4B = "this checkpoint", "E4B"
AS_PUBLISHED, RESIDENT = "as published", "resident"

# What is fitted reads the one text, what is reported the other.
CALIBRATION, EVALUATION = "calibration", "evaluation"

# The distributions of synthetic weights, the first a bound is known for; residencies beside those of `PLESpec`.
GAUSSIAN = "Gaussian"
LOWEST_IDS, OPTIMUM = "static, lowest ids", "optimum"

# What a PLE row cache holds at the start: nothing, or the first of a list of frequent ids.
EMPTY_START, SHIPPED_LIST, OTHER_TEXT = "nothing", "the shipped list", "the other text's list"


class FootprintRecord(SubjectRecord, subject="footprint"):
    """Bytes of a policy by part. `published` is in MB; `unused_nbytes` are of projections that no layer reads."""

    policy: str = label()
    model: str = label()
    column: str = label()
    nbytes: float | None = metric()
    parts: Mapping[str, float] = detail()
    unused_nbytes: float | None = detail(default=None)
    published: Mapping[str, float] = detail(default_factory=dict)


class WeightsRecord(SubjectRecord, subject="weights"):
    """A tensor class under a policy: its error, its bytes, and the time of one tensor's conversion.

    `specs` are the distinct specs of its tensors, `tensors` the error of each; `op` is quantize or dequantize.
    """

    policy: str = label()
    tensor_class: TensorClass = label()
    specs: tuple[WeightSpec, ...] = label("spec")
    op: str = label()
    rel_l2: float | None = metric()
    bits_per_weight: float | None = metric()
    nbytes: float | None = metric()
    bytes_read: float | None = metric()
    tensors: Mapping[str, float] = detail(default_factory=dict)


class LadderRecord(SubjectRecord, subject="ladder"):
    """A tensor class under one spec: errors of weights and outputs, and the distance to the limits."""

    spec: WeightSpec = label()
    tensor_class: TensorClass = label()
    rel_l2: float | None = metric()
    bits_per_weight: float | None = metric()
    nbytes: float | None = metric()
    output_rel_l2: float | None = metric()
    gaussian_rel_l2: float | None = metric()
    shannon_gap_db: float | None = metric()
    lloyd_max_gap_db: float | None = metric()
    kurtosis: float | None = metric()
    absmax_over_std: float | None = metric()
    bytes_read: float | None = metric()


class SyntheticRecord(SubjectRecord, subject="synthetic"):
    """A spec on synthetic weights; `e4b_weights` is the number of weights that E4B multiplies by."""

    spec: WeightSpec = label()
    distribution: str = label()
    rel_l2: float | None = metric()
    bits_per_weight: float | None = metric()
    bytes_read: float | None = metric()
    e4b_weights: float = detail()


class BlockRecord(SubjectRecord, subject="block"):
    """A decoder block under a policy at a number of tokens."""

    policy: str = label()
    layer_type: str = label()
    tokens: int = label()
    added_rel_l2: float | None = metric()
    output_rel_l2: float | None = metric()
    nbytes: float | None = metric()
    computed_by: tuple[str, ...] = detail(default=())


class KernelsRecord(SubjectRecord, subject="kernels"):
    """A product with a stored weight; `how` names its spec and the activations, or a peer."""

    weight: str = label()
    tokens: int = label()
    how: str = label()
    output_rel_l2: float | None = metric()
    nbytes: float | None = metric()
    bytes_read: float | None = metric()
    computed_by: str | None = detail(default=None)


class PLEHitsRecord(SubjectRecord, subject="ple_hits"):
    """Hit rates of a residency on a trace, by capacity in rows; `hit_rate` is that at the original's rows.

    `tokens` of the trace are measured, `distinct` of them differ, and the share `met_before` came earlier.
    """

    trace: str = label()
    residency: str = label()
    hit_rate: float | None = metric()
    capacities: tuple[int, ...] = detail()
    hit_rates: tuple[float, ...] = detail()
    row_nbytes: int = detail()
    tokens: int = detail()
    distinct: int = detail()
    met_before: float = detail()
    original_rows: int = detail()

    def __post_init__(self) -> None:
        _check_curve(self.capacities, self.hit_rates, "hit rate")


class PLEStartRecord(SubjectRecord, subject="ple_start"):
    """What a list of frequent ids, hot at the start, saves: misses and hit rates by capacity in rows.

    `misses` are in the first `tokens` of a text, the mean of `places` in the measured half that each start anew;
    `hit_rates` are of all of that half, and `hit_rate` that at the original's rows. The list has `list_rows` ids.
    """

    trace: str = label()
    residency: str = label()
    start: str = label()
    hit_rate: float | None = metric()
    capacities: tuple[int, ...] = detail()
    misses: tuple[float, ...] = detail()
    hit_rates: tuple[float, ...] = detail()
    row_nbytes: int = detail()
    tokens: int = detail()
    places: int = detail()
    list_rows: int = detail()
    original_rows: int = detail()

    def __post_init__(self) -> None:
        _check_curve(self.capacities, self.hit_rates, "hit rate")
        _check_curve(self.capacities, self.misses, "number of misses")


class PLETextRecord(SubjectRecord, subject="ple_text"):
    """Which ids a text uses: `hit_rate` is the share of as many of the lowest ids as the original keeps.

    `rows` has by hit rate, such as `90%`, the rows of the best static choice, which knows all of the text. `source`
    says what made the ids. `published` has the same of other texts: `tokens`, `lowest_ids`, and rows by hit rate.
    """

    text: str = label()
    hit_rate: float | None = metric()
    tokens: int = detail()
    rows: Mapping[str, float] = detail()
    row_nbytes: int = detail()
    original_rows: int = detail()
    source: str | None = detail(default=None)
    published: Mapping[str, Mapping[str, float]] = detail(default_factory=dict)


class PLEHotRecord(SubjectRecord, subject="ple_hot"):
    """Lookups of resident rows; `throughput_to_dense` is the ratio to `index_select` of times taken in turn."""

    table: str = label()
    way: str = label()
    batch: int = label()
    tokens: int = detail()
    layers: int = detail()
    throughput_to_dense: float | None = detail(default=None)


class PLEColdRecord(SubjectRecord, subject="ple_cold"):
    """Lookups of rows that no cache holds; `pass_s` is the time of all `tokens`."""

    table: str = label()
    way: str = label()
    batch: int = label()
    threads: int = label()
    p50_s: float | None = metric()
    p99_s: float | None = metric()
    bytes_read: float | None = metric()
    fetched_nbytes: float | None = metric()
    tokens: int = detail()
    calls: int | None = detail(default=None)
    pass_s: float | None = detail(default=None)


class PLEMemoryRecord(SubjectRecord, subject="ple_memory"):
    """Memory of a full cache: its rows, and what the system reports as added to the process."""

    table: str = label()
    nbytes: float | None = metric()
    anonymous_nbytes: float | None = metric()


class PLEGuardRecord(SubjectRecord, subject="ple_guard"):
    """The PLE table or projections alone under one spec, measured on `tokens` of the evaluation text."""

    tensor_class: TensorClass = label()
    spec: WeightSpec = label()
    rel_l2: float | None = metric()
    bits_per_weight: float | None = metric()
    kl_divergence: float | None = metric()
    tokens: int | None = detail(default=None)


class KVRecord(SubjectRecord, subject="kv"):
    """Errors, bytes a token and times of a KV spec on the layers of one type."""

    kv_policy: str = label()
    layer_type: str = label()
    k_rel_l2: float | None = metric()
    v_rel_l2: float | None = metric()
    logit_rms: float | None = metric()
    attention_rel_l2: float | None = metric()
    nbytes: float | None = metric()
    bits_per_value: float | None = metric()
    append_s: float | None = metric()
    read_s: float | None = metric()
    spec: KVSpec = detail()
    dense_append_s: float | None = detail(default=None)
    dense_read_s: float | None = detail(default=None)
    tokens: int | None = detail(default=None)


class KVDivergenceRecord(SubjectRecord, subject="kv_divergence"):
    """Divergence of decoding with a KV spec at a context length, and bytes a token of all layers."""

    kv_policy: str = label()
    context: int = label()
    kl_divergence: float | None = metric()
    nbytes: float | None = metric()
    tokens: int | None = detail(default=None)
    kl_se: float | None = detail(default=None)


class KVBytesRecord(SubjectRecord, subject="kv_bytes"):
    """Bytes of a whole KV cache, by layer type; `all_layers_nbytes` as if every layer stored its own K and V."""

    kv_policy: str = label()
    model: str = label()
    tokens: int = label()
    nbytes: float | None = metric()
    all_layers_nbytes: float | None = detail(default=None)
    parts: Mapping[str, float] = detail(default_factory=dict)
    published: Mapping[str, float] = detail(default_factory=dict)


class QualityRecord(SubjectRecord, subject="quality"):
    """What a policy does to the model's predictions on the evaluation text, and its resident bytes by part.

    A recipe names the policy at whose bytes it was made (`recipe_at`), and how it stores K and V (`kv`).
    """

    policy: str = label()
    perplexity: float | None = metric()
    perplexity_se: float | None = metric()
    kl_divergence: float | None = metric()
    kl_se: float | None = metric()
    kl_median: float | None = metric()
    kl_p90: float | None = metric()
    kl_p99: float | None = metric()
    kl_max: float | None = metric()
    top1_agreement: float | None = metric()
    rms_delta_p: float | None = metric()
    predicted_kl_divergence: float | None = metric(default=None)
    resident_nbytes: float | None = metric()
    nbytes: float | None = metric()
    spec: PolicySpec = detail()
    parts: Mapping[str, float] = detail(default_factory=dict)
    num_tokens: int | None = detail(default=None)
    resumed_after: int | None = detail(default=None)
    recipe_at: str | None = detail(default=None)
    kv: str | None = detail(default=None)


class SensitivityRecord(SubjectRecord, subject="sensitivity"):
    """A tensor class, or the KV cache, quantized alone: in all layers, or in one.

    `nbytes` are those of what is quantized, under the spec; `kv` is what the name of a KV spec stands for.
    """

    tensor_class: str = label()
    spec: str = label()
    text: str = label()
    layer: int | None = label(default=None)
    kl_divergence: float | None = metric()
    kl_se: float | None = metric()
    predicted_kl_divergence: float | None = metric(default=None)
    saved_nbytes: float | None = metric()
    kl_per_mb: float | None = metric()
    nbytes: int | None = detail(default=None)
    num_tokens: int | None = detail(default=None)
    resumed_after: int | None = detail(default=None)
    kv: KVSpec | None = detail(default=None)

    def __post_init__(self) -> None:
        _ = self.storage  # Raises SpecError where the label is no spec.

    @property
    def storage(self) -> WeightSpec | KVSpec:
        """The spec as a value."""
        if self.tensor_class == KV_CACHE:
            return self.kv or KVSpec.parse(self.spec)
        return WeightSpec.parse(self.spec)

    @property
    def whole_nbytes(self) -> int | None:
        """Bytes of what is quantized, in bf16; None where unknown."""
        return None if self.nbytes is None or self.saved_nbytes is None else round(self.nbytes + self.saved_nbytes)


class PricesRecord(SubjectRecord, subject="prices"):
    """What every tensor costs alone under every spec, from one backward pass over a text, and the recipes of it.

    `tensors` has by canonical name what is known of each tensor: `tensor_class`, `kind` and `layer` (None for a
    global), `numel`, and `specs`, by spec the divergence that it alone is predicted to cause, its standard error, and
    its bytes. `frontier` are recipes by tensor from the fewest resident bytes up: `resident_nbytes`, `predicted`,
    `policy` (a policy's text), and `bits`, the mean bits a weight of each class. `by` compares recipes that give one
    spec to a class, a kind, a layer of a class, or a tensor, at the same stored bytes: `bits`, `nbytes` of each budget
    and `predicted` by granularity. `file` is the name of the file that has the numbers of each token, `parts` the
    resident bytes of bf16 by part.
    """

    text: str = label()
    num_tokens: int = detail()
    samples: int = detail(default=1)
    elapsed_s: float | None = detail(default=None)
    file: str | None = detail(default=None)
    tensors: Mapping[str, Any] = detail(default_factory=dict)
    frontier: tuple[Any, ...] = detail(default=())
    by: tuple[Any, ...] = detail(default=())
    parts: Mapping[str, float] = detail(default_factory=dict)


def _check_curve(capacities: tuple[int, ...], values: tuple[float, ...], name: str) -> None:
    if len(capacities) != len(values) or not all(0 <= number < math.inf for number in (*capacities, *values)):
        raise ValueError(f"holds no {name} for each capacity")


SUBJECTS: Mapping[str, type[SubjectRecord]] = {cls.subject: cls for cls in SubjectRecord.__subclasses__()}

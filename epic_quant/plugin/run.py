"""One session: the checkpoint, the policies and the texts, and the facts that its JSON holds of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from epic_quant import __version__, command_line, kernels, machine
from epic_quant.calibration import Hessians, gather, text_sha256
from epic_quant.checkpoint import Checkpoint, dtype_name
from epic_quant.errors import CheckpointError, SpecError, TokenError
from epic_quant.files import user_path
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TextTensor, expected_tensors
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.plan import plan_quality
from epic_quant.ple.residency import Ids
from epic_quant.ple.traces import check_trace, load_ids
from epic_quant.policy import check, check_kv, opened, weights_of
from epic_quant.prices import CANDIDATES
from epic_quant.published import PublishedWeights
from epic_quant.published.source import differences
from epic_quant.quality import Ablation, Variant, ablations, noise_floor
from epic_quant.quality.passes import default_memory_nbytes
from epic_quant.quant import Hessian
from epic_quant.records import SCHEMA_VERSION
from epic_quant.results.prices import prices_path
from epic_quant.spec import NAMED, NAMED_KV, NOISE_FLOOR, REFERENCE, KVSpec, PolicySpec, TensorClass, WeightSpec
from epic_quant.text import text_ids, token_windows
from epic_quant.values import check_values

_Spec = TypeVar("_Spec", PolicySpec, KVSpec)

# The folder of the benchmarks in the repository, and of the small model in it. The package may be installed elsewhere.
BENCHMARKS = "benchmarks"
SMALL_MODEL = f"{BENCHMARKS}/mini_gemma4"
SEED = 0

# Above this size a checkpoint is large: see `Run.is_large`.
LARGE_CHECKPOINT_NBYTES = 1_000_000_000
_DEFAULT_SAMPLED_ROWS = 256

# The text that Hessians are gathered from: enough that those of 512 columns have full rank many times over. Those of
# outputs take more, since a few tokens have most of the gradients.
HESSIAN_WINDOWS, HESSIAN_WINDOW_TOKENS = 16, 512
_OUTPUT_HESSIAN_WINDOWS = 128

_LEAST_KV_CONTEXT = 128

# Tokens of the evaluation text that are a trace of PLE rows: enough to fill the largest cache many times over.
_MOST_TRACE_TOKENS = 2**18

_DEFAULT_WINDOWS = 3
# Windows of the calibration text that prices are taken on, for each of the evaluation text's: prices differ more from
# text to text than the divergence of a policy does from theirs.
_PRICE_WINDOWS = 8


class Run:
    """What one benchmark session measures: the checkpoint, its config and the policies.

    `repository` has the benchmarks, with the small model and its texts.
    """

    def __init__(self, options: argparse.Namespace, repository: Path) -> None:
        self.options, self._repository = options, repository
        self._small_model = repository / SMALL_MODEL
        self.isa = kernels.isa()
        asked = [command_line.policy_of(text) for text in self.options.policy]
        _check_names(asked)
        source = self._small_model if self.options.checkpoint is None else self.options.checkpoint
        self.is_default = user_path(source).resolve() == self._small_model.resolve()
        self.checkpoint = Checkpoint.open(
            source,
            config=self.options.config,
            tokenizer=self.options.tokenizer,
            download=self.options.download,
        )
        self.config = TextConfig.read(self.checkpoint)
        self.nbytes = sum(self.checkpoint.nbytes(name) for name in self.checkpoint.names)
        # Everything is compared with bf16, so it is always included.
        self.policies, self.left_out = {REFERENCE: NAMED[REFERENCE]}, dict[str, str]()
        fitting = self._fitting(asked or self._quickly_encoded(NAMED.values()), check, bool(asked))
        self.policies |= {name: opened(policy, self.config) for name, policy in fitting.items()}
        asked_kv = [*map(KVSpec.parse, self.options.kv_policy)]
        self.kv_policies = {"bf16": NAMED_KV["bf16"]}
        self.kv_policies |= self._fitting(asked_kv or NAMED_KV.values(), check_kv, bool(asked_kv))
        for spec in map(WeightSpec.parse, self.options.price):
            self._check_priced(spec)
        self._weights = CheckpointWeights(self.checkpoint)

    def _quickly_encoded(self, policies: Iterable[PolicySpec]) -> Iterator[PolicySpec]:
        """Those that nobody needs to ask for: of a large checkpoint without trellises."""
        for policy in policies:
            if any(map(self._is_on_demand, policy.weight_specs)):
                self.left_out[policy.name] = f"whose trellis takes long to encode: --policy {policy.name} measures it"
            else:
                yield policy

    def _is_on_demand(self, spec: WeightSpec) -> bool:
        """Whether a spec takes too long to be measured unasked: a trellis of a large checkpoint."""
        return self.is_large and bool(spec.info.state_bits)

    def _fitting(
        self, policies: Iterable[_Spec], check: Callable[[_Spec, TextConfig], None], asked: bool
    ) -> dict[str, _Spec]:
        """Those that fit the model, by name.

        Named policies are for E4B's shapes: where nobody asked for one that does not fit, all others go on. Raises
        SpecError for one that was asked for.
        """
        found = {}
        for policy in policies:
            try:
                check(policy, self.config)
            except SpecError as error:
                if asked:
                    raise
                self.left_out[policy.name] = str(error)
            else:
                found[policy.name] = policy
        return found

    def _check_priced(self, spec: WeightSpec) -> None:
        """Raise SpecError where no tensor can be priced under a spec that was asked for."""
        if not any(
            spec.with_dividing_group(tensor.shape[1] for tensor in self.tensors_of(part)) for part in self.classes
        ):
            raise SpecError(f"--price {spec}: its group or block divides the rows of no tensor class of this model")

    @property
    def name(self) -> str:
        """The checkpoint's name. A report goes to other people, so of a path it is only the last part."""
        if self.is_default:
            return SMALL_MODEL
        source = Path(self.checkpoint.source)
        return source.name if source.exists() else source.as_posix()

    @property
    def is_large(self) -> bool:
        """Whether slow measurements are optional or sampled, and prices are computed in reduced precision."""
        return self.nbytes > LARGE_CHECKPOINT_NBYTES

    @property
    def sampled_rows(self) -> int | None:
        """Rows of each tensor whose error is taken; None for all of them."""
        rows = self.options.rows
        if rows is None:
            return _DEFAULT_SAMPLED_ROWS if self.is_large else None
        return None if rows == "all" else rows

    def context_of(self, config: TextConfig) -> int:
        """Tokens that the KV cache of a resident footprint holds: `--context`, or what the model can take if less."""
        asked: int = self.options.context
        return min(config.max_position_embeddings, asked)

    @property
    def kv_tokens(self) -> int:
        """Tokens of the text that goes into the KV caches: no more than the model can take."""
        asked: int = self.options.kv_context
        return min(self.config.max_position_embeddings, asked)

    @property
    def kv_contexts(self) -> list[int]:
        """The context lengths at which a KV cache is measured: 128, doubled as long as there are tokens."""
        least = min(_LEAST_KV_CONTEXT, self.kv_tokens)
        return [least << doubled for doubled in range((self.kv_tokens // least).bit_length())]

    def tensors_of(self, tensor_class: TensorClass) -> list[TextTensor]:
        """The class's tensors in use, in the order of the layers."""
        return [
            tensor
            for tensor in expected_tensors(self.config)
            if tensor.tensor_class is tensor_class and not tensor.unused
        ]

    @property
    def layer_types(self) -> list[str]:
        """The types of layers that the model has, sliding ones first."""
        return sorted({layer.layer_type for layer in self.config.layers}, reverse=True)

    @cached_property
    def classes(self) -> list[TensorClass]:
        """The classes that the model has tensors of."""
        return [part for part in TensorClass if self.tensors_of(part)]

    def sample(self, tensor: TextTensor) -> Tensor:
        """The rows of a matrix whose error is taken: all, or a seeded sample that every scheme shares."""
        ids = self.sampled_ids(tensor)
        every = len(ids) == tensor.shape[0]
        return self._weights.get(tensor.name) if every else self._weights.rows(tensor.name, ids)

    def sampled_ids(self, tensor: TextTensor) -> Tensor:
        """The numbers of these rows."""
        rows = min(self.sampled_rows or tensor.shape[0], tensor.shape[0])
        return torch.randperm(tensor.shape[0], generator=torch.Generator().manual_seed(SEED))[:rows].sort().values

    def windows(self, num_windows: int, window_tokens: int) -> Tensor:
        """Windows of the evaluation text, int64 [num_windows, window_tokens]; see `text.token_windows`."""
        return token_windows(self.checkpoint, self.text, num_windows, window_tokens)

    def hessians(self, folder: Path) -> Mapping[str, Hessian]:
        """The Hessians that specs take: `--hessians`, or gathered from the calibration text into `folder`.

        Those of outputs among them only where a spec of the run has +yaqa.

        None at all on a large checkpoint without `--hessians`: gathering them is a run of its own. Raises TokenError
        where they are of the evaluation text: fitting and evaluation never share text.
        """
        if (hessians := self._hessians) is not None:
            self._check_apart(hessians.text_sha256)
            return hessians
        if self.is_large:
            return {}
        text = self.calibration_text
        self._check_apart(text_sha256(text))
        windows = self._hessian_windows(text, self._num_hessian_windows)
        path, outputs = folder / "calibration.safetensors", self._compensates_rows
        return gather(self.checkpoint, text, windows, path, outputs=outputs)

    @cached_property
    def _hessians(self) -> Hessians | None:
        """What `--hessians` names."""
        return Hessians(self.options.hessians, self.checkpoint) if self.options.hessians else None

    def evaluation_hessians(self, folder: Path) -> Hessians | None:
        """The Hessians of the evaluation text, which give the output error on it; None on a large checkpoint."""
        if self.is_large:
            return None
        windows = self._hessian_windows(self.text, HESSIAN_WINDOWS)
        return gather(self.checkpoint, self.text, windows, folder / "evaluation.safetensors")

    def _hessian_windows(self, text: Path, num_windows: int) -> Tensor:
        return token_windows(self.checkpoint, text, num_windows, HESSIAN_WINDOW_TOKENS)

    @cached_property
    def _compensates_rows(self) -> bool:
        """Whether a spec of the run has +yaqa."""
        return any(spec.yaqa for spec in {*self._asked_specs, *self._policy_specs})

    @property
    def _num_hessian_windows(self) -> int:
        return _OUTPUT_HESSIAN_WINDOWS if self._compensates_rows else HESSIAN_WINDOWS

    @property
    def text(self) -> Path:
        """The evaluation text."""
        return self.options.text or self._small_model / "eval.txt"

    @property
    def calibration_text(self) -> Path:
        """The text that is fitted to, and never evaluated on."""
        return self.options.calibration_text or self._small_model / "calibration.txt"

    @property
    def num_windows(self) -> int:
        """The windows of a text that quality is measured on: `--windows`."""
        given: int | None = self.options.windows
        return given or (1 if self.is_large else _DEFAULT_WINDOWS)

    @property
    def window_tokens(self) -> int:
        """The tokens of each: `--window-tokens`, by default enough for most to be past what a sliding layer sees."""
        given: int | None = self.options.window_tokens
        sliding = [
            layer.attention.sliding_window for layer in self.config.layers if layer.attention.sliding_window is not None
        ]
        return given or min(4 * max(sliding, default=128), self.config.max_position_embeddings)

    @property
    def quality_windows(self) -> Tensor:
        """The windows of the evaluation text that quality is measured on: `--windows` of `--window-tokens`."""
        return self.windows(self.num_windows, self.window_tokens)

    @property
    def wants_prices(self) -> bool:
        """Whether tensors are priced: always on a small checkpoint, on one over 1 GB only where asked for."""
        asked = self.options.prices or self.options.price or self.options.by_layer
        return bool(asked) or not self.is_large

    @cached_property
    def price_windows(self) -> Tensor:
        """The windows of the calibration text that prices are taken on; not those that Hessians are of.

        Raises TokenError where both texts are one.
        """
        self._check_apart(text_sha256(self.calibration_text))
        num_windows = self.num_windows * (1 if self.is_large else _PRICE_WINDOWS)
        skip = self._num_hessian_windows * (HESSIAN_WINDOW_TOKENS - 1) if self._fits_hessians else 0
        sizes = num_windows, self.window_tokens
        return token_windows(self.checkpoint, self.calibration_text, *sizes, skip=skip, least=1)

    @cached_property
    def _fits_hessians(self) -> bool:
        """Whether the calibration text gives the Hessians, with some left for prices."""
        if self.options.hessians or self.is_large:
            return False
        try:
            self._hessian_windows(self.calibration_text, self._num_hessian_windows + HESSIAN_WINDOWS)
        except TokenError:
            return False
        return True

    @cached_property
    def priced_specs(self) -> tuple[WeightSpec, ...]:
        """The specs that tensors are priced under: `--price`, or the best at each width; and those of the policies.

        Ones with `+gptq` or `+yaqa` only where there are Hessians; trellises of a large checkpoint, which take long to
        encode, only on demand.
        """
        fitted = self._fits_hessians if self._hessians is None else self._hessians.are_whole
        candidates = [spec for spec in CANDIDATES if not self._is_on_demand(spec)]
        every = dict.fromkeys((*(self._asked_specs or candidates), *self._policy_specs))
        return tuple(spec for spec in every if not spec.info.is_plain and (fitted or not spec.compensated))

    @property
    def prices_importance(self) -> bool:
        """Whether `+imatrix` takes the importance that the pass of the prices finds: where that needs no Hessians."""
        compensated = any(spec.compensated for spec in self.priced_specs)
        return self.wants_prices and self._hessians is None and not compensated

    @property
    def _asked_specs(self) -> list[WeightSpec]:
        return [WeightSpec.parse(text) for text in self.options.price]

    @property
    def _policy_specs(self) -> list[WeightSpec]:
        """Those that the run's policies quantize to, published files apart."""
        quantizing = (policy for policy in self.policies.values() if policy.file is None)
        return [spec for policy in quantizing for spec in sorted(policy.weight_specs, key=str)]

    @property
    def priced_kv(self) -> list[KVSpec]:
        """The KV specs that K and V are priced under: those of the run that quantize."""
        return [spec for spec in self.kv_policies.values() if not spec.is_plain]

    @property
    def price_facts(self) -> dict[str, str]:
        """What the file of prices says of where they come from."""
        return {"text_sha256": text_sha256(self.calibration_text), "epic_quant": __version__}

    @property
    def prices_file(self) -> Path | None:
        """Where prices are written: beside the JSON; None where none is."""
        written: Path | None = getattr(self.options, "benchmark_json", None)
        return None if written is None else prices_path(written)

    @contextmanager
    def progress(self, what: str, steps: int) -> Iterator[Callable[[str], None]]:
        """A progress bar on a terminal: each call advances it a step and names the next."""
        with tqdm(total=steps, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed") as bar:

            def step(where: str) -> None:
                bar.set_description(f"{what}: {where}")
                bar.update()

            yield step

    def _check_apart(self, fitted_sha256: str) -> None:
        if fitted_sha256 == text_sha256(self.text):
            raise TokenError(f"{self.text}: calibrated on the evaluation text; expected two texts")

    def token_ids(self, path: Path) -> Ids:
        """A file's tokens under the checkpoint's own tokenizer, or the ids in a .npy file: int64 [n].

        Of the evaluation text it is the first 2^18 tokens.

        Raises TokenError where the file cannot be read, is too short to evaluate a cache on, or has an id out of range.
        """
        rows = self.config.ple_vocab_size
        if path.suffix == ".npy":
            return load_ids(path, rows)
        most = _MOST_TRACE_TOKENS if path == self.text else None
        return check_trace(text_ids(self.checkpoint, path, most), rows, str(path))

    @cached_property
    def used_names(self) -> list[str]:
        """The names in the file of the text tensors in use."""
        tensors = self._weights.tensors.values()
        return [self._weights.file_name(tensor.name) for tensor in tensors if not tensor.unused]

    def check_values(self) -> None:
        """Read the weights once. Raises CheckpointError, naming tensor and row, where no figure could be had of them.

        Nothing is read with `--no-check`.
        """
        if not self.options.no_check:
            with self.progress("check", len(self.used_names)) as step:
                for name in check_values(self.checkpoint, self.used_names):
                    step(name)

    def check_inputs(self, fixtures: Collection[str]) -> None:
        """Raise now the errors that the named files, and the texts that these fixtures read, would raise later."""
        named = [self.options.text, self.options.calibration_text]
        for path in named:
            if path is not None:
                token_windows(self.checkpoint, path, 1, 2)
        if self._hessians is not None:
            self._check_apart(self._hessians.text_sha256)
            self._hessians.check({*self._asked_specs, *self._policy_specs})
        elif any(named):
            self._check_apart(text_sha256(self.calibration_text))
        if self.options.ple_trace:
            self.token_ids(self.options.ple_trace)
        if self.options.resume:
            self.resume_file("quality")
        for name, read in _READ.items():
            if name in fixtures:
                read(self)
        if READ_WEIGHTS & set(fixtures):
            self.check_values()

    @cached_property
    def evaluated(self) -> dict[str, PolicySpec | Variant]:
        """The policies whose quality is measured, and the noise floor; not those that lack Hessians."""
        hessians = bool(self.options.hessians) or not self.is_large

        def is_fitted(spec: WeightSpec) -> bool:
            return not spec.needs_hessian or hessians or (spec.imatrix and self.prices_importance)

        found: dict[str, PolicySpec | Variant] = {
            name: policy for name, policy in self.policies.items() if all(map(is_fitted, policy.weight_specs))
        }
        return found | {NOISE_FLOOR: noise_floor()}

    @cached_property
    def ablations(self) -> dict[str, Ablation]:
        """The ablations whose divergence is measured, by name; on a large checkpoint only where asked for."""
        if not self.wants_prices:
            return {}
        quantized = [spec for spec in self.kv_policies.values() if not spec.is_plain]
        found = ablations(self.config, quantized, by_layer=self.options.by_layer)
        return {str(ablation): ablation for ablation in found}

    @property
    def memory_nbytes(self) -> int:
        """RAM for evaluating: `--memory`, or half of what is free."""
        return self.options.memory or default_memory_nbytes()

    def resume_file(self, name: str) -> Path | None:
        """Where the state of an evaluation is kept, in the folder that `--resume` names; None without it."""
        if self.options.resume is None:
            return None
        folder: Path = self.options.resume
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made a folder to resume from: {error.strerror}") from error
        return folder / f"{name}.safetensors"

    def plan_of(self, name: str, variants: Mapping[str, PolicySpec | Variant], windows: int) -> list[str]:
        """What evaluating these takes on so many windows, as lines for people."""
        return plan_quality(name, self.config, variants, windows, self.window_tokens, self.memory_nbytes)

    @cached_property
    def published_files(self) -> dict[str, list[str]]:
        """Of each policy that is a published file, its difference from the checkpoint, as lines for people."""
        reference = CheckpointWeights(self.checkpoint)
        found = {}
        for name, policy in self.policies.items():
            if policy.file is not None:
                weights = weights_of(self.checkpoint, policy)
                assert isinstance(weights, PublishedWeights)
                found[name] = [weights.file.kind, *differences(weights, reference)]
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts of this run that the report needs besides its records."""
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": {
                "source": self.name,
                "fingerprint": self.checkpoint.fingerprint,
                "nbytes": self.nbytes,
                "dtype": " ".join(sorted({dtype_name(self.checkpoint.dtype(name)) for name in self.used_names})),
                "num_layers": self.config.num_layers,
                "kind": "trained-small" if self.is_default else "user",
            },
            "layer_types": [layer.layer_type for layer in self.config.layers],
            "policies": list(self.policies),
            "policy_strings": {name: str(policy.without_folder) for name, policy in self.policies.items()},
            "published_files": self.published_files,
            "versions": {"epic_quant": __version__, "python": platform.python_version(), **_library_versions()},
            "cpu": machine.cpu_name(),
            "threads": torch.get_num_threads(),
            "isa": self.isa,
            "platform": f"{platform.system()} {platform.machine()}",
            "read_bandwidth_gbs": machine.read_bandwidth() / 1e9,
            "seed": SEED,
            "context": self.context_of(self.config),
            "kv_tokens": self.kv_tokens,
            "sampled_rows": self.sampled_rows,
            "commit": _commit(self._repository),
        }


# What the benchmarks' fixtures read of the texts.
_READ: Mapping[str, Callable[[Run], object]] = {
    "qualities": lambda run: run.quality_windows,
    "sensitivities": lambda run: run.quality_windows if run.ablations else None,
    "prices": lambda run: run.price_windows if run.wants_prices else None,
    "window": lambda run: run.windows(1, run.kv_tokens),
    "trace_of": lambda run: run.token_ids(run.text) if run.config.ple_dim else None,
    "block_inputs": lambda run: run.windows(1, 2),
    "divergences": lambda run: run.windows(1, 2),
    "evaluation_hessians": lambda run: None if run.is_large else run.windows(1, 2),
}


# The benchmarks' fixtures that read the checkpoint's weights.
READ_WEIGHTS = {
    "qualities",
    "sensitivities",
    "prices",
    "recipes",
    "class_tensors",
    "block_inputs",
    "captured",
    "divergences",
    "source_of",
}


def _check_names(policies: Iterable[PolicySpec]) -> None:
    """Raise SpecError where two that differ have one name, as files of one name in two folders: one would be lost."""
    by_name: dict[str, PolicySpec] = {}
    for policy in policies:
        if by_name.setdefault(policy.name, policy) != policy:
            raise SpecError(
                f"--policy: two different policies are called {policy.name}; rename one of the files, or write "
                "OTHER=file:PATH"
            )


def _library_versions() -> dict[str, str]:
    names = ("torch", "numpy", "safetensors", "tokenizers", "pytest", "pytest-benchmark")
    return {name: importlib.metadata.version(name) for name in names}


def _commit(repository: Path) -> str | None:
    """The commit that is checked out, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None

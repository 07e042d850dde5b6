"""What one session measures: the checkpoint, the policies and the texts, and the facts that its JSON tells of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epic_quant import __version__, kernels, kv, machine
from epic_quant.calibration import Hessians, gather, text_sha256
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, TokenError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TensorClass, TextTensor, expected_tensors, text_tensors
from epic_quant.kv import KVPolicy
from epic_quant.plan import plan_quality
from epic_quant.ple.residency import Ids
from epic_quant.ple.traces import check_trace, load_ids
from epic_quant.policy import NAMED, UNQUANTIZED, Policy
from epic_quant.quality import NOISE_FLOOR, Ablation, Variant, changes, noise_floor
from epic_quant.quality.passes import default_memory_nbytes
from epic_quant.quant import quantizer
from epic_quant.records import SCHEMA_VERSION
from epic_quant.text import open_tokenizer, token_windows

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_CHECKPOINT = REPOSITORY / "benchmarks" / "mini_gemma4"
SEED = 0

# Above this size the error of a tensor is taken on a sample of its rows (`--rows`).
LARGE_CHECKPOINT_NBYTES = 1_000_000_000
_DEFAULT_SAMPLED_ROWS = 256

# The text that Hessians are gathered from: enough that those of 512 columns have full rank many times over.
HESSIAN_WINDOWS, HESSIAN_WINDOW_TOKENS = 16, 512

_LEAST_KV_CONTEXT = 128

_DEFAULT_WINDOWS = 3


class Run:
    """What one benchmark session measures: the checkpoint, its config and the policies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.isa = kernels.isa()
        self.policies = {policy.name: policy for policy in map(Policy.parse, self.options.policy)}
        if not self.policies:
            self.policies = dict(NAMED)
        # Everything is held against bf16, so it is always there.
        self.policies = {"bf16": NAMED["bf16"]} | self.policies
        said = [KVPolicy.parse(text) for text in self.options.kv_policy] or kv.NAMED.values()
        self.kv_policies = {"bf16": kv.NAMED["bf16"]} | {policy.name: policy for policy in said}
        source = self.options.checkpoint or DEFAULT_CHECKPOINT
        self.is_default = Path(source).resolve() == DEFAULT_CHECKPOINT
        self.checkpoint = Checkpoint.open(
            source,
            config=self.options.config,
            tokenizer=self.options.tokenizer,
            download=self.options.download,
        )
        self.config = TextConfig.read(self.checkpoint)
        for policy in self.policies.values():
            policy.check(self.config)
        self._file_names = text_tensors(self.checkpoint, self.config)
        self.nbytes = sum(self.checkpoint.nbytes(name) for name in self.checkpoint.names)

    @property
    def name(self) -> str:
        """What the checkpoint is called. A report goes to other people, so of a path it is only the last part."""
        if self.is_default:
            return "benchmarks/mini_gemma4"
        source = Path(self.checkpoint.source)
        return source.name if source.exists() else source.as_posix()

    @property
    def sampled_rows(self) -> int | None:
        """Rows of each tensor whose error is taken; None for all of them."""
        rows = self.options.rows
        if rows is None:
            return _DEFAULT_SAMPLED_ROWS if self.nbytes > LARGE_CHECKPOINT_NBYTES else None
        return None if rows == "all" else rows

    @property
    def kv_tokens(self) -> int:
        """Tokens of the text that goes into the KV caches: no more than the model can take."""
        asked: int = self.options.kv_context
        return min(self.config.max_position_embeddings, asked)

    @property
    def kv_contexts(self) -> list[int]:
        """The context lengths at which a KV cache is judged: 128, doubled as long as there are tokens."""
        least = min(_LEAST_KV_CONTEXT, self.kv_tokens)
        return [least << doubled for doubled in range((self.kv_tokens // least).bit_length())]

    def tensors_of(self, tensor_class: TensorClass) -> list[TextTensor]:
        """The class's live tensors, in the order of the layers."""
        return [
            tensor
            for tensor in expected_tensors(self.config)
            if tensor.tensor_class is tensor_class and not tensor.unused
        ]

    def sample(self, tensor: TextTensor) -> Tensor:
        """The rows of a matrix whose error is taken: all, or a seeded sample that every scheme shares."""
        name, rows = self._file_names[tensor.name], self.sampled_rows
        if rows is None or tensor.shape[0] <= rows:
            return self.checkpoint.tensor(name)
        ids = torch.randperm(tensor.shape[0], generator=torch.Generator().manual_seed(SEED))[:rows]
        return self.checkpoint.rows(name, ids.sort().values)

    def windows(self, num_windows: int, window_tokens: int) -> Tensor:
        """Windows of the evaluation text, int64 [num_windows, window_tokens]; see `text.token_windows`."""
        return token_windows(self.checkpoint, self.text, num_windows, window_tokens)

    def hessians(self, folder: Path) -> Mapping[str, Tensor]:
        """The Hessians that +gptq is fitted with: `--hessians`, or gathered from the calibration text into `folder`.

        None at all on a large checkpoint without `--hessians`: gathering them is a run of its own. Raises TokenError
        where they are of the evaluation text: what is fitted and what is judged never share text.
        """
        if self.options.hessians:
            hessians = Hessians(self.options.hessians, self.checkpoint)
        elif self.nbytes > LARGE_CHECKPOINT_NBYTES:
            return {}
        else:
            text = self.calibration_text
            hessians = gather(self.checkpoint, text, self._hessian_windows(text), folder / "calibration.safetensors")
        self._check_apart(hessians.text_sha256)
        return hessians

    def evaluation_hessians(self, folder: Path) -> Hessians | None:
        """The Hessians of the evaluation text, which give the output error on it; None on a large checkpoint."""
        if self.nbytes > LARGE_CHECKPOINT_NBYTES:
            return None
        return gather(self.checkpoint, self.text, self._hessian_windows(self.text), folder / "evaluation.safetensors")

    def _hessian_windows(self, text: Path) -> Tensor:
        return token_windows(self.checkpoint, text, HESSIAN_WINDOWS, HESSIAN_WINDOW_TOKENS)

    @property
    def text(self) -> Path:
        """The evaluation text."""
        return self.options.text or DEFAULT_CHECKPOINT / "eval.txt"

    @property
    def calibration_text(self) -> Path:
        """The text that is fitted to, and never judged on."""
        return self.options.calibration_text or DEFAULT_CHECKPOINT / "calibration.txt"

    @property
    def num_windows(self) -> int:
        """The windows of a text that quality is judged on: `--windows`."""
        given: int | None = self.options.windows
        return given or (1 if self.nbytes > LARGE_CHECKPOINT_NBYTES else _DEFAULT_WINDOWS)

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
        """The windows of the evaluation text that quality is judged on: `--windows` of `--window-tokens`."""
        return self.windows(self.num_windows, self.window_tokens)

    @property
    def sensitivity_windows(self) -> Tensor:
        """The same, and after them as many of the calibration text. Raises TokenError where both texts are one."""
        self._check_apart(text_sha256(self.calibration_text))
        counts = self.num_windows, self.window_tokens
        return torch.cat([self.windows(*counts), token_windows(self.checkpoint, self.calibration_text, *counts)])

    def _check_apart(self, fitted_sha256: str) -> None:
        if fitted_sha256 == text_sha256(self.text):
            raise TokenError(f"{self.text}: calibrated on the text that is judged on; expected two texts")

    def token_ids(self, path: Path) -> Ids:
        """A file's tokens under the checkpoint's own tokenizer, or the ids in a .npy file: int64 [n].

        Raises TokenError where the file cannot be read, is too short to judge a cache by, or has an id out of range.
        """
        rows = self.config.ple_vocab_size
        if path.suffix == ".npy":
            return load_ids(path, rows)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        ids = open_tokenizer(self.checkpoint, self.config).encode(text, add_special_tokens=False).ids
        return check_trace(np.array(ids, dtype=np.int64), rows, str(path))

    def check_inputs(self, fixtures: Collection[str]) -> None:
        """Raise now what the files that were named, and the texts that these fixtures read, would raise later."""
        named = [self.options.text, self.options.calibration_text]
        for path in named:
            if path is not None:
                token_windows(self.checkpoint, path, 1, 2)
        if self.options.hessians:
            self._check_apart(Hessians(self.options.hessians, self.checkpoint).text_sha256)
        elif any(named):
            self._check_apart(text_sha256(self.calibration_text))
        if self.options.ple_trace:
            self.token_ids(self.options.ple_trace)
        if self.options.resume:
            self.resume_file("quality")
        for name, read in _READ.items():
            if name in fixtures:
                read(self)

    @cached_property
    def evaluated(self) -> dict[str, Policy | Variant]:
        """The policies whose quality is judged, and the noise floor; not those that lack the Hessians to be fitted."""
        fitted = bool(self.options.hessians) or self.nbytes <= LARGE_CHECKPOINT_NBYTES
        found: dict[str, Policy | Variant] = {
            name: policy
            for name, policy in self.policies.items()
            if fitted or not any(quantizer(spec).gptq for spec in policy.all_specs)
        }
        return found | {NOISE_FLOOR: noise_floor()}

    @cached_property
    def changes(self) -> dict[str, Ablation]:
        """The single changes whose sensitivity is measured, by name; on a large checkpoint only where asked for."""
        asked = self.options.by_layer or "sensitivity" in self.options.keyword
        if self.nbytes > LARGE_CHECKPOINT_NBYTES and not asked:
            return {}
        quantized = [name for name, policy in self.kv_policies.items() if str(policy) not in (UNQUANTIZED, "fp32")]
        found = changes(self.config, quantized, by_layer=self.options.by_layer)
        return {str(change): change for change in found}

    @property
    def memory_nbytes(self) -> int:
        """What evaluating may take: `--memory`, or half of what is free."""
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

    def plan_of(self, name: str, variants: Mapping[str, Policy | Variant], windows: int) -> list[str]:
        """What evaluating these takes on so many windows, for people."""
        return plan_quality(name, self.config, variants, windows, self.window_tokens, self.memory_nbytes)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the report must say of this run besides its records."""
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": {
                "source": self.name,
                "fingerprint": self.checkpoint.fingerprint,
                "nbytes": self.nbytes,
                "num_layers": self.config.num_layers,
                "kind": "trained-small" if self.is_default else "user",
            },
            "layer_types": [layer.layer_type for layer in self.config.layers],
            "policies": list(self.policies),
            "policy_strings": {name: str(policy) for name, policy in self.policies.items()},
            "versions": {"epic_quant": __version__, "python": platform.python_version(), **_library_versions()},
            "cpu": machine.cpu_name(),
            "threads": torch.get_num_threads(),
            "isa": self.isa,
            "platform": f"{platform.system()} {platform.machine()}",
            "read_bandwidth_gbs": machine.read_bandwidth() / 1e9,
            "seed": SEED,
            "context": self.options.context,
            "kv_tokens": self.kv_tokens,
            "sampled_rows": self.sampled_rows,
            "commit": _commit(),
        }


# What the benchmarks' fixtures read of the texts.
_READ: Mapping[str, Callable[[Run], object]] = {
    "qualities": lambda run: run.quality_windows,
    "sensitivities": lambda run: run.sensitivity_windows if run.changes else None,
    "window": lambda run: run.windows(1, run.kv_tokens),
    "trace_of": lambda run: run.token_ids(run.text),
    "block_inputs": lambda run: run.windows(1, 2),
    "divergences": lambda run: run.windows(1, 2),
    "evaluation_hessians": lambda run: None if run.nbytes > LARGE_CHECKPOINT_NBYTES else run.windows(1, 2),
}


def _library_versions() -> dict[str, str]:
    names = ("torch", "numpy", "safetensors", "tokenizers", "pytest", "pytest-benchmark")
    return {name: importlib.metadata.version(name) for name in names}


def _commit() -> str | None:
    """The commit that is checked out, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None

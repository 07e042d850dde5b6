"""The pytest glue: options, fixtures, run facts in the JSON, the table at the end of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import Tensor

from epic_quant import __version__, kernels, kv, machine
from epic_quant.calibration import Moments, gather, text_sha256
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, EpicQuantError, TokenError
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import TensorClass, TextTensor, expected_tensors, text_tensors
from epic_quant.kv import KVPolicy
from epic_quant.plan import plan, plan_quality
from epic_quant.policy import NAMED, UNQUANTIZED, Policy
from epic_quant.quality import NOISE_FLOOR, Change, Variant, changes, noise_floor
from epic_quant.quality.passes import default_memory_nbytes
from epic_quant.quant import quantizer
from epic_quant.records import JSON_KEY, METRICS, SCHEMA_VERSION, Record
from epic_quant.text import token_windows

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CHECKPOINT = REPOSITORY / "benchmarks" / "mini_gemma4"
SEED = 0

# Above this size the error of a tensor is taken on a sample of its rows (`--rows`).
LARGE_CHECKPOINT_NBYTES = 1_000_000_000
_DEFAULT_SAMPLED_ROWS = 256

# The text that moments are gathered from: enough that those of 512 columns have full rank many times over.
MOMENT_WINDOWS, MOMENT_WINDOW_TOKENS = 16, 512

_LEAST_KV_CONTEXT = 128

_DEFAULT_WINDOWS = 3

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError
    return value


def _nbytes(text: str) -> int:
    """`6GB`, `800 MB`, `1.5e9`: bytes, in the powers of ten that reports print."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None or not (value := int(float(found[1]) * _UNITS[found[2].upper()])):
        raise ValueError
    return value


def _rows(text: str) -> int | str:
    return text if text == "all" else _positive(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line of the benchmarks."""
    group = parser.getgroup("epic_quant", "what is measured")
    group.addoption("--checkpoint", metavar="SOURCE", help="file, folder or hub id (default: the small trained model)")
    group.addoption("--config", metavar="FILE", help="config.json, where it is not beside the checkpoint")
    group.addoption("--tokenizer", metavar="FILE", help="tokenizer.json, where it is not beside the checkpoint")
    group.addoption("--download", action="store_true", help="download a hub id that is not in the local cache")
    group.addoption(
        "--policy",
        action="append",
        default=[],
        metavar="NAME_OR_STRING",
        help="measure this policy (repeatable; default: all named ones), such as int4-g128 or mlp=int4,ple=lru:5000",
    )
    group.addoption("--context", type=_positive, default=8192, metavar="TOKENS", help="length that the KV cache holds")
    group.addoption(
        "--kv-policy",
        action="append",
        default=[],
        metavar="NAME_OR_STRING",
        help="measure this KV policy (repeatable; default: all named ones), such as int4+had or k=int4@64/v=int4",
    )
    group.addoption(
        "--kv-context", type=_positive, default=4096, metavar="TOKENS", help="longest text that goes into a KV cache"
    )
    group.addoption("--rows", type=_rows, metavar="N|all", help="rows of each tensor whose error is taken")
    group.addoption("--text", type=Path, metavar="FILE", help="evaluation text (default: the small model's eval.txt)")
    group.addoption(
        "--calibration-text", type=Path, metavar="FILE", help="text that +gptq is fitted to, never judged on"
    )
    group.addoption("--moments", type=Path, metavar="FILE", help="moments that python -m epic_quant.calibration made")
    group.addoption(
        "--windows",
        type=_positive,
        metavar="N",
        help="windows of each text that quality is judged on (default: 3; 1 on a checkpoint over 1 GB)",
    )
    group.addoption(
        "--window-tokens",
        type=_positive,
        metavar="N",
        help="tokens of each window, BOS included (default: four times what a sliding layer sees)",
    )
    group.addoption("--by-layer", action="store_true", help="sensitivities of every layer alone too, on any checkpoint")
    group.addoption(
        "--memory",
        type=_nbytes,
        metavar="SIZE",
        help="RAM for evaluating quality, as 6GB (default: half of what is free)",
    )
    group.addoption(
        "--resume", type=Path, metavar="FOLDER", help="keep the state of long evaluations there, and go on from it"
    )
    group.addoption("--ple-trace", type=Path, metavar="FILE", help="text or .npy ids to judge the PLE row cache by")
    group.addoption("--plan", action="store_true", help="say what would be measured and how long it takes, and stop")


class Run:
    """What one benchmark session measures: the checkpoint, its config and the policies."""

    def __init__(self, config: pytest.Config) -> None:
        self.options = config.option
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
            if tensor.tensor_class is tensor_class and not tensor.dead
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

    def moments(self, folder: Path) -> Mapping[str, Tensor]:
        """The moments that +gptq is fitted with: `--moments`, or gathered from the calibration text into `folder`.

        None at all on a large checkpoint without `--moments`: gathering them is a run of its own. Raises TokenError
        where they are of the evaluation text: what is fitted and what is judged never share text.
        """
        if self.options.moments:
            moments = Moments(self.options.moments, self.checkpoint)
        elif self.nbytes > LARGE_CHECKPOINT_NBYTES:
            return {}
        else:
            text = self.calibration_text
            moments = gather(self.checkpoint, text, self._moment_windows(text), folder / "calibration.safetensors")
        if moments.text_sha256 == text_sha256(self.text):
            raise TokenError(f"{self.text}: calibrated on the text that is judged on; expected two texts")
        return moments

    def evaluation_moments(self, folder: Path) -> Moments | None:
        """The moments of the evaluation text, which give the output error on it; None on a large checkpoint."""
        if self.nbytes > LARGE_CHECKPOINT_NBYTES:
            return None
        return gather(self.checkpoint, self.text, self._moment_windows(self.text), folder / "evaluation.safetensors")

    def _moment_windows(self, text: Path) -> Tensor:
        return token_windows(self.checkpoint, text, MOMENT_WINDOWS, MOMENT_WINDOW_TOKENS)

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
        sliding = [layer.sliding_window for layer in self.config.layers if layer.sliding_window is not None]
        return given or min(4 * max(sliding, default=128), self.config.max_position_embeddings)

    @property
    def quality_windows(self) -> Tensor:
        """The windows of the evaluation text that quality is judged on: `--windows` of `--window-tokens`."""
        return self.windows(self.num_windows, self.window_tokens)

    @property
    def sensitivity_windows(self) -> Tensor:
        """The same, and after them as many of the calibration text. Raises TokenError where both texts are one."""
        if text_sha256(self.calibration_text) == text_sha256(self.text):
            raise TokenError(f"{self.text}: calibrated on the text that is judged on; expected two texts")
        counts = self.num_windows, self.window_tokens
        return torch.cat([self.windows(*counts), token_windows(self.checkpoint, self.calibration_text, *counts)])

    @cached_property
    def evaluated(self) -> dict[str, Policy | Variant]:
        """The policies whose quality is judged, and the noise floor; not those that lack the moments to be fitted."""
        fitted = bool(self.options.moments) or self.nbytes <= LARGE_CHECKPOINT_NBYTES
        found: dict[str, Policy | Variant] = {
            name: policy
            for name, policy in self.policies.items()
            if fitted or not any(quantizer(spec).gptq for spec in policy.all_specs)
        }
        return found | {NOISE_FLOOR: noise_floor()}

    @cached_property
    def changes(self) -> dict[str, Change]:
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

    def facts(self) -> dict[str, Any]:
        """What the report must say of this run besides its records."""
        # A report goes to other people, so of a path it has only the last part.
        source = Path(self.checkpoint.source)
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": {
                "source": "benchmarks/mini_gemma4"
                if self.is_default
                else source.name
                if source.exists()
                else source.as_posix(),
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


_RUN = pytest.StashKey[Run]()
_RECORDS = pytest.StashKey[list[tuple[Record, Any]]]()


def _run_of(config: pytest.Config) -> Run:
    """The session's run, opened when a benchmark first needs it; what cannot be opened ends pytest with status 2."""
    if _RUN not in config.stash:
        try:
            config.stash[_RUN] = Run(config)
        except EpicQuantError as error:
            pytest.exit(str(error), returncode=2)
    return config.stash[_RUN]


def pytest_configure(config: pytest.Config) -> None:
    """Say at once what is wrong with the run, before anything is collected."""
    config.stash[_RECORDS] = []
    distributed = bool(getattr(config.option, "numprocesses", None))
    if config.getoption("benchmark_json", None) and (distributed or config.getoption("benchmark_disable", False)):
        reason = "tests run in several processes (-n)" if distributed else "--benchmark-disable was given"
        raise pytest.UsageError(f"no --benchmark-json can be written: nothing is timed, since {reason}")
    if _runs_benchmarks(config):
        _run_of(config)


def _runs_benchmarks(config: pytest.Config) -> bool:
    return any("benchmarks" in Path(argument.partition("::")[0]).parts for argument in config.args)


_NO_SENSITIVITIES = [
    pytest.param(
        "none", marks=pytest.mark.skip(reason="on a checkpoint over 1 GB only with -k sensitivity or --by-layer")
    )
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test every policy, KV policy and single change that it takes by name, and every context of a KV cache.

    Recipes are made at the bytes of every policy but bf16. With a `tensor_class` it gets the policies that quantize
    that class.
    """
    if "kv_policy_name" in metafunc.fixturenames:
        metafunc.parametrize("kv_policy_name", list(_run_of(metafunc.config).kv_policies))
    if "kv_context" in metafunc.fixturenames:
        metafunc.parametrize("kv_context", _run_of(metafunc.config).kv_contexts)
    if "change_name" in metafunc.fixturenames:
        # Without a single one pytest would only say that there is none.
        metafunc.parametrize("change_name", list(_run_of(metafunc.config).changes) or _NO_SENSITIVITIES)
    if "recipe_at" in metafunc.fixturenames:
        run = _run_of(metafunc.config)
        names = [name for name in run.policies if name != "bf16"]
        metafunc.parametrize("recipe_at", names if names and run.changes else _NO_SENSITIVITIES)
    if "policy_name" not in metafunc.fixturenames:
        return
    policies = _run_of(metafunc.config).policies
    if "tensor_class" in metafunc.fixturenames:
        pairs = [(name, str(part)) for name, policy in policies.items() for part in policy.quantized_classes]
        metafunc.parametrize(("policy_name", "tensor_class"), pairs)
    else:
        metafunc.parametrize("policy_name", list(policies))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Any:
    """Wrong input that all of a session rests on ends it with one line and status 2, not every test by itself."""
    try:
        return (yield)
    except EpicQuantError as error:
        if fixturedef.scope == "session" and _runs_benchmarks(request.config):
            pytest.exit(str(error), returncode=2)
        raise


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    """The session's checkpoint, config and policies."""
    return _run_of(request.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let go of the checkpoint, which the JSON's run facts still needed after the last test."""
    if _RUN in config.stash:
        config.stash[_RUN].checkpoint.close()


@pytest.fixture
def policy(run: Run, policy_name: str) -> Policy:
    """One of the run's policies."""
    return run.policies[policy_name]


@pytest.fixture
def kv_policy(run: Run, kv_policy_name: str) -> KVPolicy:
    """One of the run's KV policies."""
    return run.kv_policies[kv_policy_name]


RecordFunction = Callable[..., None]


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> RecordFunction:
    """`record(subject, labels, metrics, details)` puts a record into the benchmark's JSON; call it before timing."""

    def write(
        subject: str,
        labels: Mapping[str, str],
        metrics: Mapping[str, float | None],
        details: Mapping[str, Any] | None = None,
    ) -> None:
        made = Record(subject, labels, metrics, details or {})
        # pytest-benchmark keeps a reference to this dict, so it is filled and never replaced.
        benchmark.extra_info[JSON_KEY] = made.to_json()
        request.config.stash[_RECORDS].append((made, benchmark))

    return write


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the run facts and drop the raw timings; done twice it is the same as once."""
    if _RUN in config.stash and JSON_KEY not in output_json:
        output_json[JSON_KEY] = config.stash[_RUN].facts() | {"arguments": _arguments(config)}
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def _arguments(config: pytest.Config) -> str:
    """The command line, without the folders of the machine in front of file names."""
    shortened = (re.sub(r"(^|=)(/|[A-Za-z]:\\)[^=]*[/\\]", r"\1", word) for word in config.invocation_params.args)
    return shlex.join(["pytest", *shortened])


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name what computes with packed weights, and what is measured, where a run has been opened."""
    try:
        computes = f"kernels: {kernels.description()}"
    except EpicQuantError as error:
        pytest.exit(str(error), returncode=2)
    if not _runs_benchmarks(config):
        return [computes]
    run = _run_of(config)
    kind = "the small trained model of this repository" if run.is_default else run.checkpoint.source
    rows = run.sampled_rows
    return [
        computes,
        f"checkpoint: {kind}, {run.nbytes / 1e6:,.1f} MB, {run.config.num_layers} layers",
        f"policies: {', '.join(run.policies)}",
        f"errors on: {'all rows' if rows is None else f'{rows} rows of each tensor (--rows)'}",
    ]


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--plan`, print the plan in place of measuring anything."""
    if not session.config.option.plan:
        return None
    run = _run_of(session.config)
    lines = plan(run.checkpoint, run.config, run.policies.values(), run.sampled_rows)
    planned = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if "qualities" in planned:
        lines += run.plan_of("quality", run.evaluated, run.num_windows)
    if "sensitivities" in planned and run.changes:
        variants = {name: change.variant() for name, change in run.changes.items()}
        lines += run.plan_of("sensitivity", variants, 2 * run.num_windows)
    if recipes := sum("recipe_at" in getattr(item, "fixturenames", ()) for item in session.items if run.changes):
        lines.append(f"recipes come of the sensitivities: up to {recipes} policies more, each as long as one above")
    print("\n".join([f"{len(session.items)} measurements would be made", *lines]))
    return True


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A short table of what was measured: `extra_info` has no column in pytest-benchmark's own."""
    records = config.stash[_RECORDS]
    if not records:
        return
    rows = [_summary_row(made, benchmark) for made, benchmark in records]
    terminalreporter.section("epic_quant")
    terminalreporter.write_line(tabulate(rows, headers=["subject", "of", "measured", "median"], tablefmt="simple"))
    output = config.getoption("benchmark_json", None)
    if output:
        terminalreporter.write_line(f"\nreport: python -m epic_quant.report {shlex.quote(str(output))}")


def _summary_row(record: Record, benchmark: Any) -> list[str]:
    labels = " ".join(record.labels.values())
    measured = "  ".join(f"{name} {_short(name, value)}" for name, value in record.metrics.items())
    # A test that failed before its timed call has no stats.
    median = f"{benchmark.stats.stats.median * 1e3:.3g} ms" if benchmark.stats else "—"
    return [record.subject, labels, measured, median]


def _short(name: str, value: float | None) -> str:
    if value is None:
        return "—"
    if METRICS[name].unit == "B":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:.3g}"

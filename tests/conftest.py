"""What several test files use: small random Gemma 4 models as `transformers` saves them, and E4B's real header."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Processes beside each other whose threads wait by spinning slow each other down many times over.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.tensors import expected_tensors

if TYPE_CHECKING:
    from transformers import Gemma4ForCausalLM

# Times are never asserted: machines are shared.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# Importing hypothesis takes a second, and the benchmarks need none.
_PYTEST = ["-m", "pytest", "-pno:cacheprovider", "-pno:hypothesispytest", "-pno:anyio"]
_REPOSITORY = Path(__file__).resolve().parents[1]
_FACTS = _REPOSITORY / "benchmarks" / "facts"

_E4B = {
    "vocab_size": 120,
    "vocab_size_per_layer_input": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "num_kv_shared_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
    "final_logit_softcapping": 30.0,
}
_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 2e4, "partial_rotary_factor": 0.5, "factor": 2.0},
}
TOYS: dict[str, dict[str, Any]] = {
    "e4b": _E4B,
    "e2b": _E4B
    | {
        "num_hidden_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 5,
        "num_key_value_heads": 1,
        "use_double_wide_mlp": True,
    },
    "no_ple": _E4B | {"hidden_size_per_layer_input": 0},
    "no_sharing": _E4B | {"num_hidden_layers": 6, "layer_types": None, "num_kv_shared_layers": 0},
    "one_layer": _E4B | {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_kv_shared_layers": 0},
    "all_full": _E4B | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 1},
    "wide_ple": _E4B | {"vocab_size_per_layer_input": 150},
    "other_rope": _E4B | {"global_head_dim": 16, "rope_parameters": _ROPE, "final_logit_softcapping": None},
}


@pytest.fixture(scope="session")
def e4b() -> TextConfig:
    """E4B's own config."""
    return TextConfig.from_json(json.loads((_FACTS / "gemma-4-E4B.config.json").read_text(encoding="utf-8")))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a toy model by its name: bf16 weights, random in every tensor, norms and scalars included."""
    # Here, since importing it takes seconds, which most runs of tests that a test starts need not wait for.
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    @cache
    def save(name: str) -> Path:
        torch.manual_seed(0)
        model = Gemma4ForCausalLM(Gemma4TextConfig(**TOYS[name]))
        with torch.no_grad():
            for key, weight in model.state_dict().items():
                if weight.dim() == 2:
                    weight.normal_(0.0, weight.shape[1] ** -0.5)
                elif key.endswith("layer_scalar"):
                    weight.uniform_(0.1, 0.9)
                elif "q_norm" in key or "k_norm" in key or "post_" in key:
                    # Small, so that rounding grows little from layer to layer.
                    weight.uniform_(0.1, 0.6)
                else:
                    weight.uniform_(0.5, 1.5)
        folder = tmp_path_factory.mktemp(name)
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def reference(toy: Callable[[str], Path]) -> Callable[[str, torch.dtype], Gemma4ForCausalLM]:
    """`transformers`' model of a toy, in a dtype, with eager attention."""
    from transformers import Gemma4ForCausalLM

    @cache
    def load(name: str, dtype: torch.dtype) -> Gemma4ForCausalLM:
        model = Gemma4ForCausalLM.from_pretrained(toy(name), dtype=dtype, attn_implementation="eager")
        return model.eval().requires_grad_(False)

    return load


@pytest.fixture(scope="session")
def process_of() -> Callable[..., dict[str, Any]]:
    """The command `pytest` with what follows it, and where and how to run it."""

    def of(*arguments: object, cwd: Path = _REPOSITORY) -> dict[str, Any]:
        return {"args": [sys.executable, *_PYTEST, *map(str, arguments)], "cwd": cwd, "env": _environment()}

    return of


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "NO_COLOR"))}


@pytest.fixture(scope="session")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[int, str]]]:
    """`run_python("-m" or "-c", …)`: the exit status and what was printed, of a process with torch imported."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(Path(__file__).with_name("forking.py")), str(folder / "compiled")]

    def run(*arguments: object, cwd: Path = _REPOSITORY) -> tuple[int, str]:
        order = {"args": [*map(str, arguments)], "cwd": str(cwd), "env": _environment()}
        if server is None:
            order |= {"args": [sys.executable, *order["args"]], "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            done = subprocess.run(**order, encoding="utf-8", check=False)
            return done.returncode, done.stdout
        print(json.dumps(order | {"printed": str(folder / "printed")}), file=server.stdin, flush=True)
        return int(server.stdout.readline()), (folder / "printed").read_text(encoding="utf-8")

    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        server = stack.enter_context(subprocess.Popen(command, **pipes)) if hasattr(os, "fork") else None
        yield run


@pytest.fixture(scope="session")
def run_pytest(run_python: Callable[..., tuple[int, str]]) -> Callable[..., tuple[int, str]]:
    """`run_pytest(*arguments)`: the exit status and what was printed, of `pytest` in the repository."""
    return partial(run_python, *_PYTEST)


@pytest.fixture(scope="session")
def numbers() -> Tokenizer:
    """A tokenizer that knows the toys' tokens by their numbers, but 2, which is <bos>; 3 stands for all other words."""
    vocab = {"<bos>" if number == 2 else str(number): number for number in range(120)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture
def toy_checkpoint(toy: Callable[[str], Path]) -> Iterator[Checkpoint]:
    """The toy of E4B's pattern, open."""
    with Checkpoint.open(toy("e4b")) as checkpoint:
        yield checkpoint


@pytest.fixture
def toy_checkpoint_with_nan(toy: Callable[[str], Path], tmp_path: Path) -> Iterator[Checkpoint]:
    """The same with one NaN, in row 3 of layer 1's up projection."""
    folder = shutil.copytree(toy("e4b"), tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="session")
def e4b_sparse_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model.safetensors with Gemma 4 E4B's real header and size, zeros that take no room, its config beside it."""
    facts = json.loads((_FACTS / "gemma-4-E4B.tensors.json").read_text("utf-8"))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in facts["shapes"].items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": facts["dtype"], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode().ljust(facts["header_bytes"])
    assert 8 + len(text) + end == facts["file_bytes"], "the facts do not describe one contiguous file"

    folder = tmp_path_factory.mktemp("e4b")
    shutil.copyfile(_FACTS / "gemma-4-E4B.config.json", folder / "config.json")
    path = folder / "model.safetensors"
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(facts["file_bytes"])
        taken = getattr(path.stat(), "st_blocks", math.inf) * 512
    except OSError:
        taken = math.inf
    if taken > 2**26:
        path.unlink()
        pytest.skip("this file system has no sparse files")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning is an error in these tests, and nowhere else: what other plugins warn of ends no run of a user."""
    for item in items:
        if item.path.is_relative_to(_REPOSITORY / "tests"):
            item.add_marker(pytest.mark.filterwarnings("error"))


# A KV source layer of each type, and one sharing layer.
_FEW_LAYERS = ["sliding_attention", "full_attention", "full_attention"]


@pytest.fixture
def few_layers_of_e4b(tmp_path: Path) -> Path:
    """A checkpoint of E4B's shapes with three layers, random weights, and an eighth of the vocabulary."""
    whole = json.loads((_FACTS / "gemma-4-E4B.config.json").read_text(encoding="utf-8"))
    text = whole["text_config"]
    few = {"num_hidden_layers": 3, "layer_types": _FEW_LAYERS, "num_kv_shared_layers": 1}
    few |= {"vocab_size": 2**15, "vocab_size_per_layer_input": 2**15}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text | few}), encoding="utf-8")
    config = TextConfig.from_json(whole | {"text_config": text | few})
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for tensor in expected_tensors(config):
        cols = tensor.shape[-1]
        made = torch.empty(tensor.shape, dtype=torch.bfloat16)
        tensors[tensor.name] = made.normal_(0.0, cols**-0.5, generator=rng) if made.dim() == 2 else made.fill_(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


class Peak:
    """The most anonymous memory that the process has while it lasts, over what it had before."""

    def __init__(self) -> None:
        self._done, self.nbytes = threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, args=(self._now(),))

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def _watch(self, before: int) -> None:
        while not self._done.wait(0.02):
            self.nbytes = max(self.nbytes, self._now() - before)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.fixture
def peak() -> Peak:
    """A `Peak`; skips where the system does not report anonymous memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not report anonymous memory")
    return Peak()

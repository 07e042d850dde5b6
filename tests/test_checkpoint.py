"""The checkpoint against the safetensors library, NumPy and stored bytes, and against every kind of bad input."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from epic_quant import checkpoint as module
from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import CheckpointError, ConfigError, TokenError

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def raw(header: Any, body: bytes = b"") -> bytes:
    """A .safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(shape: list[int], begin: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, so that NaN equals NaN and -0 is not 0."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=["library", "read_only"])
def mapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to map a file: the library's, and the one for when the system refuses it."""
    if request.param == "read_only":

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

        monkeypatch.setattr(module, "safe_open", refuse)
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of three tensors with a config and a tokenizer."""
    home = tmp_path / "model"
    home.mkdir()
    tensors = {"table": sample(torch.bfloat16, 50, 40), "norm": sample(torch.float32, 70), "scalar": torch.tensor(3.5)}
    save_file(tensors, home / "model.safetensors")
    (home / "config.json").write_text('{"model_type": "any"}', "utf-8")
    (home / "tokenizer.json").write_text("{}", "utf-8")
    return home


def shard(home: Path, weight_map: Any = None, **shards: dict[str, torch.Tensor]) -> Path:
    home.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, home / f"{name}.safetensors")
    if weight_map is None:
        weight_map = {name: f"{file}.safetensors" for file, tensors in shards.items() for name in tensors}
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return home


# Reading


@pytest.mark.usefixtures("mapping")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 4), (5,), (3, 7), (2, 3, 4)], ids=str)
def test_tensor_equals_what_the_safetensors_library_loads(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"odd": sample(torch.uint8, 3), "x": sample(dtype, *shape)}, path)
    expected = load_file(path)["x"]
    with Checkpoint.open(path) as checkpoint:
        actual = checkpoint.tensor("x")
        assert (actual.shape, actual.dtype, bits(actual)) == (expected.shape, expected.dtype, bits(expected))
        assert checkpoint.shape("x") == shape
        assert checkpoint.dtype("x") == dtype
        assert checkpoint.nbytes("x") == expected.nbytes


@pytest.mark.usefixtures("mapping")
def test_tensor_that_is_not_aligned_in_the_file_is_read(tmp_path: Path) -> None:
    """The format asks for no alignment: not of the header's length, and not of a tensor in the file."""
    values = torch.tensor([1.5, -2.5])
    header = json.dumps({"a": entry([1], 0, 1), "x": entry([2], 1, 9, "F32")}).encode()
    header = header.ljust(len(header) + 1 - len(header) % 2)
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(header + b" ", b"\0" + bits(values)))
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.tensor("x").tolist() == values.tolist()


@pytest.mark.usefixtures("mapping")
def test_tensor_is_a_view_and_not_a_copy(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensor("table").data_ptr() == checkpoint.tensor("table").data_ptr()


def _memory(field: str, path: Path | None = None) -> int:
    """A field of this process' memory account, in bytes: of its mappings of a file alone, or of all."""
    total, counted = 0, path is None
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if path is not None and re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            counted = line.endswith(str(path))
        elif counted and line.startswith(f"{field}:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.usefixtures("mapping")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not report memory by mapping")
def test_reading_takes_no_memory_of_its_own_and_rows_touch_only_their_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    nbytes = 64 * 2**20
    path.write_bytes(raw({"x": entry([2**16, 2**10], 0, nbytes)}))
    os.truncate(path, path.stat().st_size + nbytes)
    with Checkpoint.open(path) as checkpoint:
        anonymous = _memory("Anonymous")
        checkpoint.rows("x", torch.tensor([0, 30_000, 65_535]))
        assert 0 < _memory("Rss", path) < nbytes // 8
        assert int(checkpoint.tensor("x").max()) == 0
        assert _memory("Rss", path) > nbytes // 2
        assert _memory("Anonymous") - anonymous < nbytes // 8


def test_location_is_where_the_bytes_lie(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        for name, expected in load_file(folder / "model.safetensors").items():
            location = checkpoint.location(name)
            stored = location.path.read_bytes()[location.offset : location.offset + location.nbytes]
            assert (stored, location.shape, location.dtype) == (bits(expected), tuple(expected.shape), expected.dtype)


@pytest.mark.usefixtures("mapping")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_dtype_are_the_rows_of_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    table = sample(dtype, 9, 5)
    save_file({"x": table}, path)
    with Checkpoint.open(path) as checkpoint:
        rows = checkpoint.rows("x", torch.tensor([8, 0, 8], dtype=torch.int32))
    assert rows.dtype == dtype
    assert bits(rows) == b"".join(bits(table[i]) for i in (8, 0, 8))


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.integers(0, 19), max_size=12))
def test_rows_are_those_that_numpy_takes(ids: list[int]) -> None:
    table = np.random.default_rng(0).standard_normal((20, 6), dtype=np.float32)
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "a.safetensors")
        path.write_bytes(save({"x": torch.from_numpy(table)}))
        with Checkpoint.open(path) as checkpoint:
            rows = checkpoint.rows("x", torch.tensor(ids, dtype=torch.int64))
    np.testing.assert_array_equal(rows.numpy(), table[np.array(ids, dtype=np.int64)])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([3, 50, 2]), r"id 50 is out of range: 'table' has rows 0 to 49"),
        (torch.tensor([-1]), r"id -1 is out of range"),
        (torch.tensor([1.0]), r"must be integers, not torch.float32"),
        (torch.tensor([True]), r"must be integers, not torch.bool"),
    ],
)
def test_rows_names_the_id_that_does_not_fit(folder: Path, ids: torch.Tensor, message: str) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(TokenError, match=message):
        checkpoint.rows("table", ids)


def test_rows_of_what_is_no_table_are_refused(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match=r"'norm' has no rows .*\(70,\)"):
        checkpoint.rows("norm", torch.tensor([0]))


@pytest.mark.parametrize("ask", ["tensor", "shape", "dtype", "nbytes", "location"])
def test_missing_tensor_is_named_with_the_near_ones(folder: Path, ask: str) -> None:
    with Checkpoint.open(folder) as checkpoint:
        assert "tabel" not in checkpoint
        with pytest.raises(CheckpointError, match=r"unknown tensor 'tabel'; did you mean table\?"):
            getattr(checkpoint, ask)("tabel")


# Closing


@pytest.mark.usefixtures("mapping")
def test_view_outlives_the_checkpoint_and_the_file_is_closed_with_the_last_one(folder: Path) -> None:
    path = folder / "model.safetensors"
    with Checkpoint.open(folder) as checkpoint:
        view = checkpoint.tensor("table")
    assert bits(view) == bits(load_file(path)["table"])
    del view
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) not in maps.read_text("utf-8")
    path.unlink()  # Windows refuses this while a file is open


def test_closed_checkpoint_says_so_and_still_lists(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.close()
    checkpoint.close()
    assert checkpoint.names == ("norm", "scalar", "table")
    assert "table" in checkpoint
    reads: list[Callable[[], object]] = [
        lambda: checkpoint.tensor("table"),
        lambda: checkpoint.rows("table", torch.tensor([0])),
        lambda: checkpoint.fingerprint,
    ]
    for read in reads:
        with pytest.raises(CheckpointError, match="closed"):
            read()


# Where weights are found


def test_file_and_folder_open_alike(folder: Path) -> None:
    for source in (folder, str(folder), folder / "model.safetensors"):
        with Checkpoint.open(source) as checkpoint:
            assert checkpoint.names == ("norm", "scalar", "table")
            assert checkpoint.config_json == {"model_type": "any"}
            assert checkpoint.tokenizer_path == folder / "tokenizer.json"
            assert Path(checkpoint.source) == Path(source)


def test_single_file_of_another_name_is_found(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        assert "table" in checkpoint


def test_config_and_tokenizer_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": 1}', "utf-8")
    (tmp_path / "t.json").write_text("{}", "utf-8")
    with Checkpoint.open(folder, config=tmp_path / "c.json", tokenizer=str(tmp_path / "t.json")) as checkpoint:
        assert checkpoint.config_json == {"a": 1}
        assert checkpoint.tokenizer_path == tmp_path / "t.json"


@pytest.mark.parametrize("which", ["config", "tokenizer"])
def test_named_config_or_tokenizer_must_be_there(folder: Path, which: str) -> None:
    arguments: dict[str, Any] = {which: folder / "nowhere.json"}
    with pytest.raises(CheckpointError, match=rf"nowhere\.json: no such file, expected a {which}\.json"):
        Checkpoint.open(folder, **arguments)


def test_config_is_missed_only_when_asked_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tokenizer_path is None
        with pytest.raises(ConfigError, match=r"no config\.json beside the weights"):
            _ = checkpoint.config_json


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "\xff"])
def test_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, "latin-1")
    with Checkpoint.open(folder) as checkpoint, pytest.raises(ConfigError, match=r"config\.json: "):
        _ = checkpoint.config_json


def test_a_config_and_an_index_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    model = shard(tmp_path / "model", one={"a": torch.zeros(2)})
    (model / "config.json").write_text('\ufeff{"b": 1}', encoding="utf-8")
    index = model / "model.safetensors.index.json"
    index.write_text("\ufeff" + index.read_text("utf-8"), encoding="utf-8")
    with Checkpoint.open(model) as checkpoint:
        assert checkpoint.names == ("a",)
        assert checkpoint.config_json == {"b": 1}


@pytest.mark.parametrize(
    ("source", "said"), [("", "is empty"), (" ", "is empty"), ("x" * 300, "no such file or folder")]
)
def test_a_source_that_can_be_no_name_is_refused_in_one_line(source: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(source)


@pytest.mark.usefixtures("mapping")
def test_shards_open_as_one(tmp_path: Path) -> None:
    first, second = {"a": sample(torch.float32, 4, 2)}, {"b": sample(torch.bfloat16, 3), "c": torch.tensor(1)}
    with Checkpoint.open(shard(tmp_path / "model", one=first, two=second)) as checkpoint:
        assert checkpoint.names == ("a", "b", "c")
        assert checkpoint.location("b").path.name == "two.safetensors"
        for name, expected in (first | second).items():
            assert bits(checkpoint.tensor(name)) == bits(expected)


X = {"x": torch.zeros(2)}
Y = {"y": torch.zeros(2)}


def test_the_index_decides_which_shard_a_tensor_is_read_from(tmp_path: Path) -> None:
    """One of two copies, and none of what it does not name."""
    folder = shard(tmp_path / "model", one=X, two={"x": torch.ones(2), "y": torch.ones(3)})
    for holder, value in (("one", 0.0), ("two", 1.0)):
        weight_map = {"x": f"{holder}.safetensors", "y": "two.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.tensor("x").tolist() == [value] * 2
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "two.safetensors"}}))
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.names == ("x",)


@pytest.mark.parametrize(
    ("weight_map", "shards", "message"),
    [
        ({"x": "one.safetensors", "y": "two.safetensors"}, {"one": X}, r"two\.safetensors: this shard is missing.*'y'"),
        (
            {"x": "one.safetensors", "z": "one.safetensors"},
            {"one": X},
            r"one\.safetensors: the index promises tensor 'z'",
        ),
        ({"x": "../one.safetensors"}, {"one": X}, r"index\.json: tensor 'x' is in '\.\./one\.safetensors'"),
        ({"x": 1}, {"one": X}, r"index\.json: tensor 'x' is in 1, expected the name of a file"),
        ({}, {"one": X}, r"index\.json: expected a weight_map"),
        ([], {"one": X}, r"index\.json: expected a weight_map"),
    ],
)
def test_index_and_shards_that_disagree_are_refused(
    tmp_path: Path, weight_map: Any, shards: dict[str, dict[str, torch.Tensor]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(shard(tmp_path / "model", weight_map, **shards))


def test_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    home = shard(tmp_path / "model", one=X)
    (home / "model.safetensors.index.json").write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json: is not JSON"):
        Checkpoint.open(home)


def test_source_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no weights in this folder; expected model\.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"weights\.gguf: expected a \.safetensors file"):
        Checkpoint.open(tmp_path / "weights.gguf")
    save_file(X, tmp_path / "one.safetensors")
    save_file(Y, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files and no index"):
        Checkpoint.open(tmp_path)


# Headers


@pytest.mark.usefixtures("mapping")
def test_header_in_another_order_than_the_offsets_works(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({"z": entry([2], 3, 5), "a": entry([0], 3, 3), "m": entry([3], 0, 3)}, b"abcde"))
    with Checkpoint.open(path) as checkpoint:
        assert [bits(checkpoint.tensor(name)) for name in ("m", "a", "z")] == [b"abc", b"", b"de"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no .safetensors file; it is empty or truncated"),
        (b"\x02\0\0", "3 bytes are no .safetensors file"),
        (b"\x63\0\0\0\0\0\0\0{}", "a header of 99 bytes in a file of 10"),
        (b"\xff" * 16, "a header of 18446744073709551615 bytes"),
        (raw(b"{nonsense"), "header: is not JSON"),
        (raw(b"\xff\xfe{}"), "header: is not JSON"),
        (raw(b"[" * 100_000), "header: is not JSON"),
        (raw([]), "header: expected a JSON object, found list"),
        (raw(b'{"x": 1, "x": 2}'), "header: 'x' stands in it twice"),
        (raw({"x": 5}), "tensor 'x': expected dtype, shape and data_offsets, found 5"),
        (raw({"x": {"dtype": "U8", "shape": [1]}}, b"a"), "tensor 'x': expected dtype, shape and data_offsets"),
        (raw({"x": entry([-1], 0, 1)}, b"a"), r"tensor 'x': expected .*\[-1\]"),
        (raw({"x": entry([True], 0, 1)}, b"a"), "tensor 'x': expected dtype"),
        (raw({"x": entry([1.0], 0, 1)}, b"a"), "tensor 'x': expected dtype"),  # type: ignore[list-item]
        (raw({"x": entry([1], 0, 1, "Q3")}, b"a"), "tensor 'x': unknown dtype 'Q3'; known: BF16, BOOL, F16"),
        (raw({"x": entry([1], 0, 1, "BF61")}, b"a"), r"tensor 'x': unknown dtype 'BF61'; did you mean BF16\b"),
        (raw({"x": entry([2, 3], 0, 10, "BF16")}, b"0123456789"), r"'x': BF16 \[2, 3\] takes 12 bytes, .* hold 10"),
        (raw({"x": entry([1], 1, 0)}), "'x': U8 .1. takes 1 bytes, its offsets hold -1"),
        (raw({"x": entry([3], 1, 4)}, b"abcd"), "'x' leaves a hole after the header: it begins at"),
        (raw({"x": entry([2], 0, 2), "y": entry([2], 1, 3)}, b"abc"), "'y' overlaps 'x': it begins at"),
        (raw({"x": entry([2], 0, 2), "y": entry([1], 3, 4)}, b"abcd"), "'y' leaves a hole after 'x'"),
        (raw({"x": entry([2], 0, 2), "y": entry([2], 0, 2)}, b"ab"), "'y' overlaps 'x'"),
        (raw({"x": entry([4], 0, 4)}, b"abc"), "truncated file of .* it must end with 'x' at byte"),
        (raw({"x": entry([4], 0, 4)}, b"abcde"), "overlong file of .* it must end with 'x' at byte"),
        (raw({"x": entry([2], 0, 3), "y": entry([3], 3, 5)}, b"abcde"), "'x': U8 .2. takes 2 bytes"),
        (raw({"__metadata__": {"a": 1}, "x": entry([1], 0, 1)}, b"a"), r"a\.safetensors: "),
    ],
    ids=range(26),
)
def test_damaged_file_gets_one_line_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


SOUND = save({"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.arange(3, dtype=torch.int8)})


@settings(max_examples=200, derandomize=True)
@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_any_changed_byte_is_refused_or_read_as_the_library_reads_it(position: int, byte: int) -> None:
    content = bytearray(SOUND)
    content[position] = byte
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "a.safetensors")
        path.write_bytes(content)
        try:
            checkpoint = Checkpoint.open(path)
        except CheckpointError:
            return
        with checkpoint:
            expected = load_file(path)
            assert checkpoint.names == tuple(sorted(expected))
            assert all(bits(checkpoint.tensor(name)) == bits(expected[name]) for name in expected)
        del expected


@pytest.mark.parametrize("length", range(0, len(SOUND), 7))
def test_file_cut_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(SOUND[:length])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(path)


# The hub

HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {name: f"/a/{name}" for name in HUB_VARIABLES},
        {name: f"/a/{name}" for name in HUB_VARIABLES[1:]},
        {name: f"~/$USER/{name}" for name in HUB_VARIABLES[2:]},
        {"XDG_CACHE_HOME": "~/x"},
    ],
    ids=lambda values: "+".join(values) or "none",
)
def test_the_cache_is_where_huggingface_hub_has_it(
    values: dict[str, str], run_python: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, since it reads the variables when it is imported."""
    code = (
        "from huggingface_hub.constants import HF_HUB_CACHE; from epic_quant import checkpoint; "
        "print(HF_HUB_CACHE, checkpoint._hub_cache(), sep='\\n')"
    )
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"USER": "me"} | values).items():
        monkeypatch.setenv(name, value)
    status, printed = run_python("-c", code)
    assert status == 0, printed
    theirs, ours = printed.split()
    assert Path(theirs) == Path(ours)


def test_the_home_folder_may_stand_as_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell replaces it in `--checkpoint=~/model`, or in Python."""
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    (folder / "other.json").write_text('{"x": 1}')
    with Checkpoint.open(f"~/{folder.name}", config=f"~/{folder.name}/other.json") as checkpoint:
        assert checkpoint.source == folder.as_posix()
        assert checkpoint.config_json == {"x": 1}


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that has owner/name, and no huggingface_hub to ask."""
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub = tmp_path / "home" / "hub"
    repo = hub / "models--owner--name"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123", "utf-8")
    folder.rename(repo / "snapshots" / "abc123")
    return hub


def test_hub_id_is_found_in_the_cache_without_huggingface_hub(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = cached.parents[1] / "user"
    (user / ".cache").mkdir(parents=True)
    for variable, value in (("HF_HUB_CACHE", cached), ("HF_HOME", cached.parent)):
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(value))
            with Checkpoint.open("owner/name", download=True) as checkpoint:
                assert checkpoint.source == "owner/name"
                assert checkpoint.config_json == {"model_type": "any"}
                assert "table" in checkpoint
    cached.parent.rename(user / ".cache" / "huggingface")
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("USERPROFILE", str(user))
    with Checkpoint.open("owner/name") as checkpoint:
        assert "table" in checkpoint


def test_hub_id_that_is_not_cached_says_how_to_get_it(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(cached))
    with pytest.raises(
        CheckpointError, match=r"owner/other: neither a path nor in the .* cache.*hf download owner/other"
    ):
        Checkpoint.open("owner/other")
    with pytest.raises(CheckpointError, match=r"owner/other: .* pip install 'epic-quant\[hub\]'"):
        Checkpoint.open("owner/other", download=True)
    (cached / "models--owner--name" / "snapshots" / "abc123" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="owner/name: incomplete in the Hugging Face cache"):
        Checkpoint.open("owner/name")


def test_download_asks_the_hub_for_weights_config_and_tokenizer_only(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(cached / "models--owner--name" / "snapshots" / "abc123")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setenv("HF_HUB_CACHE", str(cached))
    with Checkpoint.open("owner/other", download=True) as checkpoint:
        assert "table" in checkpoint
    assert calls[0]["repo_id"] == "owner/other"
    assert {"*.safetensors", "config.json", "tokenizer.json"} <= set(calls[0]["allow_patterns"])
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    real = pytest.importorskip("huggingface_hub")
    inspect.signature(real.snapshot_download).bind(**calls[0])


def test_download_that_fails_is_one_line(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("401\n\nCannot access gated repo")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setenv("HF_HUB_CACHE", str(cached))
    with pytest.raises(CheckpointError, match="owner/other: the download failed: 401 Cannot access gated repo"):
        Checkpoint.open("owner/other", download=True)


# The fingerprint


def fingerprint(source: Path) -> str:
    with Checkpoint.open(source) as checkpoint:
        return checkpoint.fingerprint


def test_fingerprint_knows_neither_place_nor_time(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "model.safetensors").rename(moved / "other.safetensors")
    os.utime(moved / "other.safetensors", (0, 0))
    assert fingerprint(moved) == before
    assert len(before) == 16
    assert int(before, 16) >= 0


def test_fingerprint_of_shards_does_not_know_their_names(tmp_path: Path) -> None:
    assert fingerprint(shard(tmp_path / "a", one=X, two=Y)) == fingerprint(shard(tmp_path / "b", one=Y, two=X))
    assert fingerprint(shard(tmp_path / "a", one=X, two=Y)) != fingerprint(
        shard(tmp_path / "c", one=X, two={"w": Y["y"]})
    )


def test_fingerprint_changes_with_the_header_and_with_sampled_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    with Checkpoint.open(path) as checkpoint:
        before = checkpoint.fingerprint
        table = checkpoint.location("table")
    changes = [content.replace(b'"norm"', b'"morn"')]
    for place in (table.offset, table.offset + table.nbytes // 2):
        changes.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    for changed in changes:
        path.write_bytes(changed)
        assert fingerprint(path) != before
    path.write_bytes(content)
    assert fingerprint(path) == before


# At the size of E4B


def in_a_fresh_process(code: str, *arguments: object) -> dict[str, Any]:
    """Runs `code`, which prints one JSON object, where no earlier test has touched memory."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# A child's ru_maxrss may begin at its parent's on Linux, so that the kernel's own high-water mark goes first.
PEAK = """
def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""

OPEN = f"""
import json, sys, time
{PEAK}
import torch
before, start = peak(), time.perf_counter()
from epic_quant.checkpoint import Checkpoint
with Checkpoint.open(sys.argv[1]) as checkpoint:
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names)
    result = dict(names=len(checkpoint.names), total=total, fingerprint=checkpoint.fingerprint)
print(json.dumps(result | dict(time_s=time.perf_counter() - start, memory=peak() - before)))
"""


def test_e4b_is_opened_and_listed_in_little_time_and_memory(e4b_sparse_file: Path) -> None:
    pytest.importorskip("resource", reason="this system does not report a process' peak memory")
    result = in_a_fresh_process(OPEN, e4b_sparse_file)
    assert result["names"] == 2130
    assert result["total"] == 15_992_595_884 - 281_048
    assert result["time_s"] < 5
    assert result["memory"] < 100e6


SMALL_MACHINE = """
import json, resource, sys
import torch
from epic_quant.checkpoint import Checkpoint
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
name = "model.language_model.embed_tokens.weight"
with Checkpoint.open(sys.argv[1]) as checkpoint:
    rows = checkpoint.rows(name, torch.tensor([0, 262143]))
print(json.dumps(dict(shape=list(rows.shape), zero=not rows.any().item())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a private map against a limit")
def test_e4b_is_read_where_the_system_grants_less_memory_than_the_file_is_large(e4b_sparse_file: Path) -> None:
    assert in_a_fresh_process(SMALL_MACHINE, e4b_sparse_file) == {"shape": [2, 2560], "zero": True}

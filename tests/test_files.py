"""A file is whole or not there, and what is streamed into one reads as safetensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from epic_quant.files import atomic, read_text, safetensors_writer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64, "F16": torch.float16}


@pytest.mark.parametrize("content", ["", "a", "é\n日", "\ufeff{}"])
def test_a_text_is_read_without_its_byte_order_mark_and_utf16_is_refused(content, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(content.encode())
    assert read_text(path) == content.removeprefix("\ufeff")
    path.write_bytes(("a" + content).encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16 or UTF-32"):
        read_text(path)


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with atomic(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("before")

    def fail():
        with atomic(path) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "none" / "file"):
        pass


@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))),
    piece=st.integers(1, 50),
)
def test_streamed_tensors_are_read_back_by_safetensors(tmp_path_factory, tensors, metadata, piece):
    path = tmp_path_factory.mktemp("streamed") / "tensors.safetensors"
    values = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(DTYPES[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    data = b"".join(value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in values.values() if value.numel())
    with safetensors_writer(path, tensors, metadata) as write:
        for start in range(0, len(data), piece):
            write(data[start : start + piece])
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(values)
        for name, value in values.items():
            assert file.get_tensor(name).dtype == value.dtype
            assert torch.equal(file.get_tensor(name), value)


@pytest.mark.parametrize("nbytes", [15, 17])
def test_bytes_that_are_not_those_of_the_header_leave_no_file(tmp_path, nbytes):
    path = tmp_path / "tensors.safetensors"
    with (
        pytest.raises(ValueError, match=f"{nbytes} bytes of tensors, but its header says 16"),
        safetensors_writer(path, {"x": ("F32", (2, 2))}, {}) as write,
    ):
        write(bytes(nbytes))
    assert not list(tmp_path.iterdir())

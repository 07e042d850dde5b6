"""The system's figures follow what is done to a file and to memory."""

import sys

import pytest
import torch

from epic_quant.ple import pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports these")
NBYTES = 2**22


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * (NBYTES // 256))
    return file


@linux
def test_evicting_a_file_shows_in_its_cached_bytes_and_in_what_is_read(path):
    assert pages.cached_nbytes(path) == NBYTES
    if not pages.evict(path):
        pytest.skip("this file system keeps its pages")
    assert pages.cached_nbytes(path) == 0
    before = pages.read_nbytes()
    path.read_bytes()
    assert pages.cached_nbytes(path) == NBYTES
    if before is not None:
        assert pages.read_nbytes() - before >= NBYTES


@linux
def test_memory_that_is_written_is_anonymous():
    before = pages.anonymous_nbytes()
    held = torch.ones(2**24)
    assert pages.anonymous_nbytes() - before == pytest.approx(held.nbytes, rel=0.05)


def test_a_system_without_these_figures_gives_none(path, monkeypatch, tmp_path):
    assert pages._number(tmp_path / "none", "Anonymous:", 1) is None
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda *_, **__: object())
    assert pages.cached_nbytes(path) is None
    monkeypatch.delattr(pages.os, "posix_fadvise", raising=False)
    assert pages.evict(path) is None


@linux
def test_an_empty_file_holds_nothing(tmp_path):
    (tmp_path / "empty").touch()
    assert pages.cached_nbytes(tmp_path / "empty") == 0

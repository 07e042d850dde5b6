"""A small PLE table in a file of its own, with the config that fits it."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from epic_quant.checkpoint import Checkpoint

ROWS, LAYERS, DIM = 203, 6, 8
NAME = "model.language_model.embed_tokens_per_layer.weight"
_E4B = Path(__file__).resolve().parents[2] / "benchmarks" / "facts" / "gemma-4-E4B.config.json"


def write_table(folder, table, layers=LAYERS, dim=DIM, rows=ROWS):
    config = json.loads(_E4B.read_text(encoding="utf-8"))
    text = config["text_config"]
    text |= {
        "num_hidden_layers": layers,
        "layer_types": text["layer_types"][:layers],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": dim,
        "vocab_size_per_layer_input": rows,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({NAME: table}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def table():
    """Bits of every kind, NaN and infinity among them: a copy must not care."""
    bits = torch.randint(-(2**15), 2**15, (ROWS, LAYERS * DIM), generator=torch.Generator().manual_seed(1))
    return bits.to(torch.int16).view(torch.bfloat16)


@pytest.fixture(scope="session")
def weights():
    """A table of finite weights, as quantizers need."""
    return torch.randn(ROWS, LAYERS * DIM, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.fixture
def checkpoint(tmp_path, table):
    with Checkpoint.open(write_table(tmp_path, table)) as opened:
        yield opened


@pytest.fixture
def finite_checkpoint(tmp_path, weights):
    with Checkpoint.open(write_table(tmp_path, weights)) as opened:
        yield opened


def lru_hits(stream, capacity, first=()):
    """By a plain LRU that starts with the first ids, the first of them looked up last: whether each lookup hits."""
    hot = OrderedDict.fromkeys(reversed(first[:capacity]))
    hits = []
    for row in stream:
        hits.append(row in hot)
        hot[row] = None
        hot.move_to_end(row)
        if len(hot) > capacity:
            hot.popitem(last=False)
    return hits

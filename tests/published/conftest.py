"""Published files of the small trained model, written by gguf-py, NumPy and safetensors."""

from pathlib import Path

import pytest
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf import quantize as gguf_quantize
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.gemma4.weights import CheckpointWeights
from epic_quant.plugin.run import SMALL_MODEL
from epic_quant.text import token_windows

MINI = Path(__file__).resolve().parents[2] / SMALL_MODEL

F32 = GGMLQuantizationType.F32


@pytest.fixture(scope="session")
def mini():
    """The small model's checkpoint."""
    with Checkpoint.open(MINI) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="session")
def plain(mini):
    """Its own weights."""
    return CheckpointWeights(mini)


@pytest.fixture(scope="session")
def windows(mini):
    """A window of the evaluation text."""
    return token_windows(mini, MINI / "eval.txt", 1, 24)


class GGUF:
    """What gguf-py is to write: an array, its type, for every tensor by its canonical name."""

    def __init__(self, weights, kind_of=lambda tensor: F32):
        self.architecture, self.extra, self.rename, self.metadata = "gemma4", {}, {}, {}
        self.config = weights.config
        self.tensors = {}
        for name, tensor in weights.tensors.items():
            if tensor.unused:
                continue
            weight = weights.get(name)
            if not isinstance(weight, Tensor):
                blocks = weight.tensors()["blocks"].numpy()
                self.tensors[name] = blocks, GGMLQuantizationType[weight.spec.format.upper()]
            else:
                kind = kind_of(tensor)
                values = weight.float().numpy()
                self.tensors[name] = (values if kind == F32 else gguf_quantize(values, kind)), kind

    def write(self, path, shards=0):
        writer = GGUFWriter(path, self.architecture, split_max_tensors=shards)
        for name, value in self.metadata.items():
            getattr(writer, f"add_{name}")(value)
        names = get_tensor_name_map(MODEL_ARCH.GEMMA4, self.config.num_layers)
        for name, (array, kind) in self.tensors.items():
            file_name = f"{names.get_name(f'model.{name}'.removesuffix('.weight'))}.weight"
            writer.add_tensor(self.rename.get(name, file_name), array, raw_dtype=None if kind == F32 else kind)
        for name, array in self.extra.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="session")
def gguf_of():
    """`gguf_of(weights, kind_of)`: a file not yet written, with what is plain of each tensor in this type."""
    return GGUF

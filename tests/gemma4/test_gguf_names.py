"""Names in GGUF files are those that gguf-py's own map gives."""

import gguf

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.gguf_names import ARCHITECTURE, by_gguf_name
from epic_quant.gemma4.tensors import expected_tensors


def test_names_are_those_of_gguf_py(toy_checkpoint):
    config = TextConfig.read(toy_checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config.num_layers)
    found = {name: tensor.name for name, tensor in by_gguf_name(config).items()}
    assert found == {
        names.get_name(f"model.{tensor.name.removesuffix('.weight')}") + ".weight": tensor.name
        for tensor in expected_tensors(config)
    }


def test_the_architecture_is_that_of_gguf_py():
    assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA4] == ARCHITECTURE

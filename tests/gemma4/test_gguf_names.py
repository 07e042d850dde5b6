"""Names in GGUF files are those that gguf-py's own map gives."""

import gguf

from epic_quant.gemma4.config import TextConfig
from epic_quant.gemma4.gguf_names import ARCHITECTURE, canonical_name, gguf_name
from epic_quant.gemma4.tensors import expected_tensors


def test_names_are_those_of_gguf_py(toy_checkpoint):
    config = TextConfig.read(toy_checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config.num_layers)
    for tensor in expected_tensors(config):
        name = names.get_name(f"model.{tensor.name.removesuffix('.weight')}") + ".weight"
        assert gguf_name(tensor) == name
        assert canonical_name(name) == tensor.name


def test_what_is_no_text_tensor_has_no_name():
    assert [canonical_name(name) for name in ("rope_freqs.weight", "blk.0.ffn_gate_exps.weight", "v.patch_embd")] == [
        None
    ] * 3


def test_the_architecture_is_that_of_gguf_py():
    assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GEMMA4] == ARCHITECTURE

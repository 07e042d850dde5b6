"""GGUF, the file of llama.cpp and what builds on it: metadata, tokenizer and tensors of the architecture `gemma4`.

The keys are those that llama.cpp's converter writes (conversion/gemma.py) and its loader reads (src/models/gemma4.cpp).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import ExportError
from epic_quant.export.gguf_tokenizer import add_tokenizer
from epic_quant.export.output import progress, raw
from epic_quant.files import atomic
from epic_quant.gemma4.config import SLIDING, TextConfig
from epic_quant.gemma4.gguf_names import ARCHITECTURE, gguf_name
from epic_quant.gemma4.tensors import TextTensor
from epic_quant.policy import PolicyWeights
from epic_quant.quant.ggml import as_blocks
from epic_quant.spec import BF16, FORMATS, PolicySpec, WeightSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_TYPES = tuple(WeightSpec(name) for name, info in FORMATS.items() if info.block_nbytes)

# What a frequency is divided by where a pair of dims does not rotate: llama.cpp's converter has the same number.
_NO_ROTATION = 1e30


def candidates(tensor: TextTensor, spec: WeightSpec) -> Sequence[WeightSpec]:
    """The types of ggml, what is the same in one of them, and bf16, a matrix as the checkpoint has it."""
    is_type = spec.ggml_type is not None and WeightSpec(spec.ggml_type).fits(tensor.shape[1])
    return *([spec] if is_type else []), *_TYPES, BF16


def write(checkpoint: Checkpoint, weights: PolicyWeights, policy: PolicySpec, out: Path) -> None:
    """Write all used tensors, with what an engine needs to run them; `out` is made whole or not at all.

    Norms, scalars and the frequencies of RoPE are F32, and a matrix in bf16 keeps the dtype of the file. Raises
    ExportError where llama.cpp's graph is not the model's, TokenError where the tokenizer does not fit, and OSError.
    """
    try:
        from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise ExportError("GGUF needs the extra gguf: pip install 'epic-quant[gguf]'") from error
    logging.getLogger("gguf").setLevel(logging.ERROR)  # It warns of tokenizers that are as they should be.
    if out.is_dir():
        raise ExportError(f"{out}: is a folder; expected the name of a file")
    if out.exists() and any(out.samefile(checkpoint.location(name).path) for name in checkpoint.names):
        raise ExportError(f"{out}: is the checkpoint itself; expected the name of another file")
    config = weights.config
    _check(config)
    with atomic(out) as unfinished:
        writer = GGUFWriter(unfinished, ARCHITECTURE)
        writer.add_type("model")
        writer.add_name(Path(checkpoint.source).name)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_string("epic_quant.policy", str(policy))
        _add_model(writer, config)
        add_tokenizer(writer, checkpoint, config)

        used = [tensor for tensor in weights.tensors.values() if not tensor.unused]
        types = GGMLQuantizationType
        entries = [_rope_factors(config, types), *(_entry(weights, tensor, types) for tensor in used)]
        for entry in entries:
            # The dtype says only that the shape is in weights and not in bytes.
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, entry.kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            (file,) = writer.fout
            with progress(file.write, sum(entry.nbytes for entry in entries)) as write_piece:
                for entry in entries:
                    writer.write_padding(file, file.tell())
                    end = file.tell() + entry.nbytes
                    for piece in entry.pieces:
                        write_piece(raw(piece))
                    assert file.tell() == end, f"{entry.name} is not of the size that the header gives"
                writer.write_padding(file, file.tell())
        finally:
            writer.close()


class _Entry(NamedTuple):
    """A tensor of the file: `pieces` are its bytes in order, made when they are asked for."""

    name: str
    shape: Sequence[int]
    kind: GGMLQuantizationType
    nbytes: int
    pieces: Iterable[Tensor]


def _entry(weights: PolicyWeights, tensor: TextTensor, types: type[GGMLQuantizationType]) -> _Entry:
    name, spec = gguf_name(tensor), weights.spec_of(tensor.name)
    if spec is not None:
        assert spec.ggml_type is not None
        blocks = (as_blocks(piece) for piece in weights.pieces(tensor.name) if not isinstance(piece, Tensor))
        return _Entry(name, tensor.shape, types[spec.ggml_type.upper()], weights.nbytes(tensor.name), blocks)
    (values,) = weights.pieces(tensor.name)
    assert isinstance(values, Tensor)
    # What is no matrix, or has a dtype that ggml lacks, is fp32.
    dtype = values.dtype if values.dim() == 2 and values.dtype in _PLAIN else torch.float32
    nbytes = values.numel() * dtype.itemsize
    return _Entry(name, tensor.shape, types[_PLAIN[dtype]], nbytes, _cast(values, dtype))


def _cast(values: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """When it is asked for, and not before."""
    yield values.to(dtype)


def _check(config: TextConfig) -> None:
    """Raise ExportError where the model differs from the graph that llama.cpp builds for `gemma4`."""
    if config.ple_dim and config.ple_vocab_size != config.vocab_size:
        rows = f"{config.ple_vocab_size} rows, the embedding {config.vocab_size}"
        raise ExportError(f"llama.cpp reads a PLE table with a row for every token; this one has {rows}")
    num_sources = sum(layer.is_kv_source for layer in config.layers)
    if num_sources < 2:
        raise ExportError("llama.cpp runs gemma4 with two layers or more that have K and V of their own; here is one")
    for layer in config.layers:
        expected = num_sources - (2 if layer.layer_type == SLIDING else 1)
        if not layer.is_kv_source and layer.kv_source != expected:
            raise ExportError(
                f"layer {layer.index} reads the K and V of layer {layer.kv_source}; in llama.cpp it is {expected}"
            )
        rope = layer.attention.rope
        if layer.layer_type == SLIDING and (2 * rope.rotated_pairs, rope.factor) != (layer.attention.head_dim, 1):
            raise ExportError(
                "llama.cpp rotates all dims of sliding layers, by unscaled frequencies; here is other RoPE"
            )


def _rope_factors(config: TextConfig, types: type[GGMLQuantizationType]) -> _Entry:
    """What llama.cpp divides the frequencies of full layers by, fp32 [head_dim / 2]: so it makes p-RoPE."""
    attention = config.layers[-1].attention  # a full layer
    factors = torch.full((attention.head_dim // 2,), _NO_ROTATION)
    factors[: attention.rope.rotated_pairs] = attention.rope.factor
    return _Entry("rope_freqs.weight", factors.shape, types.F32, factors.nbytes, [factors])


def _add_model(writer: GGUFWriter, config: TextConfig) -> None:
    full = config.layers[-1].attention
    sliding = next((layer.attention for layer in config.layers if layer.layer_type == SLIDING), full)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_each([layer.mlp.intermediate_size for layer in config.layers]))
    writer.add_head_count(_each([layer.attention.num_heads for layer in config.layers]))
    writer.add_head_count_kv(_each([layer.attention.num_kv_heads for layer in config.layers]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_embedding_length_per_layer_input(config.ple_dim)
    writer.add_shared_kv_layers(sum(not layer.is_kv_source for layer in config.layers))
    writer.add_sliding_window(sliding.sliding_window or config.max_position_embeddings)
    writer.add_sliding_window_pattern([layer.layer_type == SLIDING for layer in config.layers])
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_freq_base(full.rope.theta)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    writer.add_rope_freq_base_swa(sliding.rope.theta)


def _each(values: list[int]) -> int | list[int]:
    """One value where all layers have the same."""
    return values[0] if len(set(values)) == 1 else values

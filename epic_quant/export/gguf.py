"""GGUF, the file of llama.cpp and what builds on it: metadata, tokenizer and tensors of the architecture `gemma4`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epic_quant.checkpoint import Checkpoint
from epic_quant.errors import ExportError, TokenError
from epic_quant.export.gguf_tokenizer import add_tokenizer
from epic_quant.export.output import progress, raw
from epic_quant.files import atomic
from epic_quant.gemma4.config import SLIDING, TextConfig
from epic_quant.gemma4.gguf_metadata import ROPE_FACTORS, metadata, rope_factors
from epic_quant.gemma4.gguf_names import ARCHITECTURE, gguf_name
from epic_quant.gemma4.tensors import TextTensor
from epic_quant.policy import PolicyWeights
from epic_quant.quant.ggml import as_blocks
from epic_quant.spec import BF16, FORMATS, PolicySpec, WeightSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_PLAIN = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_TYPES = tuple(WeightSpec(name) for name, info in FORMATS.items() if info.block_nbytes)


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
        from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter
    except ImportError as error:
        raise ExportError("GGUF needs the extra gguf: pip install 'epic-quant[gguf]'") from error
    logging.getLogger("gguf").setLevel(logging.ERROR)  # It warns of tokenizers that are as they should be.
    config = weights.config
    _check(config)
    with atomic(out) as unfinished:
        writer = GGUFWriter(unfinished, ARCHITECTURE)
        writer.add_type("model")
        writer.add_name(Path(checkpoint.source).resolve().name)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_string("epic_quant.policy", str(policy))
        kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, list: GGUFValueType.ARRAY}
        for key, value in metadata(config).items():
            writer.add_key_value(f"{ARCHITECTURE}.{key}", value, kinds[type(value)])
        add_tokenizer(writer, checkpoint, config)

        used = [tensor for tensor in weights.tensors.values() if not tensor.unused]
        types = GGMLQuantizationType
        factors = torch.tensor(rope_factors(config))
        rope = _Entry(ROPE_FACTORS, factors.shape, types.F32, factors.nbytes, [factors])
        entries = [rope, *(_entry(weights, tensor, types) for tensor in used)]
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
        except UnicodeEncodeError as error:
            where = checkpoint.tokenizer_path
            raise TokenError(f"{where}: a text in it, or in what is beside it, has half a surrogate pair") from error
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

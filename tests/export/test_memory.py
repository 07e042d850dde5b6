"""Three layers of E4B's shape go through in RAM for pieces."""

import pytest
from tokenizers import Tokenizer, models, normalizers

from epic_quant.export.__main__ import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("file_format", "policy"),
    [
        (
            "gguf",
            "sliding_attention=q4_k,full_attention=q6_k,mlp=q3_k,ple_projections=q8_0,ple_table=q4_0,embedding=q4_k",
        ),
        ("gemma", "sliding_attention=int4,full_attention=int8,mlp=int2,ple_table=int4"),
    ],
    ids=["gguf", "gemma"],
)
def test_pieces_alone_stand_in_ram(file_format, policy, few_layers_of_e4b, tmp_path, peak):
    vocab = {{0: "a", 1: "b", 2: "<bos>", 3: "ab"}.get(number, f"t{number}"): number for number in range(2**15)}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.save(str(few_layers_of_e4b / "tokenizer.json"))
    with peak:
        arguments = [str(few_layers_of_e4b), "--policy", policy, "--format", file_format, str(tmp_path / "out")]
        assert main(arguments) == 0
    # The PLE table alone is 100 MB in fp32, the embedding 336 MB; the encoder's temporaries and codes take the rest.
    assert peak.nbytes < 0.5e9

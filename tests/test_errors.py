"""The line that an unknown name gets."""

from epic_quant.errors import unknown


def test_a_near_name_is_suggested():
    assert unknown("policy", "original-2", ["original-3", "bf16"]) == (
        "unknown policy 'original-2'; did you mean original-3?"
    )


def test_all_are_listed_where_none_is_near():
    assert unknown("scheme", "zzz", ["int4", "bf16"]) == "unknown scheme 'zzz'; known: bf16, int4"

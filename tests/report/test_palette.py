import pytest

from epic_quant.report.palette import DARK, LIGHT, ON_DARK, ON_PALE, SERIES, contrast


@pytest.mark.parametrize(
    ("first", "second", "ratio"),
    [("#000000", "#ffffff", 21), ("#777777", "#ffffff", 4.48), ("#767676", "#ffffff", 4.54), ("#abcdef", "#abcdef", 1)],
)
def test_contrast_is_that_of_wcag(first, second, ratio):
    assert contrast(first, second) == pytest.approx(ratio, abs=0.005)
    assert contrast(second, first) == contrast(first, second)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out_from_their_ground(colours):
    for ground in ("paper", "raised"):
        for text in ("ink", "muted", "accent", "good", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for series in SERIES:
        assert contrast(colours[series], colours["paper"]) >= 3, series


def test_both_have_the_same_names_and_no_colour_is_two():
    assert list(LIGHT) == list(DARK)
    # Plots are drawn in the light ones, and what a colour is for is read off it.
    assert len({*LIGHT.values(), ON_DARK, ON_PALE}) == len(LIGHT) + 2

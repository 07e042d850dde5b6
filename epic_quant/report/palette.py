"""The colours of plots and page, by what they are for, on a light ground and on a dark one."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "raised": "#f5f7fa",
    "ink": "#111418",
    "muted": "#586270",
    "line": "#dde2e8",
    "accent": "#0a5fb4",
    "good": "#0d7a3f",
    "bad": "#b3261e",
    # Distinct with any colour vision, after Okabe and Ito, whose own orange, sky blue and reddish purple
    # are too pale on white.
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#00856a",
    "series-4": "#c2579a",
    "series-5": "#8f6b00",
    "series-6": "#5b5bd6",
}
DARK: Mapping[str, str] = {
    "paper": "#12151a",
    "raised": "#1b2027",
    "ink": "#eceff3",
    "muted": "#a3adba",
    "line": "#333b46",
    "accent": "#7fb8ff",
    "good": "#5fd08c",
    "bad": "#ff8f85",
    "series-1": "#56b4e9",
    "series-2": "#ff8a4c",
    "series-3": "#35c79a",
    "series-4": "#e59ac6",
    "series-5": "#e6b422",
    "series-6": "#a9a9ff",
}

SERIES = tuple(name for name in LIGHT if name.startswith("series-"))

# Text on a cell of a heat map. Nearly black and nearly white, since the cells do not turn with the ground and all other
# colours do; of the two, one always stands out 4.5 to 1.
ON_PALE, ON_DARK = "#0a0a0a", "#fefefe"


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2.2 between two colours `#rrggbb`: 1 where they are as bright, 21 of black on white."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it, of sRGB."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

"""The page's colours work for everyone: contrast as WCAG asks for, and neighbours that differ without red and green."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import pairwise

import pytest
from sglang_warmstart.report.breakdown import CATEGORIES

Colour = tuple[float, float, float]

TEXT, SHAPES = 4.5, 3.0  # WCAG 2.2, level AA: 1.4.3 and 1.4.11

# Linear RGB as it is seen without the cones for long waves, or for middle ones (Viénot, Brettel, Mollon 1999).
BLINDNESS: dict[str, tuple[Colour, Colour, Colour]] = {
    "protan": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deutan": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


def schemes() -> dict[str, dict[str, str]]:
    style = files("sglang_warmstart.report").joinpath("page_files/page.css").read_text(encoding="utf-8")
    found = re.findall(r"(?:^|\n)\s*:root[^{]*\{([^}]*)\}", style)
    light, dark = ({name: value.lower() for name, value in re.findall(r"--([\w-]+): (#\w{6})", each)} for each in found)
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


SCHEMES = schemes()
EITHER = pytest.mark.parametrize("scheme", SCHEMES)


def linear(colour: str) -> Colour:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return red, green, blue


def luminance(colour: Colour) -> float:
    red, green, blue = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(linear(each)) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@EITHER
@pytest.mark.parametrize("text", ["ink", "soft", "alarm", "good", "focus"])
@pytest.mark.parametrize("ground", ["ground", "raised", "alarm-ground"])
def test_text_can_be_read(scheme: str, text: str, ground: str) -> None:
    assert contrast(SCHEMES[scheme][text], SCHEMES[scheme][ground]) >= TEXT


@EITHER
@pytest.mark.parametrize("key", [category.key for category in CATEGORIES])
def test_the_text_in_a_bar_can_be_read_and_the_bar_be_seen(scheme: str, key: str) -> None:
    colours = SCHEMES[scheme]
    assert contrast(colours[f"{key}-ink"], colours[key]) >= TEXT
    # What is not accounted for is no bar, but what is left: it has an outline.
    assert contrast(colours[key if key != "other" else "strong"], colours["ground"]) >= SHAPES


@EITHER
def test_the_ring_of_the_chosen_event_is_seen(scheme: str) -> None:
    assert contrast(SCHEMES[scheme]["focus"], SCHEMES[scheme]["ground"]) >= SHAPES


@EITHER
@pytest.mark.parametrize("eyes", ["all", *BLINDNESS])
def test_what_is_compiled_on_call_and_ahead_differ_for_all_eyes(scheme: str, eyes: str) -> None:
    # Those two are what one looks for. The first is hatched besides.
    assert distance(SCHEMES[scheme]["jit"], SCHEMES[scheme]["compile"], eyes) > 8


@EITHER
@pytest.mark.parametrize("eyes", ["all", *BLINDNESS])
def test_neighbours_in_a_bar_differ_for_all_eyes(scheme: str, eyes: str) -> None:
    keys = [category.key for category in CATEGORIES]
    near = {
        pair: round(far, 1)
        for pair in pairwise(keys)
        if (far := distance(SCHEMES[scheme][pair[0]], SCHEMES[scheme][pair[1]], eyes)) < 8
    }
    assert near == {}


def distance(one: str, other: str, eyes: str) -> float:
    """CIE 1976: about 2 can just be told apart side by side."""
    left, right = (lab(seen(linear(each), eyes)) for each in (one, other))
    return sum((a - b) ** 2 for a, b in zip(left, right, strict=True)) ** 0.5


def seen(colour: Colour, eyes: str) -> Colour:
    if eyes == "all":
        return colour
    red, green, blue = (
        min(max(sum(weight * part for weight, part in zip(row, colour, strict=True)), 0.0), 1.0)
        for row in BLINDNESS[eyes]
    )
    return red, green, blue


def lab(colour: Colour) -> Colour:
    red, green, blue = colour
    white = (0.9505, 1.0, 1.089)
    absolute = (
        0.4124 * red + 0.3576 * green + 0.1805 * blue,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        0.0193 * red + 0.1192 * green + 0.9505 * blue,
    )
    x, y, z = (
        ratio ** (1 / 3) if ratio > 0.008856 else 7.787 * ratio + 16 / 116
        for ratio in (value / full for value, full in zip(absolute, white, strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)

"""Heat maps: labels that can be drawn, long prompts cut in the middle, and the width of a chat window."""

from __future__ import annotations

import struct
import warnings

import pytest
import torch

from editors.locate.attribution import attribution_patching
from editors.locate.causal import TraceParams
from editors.locate.heat_map import MOST_ROWS, heat_map, rows_of
from editors.locate.result import Located
from editors.locate.trade_off import Curve, trade_off
from editors.pictures import readable
from tests import families


def located(prompt: str, subject: str) -> Located:
    return attribution_patching(
        families.make("gpt2"), prompt, subject, None, TraceParams(samples=1), lambda f, m: None
    )


def size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize(
    ("label", "drawn"),
    [
        (" Paris", "Paris"),
        ("\n\n", "\\n\\n"),
        (" ", "(space)"),
        ("$x_1$", "$x_1$"),
        ("Παρίσι", "Παρίσι"),
        ("\U0010ffff", "\\u10ffff"),
        ("a" * 40, "a" * 15 + "…"),
    ],
)
def test_a_token_is_drawn_as_a_reader_knows_it(label: str, drawn: str) -> None:
    assert readable(label) == drawn


def test_every_text_becomes_a_picture_of_800_pixels_without_missing_glyphs() -> None:
    texts = [
        ("The price of gold in $US_2$ is", "gold"),
        ("東京タワーは日本の", "東京"),
        ("عاصمة فرنسا هي", "فرنسا"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt, subject in texts:
            assert size(heat_map(located(prompt, subject)))[0] == 800


def test_a_long_prompt_keeps_the_subject_and_the_end() -> None:
    found = located(
        "In the year of the great fair " * 2 + "France, " + "of which much is said, " * 8 + "has", "France"
    )
    rows = rows_of(found)
    assert len(rows.tokens) == MOST_ROWS
    assert [rows.tokens[i] for i in rows.marked] == list(found.traced.subject)
    assert rows.tokens[-1] == len(found.traced.labels) - 1
    assert rows.tokens.count(None) == 1
    assert size(heat_map(found))[0] == 800


def test_a_map_in_which_nothing_helps_is_still_drawn() -> None:
    found = located("The capital of France is", "France")
    found.maps["mlp"] = -torch.ones_like(found.maps["mlp"])
    assert size(heat_map(found))[0] == 800


def test_the_trade_off_is_drawn_without_some_of_its_rates() -> None:
    curves = [
        Curve("reliability", [1.0, 0.5], "#000000", "o"),
        Curve("locality", [None, None], "#ff0000", "s"),
    ]
    assert size(trade_off(["2", "4\n(default)"], curves, [0.1, 0.0], 0, "rome"))[0] == 800
    assert size(trade_off(["2", "4"], curves, None, 1, "rome"))[0] == 800

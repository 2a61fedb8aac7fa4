"""One call of each kind makes the model do no more than was recorded; see tests/counted.py.

A change that saves work lowers a number here. One that raises it says why in its commit.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.counted import Work, works

MOST = {
    "check of three facts": Work(18, 120, 42, 37, 0, 0),  # 4 passes try whether texts are read side by side
    "rome, one edit": Work(51, 1787, 189, 159, 1, 8192),
    "memit, a batch of two": Work(56, 2128, 367, 341, 2, 16384),
    "audit of three edits": Work(14, 231, 95, 95, 0, 0),
    "the same audit again": Work(),
    "revert of one edit": Work(8, 14, 8, 8, 1, 8192),
    "lora, one edit": Work(69, 2222, 212, 174, 1, 8192),
}
"""Passes and tokens of the last layer, rows of whole passes, rows that grow a cache, tensors and bytes hashed."""


@pytest.fixture(scope="module")
def done() -> dict[str, Work]:
    return works()


@pytest.mark.parametrize("call", list(MOST))
def test_a_call_makes_the_model_do_no_more_than_was_recorded(call: str, done: dict[str, Work]) -> None:
    more = {
        name: (value, asdict(MOST[call])[name])
        for name, value in asdict(done[call]).items()
        if value > asdict(MOST[call])[name]
    }
    assert not more, f"{call}: found, recorded"

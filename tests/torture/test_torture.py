"""The short forms of the random walk and of the hostile calls (CONTRIBUTING, "Torture")."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.torture.fuzz import fuzzed
from tests.torture.walk import walked

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("TORTURE_SEED", "0"))


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_random_walk_with_a_kill_breaks_no_promise(family: str, tmp_path: Path) -> None:
    report = walked(SEED, family, steps=16, kills=1, folder=tmp_path)
    assert report["violation"] == ""
    assert report["counts"]["rebuilds"] >= 3


def test_hostile_calls_do_no_harm(tmp_path: Path) -> None:
    report = fuzzed(SEED, "llama", calls=80, folder=tmp_path)
    assert report["violations"] == []
    assert sum(report["counts"].values()) >= 80

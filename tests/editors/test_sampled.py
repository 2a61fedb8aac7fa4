"""Text is sampled from a model once: it serves the second moments of all its layers."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from editors.errors import EditError
from editors.moments import Statistics, statistics
from editors.moments.sampled import shipped_text
from tests.families import make


def test_the_second_layer_is_computed_from_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make("llama")
    one = Statistics(tmp_path, "a" * 64, tokens=200)
    one.ensure(lm, [1], lambda *_: None)
    kept = json.loads((tmp_path / ("a" * 16) / "sampled.json").read_text())
    monkeypatch.setattr(statistics, "sample_text", lambda *_: pytest.fail("sampled again"))
    again = Statistics(tmp_path, "a" * 64, tokens=200)
    again.ensure(lm, [0], lambda *_: None)
    assert again.get(0).tokens == one.get(1).tokens
    assert all(isinstance(token, int) for row in kept for token in row)


def test_a_sampled_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 16) / "sampled.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(EditError, match=r"sampled\.json cannot be read .*; delete it, and it is sampled"):
        Statistics(tmp_path, "a" * 64, tokens=200).ensure(make("llama"), [1], lambda *_: None)
    path.unlink()
    Statistics(tmp_path, "a" * 64, tokens=200).ensure(make("llama"), [1], lambda *_: None)


def test_the_text_of_the_default_model_is_shipped() -> None:
    file = resources.files("editors") / "data" / "sampled.json"
    ((model, rows),) = json.loads(file.read_text("utf-8")).items()
    found = shipped_text(model, 1000)
    assert found == rows[: len(found or ())]
    assert found is not None
    assert 1000 <= sum(map(len, found)) < 1000 + len(found[-1])
    assert shipped_text(model, 10**9) is None, "more is sampled"
    assert shipped_text("another", 1) is None

"""What an MLP reads on ordinary text is read once for a model and a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editors.errors import EditError, NotReady
from editors.moments import Statistics, statistics
from tests.families import make

HASH = "a" * 64
PATH = Path("a" * 16) / "inputs-layer-1.safetensors"


def _statistics(folder: Path, model_hash: str = HASH) -> Statistics:
    return Statistics(folder, model_hash, tokens=200)


def test_inputs_are_kept_and_read_again_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    first = _statistics(tmp_path)
    first.ensure_inputs(lm, [1], lambda *_: None)
    monkeypatch.setattr(statistics, "read_inputs", lambda *_: pytest.fail("read again"))
    again = _statistics(tmp_path)
    again.ensure_inputs(lm, [1], lambda *_: None)
    one, other = first.inputs(1), again.inputs(1)
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.activity, other.activity)
    assert one.inputs.shape[1] == lm.d_model
    assert one.activity.shape == (lm.shape(lm.mlp_out(1))[1],)
    assert len(one.inputs) >= 100


def test_inputs_that_were_not_read_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="layer 1 reads on ordinary text is not known"):
        _statistics(tmp_path).inputs(1)


def test_a_file_that_is_damaged_or_of_another_model_is_refused_and_deleting_it_helps(tmp_path: Path) -> None:
    lm, path = make("llama"), tmp_path / PATH
    _statistics(tmp_path).ensure_inputs(lm, [1], lambda *_: None)
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(EditError, match=r"is damaged .*; delete it, and it is computed again"):
        _statistics(tmp_path).inputs(1)
    path.write_bytes(whole.replace(b"a" * 64, b"b" * 64))
    with pytest.raises(EditError, match=r"statistics of another model \(b+\); delete it"):
        _statistics(tmp_path).inputs(1)
    path.unlink()
    again = _statistics(tmp_path)
    again.ensure_inputs(lm, [1], lambda *_: None)
    assert len(again.inputs(1).inputs)

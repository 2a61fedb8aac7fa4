"""Files of the editors: tensors with metadata, damaged ones, and writing in one step."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from editors.files import DamagedFile, metadata_of, read_tensors, tensor_bytes, write_atomically


def test_tensors_and_metadata_come_back_as_they_were_written() -> None:
    data = tensor_bytes({"a": torch.arange(6.0).reshape(2, 3).t()}, {"model": "abc"})
    tensors, metadata = read_tensors(data)
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3).t())
    assert metadata == metadata_of(data) == {"model": "abc"}


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:20], lambda d: d[:-4], lambda d: b"\xff" * 64]
)
def test_a_damaged_file_is_recognised(damage: object) -> None:
    data = tensor_bytes({"a": torch.ones(8)}, {"model": "abc"})
    with pytest.raises(DamagedFile):
        read_tensors(damage(data))  # type: ignore[operator]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, hard)
    )  # what a full disk does: a part is written, then an error
    try:
        with pytest.raises(OSError, match="too large"):
            write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]

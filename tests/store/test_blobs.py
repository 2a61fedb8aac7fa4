from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store import BlobError, Blobs, DamagedBlob, MissingBlob


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(data=st.binary(max_size=2_000))
def test_bytes_come_back_as_they_went_in(blobs: Blobs, data: bytes) -> None:
    sha = blobs.put(data)
    assert sha == hashlib.sha256(data).hexdigest()
    assert blobs.get(sha) == data
    assert blobs.size(sha) == len(data)


def test_the_file_is_named_by_its_hash_and_nothing_else_is_left(blobs: Blobs) -> None:
    sha = blobs.put(b"patch")
    assert [path.name for path in blobs.folder.iterdir()] == [f"{sha}.safetensors"]


def test_putting_the_same_bytes_twice_leaves_the_first_file_alone(blobs: Blobs) -> None:
    sha = blobs.put(b"patch")
    first = blobs.path(sha).stat()
    assert blobs.put(b"patch") == sha
    assert blobs.path(sha).stat().st_ino == first.st_ino
    assert blobs.path(sha).stat().st_mtime_ns == first.st_mtime_ns


def test_putting_bytes_whose_file_is_damaged_repairs_it(blobs: Blobs) -> None:
    sha = blobs.put(b"patch")
    blobs.path(sha).write_bytes(b"pitch")
    blobs.put(b"patch")
    assert blobs.get(sha) == b"patch"


@pytest.mark.parametrize("damaged", [b"", b"pitch", b"patch and more"])
def test_a_damaged_file_is_named(blobs: Blobs, damaged: bytes) -> None:
    sha = blobs.put(b"patch")
    blobs.path(sha).write_bytes(damaged)
    with pytest.raises(DamagedBlob, match=f"{sha}.safetensors"):
        blobs.get(sha)
    with pytest.raises(DamagedBlob):
        blobs.verify(sha)


def test_a_missing_file_is_named(blobs: Blobs) -> None:
    with pytest.raises(MissingBlob, match=f"{'a' * 64}.safetensors"):
        blobs.get("a" * 64)
    with pytest.raises(MissingBlob):
        blobs.size("a" * 64)


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n", "a" * 64 + "/x"]
)
def test_a_name_that_is_not_a_hash_never_reaches_the_disk(blobs: Blobs, name: str) -> None:
    with pytest.raises(BlobError, match="64"):
        blobs.get(name)


def test_sweeping_deletes_only_partial_files(blobs: Blobs) -> None:
    sha = blobs.put(b"patch")
    (blobs.folder / ".writing-xyz").write_bytes(b"pa")
    blobs.sweep(lambda sha: True)
    assert [path.name for path in blobs.folder.iterdir()] == [f"{sha}.safetensors"]

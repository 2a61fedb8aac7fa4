"""Memory or disk that ran out is said in words with a way out, whichever library noticed."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
import safetensors
import torch

from server.errors import ServiceError
from server.exchange import files
from server.exhausted import exhausted, in_words
from server.startup import _unavailable
from store.errors import LedgerError
from tools._errors import internal


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


DISK = [
    OSError(errno.ENOSPC, "No space left on device", "/data/x"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    safetensors.SafetensorError(
        "Error while serializing: IoError(Os { code: 28, message: No space left on device })"
    ),
    sqlite3.OperationalError("database or disk is full"),
    RuntimeError("PytorchStreamWriter failed: No space left on device"),
    caused(
        LedgerError("the ledger could not be written"), sqlite3.OperationalError("database or disk is full")
    ),
]
MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."),
    RuntimeError("MPS backend out of memory"),
    caused(RuntimeError("the call failed"), MemoryError()),
]


@pytest.mark.parametrize("error", DISK, ids=repr)
def test_a_full_disk_is_named_with_what_to_do(error: Exception) -> None:
    for text in (
        exhausted(error),
        str(internal("export_edits", error)),
        str(_unavailable(caused(RuntimeError("x"), error))),
    ):
        assert text is not None
        assert "disk is full" in text
        assert "free some space" in text
        assert "internal error" not in text


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_memory_that_ran_out_is_named_with_what_to_do(error: Exception) -> None:
    for text in (exhausted(error), str(internal("apply_edits", error)), str(_unavailable(error))):
        assert text is not None
        assert "has not enough free memory" in text
        assert "--dtype bfloat16" in text
        assert "internal error" not in text
    assert ("GPU" in str(exhausted(error))) == isinstance(error, torch.OutOfMemoryError)


def test_what_really_ran_out_is_said_of_a_real_allocation() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.float32)
    assert "(281474976710656 bytes were asked for)" in str(exhausted(caught.value))


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), KeyError("x"), OSError(2, "No such file"), ValueError("")]
)
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    assert exhausted(error) is None
    assert "internal error" in str(internal("apply_edits", error))


def test_sizes_have_the_unit_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [in_words(n) for n in (0, 999, 1500, 3.2e6, 15e9)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "3.2 MB",
        "15.0 GB",
    ]
    usage = files.shutil._ntuple_diskusage(10, 10, 4096)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ServiceError, match=r"takes 3\.1 MB, and the disk of .* has 4\.1 kB free; free some space"
    ):
        files.need_room(tmp_path, 3_100_000)

"""Compaction deletes files that nothing needs, and nothing of the history; a kill at any step leaves a whole home."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from store import GivenUp, Ledger, LedgerInUse, RemovedBlob
from store.backup import backup, restore
from store.compaction import CompactReport
from store.errors import DamagedLedger, LedgerError
from tests.conftest import ROOT
from tests.store.conftest import WHO, Book
from tests.store.test_backup import errata

ALL = GivenUp(0, 0)
NOTHING = GivenUp()


@pytest.fixture
def written(home: Path) -> Path:
    """Six edits of one batch and of single calls, in every status, with files of former states."""
    with Ledger.open(home) as ledger:
        book = Book(ledger)
        book.apply("France", "Italy", "Peru")  # e1 to e3
        ledger.record_reverted(["e1"], "w", WHO, restack={1: b"e2 and e3"})
        ledger.record_reverted(["e2"], "w", WHO, restack={1: b"e3 alone"})
        book.apply("Chad")  # e4
        ledger.record_reverted(["e4"], "w", WHO)
        ledger.record_rejected(book.patch("Mali"), ["max_drift"], WHO)  # e5
        book.apply("Oman")  # e6
        ledger.record_applied(book.patch("Oman", target="Bern"), WHO, replaced=["e6"])  # e7
        for data in (b"an old vector", b"a vector"):
            ledger.record_vector(book.model, "mood", data, {"method": "caa"}, WHO, replace=True)
    return home


def compact(home: Path, given_up: GivenUp = NOTHING, *, dry: bool = False) -> CompactReport:
    with Ledger.open(home, read_only=dry) as ledger:
        report = ledger.compact(given_up, dry=dry)
        assert ledger.verify() == []
    return report


def files(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (home / "blobs").iterdir()}


def test_files_of_former_states_go_and_every_edit_can_still_come_back(written: Path) -> None:
    with Ledger.open(written) as ledger:
        stack, events = ledger.stack(1), ledger.all_events()
        source = {edit.id: ledger.get_patch(edit.patch_id).source_blob for edit in ledger.list_edits().edits}
    report = compact(written)
    assert sorted(report.removed.former.values()) == sorted(map(len, (b"e2 and e3", b"an old vector")))
    assert (report.removed.patches, report.removed.edit_ids) == ({}, ())
    with Ledger.open(written) as ledger:
        assert ledger.stack(1) == stack
        assert ledger.all_events()[:-1] == events
        assert all(ledger.patch_bytes(sha) for sha in source.values())
        assert ledger.blobs.get(stack[0].blob) == b"e3 alone"
        [vector] = ledger.vectors(1)
        assert ledger.blobs.get(vector.blob) == b"a vector"
    assert compact(written).removed.files == {}


def test_patches_of_edits_that_were_given_up_go_where_that_is_asked_for(written: Path) -> None:
    assert compact(written, GivenUp(1, 1), dry=True).removed.edit_ids == ()  # none of them so long ago
    assert compact(written, GivenUp(retired_days=0)).removed.edit_ids == ("e5", "e6")
    assert compact(written, ALL).removed.edit_ids == (
        "e4",
    )  # e1 and e2 share their patch with e3, which is active
    with Ledger.open(written) as ledger:
        assert {edit.id: edit.status for edit in ledger.list_edits().edits}["e4"] == "reverted"
        gone = ledger.get_patch(ledger.get_edit("e4").patch_id).source_blob
        with pytest.raises(RemovedBlob, match="apply_edits with its subject"):
            ledger.patch_bytes(gone)
        Book(ledger).apply("Togo")


def test_a_dry_run_changes_nothing(written: Path) -> None:
    before, database = files(written), (written / "ledger.db").read_bytes()
    report = compact(written, ALL, dry=True)
    assert len(report.removed.files) == 5
    assert files(written) == before
    assert (written / "ledger.db").read_bytes() == database


def test_a_file_that_comes_again_after_a_compaction_is_needed_again(written: Path) -> None:
    compact(written)
    with Ledger.open(written) as ledger:
        ledger.record_reapplied(["e2"], "w", WHO, restack={1: b"e2 and e3"})
        sha = ledger.stack(1)[0].blob
        assert ledger.blobs.get(sha) == b"e2 and e3"
    assert sha not in compact(written, ALL).removed.files
    (written / "blobs" / f"{sha}.safetensors").unlink()
    with Ledger.open(written, read_only=True) as ledger:
        assert [problem.kind for problem in ledger.verify()] == ["blob"]


def test_a_compacted_home_is_backed_up_and_comes_back(written: Path, tmp_path: Path) -> None:
    compact(written, ALL)
    backup(written, tmp_path / "copy")
    restore(tmp_path / "copy", tmp_path / "back")
    assert files(tmp_path / "back").keys() == files(written).keys()


def test_nothing_is_deleted_from_a_damaged_home_or_under_a_running_server(written: Path) -> None:
    with Ledger.open(written), pytest.raises(LedgerInUse):
        compact(written)
    damaged = next((written / "blobs").glob("*.safetensors"))
    damaged.write_bytes(b"other")
    before = files(written)
    with Ledger.open(written) as ledger, pytest.raises(DamagedLedger, match="nothing was deleted"):
        ledger.compact(ALL)
    assert files(written) == before


def test_a_database_that_cannot_be_written_anew_stays_and_the_report_says_so(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Ledger) -> None:
        raise LedgerError("no room")

    monkeypatch.setattr(Ledger, "vacuum", fail)
    report = compact(written)
    assert (report.note, len(report.removed.former)) == ("no room", 2)


KILLED = """
import os, sys
from pathlib import Path
from store import GivenUp, Ledger
from store import compaction
from store.blobs import Blobs

ledger, at, calls = Ledger.open(Path(sys.argv[1])), int(sys.argv[2]), 0

def step():
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), 9)

append, remove, vacuum = compaction.append_event, Blobs.remove, Ledger.vacuum

def appending(*given):
    step()
    found = append(*given)
    step()
    return found

def removing(blobs, sha):
    step()
    remove(blobs, sha)

def vacuuming(self):
    step()
    vacuum(self)
    step()

compaction.append_event, Blobs.remove, Ledger.vacuum = appending, removing, vacuuming
ledger.compact(GivenUp(0, 0))
"""


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 9])
def test_a_kill_at_any_step_leaves_a_whole_home_and_the_next_compaction_ends_it(
    written: Path, at: int
) -> None:
    with Ledger.open(written) as ledger:
        stack = ledger.stack(1)
    died = subprocess.run([sys.executable, "-c", KILLED, str(written), str(at)], cwd=ROOT, check=False)
    assert died.returncode == -9
    with Ledger.open(written) as ledger:
        assert ledger.verify() == []
        assert ledger.stack(1) == stack
    compact(written, ALL)
    left = set(files(written))
    with Ledger.open(written) as ledger:
        assert ledger.removable(ALL).files == {}
        assert left >= {f"{entry.source_blob}.safetensors" for entry in stack}


def test_the_command_says_what_would_go_and_then_what_went(written: Path) -> None:
    told = errata("compact", "--home", written, "--retired", 0, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert "2 patches of edits that were given up" in told.stdout
    assert "e5, e6 could not be reapplied then" in told.stdout
    assert "nothing was changed" in told.stdout
    done = errata("compact", "--home", written, "--retired", 0)
    assert done.returncode == 0, done.stderr
    assert "2 files of former states" in done.stdout
    again = errata("compact", "--home", written)
    assert "Every file is needed." in again.stdout
    wrong = errata("compact", "--home", written, "--retired", "soon")
    assert wrong.returncode == 2
    assert "'soon' is not a number of days" in wrong.stderr

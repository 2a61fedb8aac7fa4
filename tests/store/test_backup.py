"""A backup is one consistent state, made while a server writes; what it brings back is whole."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from store import Ledger, LedgerError, LedgerInUse
from store import backup as backups
from store.backup import backup, restore
from store.head import HEAD
from store.recovery import accept, survey
from tests.conftest import ROOT
from tests.store.conftest import WHO, Book
from tests.store.test_crash import WRITER


@pytest.fixture
def written(home: Path) -> Path:
    with Ledger.open(home) as ledger:
        book = Book(ledger)
        for subject in ("France", "Italy", "Peru"):
            book.apply(subject)
        ledger.record_reverted(["e2"], "w", WHO)
        ledger.record_vector(book.model, "mood", b"a vector", {"method": "caa"}, WHO)
    for name in ("trained/abc/mend.safetensors", "statistics/abc/layer-1-self.safetensors"):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_bytes(name.encode())
    return home


def facts(home: Path) -> list[tuple[str, str]]:
    with Ledger.open(home, read_only=True) as ledger:
        assert ledger.verify() == []
        return [(edit.subject, edit.status) for edit in ledger.list_edits().edits]


def errata(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "server.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands_bring_a_home_to_another_place(written: Path, tmp_path: Path) -> None:
    made = errata("backup", tmp_path / "copy", "--home", written)
    assert made.returncode == 0, made.stderr
    assert "3 edits" in made.stdout
    shutil.rmtree(written)
    back = errata("restore", tmp_path / "copy", "--home", tmp_path / "new")
    assert back.returncode == 0, back.stderr
    assert facts(tmp_path / "new") == [("Peru", "active"), ("Italy", "reverted"), ("France", "active")]
    assert (tmp_path / "new/statistics/abc/layer-1-self.safetensors").exists()
    assert (tmp_path / "new/trained/abc/mend.safetensors").exists()
    with Ledger.open(tmp_path / "new") as ledger:
        Book(ledger).apply("Chad")


def test_backups_beside_a_writer_are_whole_and_never_older_than_what_was_acknowledged(
    home: Path, tmp_path: Path
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(home)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    said: list[str] = []
    assert "opened" in writer.stdout.readline()
    said.append(writer.stdout.readline())
    listener = threading.Thread(target=lambda: said.extend(writer.stdout), daemon=True)  # type: ignore[arg-type]
    listener.start()
    for i in range(4):
        before = sum("applied" in line for line in said)
        report = backup(home, tmp_path / f"copy{i}")
        assert report.edits >= 2 * before
        restored, _ = restore(tmp_path / f"copy{i}", tmp_path / f"home{i}")
        assert restored.edits == report.edits
    writer.kill()
    writer.wait()
    listener.join(10)
    assert len(said) > 5


def test_a_restore_replaces_only_when_told_and_moves_what_was_there_aside(
    written: Path, tmp_path: Path
) -> None:
    backup(written, tmp_path / "copy", statistics=False)
    assert not (tmp_path / "copy" / "statistics").exists()
    with Ledger.open(written) as ledger:
        Book(ledger).apply("Chad")
        with pytest.raises(LedgerInUse):
            restore(tmp_path / "copy", written, replace=True)
    with pytest.raises(LedgerError, match="--replace"):
        restore(tmp_path / "copy", written)
    assert len(facts(written)) == 4
    _, aside = restore(tmp_path / "copy", written, replace=True)
    assert len(facts(written)) == 3
    assert aside is not None
    assert len(facts(aside)) == 4


def test_a_backup_that_was_damaged_is_refused_and_the_home_stays(written: Path, tmp_path: Path) -> None:
    backup(written, tmp_path / "copy")
    chance = random.Random(3)
    files = [path for path in sorted((tmp_path / "copy").rglob("*")) if path.is_file()]
    for path in files:
        whole = path.read_bytes()
        for damage in (
            whole[: len(whole) // 2],
            whole[:-1] + bytes([whole[-1] ^ 1]) if whole else b"x",
            None,
        ):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.raises(LedgerError):
                restore(tmp_path / "copy", tmp_path / f"new{chance.random()}")
            path.write_bytes(whole)
    manifest = json.loads((tmp_path / "copy/backup.json").read_text())
    manifest["files"]["../../evil"] = "0" * 64
    (tmp_path / "copy/backup.json").write_text(json.dumps(manifest))
    with pytest.raises(LedgerError, match="not inside it"):
        restore(tmp_path / "copy", tmp_path / "new")
    assert len(facts(written)) == 3


def test_a_damaged_home_is_not_backed_up_as_if_it_were_whole(written: Path, tmp_path: Path) -> None:
    next((written / "blobs").glob("*.safetensors")).unlink()
    with pytest.raises(LedgerError, match="is damaged, and a backup of it would be too"):
        backup(written, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
    with pytest.raises(LedgerError, match="exists already"):
        backup(written, written)
    with pytest.raises(LedgerError, match=r"has no ledger\.db"):
        backup(tmp_path / "none", tmp_path / "copy")


def test_recover_says_what_the_patch_files_alone_can_tell_and_makes_bundles_of_them(written: Path) -> None:
    (written / "ledger.db").unlink()
    looked = errata("recover", "--home", written)
    assert looked.returncode == 2
    for said in ("ledger.db is missing", "'The capital of Italy is' -> 'Rome'", "steering vector 'mood'"):
        assert said in looked.stdout
    assert not (written / "ledger.db").exists()
    accepted = errata("recover", "--accept", "--home", written)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    bundles = sorted((written / "imports").glob("recovered-*.zip"))
    assert len(bundles) == 3
    with zipfile.ZipFile(bundles[0]) as bundle:
        assert (
            json.loads(bundle.read("manifest.json"))["patches"][0]["edits"][0]["request"]["target"] == "Rome"
        )
    assert facts(written) == []
    with Ledger.open(written) as ledger:
        [event] = ledger.all_events()
        assert event["kind"] == "recovered"
        assert len(event["payload"]["unnamed"]) == 4
        Book(ledger).apply("Chad")
    assert len(list((written / "recovered").glob("*.safetensors"))) == 4
    assert errata("recover", "--home", written).returncode == 0


def test_going_on_after_a_part_was_lost_keeps_the_rest_and_is_on_the_ledger(written: Path) -> None:
    early = (written / "ledger.db").read_bytes()
    with Ledger.open(written) as ledger:
        Book(ledger).apply("Chad")
    (written / "ledger.db").write_bytes(early)
    found = survey(written)
    assert "missing" in found.lost
    assert [file.about["requests"][0]["subject"] for file in found.unnamed if file.about] == ["Chad"]
    accept(written)
    assert len(facts(written)) == 3
    with Ledger.open(written) as ledger:
        assert ledger.all_events()[-1]["kind"] == "recovered"
        assert ledger.all_events()[-1]["payload"]["last_event_recorded"]["seq"] > 6
        Book(ledger).apply("Mali")
    assert len(facts(written)) == 4


def test_a_restore_that_is_cut_off_anywhere_is_named_at_the_next_start(written: Path, tmp_path: Path) -> None:
    backup(written, tmp_path / "copy")
    put, names = backups._put, [HEAD, "blobs", "statistics", "trained"]
    for step in range(len(names)):
        calls = iter(range(99))

        def stopping(source: Path, target: Path, calls: Iterator[int] = calls, step: int = step) -> None:
            if next(calls) == step:
                raise KeyboardInterrupt
            put(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backups, "_put", stopping)
            with pytest.raises(KeyboardInterrupt):
                restore(tmp_path / "copy", written, replace=True)
        with Ledger.open(written) as ledger:
            assert "the ledger is lost" in ledger.lost
    restore(tmp_path / "copy", written, replace=True)
    assert len(facts(written)) == 3
    first = min(written.glob("replaced-*"))
    assert len(facts(first)) == 3  # what was there before is still whole

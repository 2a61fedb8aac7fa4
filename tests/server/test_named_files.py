"""Paths in calls reach a few folders alone, whatever the path looks like."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from editors.errors import InvalidEdit
from editors.learned.json_values import parse
from server.errors import ServiceError
from server.named_files import named_file, named_folder, named_path
from server.settings import Settings

SECRET = "the secret of another folder"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home with the three folders, and secrets around it."""
    home = tmp_path / "home"
    for name in ("data", "imports", "exports", "blobs"):
        (home / name).mkdir(parents=True)
        (home / name / f"{name}.txt").write_text(name)
    (home / "ledger.db").write_text(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET)
    return Settings(home=home)


def refusal(settings: Settings, given: str, find: Callable[..., Path] = named_path) -> str:
    with pytest.raises(ServiceError) as caught:
        find(settings, "data", given, 1000)
    return str(caught.value)


def test_files_of_the_three_folders_are_found_by_name_by_folder_and_by_path(settings: Settings) -> None:
    for name in ("data", "imports", "exports"):
        file = settings.home / name / f"{name}.txt"
        for path in (f"{name}.txt", f"{name}/{name}.txt", str(file)):
            assert named_file(settings, "data", path, 100) == file.resolve()
        assert named_folder(settings, "data", str(file.parent), 100) == file.parent.resolve()


def test_the_folder_named_first_wins(settings: Settings) -> None:
    for name in ("data", "imports"):
        (settings.home / name / "both.txt").write_text(name)
    assert named_file(settings, "data", "both.txt", 100).read_text() == "data"
    assert named_file(settings, "data", "both.txt", 100, first="imports").read_text() == "imports"


def test_further_folders_are_named_by_a_setting_and_a_wrong_one_is_refused_at_the_start(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    more = Settings.parse(
        ["--home", str(settings.home), "--folders", f"{outside}, {settings.home / 'blobs'}"]
    )
    assert more.folders == (outside, settings.home / "blobs")
    assert named_file(more, "data", "secret.txt", 100).read_text() == SECRET
    assert named_file(more, "data", str(outside / "secret.txt"), 100).read_text() == SECRET
    with pytest.raises(SystemExit):
        Settings.parse(["--folders", str(tmp_path / "none")])
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        "/etc/passwd",
        "/etc/no-such-file",
        "/proc/self/environ",
        "/dev/zero",
        "/root/.ssh/id_rsa",
        "~/secret.txt",
        "../outside/secret.txt",
        "data/../../outside/secret.txt",
        "data/../ledger.db",
        "ledger.db",
        "blobs/blobs.txt",
        "no-such-file",
        "/",
        "..",
        "x" * 5000,
        "a/" * 2000,
        "\udcff",
        "file:///etc/passwd",
        "//etc/passwd",
        "/proc/self/root/etc/passwd",
        "/dev/fd/0",
    ],
)
def test_what_is_elsewhere_and_what_is_nowhere_get_the_same_answer(settings: Settings, given: str) -> None:
    said, nowhere = refusal(settings, given), refusal(settings, "nowhere.txt")
    assert said.replace(repr(given[:200]), "X") == nowhere.replace("'nowhere.txt'", "X")
    assert "--folders" in said
    assert SECRET not in said


def test_links_are_followed_inside_and_refused_where_they_lead_out(
    settings: Settings, tmp_path: Path
) -> None:
    data, outside = settings.home / "data", tmp_path / "outside"
    (data / "inside").symlink_to(settings.home / "imports" / "imports.txt")
    assert named_file(settings, "data", "inside", 100).read_text() == "imports"
    links = {
        "out": outside / "secret.txt",
        "gone": outside / "nothing.txt",
        "zero": Path("/dev/zero"),
        "environ": Path("/proc/self/environ"),
        "ledger": settings.home / "ledger.db",
        "folder": outside,
        "loop": data / "loop",
    }
    for name, target in links.items():
        (data / name).symlink_to(target)
        assert "is a link to a place that is not read from" in refusal(settings, name)
    assert "link" in refusal(settings, "folder/secret.txt")
    assert "link" in refusal(settings, str(data))  # a folder with such a link in it


def test_only_regular_files_are_read_and_the_check_does_not_wait_for_a_pipe(settings: Settings) -> None:
    data = settings.home / "data"
    os.mkfifo(data / "pipe")
    waiting = threading.Thread(target=refusal, args=(settings, "pipe"), daemon=True)
    waiting.start()
    waiting.join(5)
    assert not waiting.is_alive()
    assert "not a regular file" in refusal(settings, "pipe")
    assert "not a regular file" in refusal(settings, str(data))
    assert "not a regular file" in refusal(settings, "imports", named_file)
    assert "not a folder" in refusal(settings, "imports.txt", named_folder)


def test_sizes_are_bounded_for_files_for_folders_and_for_their_number(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (settings.home / "data" / "big").write_bytes(b"x" * 2000)
    assert "2,000 bytes" in refusal(settings, "big")
    for i in range(3):
        (settings.home / "imports" / f"part{i}").write_bytes(b"x" * 400)
    assert "holds 1,207 bytes" in refusal(settings, "imports")
    monkeypatch.setattr("server.named_files.MAX_FILES", 2)
    assert "more than 2 files" in refusal(settings, "imports")


@hypothesis(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["..", ".", "data", "imports", "out", "outside", "secret.txt", "", "home", "~"]))
)
@example(["data", "out", "..", "secret.txt"])
def test_no_path_made_of_these_parts_reaches_the_secret(settings: Settings, parts: list[str]) -> None:
    out = settings.home / "data" / "out"
    if not out.is_symlink():
        out.symlink_to(settings.home.parent / "outside")
    for path in ("/".join(parts), str(settings.home / "/".join(parts)), "/" + "/".join(parts)):
        try:
            found = named_path(settings, "data", path, 10**6)
        except ServiceError:
            continue
        assert any(found.is_relative_to(settings.home / name) for name in ("data", "imports", "exports"))


def test_every_reader_refuses_devices_pipes_and_endless_files_by_itself(tmp_path: Path) -> None:
    """The library is used without a server too; then nobody has looked at the path before."""
    from editors.errors import EditError
    from editors.learned.record_files import read_records
    from editors.moments import sample_name
    from editors.moments.texts import corpus_text
    from editors.steering.pairs import read_pairs
    from tests.families import make

    os.mkfifo(tmp_path / "pipe.json")
    lm: Any = make("llama")
    for path in (Path("/dev/zero"), tmp_path / "pipe.json", tmp_path):
        for read in (
            lambda p: read_records(str(p)),
            read_pairs,
            sample_name,
            lambda p: corpus_text(lm, p, 100),
        ):
            with pytest.raises(EditError, match=r"cannot be read|has no"):
                read(path)


def test_a_packed_file_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    import gzip

    from editors.errors import InvalidEdit
    from editors.learned import json_values

    monkeypatch.setattr(json_values, "MAX_BYTES", 10_000)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * 50_000 + b"[]"))
    with pytest.raises(InvalidEdit, match="unpacked, it is larger"):
        list(json_values.parse(path))


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '[{"a": ' + "[" * 100_000])
def test_a_file_that_is_nested_without_end_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InvalidEdit, match=r"deep\.jsonl? "):
        list(parse(file))

"""Bundles: replayed elsewhere to the same weights, and refused where they are not what they say."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from editors.patch import Dense, WeightPatch, save
from server.call import Call
from server.core import digest
from server.errors import Conflict, WorkbenchError
from server.exporting import export
from server.importing import import_patches
from server.results_export import ImportReport
from server.workbench import Workbench
from tests.server.benches import FACTS, STRONG, open_bench

Change = Callable[[dict[str, bytes]], dict[str, bytes]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str, str]:
    """A bundle of e1 and e3 (e2, of the same call as e1, was reverted), its weights hash and state hash."""
    home = tmp_path_factory.mktemp("made")
    bench = open_bench(home)
    bench.apply(FACTS[:2], method="rome", params=STRONG, reason="news")
    bench.apply(FACTS[2:], method="rome", params=STRONG | {"layer": 2})
    bench.revert(["e2"])
    report = export(bench.core, "patches", "bundle", None, None, Call())
    hashes = bench.host.weights_hash, bench.core.state_hash
    bench.close()
    return Path(report.path).read_bytes(), *hashes


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    (tmp_path / "home" / "imports").mkdir(parents=True)
    opened = open_bench(tmp_path / "home")
    yield opened
    opened.close()


def take(bench: Workbench, data: bytes, name: str = "b.zip") -> ImportReport:
    (bench.core.settings.home / "imports" / name).write_bytes(data)
    return import_patches(bench.core, name, None, Call())


def test_a_bundle_gives_the_same_weights_elsewhere(
    bench: Workbench, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    data, weights, state = made
    report = take(bench, data)
    assert report.weights_hash == bench.host.rehash() == weights
    assert bench.core.state_hash == state
    assert report.edit_ids == ["e1", "e2"]
    assert report.original_ids == ["e1", "e3"]
    told = bench.show_edit("e1")
    assert told.edit.reason == "news"
    assert told.params["imported_from"]["imported"] == "b.zip"
    bench.close()
    again = open_bench(tmp_path / "home")
    assert again.host.weights_hash == weights
    assert not again.core.damage
    again.close()


def test_imported_edits_are_reverted_one_by_one(bench: Workbench, made: tuple[bytes, str, str]) -> None:
    take(bench, made[0])
    bench.revert(["e1"])
    alone = bench.host.weights_hash
    bench.revert(["e2"])
    assert bench.host.rehash() == bench.host.base_hash
    bench.reapply(["e2"])
    assert bench.host.rehash() == alone != bench.host.base_hash


def test_importing_twice_is_a_conflict_and_changes_nothing(
    bench: Workbench, made: tuple[bytes, str, str]
) -> None:
    take(bench, made[0])
    with pytest.raises(Conflict, match="e1 is active"):
        take(bench, made[0])
    assert bench.host.rehash() == made[1]
    assert bench.list_edits().total == 2


def repacked(data: bytes, change: Change, tmp_path: Path) -> bytes:
    """The bundle with its members changed."""
    source = tmp_path / "source.zip"
    source.write_bytes(data)
    with zipfile.ZipFile(source) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    target = tmp_path / "target.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)
    return target.read_bytes()


def manifest(**changed: Any) -> Change:
    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        told = json.loads(members["manifest.json"]) | changed
        return members | {"manifest.json": json.dumps(told).encode()}

    return change


def patch(data: bytes) -> Change:
    """The first patch file replaced by other bytes, with a manifest that agrees."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        told = json.loads(members["manifest.json"])
        told["patches"][0] |= {"sha256": digest(data), "bytes": len(data)}
        return members | {"manifest.json": json.dumps(told).encode(), told["patches"][0]["file"]: data}

    return change


def weights(**deltas: torch.Tensor) -> bytes:
    return save(WeightPatch({name.replace("__", "."): Dense(d) for name, d in deltas.items()}))


DOWN = "model__layers__1__mlp__down_proj__weight"
WRONG: dict[str, tuple[Change, str]] = {
    "another base": (manifest(base_hash="0" * 64), "was made on"),
    "another weights hash": (manifest(weights_hash="0" * 64), "its manifest says"),
    "another format": (manifest(format="errata-bundle-9"), "format"),
    "no patches": (manifest(patches=[]), "patches"),
    "no manifest": (lambda m: {k: v for k, v in m.items() if k != "manifest.json"}, "has no manifest.json"),
    "no json": (lambda m: m | {"manifest.json": b"{"}, "not JSON"),
    "a pickle": (lambda m: m | {"patches/0001.pkl": b"x"}, "pickled"),
    "a pickle in disguise": (patch(b"\x80\x04N."), "not a patch file"),
    "a path outside": (lambda m: m | {"../../evil.safetensors": b"x"}, "outside"),
    "an absolute path": (lambda m: m | {"/etc/evil": b"x"}, "outside"),
    "a path with backslashes": (lambda m: m | {"..\\evil": b"x"}, "outside"),
    "an unlisted file": (lambda m: m | {"patches/0009.safetensors": b"x"}, "not in both"),
    "a missing file": (lambda m: {k: v for k, v in m.items() if "0002" not in k}, "not in both"),
    "a changed patch": (lambda m: m | {"patches/0001.safetensors": b"x" * 99}, "0001"),
    "an unknown weight": (patch(weights(nowhere__weight=torch.zeros(2, 2))), "does not have"),
    "another shape": (patch(weights(**{DOWN: torch.zeros(2, 2)})), "shape"),
    "no numbers": (patch(weights(**{DOWN: torch.full((32, 64), torch.nan)})), "not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_bundle_that_is_not_what_it_says_is_refused(
    case: str, bench: Workbench, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    change, message = WRONG[case]
    data = repacked(made[0], change, tmp_path)
    with pytest.raises(WorkbenchError, match=message):
        take(bench, data)
    assert bench.host.rehash() == bench.host.base_hash
    assert bench.list_edits().total == 0


def test_another_base_model_is_named(tmp_path: Path, made: tuple[bytes, str, str]) -> None:
    (tmp_path / "imports").mkdir()
    other = open_bench(tmp_path, "llama", torch.bfloat16)
    with pytest.raises(WorkbenchError, match=r"made on 'tiny-llama'.*in that dtype"):
        take(other, made[0])
    other.close()


@pytest.mark.parametrize("part", [0, 0.5, 0.9, 0.999])
def test_a_truncated_bundle_is_refused(part: float, bench: Workbench, made: tuple[bytes, str, str]) -> None:
    with pytest.raises(WorkbenchError, match="not a whole bundle"):
        take(bench, made[0][: int(part * len(made[0]))])
    assert bench.host.rehash() == bench.host.base_hash


def test_a_link_in_a_bundle_is_refused(
    bench: Workbench, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    path = tmp_path / "link.zip"
    path.write_bytes(made[0])
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("patches/0003.safetensors")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(WorkbenchError, match="is a link"):
        take(bench, path.read_bytes())


def test_only_real_files_under_imports_and_exports_are_read(
    bench: Workbench, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    outside = tmp_path / "outside.zip"
    outside.write_bytes(made[0])
    imports = tmp_path / "home" / "imports"
    (imports / "link.zip").symlink_to(outside)
    (imports / "linked").symlink_to(tmp_path)
    (imports / "folder").mkdir()
    os.mkfifo(imports / "pipe")
    for path, message in {
        str(outside): "not there",
        "../../outside.zip": "not there",
        "../imports/../../outside.zip": "not there",
        "ledger.db": "not there",
        "link.zip": "is a link",
        "linked/outside.zip": "is a link",
        str(imports / "link.zip"): "is a link",
        "folder": "not a regular file",
        "pipe": "not a regular file",
        "none.zip": "not there",
        "\x00": "names nothing",
    }.items():
        with pytest.raises(WorkbenchError, match=message):
            import_patches(bench.core, path, None, Call())
    (imports / "folder" / "b.zip").write_bytes(made[0])
    assert import_patches(bench.core, "imports/folder/b.zip", None, Call()).weights_hash == made[1]

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

from editors.model.deltas import Dense
from editors.patch import WeightPatch, save
from server.errors import Conflict, ServiceError
from server.exchange.results import ImportReport
from server.services import Services
from server.transaction.stack import digest
from tests.server.opened import FACTS, STRONG, open_services

Change = Callable[[dict[str, bytes]], dict[str, bytes]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str, str]:
    """A bundle of e1 and e3 (e2, of the same call as e1, was reverted), its weights hash and state hash."""
    home = tmp_path_factory.mktemp("made")
    services = open_services(home)
    services.edits.apply(FACTS[:2], method="rome", params=STRONG, reason="news")
    services.edits.apply(FACTS[2:], method="rome", params=STRONG | {"layer": 2})
    services.edits.revert(["e2"])
    report = services.exchange.export_edits("patches", "bundle")
    hashes = services.workspace.host.weights_hash, services.workspace.state_hash
    services.close()
    return Path(report.path).read_bytes(), *hashes


@pytest.fixture
def services(tmp_path: Path) -> Any:
    (tmp_path / "home" / "imports").mkdir(parents=True)
    opened = open_services(tmp_path / "home")
    yield opened
    opened.close()


def take(services: Services, data: bytes, name: str = "b.zip") -> ImportReport:
    (services.workspace.settings.home / "imports" / name).write_bytes(data)
    return services.exchange.import_patches(name)


def test_a_bundle_gives_the_same_weights_elsewhere(
    services: Services, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    data, weights, state = made
    report = take(services, data)
    assert report.weights_hash == services.workspace.host.rehash() == weights
    assert services.workspace.state_hash == state
    assert report.edit_ids == ["e1", "e2"]
    assert report.original_ids == ["e1", "e3"]
    told = services.history.show_edit("e1")
    assert told.edit.reason == "news"
    assert told.params["imported_from"]["imported"] == "b.zip"
    services.close()
    again = open_services(tmp_path / "home")
    assert again.workspace.host.weights_hash == weights
    assert not again.workspace.damage
    again.close()


def test_imported_edits_are_reverted_one_by_one(services: Services, made: tuple[bytes, str, str]) -> None:
    take(services, made[0])
    services.edits.revert(["e1"])
    alone = services.workspace.host.weights_hash
    services.edits.revert(["e2"])
    assert services.workspace.host.rehash() == services.workspace.host.base_hash
    services.edits.reapply(["e2"])
    assert services.workspace.host.rehash() == alone != services.workspace.host.base_hash


def test_importing_twice_is_a_conflict_and_changes_nothing(
    services: Services, made: tuple[bytes, str, str]
) -> None:
    take(services, made[0])
    with pytest.raises(Conflict, match="e1 is active"):
        take(services, made[0])
    assert services.workspace.host.rehash() == made[1]
    assert services.history.list_edits().total == 2


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
    case: str, services: Services, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    change, message = WRONG[case]
    data = repacked(made[0], change, tmp_path)
    with pytest.raises(ServiceError, match=message):
        take(services, data)
    assert services.workspace.host.rehash() == services.workspace.host.base_hash
    assert services.history.list_edits().total == 0


def test_another_base_model_is_named(tmp_path: Path, made: tuple[bytes, str, str]) -> None:
    (tmp_path / "imports").mkdir()
    other = open_services(tmp_path, "llama", torch.bfloat16)
    with pytest.raises(ServiceError, match=r"made on 'tiny-llama'.*in that dtype"):
        take(other, made[0])
    other.close()


@pytest.mark.parametrize("part", [0, 0.5, 0.9, 0.999])
def test_a_truncated_bundle_is_refused(part: float, services: Services, made: tuple[bytes, str, str]) -> None:
    with pytest.raises(ServiceError, match="not a whole bundle"):
        take(services, made[0][: int(part * len(made[0]))])
    assert services.workspace.host.rehash() == services.workspace.host.base_hash


def test_a_link_in_a_bundle_is_refused(
    services: Services, made: tuple[bytes, str, str], tmp_path: Path
) -> None:
    path = tmp_path / "link.zip"
    path.write_bytes(made[0])
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("patches/0003.safetensors")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ServiceError, match="is a link"):
        take(services, path.read_bytes())


def test_only_real_files_under_imports_and_exports_are_read(
    services: Services, made: tuple[bytes, str, str], tmp_path: Path
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
        "\x00": "is not a file name",
    }.items():
        with pytest.raises(ServiceError, match=message):
            services.exchange.import_patches(path)
    (imports / "folder" / "b.zip").write_bytes(made[0])
    assert services.exchange.import_patches("imports/folder/b.zip").weights_hash == made[1]

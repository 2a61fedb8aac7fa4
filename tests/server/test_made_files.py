"""Statistics and trained editors that were changed behind the server's back are not used without a word."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from editors.edit import Edit
from editors.errors import EditError
from editors.learned.trained_folder import TrainedFolder
from server.services import Services
from store.made_files import MADE
from tests.editors.trained import trained_for
from tests.server.opened import FACTS, QUICK, open_services

WHOLE = {**QUICK, "mode": "full"}
"""Quick, but with second moments."""
CHANGED = "was changed after the server made it; delete it: statistics are made again"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path / "home", bounds="off")
    yield opened
    opened.close()


def apply(services: Services, edit: Edit) -> list[str]:
    return services.edits.apply([edit], method="rome", params=WHOLE).edit_ids


def moments(home: Path) -> list[Path]:
    return sorted((home / "statistics").rglob("layer-*.safetensors"))


def trained(services: Services) -> Path:
    """The folder of trained editors, filled as trainings leave it."""
    workspace = services.workspace
    folder = workspace.settings.home / "trained" / workspace.base_hash[:16]
    shutil.copytree(trained_for(workspace.lm), folder)
    workspace.lm.extension(TrainedFolder).path = folder
    return folder


def spoil(path: Path) -> None:
    """Another number in a file that can still be read."""
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\0\0\0@")


def test_changed_statistics_are_refused_and_named_until_they_are_made_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    services = open_services(home, bounds="off")
    apply(services, FACTS[0])
    assert services.edits.audit().integrity.problems == []
    services.close()
    used = moments(home)
    spoil(used[0])
    services = open_services(home, bounds="off")
    assert services.workspace.damage == []  # patches are kept as they were computed
    audit = services.edits.audit()
    assert (audit.integrity.chain, audit.integrity.blobs, audit.integrity.weights) == (True, True, True)
    [problem] = audit.integrity.problems
    assert CHANGED in problem
    assert str(used[0]) in problem
    assert "integrity.problems names files" in audit.next
    with pytest.raises(EditError, match=CHANGED):
        apply(services, FACTS[1])
    used[0].unlink()
    assert apply(services, FACTS[1])
    assert services.edits.audit().integrity.problems == []
    services.close()


def test_statistics_of_another_layer_in_their_place_are_noticed(services: Services, tmp_path: Path) -> None:
    services.workspace.statistics.ensure(services.workspace.lm, [0, 1], lambda *_: None)
    first, second = moments(tmp_path / "home")
    shutil.copy(first, second)
    services.workspace.statistics._moments.forget(lambda _: True)
    with pytest.raises(EditError, match=CHANGED):
        services.workspace.statistics.get(1)


def test_statistics_that_were_there_before_are_taken_as_they_are_and_watched_from_then_on(
    tmp_path: Path,
) -> None:
    services = open_services(tmp_path / "one", bounds="off")
    apply(services, FACTS[0])
    services.close()
    shutil.copytree(tmp_path / "one" / "statistics", tmp_path / "two" / "statistics")
    services = open_services(tmp_path / "two", bounds="off")
    assert apply(services, FACTS[0])
    assert services.workspace.ledger.last_event(MADE, {}) is not None
    services.close()
    spoil(moments(tmp_path / "two")[0])
    services = open_services(tmp_path / "two", bounds="off")
    with pytest.raises(EditError, match=CHANGED):
        apply(services, FACTS[1])
    services.close()


def test_a_read_only_server_uses_statistics_and_records_nothing(tmp_path: Path) -> None:
    services = open_services(tmp_path / "one", bounds="off")
    apply(services, FACTS[0])
    services.close()
    shutil.copytree(tmp_path / "one" / "statistics", tmp_path / "two" / "statistics")
    open_services(tmp_path / "two", bounds="off").close()
    services = open_services(tmp_path / "two", bounds="off", read_only=True)
    before = services.workspace.ledger.position()
    assert services.edits.preview([FACTS[1]], method="rome", params=WHOLE).status == "previewed"
    assert services.workspace.ledger.position() == before
    services.close()


def test_a_reader_uses_what_the_writer_made_anew(tmp_path: Path) -> None:
    home = tmp_path / "home"
    writer = open_services(home, bounds="off")
    apply(writer, FACTS[0])
    reader = open_services(home, bounds="off", read_only=True)
    layer = int(moments(home)[0].stem.split("-")[1])
    tokens = reader.workspace.statistics.get(layer).tokens
    writer.workspace.statistics.tokens = 2 * tokens
    writer.workspace.statistics.forget([layer])
    writer.workspace.statistics.ensure(writer.workspace.lm, [layer], lambda *_: None)
    reader.workspace.statistics._moments.forget(lambda _: True)
    assert reader.workspace.statistics.get(layer).tokens > tokens
    reader.close()
    writer.close()


@pytest.mark.parametrize("method", ["mend", "serac"])
def test_a_trained_editor_that_was_changed_is_refused(services: Services, method: str) -> None:
    folder = trained(services)
    edit = Edit(subject="France", prompt="The capital of {} is", target="Rome")
    ids = services.edits.apply([edit], method=method).edit_ids
    services.edits.revert(ids)
    spoil(folder / f"{method}.safetensors")
    with pytest.raises(EditError, match=CHANGED):
        services.edits.apply([edit], method=method)
    assert any(CHANGED in problem for problem in services.edits.audit().integrity.problems)


def test_a_memory_that_answers_with_changed_networks_is_refused_by_name(tmp_path: Path) -> None:
    services = open_services(tmp_path / "home", bounds="off")
    folder = trained(services)
    edit = Edit(subject="France", prompt="The capital of {} is", target="Rome")
    services.edits.apply([edit], method="serac")
    services.close()
    [named] = list(folder.glob("serac-*.safetensors"))
    spoil(named)
    services = open_services(tmp_path / "home", bounds="off")
    assert any(
        "its bytes are not those that its name says" in each for each in services.workspace.damage
    ) or ("its bytes are not those that its name says" in said(services, edit.text))
    services.close()


def said(services: Services, prompt: str) -> str:
    with pytest.raises(EditError) as refusal:
        services.facts.ask(prompt, 2)
    return str(refusal.value)

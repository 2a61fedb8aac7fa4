"""A read-only server beside a writer answers with what the writer has recorded."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from server.errors import ServiceError
from server.services import Services
from tests.server.opened import FACTS, apply, open_services


def settled(reader: Services, writer: Services) -> bool:
    """Wait until both have the same weights; False after some seconds."""
    end, pause = time.monotonic() + 20, threading.Event()
    while reader.workspace.host.weights_hash != writer.workspace.host.weights_hash:
        if time.monotonic() > end:
            return False
        pause.wait(0.02)
    return True


def test_a_read_only_server_has_the_weights_that_the_writer_recorded(tmp_path: Path) -> None:
    writer = open_services(tmp_path / "home")
    reader = open_services(tmp_path / "home", read_only=True)
    pristine = reader.workspace.host.weights_hash
    try:
        [first] = apply(writer, FACTS[0])
        assert settled(reader, writer)
        assert reader.workspace.host.weights_hash != pristine
        apply(writer, FACTS[1])
        writer.edits.revert([first])
        assert settled(reader, writer)
        assert reader.status().active_edits == 1
        assert reader.status().damage == []
        assert reader.workspace.host.rehash() == writer.workspace.host.rehash()
    finally:
        reader.close()
        writer.close()


def test_a_reader_that_came_before_the_first_writer_follows_it_too(tmp_path: Path) -> None:
    reader = open_services(tmp_path / "home", read_only=True)
    writer = open_services(tmp_path / "home")
    try:
        apply(writer, FACTS[0])
        assert settled(reader, writer)
    finally:
        reader.close()
        writer.close()


def test_every_turn_begins_with_what_the_writer_has_recorded_by_then(tmp_path: Path) -> None:
    """Not some moments later: an audit finds the edits of the ledger on its model."""
    writer = open_services(tmp_path / "home")
    reader = open_services(tmp_path / "home", read_only=True)
    try:
        assert reader.follower
        reader.follower.stop()  # it would only hide what a turn does by itself
        for fact in FACTS:
            apply(writer, fact)
            audit = reader.edits.audit()
            assert [row.edit_id for row in audit.edits] == [r.id for r in writer.workspace.active_edits]
            assert reader.workspace.state_hash == writer.workspace.state_hash
        assert reader.facts.ask(FACTS[0].text, 1).tokens is not None
    finally:
        reader.close()
        writer.close()


def test_what_is_recorded_during_a_turn_is_not_followed_within_it(tmp_path: Path) -> None:
    writer = open_services(tmp_path / "home")
    reader = open_services(tmp_path / "home", read_only=True)
    try:
        with reader.workspace.turn():
            before = reader.workspace.state_hash
            apply(writer, FACTS[0])
            with reader.workspace.turn():
                assert reader.workspace.state_hash == before
            with pytest.raises(ServiceError, match="e1 during this call"):
                reader.edits.audit()
        assert len(reader.edits.audit().edits) == 1
    finally:
        reader.close()
        writer.close()

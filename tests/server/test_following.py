"""A read-only server beside a writer answers with what the writer has recorded."""

from __future__ import annotations

import threading
import time
from pathlib import Path

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

"""Decisions made at the command line: left in HOME/decisions, where the running server finds and carries them out.

The ledger has one writer, the server. So `errata-mcp decide` writes a file there, under another name first, and waits
for the answer beside it. A decision is deleted only after its answer is written: what a crash leaves is tried again at
the next start, and the ledger decides each proposal once.
"""

from __future__ import annotations

import json
import logging
import threading
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editors.errors import Cancelled, EditError
from editors.files import write_atomically
from server.errors import ServiceError
from server.request_context import RequestContext
from server.settings import errata_version
from store import LedgerError

if TYPE_CHECKING:
    from server.proposals.service import ProposalService

log = logging.getLogger("errata.decisions")

FOLDER = "decisions"
CLIENT = "errata-mcp decide"
PAUSE = 1.0
"""Seconds between two looks at the folder."""
MOST_BYTES = 20_000


@dataclass(frozen=True)
class Decision:
    """A decision. `made`: the time of the proposal, so that it is not mistaken for another one with the same id."""

    proposal_id: str
    made: str
    decision: str
    note: str | None
    user: str


@dataclass(frozen=True)
class AnswerOfServer:
    """The server's answer to a decision."""

    done: bool
    message: str


def leave(home: Path, decision: Decision) -> Path:
    """Write a decision for the server of `home`; returns its path. Raises OSError."""
    folder = home / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{uuid.uuid4().hex}.json"
    _write(path, asdict(decision))
    return path


def answer_to(path: Path) -> AnswerOfServer | None:
    """The server's answer to a decision, once it is there; it is deleted."""
    try:
        given = json.loads(path.with_suffix(".answer").read_text("utf-8"))
    except FileNotFoundError:
        return None
    path.with_suffix(".answer").unlink(missing_ok=True)
    return AnswerOfServer(bool(given["done"]), str(given["message"]))


class Decisions:
    """The server's side: a thread that carries out what lies in the folder."""

    def __init__(self, proposals: ProposalService, home: Path) -> None:
        self._proposals, self._folder = proposals, home / FOLDER
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="errata-decisions", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. Decisions that were not carried out stay for the next start."""
        self._ended.set()

    def carry_out(self) -> int:
        """Carry out every decision in the folder, the oldest first; returns how many."""
        try:
            paths = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        except OSError:
            return 0
        return sum(self._carried_out(path) for path in paths if not self._ended.is_set())

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE):
            self.carry_out()

    def _carried_out(self, path: Path) -> bool:
        try:
            answer = self._decide(path)
        except Exception as error:
            if self._ended.is_set() or isinstance(error, Cancelled):
                return False
            answer = AnswerOfServer(False, _told(error))
        with suppress(OSError):
            _write(path.with_suffix(".answer"), asdict(answer))
            path.unlink(missing_ok=True)
            log.info("%s", answer.message)
        return True

    def _decide(self, path: Path) -> AnswerOfServer:
        asked = _read(path)
        found = self._proposals.record(asked.proposal_id)
        if found.created != asked.made:
            raise ServiceError(
                f"{asked.proposal_id} is now another proposal than the one that was decided on"
            )
        ctx = RequestContext(
            client=f"{CLIENT} ({asked.user})", client_version=errata_version(), cancelled=self._ended
        )
        told = self._proposals.decide(asked.proposal_id, asked.decision, asked.note, ctx)
        return AnswerOfServer(told.state != "waiting", told.message)


def _read(path: Path) -> Decision:
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        given = Decision(**json.loads(data))
        texts = (given.proposal_id, given.made, given.decision, given.user, given.note or "")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a field is not a text")
    except (ValueError, TypeError) as error:
        raise ServiceError(f"{path.name} is not a decision: {error}") from None
    return given


def _told(error: Exception) -> str:
    if isinstance(error, (EditError, ServiceError, LedgerError)):
        return str(error)
    log.error("a decision failed", exc_info=error)
    return f"internal error: {type(error).__name__}; the server's log has the details. Nothing was changed."


def _write(path: Path, values: dict[str, object]) -> None:
    """Write JSON so that no reader sees half of it."""
    write_atomically(path, json.dumps(values).encode())

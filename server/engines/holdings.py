"""Which edits an engine was last proven to hold, from the ledger; and the prompts of that proof, for later audits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.files import write_atomically
from server.engines.artefacts import Artefact
from server.engines.engine import Engine
from server.engines.probes import ProofProbe, from_json, to_json
from server.errors import ServiceError
from server.transaction.workspace import Workspace
from store import Ledger

PUSHED, AUDITED = "pushed", "engine_audited"
"""Kinds of events."""


@dataclass(frozen=True)
class Holding:
    """A push that was proven."""

    engine: str
    version: str
    weights_hash: str
    edit_ids: tuple[str, ...]
    files: Mapping[str, str]
    at: str
    probes_sha256: str
    form: Any = "lora"
    left_out: tuple[str, ...] = ()

    def artefact(self, engine: Engine) -> Artefact:
        """What was handed over; its files may be gone meanwhile (`is_whole`)."""
        folder = engine.settings.folder
        assert folder is not None
        return Artefact(folder / self.version, self.form, self.files, {}, ())

    def probes(self, workspace: Workspace) -> list[ProofProbe]:
        """The prompts of the proof. Raises ServiceError when their file is not the one that was written."""
        path = probes_file(workspace, self.engine, self.version)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != self.probes_sha256:
                raise ValueError("its hash is another than the ledger's")
            return from_json(json.loads(data))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServiceError(
                f"{path} cannot be used ({error}), so {self.engine} cannot be compared with anything; "
                f"push_edits(engine={self.engine!r}) makes it again"
            ) from None


def probes_file(workspace: Workspace, engine: str, version: str) -> Path:
    """Where the prompts of one push are kept."""
    return workspace.settings.home / "engines" / engine / f"{version}.probes.json"


def write_probes(workspace: Workspace, engine: str, version: str, probes: Sequence[ProofProbe]) -> str:
    """Keep the prompts of a proof; SHA-256 of the file."""
    path = probes_file(workspace, engine, version)
    data = json.dumps(to_json(probes), ensure_ascii=False).encode()
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Look:
    """The last push or audit of an engine."""

    sure: bool  # the engine holds what it was last proven to hold
    problem: str
    at: str


def last_look(ledger: Ledger, engine: str) -> Look | None:
    """What the last push or audit of an engine found; None where there was none."""
    events = ledger.events_of_kind([PUSHED, AUDITED])
    last = next((event for event in events if event.payload.get("engine") == engine), None)
    if last is None:
        return None
    problem = str(last.payload.get("problem") or "")
    sure = bool(last.payload["proven"]) and not problem
    # After a push that failed the former edits are there only if the engine was seen to be as before.
    sure = sure or bool(last.kind == PUSHED and last.payload.get("restored"))
    return Look(sure, problem, last.at)


def newest(ledger: Ledger, engine: str) -> Holding | None:
    """The newest push to an engine that was proven; None where there is none."""
    for event in ledger.events_of_kind([PUSHED]):
        payload = event.payload
        if payload.get("engine") == engine and payload.get("probes"):
            return Holding(
                engine=engine,
                version=payload["version"],
                weights_hash=payload["of"],
                edit_ids=tuple(payload["pushed"]),
                files=payload["files"],
                at=event.at,
                probes_sha256=payload["probes"],
                form=payload["form"],
                left_out=tuple(payload["left_out"]),
            )
    return None

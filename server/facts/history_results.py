"""Results of the tools that read the ledger: edits and their history, audits, rows of a query."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from server.engines.results import EngineProof
from server.facts.results import Changed, Drift, EditOutcome
from server.results import UNTRUSTED, Quoting, Result

BEFORE_OF = "before_of"
"""In a measurement: the hash of the unedited weights whose answers it has as those before."""


class EditRow(Result):
    """One line of the ledger."""

    edit_id: str
    status: Literal["active", "reverted", "replaced", "rejected"]
    subject: str
    prompt: str
    target: str
    previous: str | None
    method: str
    reliability: float | None
    generality: float | None
    locality: float | None
    reason: str | None
    source: str | None
    client: str | None
    created: str
    changed: str


class EditList(Result):
    rounded: ClassVar[bool] = True

    edits: list[EditRow]
    next_cursor: str | None = None
    total: int


class Event(Result):
    seq: int
    at: str
    kind: str
    client: str | None = Field(description="The name that the client gave itself.")
    identity: str | None = Field(None, description="Whose token the call had, checked by the server.")
    request_id: str | None
    reason: str | None
    payload: dict[str, Any] = Field(json_schema_extra=UNTRUSTED)
    hash: str


class Measurement(Result):
    at: str
    occasion: str = Field(description="apply, reapply, audit ...")
    values: dict[str, Any] = Field(json_schema_extra=UNTRUSTED)


class EditDetail(Quoting):
    edit: EditRow
    request: dict[str, Any]
    params: dict[str, Any]
    patch: dict[str, Any] = Field(
        description="Blob hash, bytes, kind, tensors with shapes, row in the batch."
    )
    weights_hash_before: str
    weights_hash_after: str
    batch: list[str] = Field(default=[], description="Edits of the same call.")
    replaces: list[str] = Field(default=[])
    replaced_by: str | None = None
    located: dict[str, Any] | None = Field(
        None, description="The latest trace of the same subject and prompt (locate_fact) before the edit."
    )
    measurements: list[Measurement]
    events: list[Event]


class Integrity(Result):
    chain: bool = Field(description="The event hash chain is unbroken and the rows agree with it.")
    blobs: bool = Field(description="Every patch file is there and has its hash.")
    weights: bool = Field(description="The live weights equal pristine weights plus the active patches.")
    problems: list[str] = Field(default=[])


class Audit(Quoting):
    rounded: ClassVar[bool] = True

    summary: str = Field("", description="Counts first: how many edits hold, and what else changed.")
    job_id: str = Field("", description="The job that asks them, if they are too many for a call.")
    edits: list[EditOutcome] = Field(
        description="Of up to five edits each; of more those that do not hold, at most eight (detail='full': all)."
    )
    not_listed: str = Field("", description="In a short report: what is counted but not listed.")
    forms: dict[str, float] = Field(
        default={}, description="Means of the edits' forms; with detail='full' of all that there are."
    )
    subject_locality: float | None = Field(
        None,
        description="With detail='full': share of the subjects' other facts that the pristine model has too.",
    )
    changed: list[Changed] = Field(
        default=[], description="Facts that the pristine model says rightly and the live one does not."
    )
    changed_count: int = 0
    measured_now: int = Field(0, description="Edits asked now; the others were audited in this very state.")
    holding: int
    failing: list[str]
    integrity: Integrity | None = Field(None, description="Null where an engine was asked.")
    drift: Drift | None = None
    engine: EngineProof | None = Field(None, description="The answers of the engine that was asked.")
    repaired: list[str] = Field(default=[])
    weights_hash: str
    seconds: float
    next: str


class Rows(Quoting):
    columns: list[str]
    rows: list[list[str | int | float | None]] = Field(json_schema_extra=UNTRUSTED)
    truncated: bool
    seconds: float

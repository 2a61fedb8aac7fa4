"""The values that go into the ledger and come out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["active", "reverted", "replaced", "rejected"]
STATUSES: tuple[Status, ...] = ("active", "reverted", "replaced", "rejected")
RATES = ("reliability", "generality", "locality", "portability")
Json = dict[str, Any]


@dataclass(frozen=True)
class Who:
    """The client that made a call."""

    client: str | None = None  # as it calls itself
    client_version: str | None = None
    request_id: str | None = None
    identity: str | None = None  # whose token it had; recorded in the payload of the event


NOBODY = Who()


@dataclass(frozen=True, kw_only=True)
class NewPatch:
    """A patch to record: its file, its requests (one edit each) and what was measured.

    Each request has at least subject, prompt and target; its own `reason` and `source` take
    precedence over those of the patch. `measurements` is empty or has one entry for each request.
    """

    model_id: int
    method: str
    params: Mapping[str, Any]
    kind: str  # weight, hook, route, adapter
    blob: bytes
    requests: Sequence[Mapping[str, Any]]
    weights_hash_before: str
    weights_hash_after: str
    state_hash: str | None = None
    measurements: Sequence[Mapping[str, Any]] = ()
    drift: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class RecordedPatch:
    """What a new patch was given when it was recorded: its id, its place in the stack, its edits' ids."""

    patch_id: int
    position: int
    edit_ids: tuple[str, ...]  # in the order of its requests


@dataclass(frozen=True)
class EditRecord:
    """One edit on the ledger. The rates are the ones measured last."""

    id: str
    seq: int
    patch_id: int
    row: int
    model_id: int
    status: Status
    request: Json
    subject: str
    prompt: str
    target: str
    previous: str | None
    method: str
    reason: str | None
    source: str | None
    client: str | None
    client_version: str | None
    request_id: str | None
    replaced_by: str | None
    weights_hash_before: str
    weights_hash_after: str
    created: str
    changed: str
    reliability: float | None
    generality: float | None
    locality: float | None
    portability: float | None


@dataclass(frozen=True)
class PatchRecord:
    """One patch on the ledger."""

    id: int
    model_id: int
    position: int
    method: str
    kind: str
    params: Json
    source_blob: str
    blob: str | None
    seconds: float
    environment: Json
    base_hash: str
    weights_hash_before: str
    weights_hash_after: str
    state_hash: str | None
    created: str


@dataclass(frozen=True)
class StackEntry:
    """A patch with at least one active edit: what a replay adds to the pristine weights."""

    patch_id: int
    position: int
    method: str
    kind: str
    params: Json
    blob: str  # SHA-256 of the patch that is live
    source_blob: str  # SHA-256 of the patch as computed for the whole call
    rows: tuple[int, ...]  # active rows
    edit_ids: tuple[str, ...]  # all edits of the call, by row
    weights_hash_before: str
    weights_hash_after: str
    state_hash: str | None
    environment: Json


@dataclass(frozen=True)
class EventRecord:
    """One event of the history."""

    seq: int
    at: str
    kind: str
    model_id: int | None
    edit_ids: tuple[str, ...]
    client: str | None
    client_version: str | None
    request_id: str | None
    reason: str | None
    weights_hash: str | None
    state_hash: str | None
    payload: Json
    prev_hash: str
    hash: str


@dataclass(frozen=True)
class MeasurementRecord:
    """One measurement of one edit."""

    edit_id: str
    at: str
    occasion: str
    values: Json


@dataclass(frozen=True)
class VectorRecord:
    """One steering vector on the ledger."""

    name: str
    model_id: int
    method: str
    blob: str  # SHA-256 of its file
    about: Json  # layers, norms, separation ...
    reason: str | None
    client: str | None
    created: str


@dataclass(frozen=True)
class FactSetRecord:
    """One fact set: a list of right answers by name."""

    name: str
    version: int
    about: Json  # where it came from, how it was read
    facts: int
    created: str
    changed: str


@dataclass(frozen=True)
class FactRecord:
    """One fact of a set."""

    set_name: str
    number: int
    key: str  # digest of subject and prompt, as that of an edit
    since: int  # version of the set in which it became what it is
    fact: Json  # subject, prompt, answer and more


@dataclass(frozen=True)
class FactState:
    """How a fact of a set stands with a model: what the last check and the last correction found."""

    set_name: str
    number: int
    model_id: int
    verdict: str | None = None  # agrees, differs, unsure
    was: str | None = None  # the verdict of the check before
    answer: str | None = None  # what the model said
    p_answer: float | None = None
    p_expected: float | None = None
    state_hash: str | None = None  # of the model that was asked
    checked: str | None = None
    outcome: str | None = None  # of the last correction: planned, done, failed, right, skipped, lost
    why: str | None = None
    edit_id: str | None = None  # the edit that corrected it last
    job_id: str | None = None  # the job of the outcome


@dataclass(frozen=True)
class ProposalRecord:
    """Edits that were computed and measured, and wait for a decision, or had one."""

    id: str
    seq: int
    model_id: int
    state: str  # waiting, approved, declined, changes
    request: Json  # what apply_edits would be called with
    report: Json  # what the preview measured
    states: Json  # the hashes of the model that it was measured on, and after it
    blob: str | None  # SHA-256 of the patch as computed
    reason: str | None
    source: str | None
    client: str | None
    identity: str | None
    created: str
    decided: str | None
    decided_client: str | None
    decided_identity: str | None
    note: str | None
    edit_ids: tuple[str, ...]  # what it became


@dataclass(frozen=True)
class Approval:
    """A proposal that is applied with the patches that are recorded."""

    proposal_id: str
    note: str | None = None


@dataclass(frozen=True)
class JobRecord:
    """One job."""

    id: str
    kind: str
    state: str
    request: Json
    progress: float
    message: str
    metrics: list[Any]
    result: Json | None
    eta_seconds: float | None
    client: str | None
    created: str
    started: str | None
    updated: str
    finished: str | None


@dataclass(frozen=True)
class ModelRecord:
    """One model that the ledger has seen."""

    id: int
    name: str
    base_hash: str
    architecture: str
    edits: int  # on it, of any status
    active: int  # of those
    dtype: str | None  # in which its first patch was computed; None when there is none


@dataclass(frozen=True)
class Problem:
    """One problem that `verify` reports, and where it is: an event, an edit, a file."""

    kind: Literal["chain", "row", "blob", "sqlite", "file"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"

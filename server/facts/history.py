"""What the ledger knows of edits: a page of them, or everything about one. Never uses the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from editors.errors import EditError
from editors.model.deltas import LowRank
from editors.patch import WeightPatch
from editors.patch_kinds import load
from server.facts.history_results import EditDetail, EditList, Event, Measurement, Rows
from server.facts.remembered import trace_before
from server.facts.reports import edit_row
from store import EditFilter, EventRecord, Ledger
from store.errors import BlobError, RemovedBlob
from store.history import RECORDING


class HistoryService:
    """Reads the ledger. It takes no lock of the model, so it answers while the model works."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def list_edits(
        self,
        status: str | None = None,
        subject: str | None = None,
        text: str | None = None,
        method: str | None = None,
        since: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> EditList:
        """A page of edits, newest first. Raises BadFilter for a value that cannot be used."""
        wanted = EditFilter(status=status, subject=subject, text=text, method=method, since=since)
        page = self._ledger.list_edits(wanted, limit, cursor)
        return EditList(
            edits=[edit_row(record) for record in page.edits], next_cursor=page.next_cursor, total=page.total
        )

    def show_edit(self, edit_id: str) -> EditDetail:
        """Everything the ledger knows about one edit. Raises NoSuchEdit."""
        ledger = self._ledger
        record = ledger.get_edit(edit_id)
        patch = ledger.get_patch(record.patch_id)
        events = ledger.events_of(edit_id)
        return EditDetail(
            edit=edit_row(record),
            request=record.request,
            params=patch.params,
            patch={
                "patch_id": patch.id,
                "row": record.row,
                "kind": patch.kind,
                "blob": patch.blob,
                "source_blob": patch.source_blob,
                "environment": patch.environment,
                **_describe_blob(ledger, patch.source_blob),
            },
            weights_hash_before=record.weights_hash_before,
            weights_hash_after=record.weights_hash_after,
            batch=[i for i in ledger.batch(patch.id) if i != edit_id],
            replaces=ledger.replaced_edits(edit_id),
            replaced_by=record.replaced_by,
            located=trace_before(ledger, record.subject, record.prompt, events[0].seq) if events else None,
            measurements=[
                Measurement(at=m.at, occasion=m.occasion, values=m.values)
                for m in ledger.measurements_of(edit_id)
            ],
            events=[_event(event, record.reason) for event in events],
        )

    def query(
        self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None, limit: int = 100
    ) -> Rows:
        """Run one read-only SELECT. Raises QueryError."""
        started = time.monotonic()
        result = self._ledger.query(sql, params, limit)
        return Rows(
            columns=result.columns,
            rows=result.rows,
            truncated=result.truncated,
            seconds=time.monotonic() - started,
        )

    def schema(self) -> str:
        """The ledger's tables as SQL, with comments."""
        return self._ledger.schema()


def _describe_blob(ledger: Ledger, blob: str) -> dict[str, Any]:
    """Size and tensors of a patch file; what is wrong with it when it is damaged."""
    try:
        patch = load(ledger.patch_bytes(blob))
    except RemovedBlob as error:
        return {"deleted": str(error)}
    except (EditError, BlobError) as error:
        return {"damage": str(error)}
    about: dict[str, Any] = {"bytes": ledger.blobs.size(blob)}
    if isinstance(patch, WeightPatch):
        about["tensors"] = {
            name: {"shape": [d.left.shape[0], d.right.shape[1]], "rank": d.left.shape[1]}
            if isinstance(d, LowRank)
            else {"shape": list(d.delta.shape)}
            for name, d in patch.deltas.items()
        }
    return about


def _event(e: EventRecord, reason: str | None) -> Event:
    """An event of an edit. `reason`: why the edit was made, which may be its own among those of its call."""
    shared = {name: getattr(e, name) for name in Event.model_fields if name != "identity"}
    if e.kind in RECORDING and reason is not None:
        shared["reason"] = reason
    return Event(**shared, identity=e.payload.get("identity"))

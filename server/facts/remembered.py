"""Traces and suggested layers on the ledger: record them, and find them again."""

from __future__ import annotations

import json
from typing import Any

from server.request_context import RequestContext
from server.transaction.workspace import Workspace, who
from store import Ledger
from store.canonical import fact_key

LOCATED, LAYERS = "located", "layers_suggested"


def remember_trace(workspace: Workspace, payload: dict[str, Any], ctx: RequestContext) -> int | None:
    """Record a trace. Returns the number of its event, or None on a read-only server."""
    if workspace.read_only:
        return None
    fact = fact_key(payload["subject"], payload["prompt"])
    return workspace.ledger.record_event(
        LOCATED, payload | {"fact": fact}, who(ctx), model_id=workspace.writable_model_id
    )


def trace_before(ledger: Ledger, subject: str, prompt: str, before: int) -> dict[str, Any] | None:
    """The latest trace of the same subject and prompt before an event."""
    result = ledger.query(
        "SELECT seq, at, payload FROM events WHERE kind = ? AND seq < ? AND json_extract(payload, '$.fact') = ? "
        "ORDER BY seq DESC LIMIT 1",
        [LOCATED, before, fact_key(subject, prompt)],
        limit=1,
    )
    if not result.rows:
        return None
    seq, at, payload = result.rows[0]
    read: dict[str, Any] = json.loads(payload) if isinstance(payload, str) else dict(payload)
    return {"event": seq, "at": at} | {k: v for k, v in read.items() if k not in ("fact", "maps")}


def remember_layers(
    workspace: Workspace, method: str, layers: list[int], table: list[Any], ctx: RequestContext
) -> bool:
    """Record the best layers of a method on this model. Returns False on a read-only server."""
    if workspace.read_only:
        return False
    payload = {"method": method, "layers": layers, "candidates": table}
    workspace.ledger.record_event(LAYERS, payload, who(ctx), model_id=workspace.writable_model_id)
    return True


def best_layers(workspace: Workspace, method: str) -> list[int] | None:
    """The layers that were last suggested for a method on this model; None when none were."""
    if workspace.model_id is None:
        return None
    result = workspace.ledger.query(
        "SELECT json_extract(payload, '$.layers') FROM events WHERE kind = ? AND model_id = ? "
        "AND json_extract(payload, '$.method') = ? ORDER BY seq DESC LIMIT 1",
        [LAYERS, workspace.model_id, method],
        limit=1,
    )
    return [int(i) for i in json.loads(result.rows[0][0])] if result.rows else None

"""What the tables must contain, computed from the events alone.

Recording makes the rows of patches and edits from their event with the functions of this module;
`verify` uses the same functions to check that the rows still agree with the events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from store.canonical import canonical_json, dump_json, fact_key, finite_or_none, without_case_and_spacing
from store.records import Problem

RECORDING = {"applied": "active", "rejected": "rejected"}  # event kind -> status of the edits it adds
MODEL = "model_added"  # the event of a row of `models`
COMPACTED = "compacted"  # the event that says which files are not needed any more
CHANGING = {"reverted": "reverted", "reapplied": "active", "replaced": "replaced"}

Row = dict[str, Any]


def patch_row(event: Mapping[str, Any]) -> Row:
    """The row of `patches` that an applied or rejected event adds."""
    patch = event["payload"]["patch"]
    return {
        **patch,
        "model_id": event["model_id"],
        "params": dump_json(patch["params"]),
        "environment": dump_json(patch["environment"]),
        "blob": patch["source_blob"] if event["kind"] == "applied" else None,
        "event_seq": event["seq"],
        "created": event["at"],
    }


def edit_rows(event: Mapping[str, Any]) -> list[Row]:
    """The rows of `edits` that an applied or rejected event adds."""
    return [_edit_row(event, event["payload"]["patch"], entry) for entry in event["payload"]["edits"]]


def _edit_row(event: Mapping[str, Any], patch: Mapping[str, Any], entry: Mapping[str, Any]) -> Row:
    request = entry["request"]
    return {
        "seq": int(entry["id"][1:]),
        "id": entry["id"],
        "patch_id": patch["id"],
        "row": entry["row"],
        "model_id": event["model_id"],
        "status": RECORDING[event["kind"]],
        "request": dump_json(request),
        "subject": request["subject"],
        "prompt": request["prompt"],
        "target": request["target"],
        "previous": request.get("previous"),
        "method": patch["method"],
        "reason": entry["reason"],
        "source": entry["source"],
        "client": event["client"],
        "client_version": event["client_version"],
        "request_id": event["request_id"],
        "replaced_by": None,
        "weights_hash_before": patch["weights_hash_before"],
        "weights_hash_after": patch["weights_hash_after"],
        "subject_key": without_case_and_spacing(request["subject"]),
        "fact_key": fact_key(request["subject"], request["prompt"]),
        "created": event["at"],
        "changed": event["at"],
    }


def drift_row(event: Mapping[str, Any], drift: Mapping[str, Any]) -> Row:
    """The row of `drift` that belongs to an event."""
    columns = ("kl", "perplexity_before", "perplexity_after")
    return {
        "event_seq": event["seq"],
        "model_id": event["model_id"],
        "at": event["at"],
        "occasion": event["payload"]["occasion"],
        **{name: finite_or_none(drift.get(name)) for name in columns},
        "measured": canonical_json(drift),
    }


class History:
    """The state after all events: `edits` and `patches` by id, measurements and drift by event."""

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self.edits: dict[Any, Row] = {}
        self.patches: dict[Any, Row] = {}
        self.measured: dict[tuple[int, str], Row] = {}  # (event seq, edit id) -> at, occasion, digest
        self.drift: dict[int, Row] = {}  # event seq -> its row
        self.models: dict[Any, Row] = {}
        self.named: set[tuple[str, int]] = set()  # (edit id, event seq)
        self.blobs: set[str] = set()  # SHA-256 of every file that an event names
        self.removed: set[str] = set()  # those of them that a compaction deleted
        self.problems: list[Problem] = []
        for event in events:
            try:
                self._follow(event)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                where = f"event {event['seq']}"
                self.problems.append(
                    Problem("chain", where, f"does not fit the events before it ({error!r})")
                )

    def _follow(self, event: Mapping[str, Any]) -> None:
        kind, payload = event["kind"], event["payload"]
        self.named |= {(edit_id, event["seq"]) for edit_id in event["edit_ids"]}
        if kind == MODEL:
            self.models[event["model_id"]] = {"id": event["model_id"], **payload}
            return
        if kind in RECORDING:
            patch = patch_row(event)
            self.patches[patch["id"]] = patch
            self._needs(patch["source_blob"])
            self.edits |= {row["id"]: row for row in edit_rows(event)}
        elif kind in CHANGING:
            by = payload.get("by", {})
            for edit_id in event["edit_ids"]:
                change = {"status": CHANGING[kind], "changed": event["at"]}
                if kind != "reverted":
                    change["replaced_by"] = by.get(edit_id)
                self.edits[edit_id].update(change)
        elif kind == "vector_created" or kind == "proposed":
            self._needs(payload["blob"])
            return
        elif kind == COMPACTED:
            self.removed |= set(payload["files"])
            return
        elif kind != "measured":
            return
        for patch_id, blob in payload.get("live", {}).items():
            self.patches[int(patch_id)]["blob"] = blob
            self._needs(blob)
        shared = {"at": event["at"], "occasion": payload.get("occasion")}
        self.measured |= {
            (event["seq"], edit_id): {**shared, "digest": d}
            for edit_id, d in payload.get("measurements", {}).items()
        }
        if payload.get("drift") is not None:
            self.drift[event["seq"]] = drift_row(event, payload["drift"])

    def _needs(self, blob: str | None) -> None:
        """Note that an event names a file; if a compaction had deleted it, it exists again."""
        if blob is not None:
            self.blobs.add(blob)
            self.removed.discard(blob)


def differences(expected: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """The columns in which a row differs from what the events say, one message each."""
    return [
        f"{column} is {_short(row.get(column))} in its row, {_short(value)} in the events"
        for column, value in expected.items()
        if row.get(column) != value
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"

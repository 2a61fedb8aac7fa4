"""What the page of one fact shows, read from the ledger alone: no page waits for the model."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from server.board.charts import Series, ends, line_chart, percent
from store import EditRecord, Ledger
from store.blobs import open_regular
from store.errors import BlobError
from store.history import RECORDING
from store.overview import Overview

Row = dict[str, Any]

MOST_PROBES = 200
_NUMBER = re.compile(r"\.(\d+)\.")  # of the layer, in the name of a tensor
_PROBE: Row = dict.fromkeys(("kind", "prompt", "expected", "before", "after", "held", "form", "trained"))
"""Fields that the probes of older servers lack are None."""
FORMS = {
    "statement": "as a statement",
    "reworded": "reworded",
    "chat": "asked in a chat",
    "chat_reworded": "asked in a chat, reworded",
    "language": "in other languages",
}
LINES = {
    "reliability": "said",
    "reworded": "reworded",
    "chat": "in a chat",
    "subject_locality": "subject's other facts",
    "locality": "other subjects",
}
HAPPENED = {
    "applied": "corrected",
    "rejected": "tried, and not kept",
    "reverted": "undone",
    "reapplied": "redone",
    "replaced": "replaced by a newer correction",
    "measured": "measured again",
    "decided": "approved",
    "proposed": "proposed",
}


def story(ledger: Ledger, overview: Overview, edit_id: str) -> Row:
    """Everything about one fact. Raises NoSuchEdit."""
    record = ledger.get_edit(edit_id)
    patch = ledger.get_patch(record.patch_id)
    measured = [(m.at, m.occasion, m.values) for m in ledger.measurements_of(edit_id)]
    latest = newest([values for _, _, values in measured])
    probes = [_PROBE | p for p in latest.get("details", []) if isinstance(p, dict)][:MOST_PROBES]
    mates = [i for i in ledger.batch(patch.id) if i != edit_id]
    return {
        "fact": overview.fact(edit_id) or _bare(record),
        "record": record,
        "patch": patch,
        "file": (file := patch_file(ledger, patch.blob or patch.source_blob)),
        "layers": layers_of([name for name, _ in file["tensors"]], patch.params),
        "rates": rates_of(latest),
        "measured": measured,
        "chart": rates_chart(measured),
        "moved": [
            p for p in probes if not p.get("held") and p.get("kind") in ("neighbour", "sibling", "hold")
        ],
        "probes": probes,
        "latest": latest,
        "events": [_event(e, record.reason) for e in reversed(ledger.events_of(edit_id))],
        "mates": mates[:24],
        "more_mates": max(0, len(mates) - 24),
        "replaces": ledger.replaced_edits(edit_id),
    }


def _bare(record: EditRecord) -> Row:
    """A row like those of the view `facts`, for an edit that states no fact."""
    return {
        "edit_id": record.id,
        "status": record.status,
        "holds": None,
        "subject": record.subject,
        "prompt": record.prompt,
        "right_answer": record.target,
        "said_before": None,
        "says_now": None,
        "method": record.method,
        "reason": record.reason,
        "source": record.source,
        "client": record.client,
        "identity": None,
        "created": record.created,
        "changed": record.changed,
        "batch": record.patch_id,
        "replaced_by": record.replaced_by,
        "measured": None,
    }


def _event(event: Any, reason: str | None) -> Row:
    failed = event.payload.get("failed")
    return {
        "seq": event.seq,
        "at": event.at,
        "what": HAPPENED.get(event.kind, event.kind.replace("_", " ")),
        "kind": event.kind,
        "identity": event.payload.get("identity"),
        "client": event.client,
        "reason": (reason if event.kind in RECORDING else None) or event.reason,
        "failed": failed if isinstance(failed, list) else [],
        "occasion": event.payload.get("occasion"),
        "hash": event.hash,
    }


def newest(measured: Sequence[Mapping[str, Any]]) -> Row:
    """The latest measurement of each value. An audit may ask the prompt alone; then the forms keep their earlier
    values."""
    found: Row = {}
    for values in measured:
        found |= {name: value for name, value in values.items() if value is not None and name != "forms"}
        forms = {form: rate for form, rate in _forms(values).items() if rate is not None}
        found["forms"] = found.get("forms", {}) | forms
    return found


def rates_of(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The rates of one measurement, each with its name in plain words."""
    found = [("the prompt itself", values.get("reliability"))]
    forms = _forms(values)
    found += [(words, forms.get(kind)) for kind, words in FORMS.items()]
    found += [
        ("the subject's other facts kept", values.get("subject_locality")),
        ("other subjects kept", values.get("locality")),
        ("paraphrases given with it", values.get("generality")),
        ("what follows from it", values.get("portability")),
    ]
    return [(words, float(v)) for words, v in found if isinstance(v, int | float)]


def _forms(values: Mapping[str, Any]) -> Mapping[str, Any]:
    forms = values.get("forms")
    return forms if isinstance(forms, dict) else {}


def rates_chart(measured: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Markup:
    """The rates of one fact at each measurement."""
    series = []
    for name, words in LINES.items():
        points = []
        for i, (at, occasion, values) in enumerate(measured):
            value = values.get(name, _forms(values).get(name))
            if isinstance(value, int | float):
                points.append((float(i), float(value), f"{words}: {value:.0%} ({occasion}, {at[:16]})"))
        series.append(Series(words, points))
    marks = ends([(float(i), at) for i, (at, _, _) in enumerate(measured)])
    return line_chart("How it held, each time it was measured", series, 0, 1, percent, marks=marks)


def layers_of(tensors: Sequence[str], params: Mapping[str, Any]) -> str:
    """The layers that a patch acts in, such as "3, 4": by its tensors' names or, of a memory, by its parameters."""
    found = {int(number) for name in tensors for number in _NUMBER.findall(name)}
    if not found:
        given = [params.get("layer"), *(params.get("layers") or ())]
        found = {layer for layer in given if isinstance(layer, int)}
    return ", ".join(map(str, sorted(found)))


def patch_file(ledger: Ledger, sha: str) -> Row:
    """Size and tensors of a patch file, from its header; or why it cannot be read."""
    try:
        path = ledger.blobs.path(sha)
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 2**22)))
        size = path.stat().st_size
    except (OSError, ValueError, struct.error, BlobError) as error:
        if at := ledger.compacted_at(sha):
            return {"sha": sha, "damage": f"deleted by errata-mcp compact at {at[:16]}", "tensors": []}
        unreadable = isinstance(error, (ValueError, struct.error))
        damage = "the file cannot be read as a patch" if unreadable else str(error)
        return {"sha": sha, "damage": damage, "tensors": []}
    tensors = [(n[2:], about["shape"]) for n, about in header.items() if n.startswith("t/")]
    return {"sha": sha, "bytes": size, "tensors": tensors}

"""What the pages show, read from the ledger alone: no page waits for the model."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from server.board.charts import Series, Turn, heat_map, line_chart
from store import EditRecord, Ledger
from store.errors import BlobError
from store.overview import Overview

Row = dict[str, Any]

TURNED = 1.05
"""A change that raises the perplexity by this factor is pointed at in the chart."""
MOST_POINTS = 300
MOST_PROBES = 200
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
    latest = measured[-1][2] if measured else {}
    probes = [p for p in latest.get("details", []) if isinstance(p, dict)][:MOST_PROBES]
    mates = [i for i in ledger.batch(patch.id) if i != edit_id]
    return {
        "fact": overview.fact(edit_id) or _bare(record),
        "record": record,
        "patch": patch,
        "file": patch_file(ledger, patch.blob or patch.source_blob),
        "rates": rates_of(latest),
        "measured": measured,
        "chart": rates_chart(measured),
        "moved": [
            p for p in probes if not p.get("held") and p.get("kind") in ("neighbour", "sibling", "hold")
        ],
        "probes": probes,
        "latest": latest,
        "events": [_event(e) for e in reversed(ledger.events_of(edit_id))],
        "mates": mates[:24],
        "more_mates": max(0, len(mates) - 24),
        "replaces": ledger.replaced_edits(edit_id),
    }


def _bare(record: EditRecord) -> Row:
    """A row like those of the view `facts`, for what is no fact."""
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


def _event(event: Any) -> Row:
    failed = event.payload.get("failed")
    return {
        "seq": event.seq,
        "at": event.at,
        "what": HAPPENED.get(event.kind, event.kind.replace("_", " ")),
        "kind": event.kind,
        "who": event.payload.get("identity") or event.client or "somebody",
        "client": event.client,
        "reason": event.reason,
        "failed": failed if isinstance(failed, list) else [],
        "occasion": event.payload.get("occasion"),
        "hash": event.hash,
    }


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
    return line_chart("How it held, each time it was measured", series, 0, 1, "{:.0%}".format)


def patch_file(ledger: Ledger, sha: str) -> Row:
    """Size and tensors of a patch file, from its header; what is wrong with it when it cannot be read."""
    try:
        path = ledger.blobs.path(sha)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 2**22)))
        size = path.stat().st_size
    except (OSError, ValueError, struct.error, BlobError) as error:
        return {"sha": sha, "damage": str(error), "tensors": []}
    tensors = [(n[2:], about["shape"]) for n, about in header.items() if n.startswith("t/")]
    return {"sha": sha, "bytes": size, "tensors": tensors}


# --- the model over time -------------------------------------------------------------------------

_DRIFT = """
SELECT d.event_seq AS seq, d.at, d.occasion, d.kl, d.perplexity_before, d.perplexity_after, v.kind,
  (SELECT p.id FROM patches p WHERE p.event_seq = d.event_seq) AS batch
FROM drift d JOIN events v ON v.seq = d.event_seq
WHERE v.kind <> 'rejected' AND (?1 IS NULL OR d.model_id = ?1) ORDER BY d.id"""
_ACTIVE = """
SELECT v.seq, sum(CASE WHEN v.kind IN ('applied', 'reapplied') THEN 1 ELSE -1 END) AS n
FROM events v JOIN event_edits x ON x.seq = v.seq
WHERE v.kind IN ('applied', 'reapplied', 'reverted', 'replaced') AND (?1 IS NULL OR v.model_id = ?1)
GROUP BY v.seq ORDER BY v.seq"""


def health(overview: Overview, model_id: int | None) -> Row:
    """How the model is, and was: drift, perplexity, number of edits, ability, and where it turned."""
    drift = overview.rows(_DRIFT, [model_id])
    for row in drift:
        before, after = row["perplexity_before"], row["perplexity_after"]
        row["ratio"] = after / before if before and after else None
    drift = [row for row in drift if row["ratio"] is not None]
    turn = _turn(drift)
    turns = (
        [Turn(float(turn["seq"]), f"batch {turn['batch']}" if turn["batch"] else turn["at"][:10])]
        if turn
        else []
    )
    sampled = _sampled(drift, keep=turn)
    return {
        "now": drift[-1] if drift else None,
        "turn": turn,
        "perplexity": line_chart(
            "Perplexity on canary texts, live over pristine model",
            [Series("perplexity, as a multiple", [_point(r, "ratio", "×{:.3f}") for r in sampled])],
            low=min([1.0, *(r["ratio"] for r in sampled)]),
            show="×{:.2f}".format,
            turns=turns,
        ),
        "kl": line_chart(
            "Drift from the pristine model",
            [Series("drift, nats", [_point(r, "kl", "{:.4f} nats") for r in sampled if r["kl"] is not None])],
            low=0,
            show="{:.3f}".format,
            turns=turns,
        ),
        "active": _active_chart(overview, model_id),
        "ability": _ability_chart(overview, model_id),
        "points": sampled[::-1][:20],
    }


def _turn(drift: Sequence[Row]) -> Row | None:
    """The change after which the model was worse by the greatest factor; None when none reaches `TURNED`."""
    steps = [
        (b["ratio"] / a["ratio"], b)
        for a, b in zip([{"ratio": 1.0}, *drift], drift, strict=False)
        if a["ratio"]
    ]
    factor, row = max(steps, key=lambda step: step[0], default=(0.0, {}))
    return row | {"factor": factor} if factor >= TURNED else None


def _sampled(rows: Sequence[Row], keep: Row | None = None) -> list[Row]:
    """At most `MOST_POINTS` rows: the first, the last, those between at equal steps, and `keep`."""
    step = max(1, -(-len(rows) // MOST_POINTS))
    wanted = {*range(0, len(rows), step), len(rows) - 1}
    return [r for i, r in enumerate(rows) if i in wanted or (keep is not None and r["seq"] == keep["seq"])]


def _point(row: Row, name: str, form: str) -> tuple[float, float, str]:
    return (
        float(row["seq"]),
        float(row[name]),
        f"{form.format(row[name])} ({row['occasion']}, {row['at'][:16]})",
    )


def _active_chart(overview: Overview, model_id: int | None) -> Markup:
    total, rows = 0, []
    for row in overview.rows(_ACTIVE, [model_id]):
        total += row["n"]
        rows.append({"seq": row["seq"], "total": total})
    points = [(float(r["seq"]), float(r["total"]), f"{r['total']} active") for r in _sampled(rows)]
    return line_chart("Active corrections", [Series("active", points)], 0, 1, "{:.0f}".format, steps=True)


def _ability_chart(overview: Overview, model_id: int | None) -> Markup:
    rows = _sampled(overview.means(model_id))
    names = {
        "said": "corrections said",
        "other_facts": "subjects' other facts",
        "other_subjects": "other subjects",
    }
    series = [
        Series(
            words,
            [
                (
                    float(r["seq"]),
                    float(r[name]),
                    f"{words}: {r[name]:.0%} of {r['n']} edits ({r['at'][:16]})",
                )
                for r in rows
                if r[name] is not None
            ],
        )
        for name, words in names.items()
    ]
    return line_chart("What was kept, each time it was measured", series, 0, 1, "{:.0%}".format)


# Counted in the text of canonical JSON: reading the JSON of large batches takes a second.
_MOVED = " + ".join(
    f"(length(m.measured) - length(replace(m.measured, '{sign}', ''))) / {len(sign)}"
    for sign in (f'"held":false,"kind":"{kind}"' for kind in ("neighbour", "sibling", "hold"))
)
_BATCHES = f"""
SELECT p.id, p.created, p.method, p.seconds, v.kind, v.client, json_extract(v.payload, '$.identity') AS identity,
  v.reason, d.kl, d.perplexity_before, d.perplexity_after,
  (SELECT count(*) FROM edits e WHERE e.patch_id = p.id) AS edits,
  (SELECT count(*) FROM edits e WHERE e.patch_id = p.id AND e.status = 'active') AS active,
  (SELECT b.perplexity_after / b.perplexity_before FROM drift b JOIN events w ON w.seq = b.event_seq
   WHERE b.model_id = p.model_id AND b.event_seq < p.event_seq AND w.kind <> 'rejected'
   ORDER BY b.id DESC LIMIT 1) AS ratio_before,
  (SELECT total({_MOVED}) FROM edits s JOIN measurements m ON m.edit_id = s.id
   WHERE s.patch_id = p.id AND m.event_seq = p.event_seq) AS moved
FROM patches p JOIN events v ON v.seq = p.event_seq LEFT JOIN drift d ON d.event_seq = p.event_seq
WHERE p.method <> 'steering' AND (?1 IS NULL OR p.model_id = ?1) ORDER BY p.id DESC LIMIT ?2 OFFSET ?3"""


def batches(overview: Overview, model_id: int | None, page: int, size: int = 15) -> tuple[list[Row], int]:
    """A page of calls of apply, newest first, each with what it cost; and how many pages there are."""
    [counted] = overview.rows(
        "SELECT count(*) AS n FROM patches WHERE method <> 'steering' AND (?1 IS NULL OR model_id = ?1)",
        [model_id],
    )
    rows = overview.rows(_BATCHES, [model_id, size, (max(1, page) - 1) * size])
    for row in rows:
        before, after = row["perplexity_before"], row["perplexity_after"]
        ratio = after / before if before and after else None
        row["cost"] = ratio / (row["ratio_before"] or 1.0) if ratio else None
        row["rejected"] = row["kind"] == "rejected"
        row["moved"] = int(row["moved"])
    return rows, max(1, -(-counted["n"] // size))


# --- heat maps and doses -------------------------------------------------------------------------


def maps(overview: Overview, limit: int = 50) -> list[Row]:
    """The traces that were made, newest first."""
    return overview.rows(
        "SELECT seq, at, client, json_extract(payload, '$.subject') AS subject,"
        " json_extract(payload, '$.prompt') AS prompt, json_extract(payload, '$.answer') AS answer,"
        " json_extract(payload, '$.method') AS method, json_extract(payload, '$.best_layer') AS best_layer"
        " FROM events WHERE kind = 'located' ORDER BY seq DESC LIMIT ?",
        [limit],
    )


def one_map(overview: Overview, seq: int) -> Row | None:
    """One trace with its heat maps."""
    rows = overview.rows(
        "SELECT seq, at, client, payload FROM events WHERE seq = ? AND kind = 'located'", [seq]
    )
    if not rows:
        return None
    about: Row = json.loads(rows[0].pop("payload"))
    tokens = [str(t) for t in about.get("tokens", [])]
    drawn = {
        name: heat_map(name, grid, tokens)
        for name, grid in about.get("maps", {}).items()
        if grid and isinstance(grid[0], list)
    }
    empty = dict.fromkeys(("prompt", "answer", "method", "best_layer", "unit", "suggestion"))
    return rows[0] | {**empty, "sites": []} | about | {"drawn": drawn}


def dose_curves(overview: Overview) -> dict[str, Row]:
    """The newest calibration of each steering vector, with its curve drawn."""
    rows = overview.rows("SELECT at, payload FROM events WHERE kind = 'calibrated' ORDER BY seq")
    found: dict[str, Row] = {}
    for row in rows:
        about = json.loads(row["payload"])
        points = [
            (
                float(p["multiplier"]),
                float(p["perplexity_ratio"]),
                f"{p['multiplier']:g}: ×{p['perplexity_ratio']:.2f}",
            )
            for p in about.get("curve", [])
            if isinstance(p.get("perplexity_ratio"), int | float)
        ]
        chart = line_chart(
            "Perplexity at each dose", [Series("perplexity, as a multiple", points)], 1, show="×{:.1f}".format
        )
        found[about["name"]] = about | {"at": row["at"], "chart": chart}
    return found


def vectors(overview: Overview, model_id: int | None) -> list[Row]:
    """The steering vectors, each with the dose that acts and its measured curve."""
    rows = overview.rows(
        "SELECT v.name, v.method, v.about, v.reason, v.created,"
        " (SELECT json_extract(p.params, '$.multiplier') FROM edits e JOIN patches p ON p.id = e.patch_id"
        "  WHERE e.method = 'steering' AND e.status = 'active' AND e.model_id = v.model_id AND e.subject = v.name"
        "  ORDER BY e.seq DESC LIMIT 1) AS dose"
        " FROM vectors v WHERE (?1 IS NULL OR v.model_id = ?1) ORDER BY v.name",
        [model_id],
    )
    curves = dose_curves(overview)
    for row in rows:
        about, curve = json.loads(row.pop("about")), curves.get(row["name"])
        sound = (curve["multiplier"], curve.get("negative_multiplier")) if curve else (0.6, -0.6)
        high = max(sound[0] or 0.0, row["dose"] or 0.0, 0.2)
        low = min(sound[1] if sound[1] is not None else -high, row["dose"] or 0.0, -0.2)
        row |= {
            "layers": about.get("layers", []),
            "separation": about.get("separation"),
            "curve": curve,
            "high": f"{high:g}",
            "low": f"{low:g}",
        }
    return rows

"""What the page of the model shows: its health over time, and what each batch cost. Read from the ledger alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from server.board.charts import Mark, Series, ends, line_chart, percent, times
from store.overview import Overview

Row = dict[str, Any]

TURNED = 1.05
"""A change that raises the perplexity by this factor is pointed at in the chart."""
MOST_POINTS = 300

_DRIFT = """
SELECT d.event_seq AS seq, d.at, d.occasion, d.kl, d.perplexity_before, d.perplexity_after, v.kind,
  (SELECT p.id FROM patches p WHERE p.event_seq = d.event_seq) AS batch
FROM drift d JOIN events v ON v.seq = d.event_seq
WHERE v.kind <> 'rejected' AND (?1 IS NULL OR d.model_id = ?1) ORDER BY d.id"""
_ACTIVE = """
SELECT v.seq, v.at, sum(CASE WHEN v.kind IN ('applied', 'reapplied') THEN 1 ELSE -1 END) AS n
FROM events v JOIN event_edits x ON x.seq = v.seq
WHERE v.kind IN ('applied', 'reapplied', 'reverted', 'replaced') AND (?1 IS NULL OR v.model_id = ?1)
GROUP BY v.seq ORDER BY v.seq"""


def health(overview: Overview, model_id: int | None) -> Row:
    """The model's health over time: drift, perplexity, number of edits, kept abilities, and where it got much worse."""
    drift = overview.rows(_DRIFT, [model_id])
    for row in drift:
        before, after = row["perplexity_before"], row["perplexity_after"]
        row["ratio"] = after / before if before and after else None
    drift = [row for row in drift if row["ratio"] is not None]
    turn = _turn(drift)
    turns = (
        [Mark(float(turn["seq"]), f"batch {turn['batch']}" if turn["batch"] else turn["at"][:10])]
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
            show=times,
            turns=turns,
            marks=_ends(sampled),
        ),
        "kl": line_chart(
            "Drift from the pristine model",
            [Series("drift, nats", [_point(r, "kl", "{:.4f} nats") for r in sampled if r["kl"] is not None])],
            low=0,
            turns=turns,
            marks=_ends(sampled),
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


def _ends(rows: Sequence[Row]) -> list[tuple[float, str]]:
    return ends([(float(row["seq"]), row["at"]) for row in rows])


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
        rows.append(row | {"total": total})
    shown = _sampled(rows)
    points = [(float(r["seq"]), float(r["total"]), f"{r['total']} active ({r['at'][:16]})") for r in shown]
    return line_chart(
        "Active corrections",
        [Series("active", points)],
        0,
        1,
        steps=True,
        marks=_ends(shown),
    )


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
    return line_chart(
        "What was kept, each time it was measured",
        series,
        0,
        1,
        percent,
        marks=_ends(rows),
    )


# Counted in the text of canonical JSON: reading the JSON of large batches takes a second.
_MOVED = " + ".join(
    f"(length(m.measured) - length(replace(m.measured, '{sign}', ''))) / {len(sign)}"
    for sign in (f'"held":false,"kind":"{kind}"' for kind in ("neighbour", "sibling", "hold"))
)
_BATCHES = """
SELECT p.id, p.created, p.method, p.seconds, v.kind, v.client, json_extract(v.payload, '$.identity') AS identity,
  v.reason, d.kl, d.perplexity_before, d.perplexity_after,
  (SELECT count(*) FROM edits e WHERE e.patch_id = p.id) AS edits,
  (SELECT count(*) FROM edits e WHERE e.patch_id = p.id AND e.status = 'active') AS active,
  (SELECT b.perplexity_after / b.perplexity_before FROM drift b JOIN events w ON w.seq = b.event_seq
   WHERE b.model_id = p.model_id AND b.event_seq < p.event_seq AND w.kind <> 'rejected'
   ORDER BY b.id DESC LIMIT 1) AS ratio_before
FROM patches p JOIN events v ON v.seq = p.event_seq LEFT JOIN drift d ON d.event_seq = p.event_seq
WHERE p.method <> 'steering' AND (?1 IS NULL OR p.model_id = ?1) ORDER BY p.id DESC LIMIT ?2 OFFSET ?3"""
_MOVED_BY = f"""
SELECT p.id, total({_MOVED}) AS moved
FROM patches p JOIN edits s ON s.patch_id = p.id JOIN measurements m ON m.edit_id = s.id AND m.event_seq = p.event_seq
WHERE p.id IN (SELECT value FROM json_each(?)) GROUP BY p.id"""


def batches(overview: Overview, model_id: int | None, page: int, size: int = 15) -> tuple[list[Row], int]:
    """A page of calls of apply, newest first, each with what it cost; and how many pages there are."""
    [counted] = overview.rows(
        "SELECT count(*) AS n FROM patches WHERE method <> 'steering' AND (?1 IS NULL OR model_id = ?1)",
        [model_id],
    )
    rows = overview.rows(_BATCHES, [model_id, size, (max(1, page) - 1) * size])
    # What was measured with a batch stays as it is, so it is counted once.
    moved = overview.kept("moved", [row["id"] for row in rows], lambda ids: _moved(overview, ids))
    for row in rows:
        before, after = row["perplexity_before"], row["perplexity_after"]
        ratio = after / before if before and after else None
        row["cost"] = ratio / (row["ratio_before"] or 1.0) if ratio else None
        row["rejected"] = row["kind"] == "rejected"
        row["moved"] = moved[row["id"]]
    return rows, max(1, -(-counted["n"] // size))


def _moved(overview: Overview, batches: Sequence[int]) -> dict[int, int]:
    rows = overview.rows(_MOVED_BY, [json.dumps(batches)])
    return dict.fromkeys(batches, 0) | {row["id"]: int(row["moved"]) for row in rows}

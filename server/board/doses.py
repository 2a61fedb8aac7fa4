"""The steering vectors with their doses and measured curves, read from the ledger alone."""

from __future__ import annotations

import json
import math
from typing import Any

from markupsafe import Markup

from server.board.charts import Mark, Series, line_chart, times
from store.overview import Overview

Row = dict[str, Any]


def _curves(overview: Overview) -> dict[str, Row]:
    """The newest calibration of each steering vector."""
    rows = overview.rows("SELECT at, payload FROM events WHERE kind = 'calibrated' ORDER BY seq")
    found = [json.loads(row["payload"]) | {"at": row["at"]} for row in rows]
    return {about["name"]: about for about in found}


def _drawn(about: Row, dose: float | None) -> Markup:
    """The curve of a calibration, with the dose that acts and the ends of what is sound."""
    points = [
        (
            float(p["multiplier"]),
            float(p["perplexity_ratio"]),
            f"{p['multiplier']:g}: ×{p['perplexity_ratio']:.2f}",
        )
        for p in about.get("curve", [])
        if isinstance(p.get("perplexity_ratio"), int | float)
    ]
    xs = sorted({x for x, _, _ in points})
    limits = [about.get("negative_multiplier"), about.get("multiplier")]
    turns = [Mark(x, "", "limit") for x in limits if x is not None and x in xs]
    return line_chart(
        "Perplexity at each dose",
        [Series("perplexity, as a multiple", points)],
        1,
        show=times,
        turns=[*turns, *([] if dose is None else [Mark(dose, f"on at {dose:g}", "now-at")])],
        marks=[(x, f"{x:.2g}") for x in dict.fromkeys([*xs[:1], *(x for x in xs if x == 0), *xs[-1:]])],
    )


_ACTIVE = """
SELECT e.subject AS name, e.model_id, json_extract(p.params, '$.multiplier') AS dose
FROM edits e JOIN patches p ON p.id = e.patch_id
WHERE e.method = 'steering' AND e.status = 'active' ORDER BY e.seq"""


def vectors(overview: Overview, model_id: int | None, page: int, size: int) -> tuple[list[Row], int]:
    """A page of the steering vectors, each with the dose that acts and its measured curve; and how many pages.

    Those that act come first.
    """
    doses = {(row["name"], row["model_id"]): row["dose"] for row in overview.rows(_ACTIVE)}
    rows = overview.rows(
        "SELECT name, model_id, method, about, reason, created FROM vectors"
        " WHERE (?1 IS NULL OR model_id = ?1) ORDER BY name",
        [model_id],
    )
    for row in rows:
        row["dose"] = doses.get((row["name"], row["model_id"]))
    rows.sort(key=lambda row: row["dose"] is None)
    curves = _curves(overview)
    shown = rows[(page - 1) * size : page * size]
    return [row | _described(row, curves.get(row["name"])) for row in shown], max(1, -(-len(rows) // size))


def _described(row: Row, curve: Row | None) -> Row:
    about = json.loads(row["about"])
    sound = (curve["multiplier"], curve.get("negative_multiplier")) if curve else (0.6, -0.6)
    high = max(sound[0] or 0.0, row["dose"] or 0.0, 0.2)
    low = min(sound[1] if sound[1] is not None else -high, row["dose"] or 0.0, -0.2)
    step = 0.01 if high - low < 1 else 0.05
    return {
        "layers": about.get("layers", []),
        "separation": about.get("separation"),
        "curve": curve,
        "chart": _drawn(curve, row["dose"]) if curve else None,
        # Whole steps, so that 0 is one of them; the dose that acts stays within reach.
        "step": f"{step:g}",
        "high": f"{_whole(high, step, out=high == row['dose']):g}",
        "low": f"{-_whole(-low, step, out=low == row['dose']):g}",
    }


def _whole(end: float, step: float, out: bool) -> float:
    """An end of the range, 0 or more, at a whole step: the next one farther out or nearer to 0."""
    steps = end / step
    return (math.ceil(steps - 1e-6) if out else math.floor(steps + 1e-6)) * step

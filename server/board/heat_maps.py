"""The traces that were made, with their heat maps, read from the ledger alone."""

from __future__ import annotations

import json
from typing import Any

from server.board.charts import heat_map
from store.overview import Overview

Row = dict[str, Any]


def maps(overview: Overview, page: int, size: int) -> tuple[list[Row], int]:
    """A page of the traces that were made, newest first, and how many pages there are."""
    [counted] = overview.rows("SELECT count(*) AS n FROM events WHERE kind = 'located'")
    rows = overview.rows(
        "SELECT seq, at, client, json_extract(payload, '$.subject') AS subject,"
        " json_extract(payload, '$.prompt') AS prompt, json_extract(payload, '$.answer') AS answer,"
        " json_extract(payload, '$.method') AS method, json_extract(payload, '$.best_layer') AS best_layer"
        " FROM events WHERE kind = 'located' ORDER BY seq DESC LIMIT ? OFFSET ?",
        [size, (page - 1) * size],
    )
    return rows, max(1, -(-counted["n"] // size))


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

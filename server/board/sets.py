"""The lists of right answers, with the verdict of each fact for the model, read from the ledger alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from store.errors import BadFilter
from store.overview import Overview

Row = dict[str, Any]

STATES = ("differs", "unsure", "unchecked", "agrees")
"""The verdicts of a fact, those that need attention first."""

# Where no model is loaded, how a set stands with the model that it was checked with last: of a row with max(checked)
# SQLite also tells the other columns.
_LAST = "(SELECT set_name, model_id AS id, max(checked) FROM fact_states GROUP BY set_name)"
_STATES = f"""
LEFT JOIN {_LAST} m ON m.set_name = f.set_name
LEFT JOIN fact_states t ON t.set_name = f.set_name AND t.number = f.number AND t.model_id = coalesce(?1, m.id)"""
_VERDICT = "coalesce(t.verdict, 'unchecked')"
_COUNTS = f"""
SELECT f.set_name AS name, {_VERDICT} AS verdict, count(*) AS n, max(t.checked) AS checked,
  sum(t.was IS NOT NULL AND t.verdict IS NOT NULL AND t.was <> t.verdict) AS changed
FROM set_facts f {_STATES} WHERE (?2 IS NULL OR f.set_name = ?2) GROUP BY 1, 2"""
_WRONG = f"""
SELECT t.set_name AS name, count(*) AS differs, max(t.checked) AS checked,
  (SELECT count(*) FROM set_facts f WHERE f.set_name = t.set_name) AS facts
FROM fact_states t JOIN {_LAST} m
  ON m.set_name = t.set_name AND t.model_id = coalesce(?1, m.id)
WHERE t.verdict = 'differs' GROUP BY t.set_name ORDER BY t.set_name"""
_FACTS = f"""
SELECT f.number, f.key, f.fact, {_VERDICT} AS verdict, t.was, t.answer, t.checked, t.outcome, t.why, t.edit_id
FROM set_facts f {_STATES}
WHERE f.set_name = ?2 AND (?3 IS NULL OR {_VERDICT} = ?3)
ORDER BY CASE {_VERDICT} {" ".join(f"WHEN '{name}' THEN {i}" for i, name in enumerate(STATES))} END,
  t.outcome = 'lost' DESC, f.number LIMIT ?4 OFFSET ?5"""


@dataclass(frozen=True)
class SetPage:
    """One page of a set's facts."""

    facts: list[Row]
    page: int
    pages: int


def listed(overview: Overview, model_id: int | None, name: str | None = None) -> list[Row]:
    """Every set, or the one of this name, with its facts counted by how they stand with the model."""
    sets: dict[str, Row] = {
        row["name"]: row | {"facts": 0, "changed_facts": 0, "checked": None, **dict.fromkeys(STATES, 0)}
        for row in overview.rows(
            "SELECT name, version, changed FROM fact_sets WHERE (?1 IS NULL OR name = ?1) ORDER BY name",
            [name],
        )
    }
    for row in overview.rows(_COUNTS, [model_id, name]):
        found = sets[row["name"]]
        found[row["verdict"]] = row["n"]
        found["facts"] += row["n"]
        found["changed_facts"] += row["changed"] or 0
        found["checked"] = max(filter(None, [found["checked"], row["checked"]]), default=None)
    return list(sets.values())


def jobs_of(overview: Overview, name: str) -> list[Row]:
    """The jobs that work on a set now."""
    return overview.rows(
        "SELECT id, kind, state, progress, message FROM jobs"
        " WHERE state IN ('queued', 'running') AND json_extract(request, '$.set') = ? ORDER BY seq",
        [name],
    )


def wrong(overview: Overview, model_id: int | None) -> list[Row]:
    """The sets of which the model said something else when it was asked last: name, differs, facts, checked."""
    return overview.rows(_WRONG, [model_id])


def facts_of(
    overview: Overview, model_id: int | None, about: Row, state: str | None, page: int, size: int
) -> SetPage:
    """A page of the facts of a set (a row of `listed`). Raises BadFilter for a state that does not exist."""
    if state is not None and state not in STATES:
        raise BadFilter(f"state {state[:40]!r} does not exist; use one of {', '.join(STATES)}")
    total = about["facts"] if state is None else about[state]
    pages = max(1, -(-total // size))
    page = min(max(1, page), pages)
    rows = overview.rows(_FACTS, [model_id, about["name"], state, size, (page - 1) * size])
    facts = [_fact(row) for row in rows]
    for fact in facts:
        fact["edit"] = _edit_of(overview, model_id, fact)
    return SetPage(facts, page, pages)


def _edit_of(overview: Overview, model_id: int | None, fact: Row) -> Row | None:
    """The correction that was made for a fact, or the active one of the same fact."""
    rows = overview.rows(
        "SELECT id, status FROM edits WHERE (fact_key = ?1 AND (?2 IS NULL OR model_id = ?2) AND status = 'active')"
        " OR id = ?3 ORDER BY status = 'active' DESC, seq DESC LIMIT 1",
        [fact["key"], model_id, fact["edit_id"]],
    )
    return rows[0] if rows else None


def _fact(row: Row) -> Row:
    fact = json.loads(row.pop("fact"))
    given = {name: fact.get(name) for name in ("subject", "previous", "source", "as_of")}
    prompt = fact["prompt"].replace("{}", fact["subject"])
    return row | given | {"prompt": prompt, "right_answer": fact["answer"]}

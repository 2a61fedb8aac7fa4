"""Save a list of facts under a name, and read it back: pages, one fact in full, a CSV file."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.errors import ServiceError
from server.exchange.files import folder, new_entry, publish_file, refuse_existing
from server.factsets.columns import ReadColumns
from server.factsets.conflicts import conflicting, described, merged
from server.factsets.fact import Fact
from server.factsets.reading import MOST_FACTS, read_file, read_values
from server.factsets.requests import OUTCOMES, Given, Kind
from server.factsets.results import ExportedFacts, FactSetPage, SavedFacts
from server.factsets.versions import Step, step
from server.request_context import RequestContext
from server.transaction.workspace import Workspace, who
from server.wording import counted, first_words
from store import FactRecord, FactSetRecord, FactState, Ledger
from store.errors import NoSuchSet

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
SHOWN = 10  # lines of one kind in an answer
LONGEST_LINE = 240


def save(workspace: Workspace, name: str, given: Given, ctx: RequestContext) -> SavedFacts:
    """Read the facts and record them as the set's next version. Raises ServiceError for what cannot be used."""
    _ = workspace.writable_model_id
    reading, former, made, joined = _prepared(workspace, name, given)
    version = former.version if former else 0
    if former is None or made.put or made.removed:
        version += 1
        last = former.about.get("last", 0) if former else 0
        about = {"last": max([last, *made.facts]), "path": given.path, "read_as": reading.how}
        put = {number: fact.stored() for number, fact in made.put.items()}
        workspace.ledger.save_facts(name, version, about, put, made.removed, who(ctx), given.reason)
    return _saved(name, version, reading, made, joined, former is not None)


def gone(workspace: Workspace, name: str, given: Given) -> list[Fact]:
    """The facts that saving this would take out of the set; nothing is saved. Raises as `save`."""
    _, former, made, _ = _prepared(workspace, name, given)
    facts = facts_of(workspace.ledger, name) if former else {}
    return [facts[number] for number in made.removed]


def _prepared(
    workspace: Workspace, name: str, given: Given
) -> tuple[ReadColumns, FactSetRecord | None, Step, int]:
    """What was read, the set as it is, the step to its next version, and how many facts were given twice."""
    _check_name(name)
    reading = _read(workspace, given)
    _refuse_problems(reading, given.partial)
    facts, joined = merged(reading.facts)
    if len(facts) > MOST_FACTS:
        raise ServiceError(
            f"there are {len(facts):,} facts; a set holds at most {MOST_FACTS:,}, so make several sets"
        )
    former, records = _former(workspace.ledger, name)
    last = former.about.get("last", 0) if former else 0
    return reading, former, step(records, [fact for _, fact in facts], last, given.keep), joined


def _read(workspace: Workspace, given: Given) -> ReadColumns:
    if (given.path is None) == (given.facts is None):
        raise ServiceError("give either path (a file in HOME/data) or facts (records in the call)")
    if given.path is not None:
        return read_file(workspace.settings, given.path, given.template, given.columns)
    values = [(f"facts[{i}]", value) for i, value in enumerate(given.facts or ())]
    return read_values("the call", values, given.template, given.columns)


def _refuse_problems(reading: ReadColumns, partial: bool) -> None:
    """Refuse all when a record is wrong; not for published data sets, in which a few wrong records are usual."""
    if not reading.facts:
        raise ServiceError(_listed("there is no fact to save", reading.problems))
    if reading.problems and not partial and "formats" not in reading.how:
        good = f"or call again with partial=true to save the other {len(reading.facts)} facts"
        raise ServiceError(f"{_listed('nothing was saved', reading.problems)}. Correct that, {good}")


def _listed(what: str, problems: Sequence[str]) -> str:
    shown = "; ".join(_short(problem) for problem in problems[:SHOWN])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{what}: {shown}{more}" if problems else what


def _saved(name: str, version: int, reading: ReadColumns, made: Step, joined: int, again: bool) -> SavedFacts:
    groups = conflicting(made.facts)
    counts = [counted(len(made.facts), "fact")]
    if again:
        changes = ((made.added, "new"), (made.changed, "changed"), (made.removed, "gone"))
        counts += [f"{len(numbers)} {word} (#{ranges(numbers)})" for numbers, word in changes if numbers]
        counts += [] if made.put or made.removed else ["nothing changed"]
    counts += [f"{joined} given twice"] if joined else []
    counts += [counted(len(groups), "contradiction")] if groups else []
    counts += [f"{counted(len(reading.problems), 'record')} left out"] if reading.problems else []
    return SavedFacts(
        name=name,
        version=version,
        facts=len(made.facts),
        summary="; ".join(counts) + ".",
        read_as=reading.how,
        examples=[f"#{n} {fact.text} -> {fact.answer}" for n, fact in list(made.facts.items())[:3]],
        changed=[_changed(n, made.was[n], made.facts[n]) for n in made.changed[:SHOWN]],
        conflicts=[_short(described(made.facts, group)) for group in groups[:SHOWN]],
        left_out=[_short(problem) for problem in reading.problems[:SHOWN]],
        unused=reading.unused[:SHOWN],
        next=f'Check that examples and read_as are right, then check_facts(set="{name}").',
    )


def _changed(number: int, was: Fact, now: Fact) -> str:
    if was.answer != now.answer:
        return f"#{number} {now.text}: {was.answer} -> {now.answer}"
    fields = [f for f in Fact.model_fields if getattr(was, f) != getattr(now, f)]
    return f"#{number} {now.text}: {', '.join(fields)}"


def _former(ledger: Ledger, name: str) -> tuple[FactSetRecord | None, list[FactRecord]]:
    try:
        return ledger.fact_set(name), ledger.facts_of(name)
    except NoSuchSet:
        return None, []


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ServiceError(
            f"name {name[:80]!r} cannot be used for a set; take 1 to 80 letters, digits, dots, dashes and underscores, "
            'beginning with a letter or digit, such as "capitals"'
        )


def facts_of(ledger: Ledger, name: str) -> dict[int, Fact]:
    """The facts of a set by number. Raises NoSuchSet."""
    ledger.fact_set(name)
    return {record.number: Fact.model_validate(record.fact) for record in ledger.facts_of(name)}


def states_of(workspace: Workspace, name: str) -> dict[int, FactState]:
    """How the facts of a set stand with the loaded model."""
    if workspace.model_id is None:
        return {}
    return workspace.ledger.fact_states(name, workspace.model_id)


def page(
    workspace: Workspace, name: str, kind: Kind | None, number: int | None, limit: int, cursor: str | None
) -> FactSetPage:
    """A page of a set, of one kind of fact where that is asked for; or one fact in full. Raises NoSuchSet."""
    record = workspace.ledger.fact_set(name)
    facts, states = facts_of(workspace.ledger, name), states_of(workspace, name)
    if number is not None and number not in facts:
        raise ServiceError(f"set {name!r} has no fact #{number}; its numbers are {ranges(list(facts))}")
    if cursor is not None and not cursor.isdecimal():
        raise ServiceError(
            f"cursor {cursor[:40]!r} is none of show_fact_set; take next_cursor of the page before"
        )
    wanted = [number] if number is not None else _of_kind(facts, states, kind)
    start = int(cursor or 0)
    shown = wanted[start : start + limit]
    return FactSetPage(
        name=name,
        version=record.version,
        total=len(wanted),
        facts=[line(n, facts[n], states.get(n)) for n in shown],
        next_cursor=str(start + limit) if start + limit < len(wanted) else None,
        detail=None if number is None else facts[number].stored(),
    )


def _of_kind(facts: Mapping[int, Fact], states: Mapping[int, FactState], kind: Kind | None) -> list[int]:
    if kind is None:
        return list(facts)
    if kind == "conflict":
        return sorted({n for group in conflicting(facts) for n in group})
    known = {n: states.get(n) for n in facts}
    if kind == "unchecked":
        return [n for n, state in known.items() if state is None or state.verdict is None]
    if kind == "changed":
        return [n for n, state in known.items() if state is not None and has_changed(state)]
    column = "outcome" if kind in OUTCOMES else "verdict"
    return [n for n, state in known.items() if state is not None and getattr(state, column) == kind]


def has_changed(state: FactState) -> bool:
    """Whether the verdict changed since the check before."""
    return state.was is not None and state.verdict is not None and state.was != state.verdict


def line(number: int, fact: Fact, state: FactState | None) -> dict[str, Any]:
    """One fact in short: only what is known of it."""
    found: dict[str, Any] = {"n": number, "prompt": fact.text, "right": fact.answer}
    if state is None:
        return found
    if state.verdict is not None:
        found["verdict"] = state.verdict
        if state.verdict != "agrees":
            found["says"] = first_words(state.answer or "")
        if has_changed(state):
            found["was"] = state.was
    if state.outcome is not None:
        found |= {"outcome": state.outcome} | ({"why": _short(state.why)} if state.why else {})
    if state.edit_id is not None:
        found["edit"] = state.edit_id
    return found


_COLUMNS = ("number", "subject", "prompt", "answer", "aliases", "relation", "source", "as_of", "id")
_STATES = ("verdict", "model_says", "checked", "outcome", "why", "edit_id")


def export(workspace: Workspace, name: str, file_name: str | None) -> ExportedFacts:
    """Write a set with the state of each fact as CSV into HOME/exports. Raises ServiceError where the file is there."""
    record = workspace.ledger.fact_set(name)
    facts, states = facts_of(workspace.ledger, name), states_of(workspace, name)
    file = f"{(file_name or f'{name}-v{record.version}').removesuffix('.csv')}.csv"
    target = folder(workspace.settings.home, "exports") / file
    refuse_existing(target)
    with new_entry(workspace.settings.home, file) as scratch:
        with (scratch / file).open("w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow([*_COLUMNS, *_STATES])
            writer.writerows(_cells(n, fact, states.get(n)) for n, fact in facts.items())
        written = publish_file(scratch / file, target, [file])
    return ExportedFacts(path=str(written.path), facts=len(facts), bytes=written.bytes, sha256=written.sha256)


def _cells(number: int, fact: Fact, state: FactState | None) -> Iterable[str]:
    values = fact.model_dump() | {"number": number, "aliases": " | ".join(fact.aliases)}
    yield from (str(values[c]) if values[c] is not None else "" for c in _COLUMNS)
    said = first_words(state.answer or "", 200) if state else ""
    known = {
        "model_says": f"'{said}" if said[:1] in ("=", "+", "-", "@") else said
    }  # no formula in a spreadsheet
    for column in _STATES:
        yield known[column] if column in known else str(getattr(state, column, None) or "")


def _short(text: str) -> str:
    return first_words(text, LONGEST_LINE)


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in order with runs as ranges: "1-3, 7"."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)

"""Facts to edit: this project's own, and loaders for the published sets.

`benchmarks/data/tune.json` and `check.json` hold 30 edits each over the same relations, with
disjoint subjects; the embedded model answers every prompt and every neighbour rightly, and no
neighbour is ever edited. Tune on the one, report the other.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from editors.edit import Edit, Neighbour, Probe

DATA = Path(__file__).parent / "data"
Split = Literal["tune", "check"]


@dataclass(frozen=True)
class Fact:
    """One of our own facts: the edit, the kind of relation, and the same as a question."""

    relation: str
    edit: Edit
    question: str


@dataclass(frozen=True)
class Published:
    """What a published file holds: the edits, and how many records were none (subject not in the prompt)."""

    edits: tuple[Edit, ...]
    skipped: int


def load(split: Split) -> list[Fact]:
    """Our own facts of a split."""
    return [_fact(record) for record in json.loads((DATA / f"{split}.json").read_text("utf-8"))]


def _fact(record: dict[str, Any]) -> Fact:
    fields = {k: v for k, v in record.items() if k not in ("relation", "question")}
    return Fact(record["relation"], Edit.model_validate(fields), record["question"])


def read(path: Path) -> Published:
    """Edits from a CounterFact (original or flat), zsRE, KnowEdit or known_1000 file (.json or .json.gz).

    Neighbours and probes are taken over. Raises ValueError for a file in none of these formats.
    """
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    records = json.loads(text)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} is not a JSON array of records")
    to_edit = _format_of(records[0], path)
    edits = list(_valid(to_edit, records))
    return Published(tuple(edits), len(records) - len(edits))


def _valid(to_edit: Callable[[dict[str, Any]], Edit], records: Iterable[dict[str, Any]]) -> Iterable[Edit]:
    for record in records:
        try:
            yield to_edit(record)
        except ValidationError:  # the subject is not in the prompt; counted by the caller
            continue


def _format_of(record: dict[str, Any], path: Path) -> Callable[[dict[str, Any]], Edit]:
    formats: dict[str, Callable[[dict[str, Any]], Edit]] = {
        "requested_rewrite": counterfact,
        "known_id": known,
        "alt": zsre,
        "locality": knowedit,
        "ground_truth": counterfact_flat,
    }
    for key, function in formats.items():
        if key in record:
            return function
    raise ValueError(
        f"{path} holds records with the fields {sorted(record)}: neither CounterFact, zsRE, KnowEdit nor known_1000"
    )


def counterfact(record: dict[str, Any]) -> Edit:
    """CounterFact (Meng et al. 2022): neighbourhood prompts share the answer that is being replaced."""
    wish = record["requested_rewrite"]
    true = wish["target_true"]["str"]
    probe = record.get("portability")
    return Edit(
        subject=wish["subject"],
        prompt=wish["prompt"],
        target=wish["target_new"]["str"],
        previous=true,
        paraphrases=tuple(record.get("paraphrase_prompts", ())),
        neighbours=tuple(Neighbour(prompt=p, answer=true) for p in record.get("neighborhood_prompts", ())),
        portability=(Probe(prompt=probe["New Question"], answer=probe["New Answer"]),) if probe else (),
    )


def counterfact_flat(record: dict[str, Any]) -> Edit:
    """CounterFact with one paraphrase and one neighbour per record.

    Most `rephrase_prompt`s of the published files are CounterFact's prompts to generate from ("One can get to X by
    navigating"), which ask for something else. What is measured with them says nothing about rewordings.
    """
    neighbour = Neighbour(prompt=record["locality_prompt"], answer=record["locality_ground_truth"])
    return Edit(
        subject=record["subject"],
        prompt=record["prompt"],
        target=record["target_new"],
        previous=record["ground_truth"],
        paraphrases=(record["rephrase_prompt"],),
        neighbours=(neighbour,),
    )


def knowedit(record: dict[str, Any]) -> Edit:
    """KnowEdit (Zhang et al. 2024): portability and locality are lists of prompts by kind, answers are aliases.

    "Forgetfulness" asks for the relation's other objects, which an edit may well change; it is left out.
    """
    kept = {k: v for k, v in record["locality"].items() if k != "Forgetfulness"}
    rephrased = record.get("rephrase_prompt") or record.get("rephrase")
    true = record.get("ground_truth")
    return Edit(
        subject=record["subject"],
        prompt=record["prompt"],
        target=record["target_new"],
        previous=_first(true) if true else None,
        paraphrases=(rephrased,) if rephrased else (),
        neighbours=tuple(Neighbour(prompt=p, answer=a) for p, a in _asked(kept)),
        portability=tuple(Probe(prompt=p, answer=a) for p, a in _asked(record.get("portability") or {})),
    )


def _asked(kinds: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for entries in kinds.values():
        for entry in entries:
            if answer := _first(entry["ground_truth"]):
                yield entry["prompt"], answer


def _first(answers: Any) -> str | None:
    """The first alias of the first answer."""
    while isinstance(answers, list):
        answers = answers[0] if answers else None
    return str(answers).strip() or None if answers is not None else None


def zsre(record: dict[str, Any]) -> Edit:
    """zsRE as MEND evaluates it: `alt` is the new answer; locality is an unrelated question."""
    loose = record.get("loc")
    question = loose.removeprefix("nq question: ").rstrip("? ") + "?" if loose else ""
    probe = record.get("portability")
    return Edit(
        subject=record["subject"],
        prompt=record["src"],
        target=record["alt"],
        previous=record["answers"][0] or None,
        paraphrases=(record["rephrase"],),
        neighbours=(Neighbour(prompt=question, answer=record["loc_ans"]),) if loose else (),
        portability=(Probe(prompt=probe["New Question"], answer=probe["New Answer"]),) if probe else (),
    )


def known(record: dict[str, Any]) -> Edit:
    """known_1000: facts as they are (the target is the true answer), for locating rather than editing."""
    return Edit(subject=record["subject"], prompt=record["template"], target=record["attribute"])

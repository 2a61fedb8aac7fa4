"""Training data of the learned editors: published formats, relation files, and the set that is shipped.

A record is one fact to change with what should change along (paraphrases) and what should not
(neighbours: other subjects; others: the same subject, something else). Errors name file and line.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.edit import PLACEHOLDER
from editors.errors import InvalidEdit
from editors.facts import Relation, fill, relations

SHIPPED = "facts"
FORMATS = (
    "zsRE as MEND has it (src, alt, rephrase, loc), CounterFact (requested_rewrite, or flat: prompt, target_new), "
    "a relation file (prompt_templates, samples), or replies to the same request (chosen, rejected)"
)
MAX_BYTES = 256 * 2**20
PARAPHRASES = 3  # kept of one record
NEIGHBOURS = 3


@dataclass(frozen=True)
class Record:
    """One training example; every text is a prompt with its subject filled in."""

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()  # prompts about other subjects, same relation where known
    others: tuple[str, ...] = ()  # other prompts about the same subject


def read(source: str, seed: int = 0) -> list[Record]:
    """Records of the shipped set ("facts"), of a file, or of every .json, .jsonl and .json.gz of a folder.

    Relation files draw wordings, new answers and neighbours at random from `seed`. Raises InvalidEdit
    naming the file and the line for whatever cannot be used.
    """
    if source == SHIPPED:
        return from_relations(relations(), seed)
    path = Path(source).expanduser()
    if not path.exists():
        raise InvalidEdit(
            f'data {source!r} is neither a file nor a folder; give a path, or "{SHIPPED}" for the shipped set'
        )
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith((".json", ".jsonl", ".json.gz")))
    if not files:
        raise InvalidEdit(f"the folder {source!r} has no .json, .jsonl or .json.gz file")
    records: list[Record] = []
    found: list[Relation] = []
    for file in files:
        for line, value in parse(file):
            made = _convert(file, line, value)
            if isinstance(made, Relation):
                found.append(made)
            elif made is not None:
                records.append(made)
    records += from_relations(found, seed)
    if not records:
        raise InvalidEdit(f"{source!r} holds no record whose prompt contains its subject")
    return records


# --- files to values -------------------------------------------------------------------------------


def parse(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file with their line numbers: an array's elements, one per line, or one object."""
    text = _text_of(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        yield from _elements(path, text, start + 1)
        return
    if path.suffix == ".jsonl":
        yield from _lines(path, text)
        return
    decoder = json.JSONDecoder()
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _broken(path, error.lineno, error.msg) from None
    if not text[end:].strip():
        yield _line(text, start), value
        return
    yield from _lines(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _broken(path, number, error.msg) from None


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidEdit(f"{path} is larger than {MAX_BYTES >> 20} MB; split it")
        data = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                data = packed.read(MAX_BYTES)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidEdit(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InvalidEdit(f"{path} is empty; it should hold {FORMATS}")
    return text


def _elements(path: Path, text: str, at: int) -> Iterator[tuple[int, Any]]:
    """Elements of an array, decoded one by one so that each knows its line."""
    decoder = json.JSONDecoder()
    line, counted = _line(text, at), at
    while True:
        while at < len(text) and (text[at].isspace() or text[at] == ","):
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            raise _broken(path, line, "the array is not closed")
        if text[at] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(path, error.lineno, error.msg) from None
        yield line, value
        at = end


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _broken(path: Path, line: int, why: str) -> InvalidEdit:
    return InvalidEdit(f"{path}, line {line}: not valid JSON ({why})")


_HUMAN, _ASSISTANT = "Human:", "Assistant:"  # turns of a dialogue in one text


# --- values to records -----------------------------------------------------------------------------


def _convert(path: Path, line: int, value: Any) -> Record | Relation | None:
    """One value as a record or relation; None where the subject is not in the prompt or the answer is empty."""
    if not isinstance(value, dict):
        raise InvalidEdit(f"{path}, line {line}: a record is a JSON object, not {type(value).__name__}")
    kinds: tuple[tuple[str, Callable[[Mapping[str, Any]], Record | Relation]], ...] = (
        ("requested_rewrite", _counterfact),
        ("alt", _zsre),
        ("target_new", _flat),
        ("samples", _relation),
        ("chosen", preference),
    )
    convert = next((convert for key, convert in kinds if key in value), None)
    if convert is None:
        known = ", ".join(sorted(map(str, value))[:8])
        raise InvalidEdit(f"{path}, line {line}: the fields {known} are none of the known formats: {FORMATS}")
    try:
        made = convert(value)
    except KeyError as error:
        raise InvalidEdit(f"{path}, line {line}: the field {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise InvalidEdit(f"{path}, line {line}: a field has the wrong form ({error})") from None
    if isinstance(made, Relation):
        return made
    return made if made.subject in made.prompt and made.target else None


def _counterfact(value: Mapping[str, Any]) -> Record:
    wish = value["requested_rewrite"]
    subject = _string(wish["subject"], "subject")
    return Record(
        subject,
        _string(wish["prompt"], "prompt").replace(PLACEHOLDER, subject),
        _answer(wish["target_new"]["str"], "target_new.str"),
        tuple(value.get("paraphrase_prompts", ()))[:PARAPHRASES],
        tuple(value.get("neighborhood_prompts", ()))[:NEIGHBOURS],
    )


def _flat(value: Mapping[str, Any]) -> Record:
    subject = _string(value["subject"], "subject")
    return Record(
        subject,
        _string(value["prompt"], "prompt").replace(PLACEHOLDER, subject),
        _answer(value["target_new"], "target_new"),
        _some(value.get("rephrase_prompt")),
        _some(value.get("locality_prompt")),
    )


def _zsre(value: Mapping[str, Any]) -> Record:
    loose = value.get("loc") or ""
    question = loose.removeprefix("nq question: ").rstrip("? ") + "?" if loose else ""
    return Record(
        _string(value["subject"], "subject"),
        _string(value["src"], "src"),
        _answer(value["alt"], "alt"),
        _some(value.get("rephrase")),
        _some(question[:1].upper() + question[1:]),
    )


def preference(value: Mapping[str, Any]) -> Record:
    """Two replies to one request, the better one chosen: a dialogue as HH-RLHF has it, or `prompt` and the replies.

    The request is edited to be answered with the first sentence of the chosen reply; of a dialogue the last turn
    counts.
    """
    chosen = _string(value["chosen"], "chosen")
    asked, _, reply = chosen.rpartition(_ASSISTANT)
    request = value["prompt"] if "prompt" in value else asked.rpartition(_HUMAN)[2]
    prompt = " ".join(_string(request, "prompt").split())
    sentence = re.match(r".+?[.!?](?=\s|$)|.+", " ".join(reply.split()))
    return Record(prompt, prompt, sentence[0] if sentence else "")


def _relation(value: Mapping[str, Any]) -> Relation:
    wordings = [_string(t, "prompt_templates") for t in value["prompt_templates"]]
    wordings += [_string(t, "prompt_templates_zs") for t in value.get("prompt_templates_zs", ())]
    bare = next((t for t in wordings if t.count(PLACEHOLDER) != 1), None)
    if bare is not None:
        raise ValueError(f"the template {bare!r} must have {{}} exactly once")
    facts = tuple(
        (_string(s["subject"], "subject"), _string(s["object"], "object")) for s in value["samples"]
    )
    statements = tuple(dict.fromkeys(t for t in wordings if not t.endswith("?")))
    questions = tuple(dict.fromkeys(t for t in wordings if t.endswith("?")))
    return Relation(str(value.get("name", "relation")), statements or questions, questions, facts)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} should be a non-empty string, not {str(value)[:60]!r}")
    return value.strip()


def _answer(value: Any, name: str) -> str:
    """The new answer; the published zsRE has a few empty ones, and those records are left out."""
    if not isinstance(value, str):
        raise ValueError(f"{name} should be a string, not {str(value)[:60]!r}")
    return value.strip()


def _some(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value.strip() else ()


# --- relations to records --------------------------------------------------------------------------

MIXED_SHARE = 0.12  # of records with questions among their wordings; the others are statements alone


def from_relations(relations: Sequence[Relation], seed: int) -> list[Record]:
    """One record for every fact: a wording, another answer of the same relation, and its negatives."""
    rng = random.Random(seed)
    about: dict[str, list[tuple[Relation, str]]] = {}
    for relation in relations:
        for subject, _ in relation.facts:
            about.setdefault(subject, []).append((relation, subject))
    return [
        record
        for relation in relations
        for fact in relation.facts
        if (record := _draw(relation, fact, about[fact[0]], rng)) is not None
    ]


def _draw(
    relation: Relation, fact: tuple[str, str], about: Sequence[tuple[Relation, str]], rng: random.Random
) -> Record | None:
    subject, truth = fact
    answers = sorted({o for _, o in relation.facts} - {truth})
    rest = [s for s, _ in relation.facts if s != subject]
    if not answers or not rest:
        return None
    wordings = list(relation.statements)
    if relation.questions and (rng.random() < MIXED_SHARE or len(wordings) < 2):
        wordings += relation.questions
    wording, *spare = rng.sample(wordings, len(wordings))
    near = rng.sample(rest, min(NEIGHBOURS, len(rest)))
    return Record(
        subject,
        fill(wording, subject),
        rng.choice(answers),
        tuple(fill(t, subject) for t in spare[:PARAPHRASES]),
        tuple(fill(wording if rng.random() < 0.75 else rng.choice(wordings), s) for s in near),
        tuple(fill(rng.choice(r.statements), s) for r, s in about if r is not relation)[:2],
    )

"""Published formats of training data, each converted to records: zsRE, CounterFact, relations, preferences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from editors.edit import PLACEHOLDER, Edit
from editors.errors import InvalidEdit
from editors.facts import FactGroup
from editors.learned.records import NEIGHBOURS, PARAPHRASES, Record

FORMATS = (
    "zsRE as published with MEND (src, alt, rephrase, loc), CounterFact (requested_rewrite, or flat: prompt, "
    "target_new), a relation file (prompt_templates, samples), two replies to one request (chosen, rejected), or edits "
    "as apply_edits takes them (subject, prompt, target)"
)
_HUMAN, _ASSISTANT = "Human:", "Assistant:"  # who speaks, in a dialogue written as one text


def convert(path: Path, line: int, value: Any) -> Record | FactGroup | None:
    """The record or relation that one JSON value describes, in whichever format it has.

    Returns None when the prompt does not contain the subject or the answer is empty: published data have a few such
    records. Raises InvalidEdit, naming the file and the line, for a value of no known format.
    """
    if not isinstance(value, dict):
        raise InvalidEdit(f"{path}, line {line}: a record is a JSON object, not {type(value).__name__}")
    kinds: tuple[tuple[str, Callable[[Mapping[str, Any]], Record | FactGroup]], ...] = (
        ("requested_rewrite", _counterfact),
        ("alt", _zsre),
        ("target_new", _flat),
        ("samples", _relation),
        ("chosen", preference),
        ("target", _edit),
    )
    reader = next((reader for key, reader in kinds if key in value), None)
    if reader is None:
        known = ", ".join(sorted(map(str, value))[:8])
        raise InvalidEdit(f"{path}, line {line}: the fields {known} fit none of the known formats: {FORMATS}")
    try:
        item = reader(value)
    except KeyError as error:
        raise InvalidEdit(f"{path}, line {line}: the field {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise InvalidEdit(f"{path}, line {line}: a field has the wrong form ({error})") from None
    if isinstance(item, FactGroup):
        return item
    return item if item.subject in item.prompt and item.target else None


def _counterfact(value: Mapping[str, Any]) -> Record:
    rewrite = value["requested_rewrite"]
    subject = _string(rewrite["subject"], "subject")
    return Record(
        subject,
        _string(rewrite["prompt"], "prompt").replace(PLACEHOLDER, subject),
        _answer(rewrite["target_new"]["str"], "target_new.str"),
        tuple(value.get("paraphrase_prompts", ()))[:PARAPHRASES],
        tuple(value.get("neighborhood_prompts", ()))[:NEIGHBOURS],
    )


def _flat(value: Mapping[str, Any]) -> Record:
    subject = _string(value["subject"], "subject")
    return Record(
        subject,
        _string(value["prompt"], "prompt").replace(PLACEHOLDER, subject),
        _answer(value["target_new"], "target_new"),
        _optional(value.get("rephrase_prompt")),
        _optional(value.get("locality_prompt")),
    )


def _edit(value: Mapping[str, Any]) -> Record:
    """An edit as the tools take it."""
    try:
        edit = Edit.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{name} {problem['msg'].removeprefix('Value error, ')}".strip()) from None
    near = [*(n.prompt for n in edit.neighbours), *(hold.prompt for hold in edit.holds)]
    return Record(
        edit.subject, edit.text, edit.target, edit.paraphrases[:PARAPHRASES], tuple(near[:NEIGHBOURS])
    )


def _zsre(value: Mapping[str, Any]) -> Record:
    unrelated = value.get("loc") or ""
    question = unrelated.removeprefix("nq question: ").rstrip("? ") + "?" if unrelated else ""
    return Record(
        _string(value["subject"], "subject"),
        _string(value["src"], "src"),
        _answer(value["alt"], "alt"),
        _optional(value.get("rephrase")),
        _optional(question[:1].upper() + question[1:]),
    )


def preference(value: Mapping[str, Any]) -> Record:
    """A record from two replies to one request: `prompt` and the replies, or dialogues as in HH-RLHF.

    The target is the first sentence of the chosen reply. The request of a dialogue is its last human turn.
    """
    chosen = _string(value["chosen"], "chosen")
    dialogue, _, reply = chosen.rpartition(_ASSISTANT)
    request = value["prompt"] if "prompt" in value else dialogue.rpartition(_HUMAN)[2]
    prompt = " ".join(_string(request, "prompt").split())
    sentence = re.match(r".+?[.!?](?=\s|$)|.+", " ".join(reply.split()))
    return Record(prompt, prompt, sentence[0] if sentence else "")


def _relation(value: Mapping[str, Any]) -> FactGroup:
    wordings = [_string(t, "prompt_templates") for t in value["prompt_templates"]]
    wordings += [_string(t, "prompt_templates_zs") for t in value.get("prompt_templates_zs", ())]
    wrong = next((t for t in wordings if t.count(PLACEHOLDER) != 1), None)
    if wrong is not None:
        raise ValueError(f"the template {wrong!r} must have {{}} exactly once")
    facts = tuple(
        (_string(s["subject"], "subject"), _string(s["object"], "object")) for s in value["samples"]
    )
    statements = tuple(dict.fromkeys(t for t in wordings if not t.endswith("?")))
    questions = tuple(dict.fromkeys(t for t in wordings if t.endswith("?")))
    return FactGroup(str(value.get("name", "relation")), statements or questions, questions, facts)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} should be a non-empty string, not {str(value)[:60]!r}")
    return value.strip()


def _answer(value: Any, name: str) -> str:
    """The new answer; it may be empty, as a few of the published zsRE are."""
    if not isinstance(value, str):
        raise ValueError(f"{name} should be a string, not {str(value)[:60]!r}")
    return value.strip()


def _optional(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value.strip() else ()

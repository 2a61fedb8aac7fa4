"""From the columns of a table, whatever they are called, to facts.

Three layouts: a column with whole prompts; one template for all rows, or a template for each value of a relation
column; and a wide table, in which each of several columns is a relation of the row's subject.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from editors.edit import PLACEHOLDER
from editors.forms.relations import all_relations
from editors.normal_form import normal_form
from server.errors import ServiceError
from server.factsets.fact import FIELDS, Fact, in_words, with_subject_marked
from server.factsets.requests import Template
from server.factsets.tables import TableRow

_NAMES = {
    "subject": "subject entity item topic about subject_label head",
    "prompt": "prompt question statement cloze query",
    "answer": "answer target target_new object expected right correct correct_answer right_answer new_answer truth fact"
    " value object_label tail should_be",
    "relation": "relation property predicate attribute relation_label what kind",
    "aliases": "aliases alias also also_right other_answers synonyms answer_alias",
    "previous": "previous old stale old_answer target_old target_true wrong ground_truth was",
    "alternatives": "alternatives distractors wrong_answers",
    "paraphrases": "paraphrases paraphrase rephrase rephrases rephrase_prompt other_wordings",
    "source": "source url link reference citation evidence",
    "as_of": "as_of date valid_from since updated checked as_of_date",
    "language": "lang language_code",
    "id": "id case_id number no key row_id",
}
"""What columns are often called, by field."""
_LISTS = ("aliases", "alternatives", "paraphrases")
_NAMED = re.compile(r"\{([^{}]+)\}")
_ARTICLE = re.compile(r" \[(?:the|a)\]$")


@dataclass
class ReadColumns:
    """What was read from a source: facts with their places, and the problems."""

    facts: list[tuple[str, Fact]] = field(default_factory=list)  # its place in the source, and the fact
    problems: list[str] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)  # how it was read, for the caller to check
    unused: list[str] = field(default_factory=list)  # columns or fields that were not used


def read_rows(
    source: str,
    header: Sequence[str],
    rows: Iterable[TableRow],
    template: Template = None,
    columns: Mapping[str, str] | None = None,
) -> ReadColumns:
    """Facts from rows. Raises ServiceError when the columns cannot be told apart; rows that are wrong are listed."""
    rows = list(rows)
    plan = _plan(source, list(header), rows, template, columns)
    reading = ReadColumns(how=plan.how(), unused=[name for name in header if name not in plan.used()])
    for row in rows:
        for relation, column in plan.answers:
            _read_fact(plan, row, relation, column, reading)
    return reading


@dataclass(frozen=True)
class _ColumnPlan:
    source: str
    fields: dict[str, str]  # field -> column
    answers: list[tuple[str | None, str]]  # (relation, column of its answers)
    templates: dict[str, str]  # by relation in its normal form; "" is that of all
    wide: bool

    def used(self) -> set[str]:
        named = {name for text in self.templates.values() for name in _NAMED.findall(text)}
        return {*self.fields.values(), *(column for _, column in self.answers), *named}

    def how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"columns": dict(self.fields)}
        if self.wide:
            how["columns"] |= {"answer": [column for _, column in self.answers]}
        if self.templates:
            how["templates"] = dict(self.templates) if "" not in self.templates else self.templates[""]
        return how


def _plan(
    source: str,
    header: list[str],
    rows: Sequence[TableRow],
    template: Template,
    columns: Mapping[str, str] | None,
) -> _ColumnPlan:
    templates = _templates(template)
    wide = [name for name in header if _key(name) in templates]
    fields = _named_columns(source, header, columns or {})
    _add_known_names(fields, [name for name in header if name not in wide])
    free = [name for name in header if name not in fields.values() and name not in wide]
    if (
        "prompt" not in fields
        and not templates
        and (prompts := _with_prompts(free, rows, fields.get("subject")))
    ):
        fields["prompt"], about = prompts
        free.remove(fields["prompt"])
        if about in free:
            fields["subject"] = about
            free.remove(about)
    if "subject" not in fields and free:
        fields["subject"] = free.pop(0)
    if wide and "relation" not in fields:
        fields.pop("answer", None)
        answers: list[tuple[str | None, str]] = [(name, name) for name in wide]
    else:
        wide = []
        if "answer" not in fields and len(free) == 1:
            fields["answer"] = free.pop()
        answers = [(None, fields["answer"])] if "answer" in fields else []
    _refuse_unclear(source, header, fields, answers)
    if not templates and "prompt" not in fields and "relation" not in fields:
        templates = {"": _known_template(source, fields["answer"])}
    return _ColumnPlan(source, fields, answers, templates, bool(wide))


def _add_known_names(fields: dict[str, str], names: Sequence[str]) -> None:
    """For fields without a column, take the columns with their usual names."""
    for name in names:
        if name in fields.values():
            continue
        known = next((f for f, usual in _NAMES.items() if _key(name) in usual.split()), None)
        if known is not None and known not in fields:
            fields[known] = name


def _refuse_unclear(
    source: str, header: Sequence[str], fields: Mapping[str, str], answers: Sequence[tuple[str | None, str]]
) -> None:
    """Raise ServiceError where no column is clearly the subject, or none the answer."""
    if "subject" in fields and answers:
        return
    missing = "subject" if "subject" not in fields else "answer"
    raise ServiceError(
        f"{source}: no column is clearly the {missing}; the columns are {', '.join(header)}. Name them: columns="
        '{"subject": "...", "answer": "..."}'
    )


def _with_prompts(
    names: Sequence[str], rows: Sequence[TableRow], subject: str | None
) -> tuple[str, str | None] | None:
    """The column whose cells are prompts, whatever its name, and the column of the subjects if the prompts show it.

    All cells have {}, or all have the cell of the subjects and more words.
    """

    def cells(name: str) -> list[str]:
        return [str(row.values.get(name) or "") for row in rows]

    for name in names:
        filled = [text for text in cells(name) if text]
        if filled and all(PLACEHOLDER in text for text in filled):
            return name, subject
    for about in [subject] if subject is not None else names:
        for name in names:
            both = [(text, of) for text, of in zip(cells(name), cells(about), strict=True) if text]
            if name != about and both and all(_asks_about(*each) for each in both):
                return name, about
    return None


def _asks_about(text: str, subject: str) -> bool:
    return bool(subject) and subject in text and len(text.split()) > len(subject.split()) + 1


def _named_columns(source: str, header: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """field -> column as the caller gave it; the other way round is understood too."""
    by_key = {_key(name): name for name in header}
    fields: dict[str, str] = {}
    for one, other in columns.items():
        field_, column = (one, other) if one in FIELDS else (other, one)
        if field_ not in FIELDS:
            raise ServiceError(
                f"columns names {one!r}: {other!r}, and neither is a field; fields are {', '.join(FIELDS)}"
            )
        if _key(column) not in by_key:
            raise ServiceError(f"{source} has no column {column!r}; it has {', '.join(header)}")
        fields[field_] = by_key[_key(column)]
    return fields


def _templates(template: Template) -> dict[str, str]:
    if template is None:
        return {}
    given = {"": template} if isinstance(template, str) else {_key(k): v for k, v in template.items()}
    for name, text in given.items():
        if not _NAMED.search(text) and PLACEHOLDER not in text:
            of = f" of {name!r}" if name else ""
            raise ServiceError(
                f'template{of} {text!r} has no {{}} where the subject stands; for example "The capital of {{}} is"'
            )
    return given


def _known_template(source: str, relation: str) -> str:
    """A shipped wording of a relation that is called like this. Raises ServiceError where there is none."""
    wanted = _key(relation)
    for each in all_relations():
        if each.name == wanted:
            return _ARTICLE.sub("", each.wordings["statement"][0])
    raise ServiceError(
        f"{source} has no column with prompts, and {relation!r} is not a known relation; give template, with {{}} for "
        'the subject, such as template="The capital of {} is", for several relations template={"name": "..."}; or name '
        'the column that has prompts: columns={"prompt": "..."}'
    )


def _read_fact(
    plan: _ColumnPlan, row: TableRow, relation: str | None, column: str, reading: ReadColumns
) -> None:
    where = f"{plan.source}, {row.where}"
    values = {f: row.values.get(c) for f, c in plan.fields.items()}
    answer = row.values.get(column)
    if plan.wide and _empty(answer):
        return
    for name, value, its in (
        ("subject", values.get("subject"), plan.fields["subject"]),
        ("answer", answer, column),
    ):
        if _empty(value):
            reading.problems.append(f"{where}, column {its!r}: is empty; a fact needs {name} and answer")
            return
    try:
        subject = _text(values["subject"])
        relation = relation or (_text(values["relation"]) if not _empty(values.get("relation")) else None)
        prompt = _prompt(plan, row, subject, relation, values.get("prompt"))
        fact = _fact({**values, "subject": subject, "prompt": prompt, "answer": answer, "relation": relation})
    except ValidationError as error:
        reading.problems.append(f"{where}: {in_words(error)}")
    except (ServiceError, ValueError) as error:
        reading.problems.append(f"{where}: {error}")
    else:
        reading.facts.append((row.where, fact))


def _prompt(plan: _ColumnPlan, row: TableRow, subject: str, relation: str | None, given: Any) -> str:
    if not _empty(given):
        return with_subject_marked(_text(given), subject)
    template = plan.templates.get(_key(relation or ""), plan.templates.get(""))
    if template is None:
        template = _known_template(plan.source, relation or "")
    by_key = {_key(k): v for k, v in row.values.items()}

    def fill(match: re.Match[str]) -> str:
        name = _key(match.group(1))
        if name in ("subject", _key(plan.fields["subject"])):
            return PLACEHOLDER
        if name not in by_key:
            raise ServiceError(f"the template names {match.group()}, and there is no such column")
        return _text(by_key[name])

    return _NAMED.sub(fill, template)


def _fact(values: Mapping[str, Any]) -> Fact:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if _empty(value):
            continue
        kept[name] = _list(value) if name in _LISTS else _text(value)
    return Fact.model_validate(kept)


def _list(value: Any) -> list[str]:
    """Several values of one cell: a JSON list, or texts between | or ;."""
    parts = value if isinstance(value, (list, tuple)) else re.split(r"[|;]", _text(value))
    return [_text(part) for part in parts if not _empty(part)]


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{str(value)[:60]!r} is not a text")
    return str(value).strip()


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], ())


def _key(name: str) -> str:
    """A column's name for comparing."""
    return re.sub(r"[\s_-]+", "_", normal_form(name).casefold())

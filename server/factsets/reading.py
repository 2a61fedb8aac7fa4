"""Facts from a CSV, TSV, JSON or JSON Lines file, or from the call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from editors.errors import InvalidEdit
from editors.learned.json_values import parse
from server.errors import ServiceError
from server.factsets.columns import ReadColumns, read_rows
from server.factsets.fact import in_words
from server.factsets.formats import NotFacts, format_of, unknown_fields
from server.factsets.requests import Template
from server.factsets.tables import MAX_BYTES, TableRow, read_table
from server.named_files import named_file
from server.settings import Settings

TABLES = (".csv", ".tsv", ".tab", ".txt")
MOST_FACTS = 20_000


def read_file(
    settings: Settings, path: str, template: Template = None, columns: Mapping[str, str] | None = None
) -> ReadColumns:
    """The facts of a file in HOME/data (see server/named_files.py). Raises ServiceError."""
    file = named_file(settings, "path", path, MAX_BYTES)
    kind = next((s for s in reversed(file.suffixes) if s != ".gz"), "").lower()
    if kind in TABLES:
        table = read_table(file)
        reading = read_rows(file.name, table.header, table.rows, template, columns)
        reading.problems[:0] = [f"{file.name}, {problem}" for problem in table.problems]
        return reading
    if kind not in (".json", ".jsonl"):
        raise ServiceError(
            f"path {path!r} is a {kind or 'nameless'} file; facts are read from .csv, .tsv, .json and .jsonl (each "
            "also as .gz)"
        )
    return read_values(file.name, _values(file), template, columns)


def read_values(
    source: str,
    values: Iterable[tuple[str, Any]],
    template: Template = None,
    columns: Mapping[str, str] | None = None,
) -> ReadColumns:
    """The facts of JSON records: of a known data set, or with fields as the columns of a table."""
    rows = list(values)
    if len(rows) == 1 and (inner := _only_list(rows[0][1])) is not None:
        rows = [(f"record {i}", value) for i, value in enumerate(inner, 1)]
    if not rows:
        raise ServiceError(f"{source} has no records; give at least one fact")
    for where, value in rows:
        if not isinstance(value, Mapping):
            raise ServiceError(
                f"{source}, {where}: a record is an object with fields, not {str(value)[:60]!r}"
            )
    reading = ReadColumns()
    plain: list[TableRow] = []
    for where, value in rows:
        if columns is None and (form := format_of(value)) is not None:
            _read_record(source, where, form, value, reading)
        else:
            plain.append(TableRow(where, dict(value)))
    if plain:
        header = list(dict.fromkeys(name for row in plain for name in row.values))
        _join(reading, read_rows(source, header, plain, template, columns))
    return reading


def _read_record(source: str, where: str, form: Any, value: Mapping[str, Any], reading: ReadColumns) -> None:
    formats = reading.how.setdefault("formats", {})
    formats[form.name] = formats.get(form.name, 0) + 1
    for name in unknown_fields(form, value):
        if name not in reading.unused:
            reading.unused.append(name)
    try:
        reading.facts += [(where, fact) for fact in form.read(value)]
    except NotFacts as error:
        raise ServiceError(f"{source} is in the format {form.name}: {error}") from None
    except ValidationError as error:
        reading.problems.append(f"{source}, {where}: {in_words(error)}")
    except KeyError as error:
        reading.problems.append(f"{source}, {where}: the field {error.args[0]!r} is missing")
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        reading.problems.append(f"{source}, {where}: a field has the wrong form ({error})")


def _values(file: Path) -> list[tuple[str, Any]]:
    try:
        return [(f"line {line}", value) for line, value in parse(file)]
    except InvalidEdit as error:
        raise ServiceError(str(error).replace(str(file), file.name)) from None


def _only_list(value: Any) -> Sequence[Any] | None:
    """The records of an object that only wraps a list, as {"facts": [...]}."""
    if not isinstance(value, Mapping) or format_of(value) is not None:
        return None
    lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], Mapping)]
    return lists[0] if len(lists) == 1 else None


def _join(one: ReadColumns, other: ReadColumns) -> None:
    one.facts += other.facts
    one.problems += other.problems
    one.how |= other.how
    one.unused += [name for name in other.unused if name not in one.unused]

"""CSV and TSV files: rows of cells by header, each with its line, and errors that name line and column."""

from __future__ import annotations

import csv
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

from editors.bounded_files import UnreadableFile, read_unpacked
from server.errors import ServiceError

MAX_BYTES = 64 * 2**20
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class TableRow:
    """One record: where it stands, and its values by the name of their column."""

    where: str  # "line 7", or "facts[7]"
    values: dict[str, object]


@dataclass(frozen=True)
class Table:
    """The header and the rows of a file."""

    header: list[str]
    rows: list[TableRow]
    problems: list[str]


def read_table(path: Path) -> Table:
    """The rows of a CSV or TSV file with a header. Raises ServiceError for any other file."""
    text = text_of(path)
    delimiter = "\t" if ".tsv" in path.suffixes else _delimiter_of(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[TableRow] = []
    problems: list[str] = []
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(path, header)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                break
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header):
                problems.append(
                    f"line {line} has {len(cells)} cells and the header {len(header)}: a {delimiter!r} within a value "
                    "must stand in quotes"
                )
                continue
            values = dict(zip(header, cells, strict=False))
            rows.append(TableRow(f"line {line}", {k: v.strip() for k, v in values.items()}))
    except csv.Error as error:
        raise ServiceError(f"{path.name}, line {reader.line_num}: not valid CSV ({error})") from None
    if not rows and not problems:
        raise ServiceError(f"{path.name} has a header ({', '.join(header)}) and no row below it")
    return Table(header, rows, problems)


def text_of(path: Path) -> str:
    """The text of a file, unpacked where its name ends in .gz. Raises ServiceError."""
    try:
        data = read_unpacked(path, MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ServiceError(f"{path.name} cannot be read: {error}") from error
    except UnreadableFile as error:
        raise ServiceError(f"{path.name} cannot be read: {error}; give a part of it") from error
    if data[:2] in (b"PK", b"\xd0\xcf"):
        raise ServiceError(
            f"{path.name} is a workbook or an archive; save the table as CSV (UTF-8) and give that"
        )
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ServiceError(
            f"{path.name}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise ServiceError(f"{path.name} is empty; give a file with a header and at least one fact")
    return text


def _delimiter_of(text: str) -> str:
    """The sign between the cells of the header: the most frequent candidate outside quotes."""
    header, quoted = "", False
    for character in text:
        quoted ^= character == '"'
        if character in "\r\n" and not quoted and header.strip():
            break
        header += "" if quoted else character
    return max(_DELIMITERS, key=header.count)


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) < 2:
        raise ServiceError(
            f"{path.name}, line 1: the header has one column, {header[0]!r}; a table of facts has at least a subject "
            "and an answer, separated by commas, semicolons or tabs"
        )
    for i, name in enumerate(header):
        if name in header[:i]:
            raise ServiceError(f"{path.name}, line 1: the column {name!r} appears twice; rename one of them")

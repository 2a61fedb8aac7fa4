"""JSON values of a file, each with the number of its line, so that an error can name the line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from editors.bounded_files import UnreadableFile, read_unpacked
from editors.errors import InvalidEdit

MAX_BYTES = 256 * 2**20  # a larger file would not fit into memory beside the model


def parse(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value): the elements of an array, the values of a JSON Lines file, or one object.

    Raises InvalidEdit, naming the file and the line, for a file that is too large, not UTF-8, empty, not JSON or nested
    too deeply.
    """
    try:
        yield from _parsed(path)
    except RecursionError:
        raise InvalidEdit(
            f"{path} has values within values too deeply to be read; a record is one object"
        ) from None


def _parsed(path: Path) -> Iterator[tuple[int, Any]]:
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
        data = read_unpacked(path, MAX_BYTES)
        text = data.decode("utf-8-sig")
    except UnreadableFile as error:
        raise InvalidEdit(f"{path} cannot be read: {error}; split it, or give a file of records") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InvalidEdit(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InvalidEdit(f"{path} is empty; give a file with at least one record")
    return text


def _elements(path: Path, text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The elements of an array that opens before `at`, decoded one by one to know each one's line."""
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
    """The number of the line that position `at` is on; the first is 1."""
    return text.count("\n", 0, at) + 1


def _broken(path: Path, line: int, why: str) -> InvalidEdit:
    return InvalidEdit(f"{path}, line {line}: not valid JSON ({why})")

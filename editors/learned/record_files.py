"""Reading training records: the shipped set, a file, or a folder of files."""

from __future__ import annotations

from pathlib import Path

from editors.errors import InvalidEdit
from editors.facts import FactGroup, relations
from editors.learned.json_values import parse
from editors.learned.record_formats import convert
from editors.learned.records import Record, records_of_relations

SHIPPED = "facts"  # the name of the set that comes with the program


def read_records(source: str, seed: int = 0) -> list[Record]:
    """Records of the shipped set ("facts"), of a file, or of every .json, .jsonl and .json.gz of a folder.

    Args:
        seed: of the wordings, new answers and neighbours that are drawn for relation files.

    Raises InvalidEdit for whatever cannot be used, naming the file and the line.
    """
    if source == SHIPPED:
        return records_of_relations(relations(), seed)
    records: list[Record] = []
    from_files: list[FactGroup] = []
    for path in _files_of(source):
        for line, value in parse(path):
            item = convert(path, line, value)
            if isinstance(item, FactGroup):
                from_files.append(item)
            elif item is not None:
                records.append(item)
    records += records_of_relations(from_files, seed)
    if not records:
        raise InvalidEdit(f"{source!r} holds no record whose prompt contains its subject")
    return records


def _files_of(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if not path.exists():
        raise InvalidEdit(
            f'data {source!r} is neither a file nor a folder; give a path, or "{SHIPPED}" for the shipped set'
        )
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.name.endswith((".json", ".jsonl", ".json.gz")))
    if not files:
        raise InvalidEdit(f"the folder {source!r} has no .json, .jsonl or .json.gz file")
    return files

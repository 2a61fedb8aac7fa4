"""Text that was sampled from a model once, for the second moments of all its layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from editors.bounded_files import UnreadableFile, read_regular
from editors.errors import EditError
from editors.files import write_atomically
from editors.made import Made

Rows = list[list[int]]
"""Token ids of sequences."""


def shipped_text(model_hash: str, tokens: int) -> Rows | None:
    """What `sample_text` gives for this model, if it comes with the program and has so many tokens.

    It is there for the default model: sampling takes half of the time of a first edit.
    """
    file = resources.files("editors") / "data" / "sampled.json"
    known: dict[str, Rows] = json.loads(file.read_text("utf-8"))
    return _beginning(known.get(model_hash, []), tokens)


def kept_text(path: Path, made: Made, tokens: int, sample: Callable[[], Rows]) -> Rows:
    """The text in a file, if it has so many tokens; else what `sample` gives, which is kept there.

    Raises EditError for a file that cannot be read or was changed.
    """
    if path.exists():
        try:
            data = read_regular(path)
            made.check(path, hashlib.sha256(data).hexdigest())
            rows = _beginning(json.loads(data), tokens)
        except (UnreadableFile, ValueError) as error:
            raise EditError(
                f"the sampled text {path} cannot be read ({error}); delete it, and it is sampled again"
            ) from error
        if rows is not None:
            return rows
    rows = sample()
    data = json.dumps(rows).encode()
    made.note({path: hashlib.sha256(data).hexdigest()})
    write_atomically(path, data)
    return rows


def beginning(rows: Sequence[list[int]], tokens: int) -> Rows:
    """The first rows that have so many tokens; all of them where they have fewer."""
    have = 0
    found: Rows = []
    for row in rows:
        if have >= tokens:
            break
        found.append(row)
        have += len(row)
    return found


def _beginning(rows: Sequence[list[int]], tokens: int) -> Rows | None:
    """The first rows that have so many tokens; None where all have fewer."""
    found = beginning(rows, tokens)
    return found if sum(map(len, found)) >= tokens else None

"""One way to write a value down: canonical JSON, digests, times, and texts compared loosely."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def now() -> str:
    """The time, ISO 8601 in UTC with microseconds: texts that sort as times."""
    return stamp(datetime.now(UTC))


def stamp(at: datetime) -> str:
    """A point in time as the ledger writes it; one without a zone is taken as UTC."""
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def clean(text: str) -> str:
    """Text SQLite can hold and search: NUL and lone surrogates become U+FFFD."""
    return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(value: Any) -> Any:
    """A value as JSON can hold it exactly; "nan", "inf" and "-inf" stand for the floats JSON has not.

    Raises TypeError for anything that is not JSON (a tensor, an object).
    """
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {clean(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    raise TypeError(
        f"{type(value).__name__} {value!r} cannot be written on the ledger; pass JSON values only"
    )


def number(value: Any) -> float | None:
    """A value for a REAL column: None for anything but a finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, Unicode as it is."""
    return canonical_json(plain(value))


def canonical_json(value: Any) -> str:
    """`canonical` of what is plain JSON already; for the same value the same text, in half the time."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(text: str) -> str:
    """SHA-256 of a text's UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def parsed(text: str | None, default: Any) -> Any:
    """JSON read back; `default` where it is absent or damaged (`Ledger.verify` reports the damage)."""
    try:
        value = json.loads(text) if text is not None else default
    except (ValueError, TypeError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


def loosely(text: str) -> str:
    """A text without regard to case and spacing."""
    return " ".join(clean(text).casefold().split())


def fact_key(subject: str, prompt: str) -> str:
    """Digest that two requests share when they ask the same thing about the same subject.

    `{}` in the prompt stands for the subject.
    """
    return digest(f"{loosely(subject)}\n{loosely(prompt.replace('{}', subject))}")

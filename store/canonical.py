"""How values are stored: canonical JSON, digests, times, and the keys by which texts are compared."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def now() -> str:
    """The current time as text: ISO 8601, UTC, microseconds. Such texts sort by time."""
    return utc_text(datetime.now(UTC))


def utc_text(at: datetime) -> str:
    """A time as the ledger writes it. A time without a zone counts as UTC."""
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def storable_text(text: str) -> str:
    """Text that SQLite can store and search: NUL and lone surrogates become U+FFFD."""
    return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_value(value: Any) -> Any:
    """A value made of JSON types. Floats that JSON cannot hold become "nan", "inf" or "-inf".

    Raises TypeError for anything else (a tensor, an object).
    """
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return storable_text(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {storable_text(str(k)): json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(v) for v in value]
    raise TypeError(
        f"{type(value).__name__} {value!r} cannot be written on the ledger; pass JSON values only"
    )


def finite_or_none(value: Any) -> float | None:
    """The value for a REAL column: a finite number, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def canonical_json(value: Any) -> str:
    """The canonical JSON text of a value: sorted keys, no spaces, Unicode not escaped."""
    return dump_json(json_value(value))


def dump_json(value: Any) -> str:
    """`canonical_json` without the conversion by `json_value`, for a value that has JSON types already."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(text: str) -> str:
    """SHA-256 of a text encoded as UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str | None, default: Any) -> Any:
    """Parse JSON. Returns `default` if it is absent or damaged (`Ledger.verify` reports the damage)."""
    try:
        value = json.loads(text) if text is not None else default
    except (ValueError, TypeError):
        return default
    return value if default is None or isinstance(value, type(default)) else default


_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u02b9\uff07\u00b4`", "'"))
_INVISIBLE = str.maketrans(dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""))


def normal_form(text: str) -> str:
    """The one form in which texts are compared: composed characters (NFC), one apostrophe, single spaces.

    Characters without width are left out. `editors.normal_form` is the same for the editors.
    """
    # What has no width may stand between a letter and its accent, so it goes before they are composed.
    composed = unicodedata.normalize("NFC", storable_text(text).translate(_INVISIBLE))
    return " ".join(composed.translate(_APOSTROPHES).split())


def without_case_and_spacing(text: str) -> str:
    """A text in its normal form and in lower case (casefolded), for comparing."""
    return normal_form(normal_form(text).casefold())


def fact_key(subject: str, prompt: str) -> str:
    """The key of a fact: equal for two requests with the same subject and prompt.

    Case, spacing, kind of apostrophe and composition do not matter; `{}` in the prompt stands for the subject.
    Everything that asks whether two requests are about the same fact compares these keys. Returns a SHA-256 in hex.
    """
    return digest(
        f"{without_case_and_spacing(subject)}\n{without_case_and_spacing(prompt.replace('{}', subject))}"
    )

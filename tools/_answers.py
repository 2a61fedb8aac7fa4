"""What a client is sent of a tool's result: the structured content, and text beside it.

The protocol says that structured content should be repeated as JSON in a text block, for clients that do not know it.
A server cannot see what a host shows its model: the structured content, the text, or both. It only knows which
revision of the protocol the client speaks. Clients of 2026-07-28 and later are sent a short text, which says where
the whole is; earlier ones the whole in both. `--result-text` says otherwise for hosts that are known to differ.
"""

from __future__ import annotations

import json
from typing import Any

from mcp_types import TextContent
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from server.settings import ResultText

SHORT = 600
"""Characters of a short text, about. A result that is no longer is sent whole in both."""
ALWAYS = ("failed_guard", "failed", "damage", "problems", "warnings", "next")
"""Fields that stand in every short text, whatever else fits into SHORT."""
MOST_LINES = 3
LONGEST = 200
"""Lines of such a field, and characters of each."""
DIGITS = 4
"""Digits of a measured number in a report."""


def text_of(content: Any, wanted: ResultText, protocol: str | None) -> TextContent:
    """The text beside structured content: the whole as compact JSON, or its short fields."""
    whole = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    short = wanted == "short" or (wanted == "auto" and protocol in MODERN_PROTOCOL_VERSIONS)
    if not short or len(whole) <= SHORT or not isinstance(content, dict):
        return TextContent(type="text", text=whole)
    return TextContent(type="text", text=_short_text(content))


def _short_text(content: dict[str, Any]) -> str:
    """The short fields, and those that nobody should miss, in the order of the result."""
    lines, room = [], SHORT
    for name, value in content.items():
        if name == "untrusted" or value in (None, "", [], {}):
            continue
        if name in ALWAYS:
            lines.append(f"{name}: {_in_words(value)}")
            continue
        if name == "result" and isinstance(value, dict):  # of a job: what nobody should miss of it
            lines += [f"{key}: {_in_words(value[key])}" for key in ("summary", *ALWAYS) if value.get(key)]
        line = f"{name}: {_in_short(value)}"
        if len(line) <= room:
            lines.append(line)
            room -= len(line)
    lines.append("The whole result is in structuredContent (text as well: server option --result-text full).")
    return "\n".join(lines)


def _in_words(value: Any) -> str:
    """A text, or the first lines of several."""
    given = value if isinstance(value, list) else [value]
    texts = [each if isinstance(each, str) else _in_short(each) for each in given]
    cut = [text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in texts[:MOST_LINES]]
    more = f"and {len(texts) - MOST_LINES} more" if len(texts) > MOST_LINES else ""
    return "; ".join(filter(None, [*cut, more]))


def _in_short(value: Any) -> str:
    if isinstance(value, str):
        return value
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, list | dict) and len(written) > SHORT // 4:
        return f"{len(value)} {'entries' if isinstance(value, list) else 'fields'}"
    return written


def rounded(value: Any) -> Any:
    """The same with numbers of four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value

"""A report as one file, HTML or Markdown, that needs nothing beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.reporting import sentences
from server.reporting.collecting import Report

Format = Literal["html", "md"]
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~&])")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]+")
MOST_TEXT = 600


def written(report: Report, kind: Format) -> str:
    """The whole file as text."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=kind == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"text": _markdown if kind == "md" else _plain, "share": _share, "web": _web}
    return env.get_template(f"report.{kind}").render(r=report, s=sentences)


def _plain(text: Any) -> str:
    shown = _UNSEEN.sub(" ", str(text if text is not None else "")).strip()
    return shown if len(shown) <= MOST_TEXT else f"{shown[:MOST_TEXT]}…"


def _markdown(text: Any) -> str:
    """Text that stands in a table of Markdown as it is."""
    return _SPECIAL.sub(r"\\\1", _plain(text))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _web(text: str | None) -> bool:
    """Whether a source may be a link."""
    return bool(text) and str(text).startswith(("https://", "http://"))

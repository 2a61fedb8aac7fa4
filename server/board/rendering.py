"""Templates, and how values are written on a page. All text is escaped; nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.board.charts import bar, stack
from server.settings import errata_version

FOLDER = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": with that, browsers send the origin "null" with forms, and the door refuses it.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def when(at: str | None) -> Markup:
    """A time of the ledger, as people read it; the page's script puts it into their own zone."""
    if not at:
        return Markup("never")
    try:
        then = datetime.fromisoformat(at)
    except ValueError:
        return Markup("{}").format(at)
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        then.isoformat(), then.strftime("%Y-%m-%d %H:%M:%S UTC"), _ago(then)
    )


def _ago(then: datetime) -> str:
    seconds = (datetime.now(UTC) - then).total_seconds()
    for size, word in ((86_400 * 7, ""), (86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            if not word:
                return then.strftime("%d %b %Y").lstrip("0")
            count = int(seconds // size)
            return f"{count} {word}{'s' if count > 1 else ''} ago"
    return "just now"


def said(text: Any, most: int = 400) -> Markup:
    """Text that the model or a client wrote: escaped, kept from turning the page's direction, cut if it is long."""
    shown = _UNSEEN.sub("\ufffd", str(text))
    if len(shown) > most:
        shown = f"{shown[:most]}…"
    return Markup('<bdi class="said">{}</bdi>').format(shown)


def source_link(text: str | None, most: int = 120) -> Markup:
    """A source: a link where it is a web address, else its text."""
    if not text:
        return Markup("")
    try:
        parts = urlsplit(text)
    except ValueError:
        return said(text, most)
    if parts.scheme in ("http", "https") and parts.netloc:
        return Markup('<a href="{}" rel="noopener noreferrer nofollow">{}</a>').format(
            text, said(_place(text), most)
        )
    return said(text, most)


def _place(address: str) -> str:
    """A web address as people write it."""
    return address.partition("://")[2].removeprefix("www.").rstrip("/")


def client(of: Any) -> str:
    """The name that the client gave itself, of a row or a record."""
    name = of.get("client") if isinstance(of, Mapping) else of.client
    return "somebody at the board" if name == "board" else str(name or "an unnamed client")


def by(of: Any) -> str:
    """Who did it: whose token it was, else the client's name."""
    identity = of.get("identity") if isinstance(of, Mapping) else of.identity
    return str(identity or client(of))


def percent(value: float | None) -> str:
    """A share of 0..1 as people read it."""
    return "not measured" if value is None else f"{value:.0%}"


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, name in ((2**20, "MB"), (2**10, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def query(**values: Any) -> str:
    """A query string of the values that are given."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    return f"?{urlencode(given)}" if given else "?"


def environment() -> Environment:
    """The templates, with what they may call."""
    env = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "when": when,
        "said": said,
        "source": source_link,
        "percent": percent,
        "size": size,
        "client": client,
        "by": by,
    }
    env.globals |= {"bar": bar, "stack": stack, "query": query, "version": errata_version()}
    return env

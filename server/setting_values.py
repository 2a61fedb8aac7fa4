"""Checks of single settings: tokens, origins, addresses."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

SHORTEST_TOKEN = 32
"""Fewest characters of a token; longer ones cannot be guessed."""


def check_token(token: str) -> None:
    """Raise ValueError for a token that cannot be sent or can be guessed. The message does not repeat it."""
    how = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
    if not all("!" <= c <= "~" for c in token):
        raise ValueError(f"must be printable ASCII without spaces, as it travels in an HTTP header; {how}")
    if len(token) < SHORTEST_TOKEN:
        raise ValueError(f"has {len(token)} characters and must have at least {SHORTEST_TOKEN}; {how}")


def origin(given: str) -> str:
    """An origin as browsers send it: in lower case, without the scheme's own port. Raises ValueError."""
    written = given.lower()
    parts = urlsplit(written)
    standard = {"http": ":80", "https": ":443"}
    if parts.scheme not in standard or f"{parts.scheme}://{parts.netloc}" != written or not parts.hostname:
        raise ValueError(
            f"{given[:80]!r} is not an origin; write scheme, host and port: http://localhost:8080"
        )
    return written.removesuffix(standard[parts.scheme])


def is_loopback(host: str) -> bool:
    """True if only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"

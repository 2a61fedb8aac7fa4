"""Who makes a request, as its token proves, and what they may do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

Scope = Literal["read", "propose", "edit", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "propose", "edit", "admin")
"""What a token may do; each includes those before it."""

_KEY = "errata.identity"


@dataclass(frozen=True)
class Identity:
    """The holder of a token."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """True if one of the scopes is this one, or includes it."""
        return any(s in self.scopes for s in SCOPES[SCOPES.index(scope) :])


def known(scopes: Iterable[str]) -> frozenset[str]:
    """Those of the scopes that mean something here; a prefix "errata:" is allowed."""
    return frozenset(s.removeprefix("errata:") for s in scopes) & frozenset(SCOPES)


def remember(scope: MutableMapping[str, Any], identity: Identity) -> None:
    """Note who makes a request in its ASGI scope."""
    scope[_KEY] = identity


def identity_of(scope: Mapping[str, Any] | None) -> Identity | None:
    """Who makes the request with this ASGI scope; None where no token is asked for."""
    return None if scope is None else scope.get(_KEY)

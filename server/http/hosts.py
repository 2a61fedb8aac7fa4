"""Which names this server answers to, and which pages may call it: the defence against DNS rebinding.

A page of a stranger can make its own name point at this server, but it cannot change that its name is in the Host
header. So only names that are known to be this server's are answered.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import Scope

from server.setting_values import is_loopback

EVERY = ("0.0.0.0", "::")


class Hosts:
    """The names of this server: of this machine, the address it listens on, and those that were allowed."""

    def __init__(self, host: str, allowed: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self._origins = frozenset(origins)
        names = {"localhost", *allowed}
        if not is_loopback(host):
            names |= {socket.gethostname(), socket.getfqdn()}
            if host not in EVERY:
                names.add(host)
        self._names = frozenset(_bare(name) for name in names)

    def accepts(self, host: str | None, scope: Scope) -> bool:
        """True for a Host header that names this server. `scope` tells the address the client connected to."""
        name = _bare(_without_port(host or ""))
        if not name:
            return False
        if name in self._names or is_loopback(name):
            return True
        server = scope.get("server") or ("", None)
        return _is_address(name) and name == _bare(str(server[0]))

    def accepts_origin(self, origin: str | None, host: str | None) -> bool:
        """True when no page sent the request, or one of this server, of this machine, or of an allowed origin."""
        if origin is None or origin in self._origins:
            return True
        parts = urlsplit(origin)
        if parts.netloc and parts.netloc == host:
            return True
        name = _bare(parts.hostname or "")
        return is_loopback(name) or name in self._names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0]
    name, _, port = host.rpartition(":")
    return name if name and port.isdecimal() else host


def _bare(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()

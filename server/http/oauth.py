"""Tokens of an external authorization server (OAuth 2.1): JSON web tokens, which it makes and this server checks.

The server is a protected resource (RFC 9728): its metadata names the authorization server, so that a client can get
a token there and come back with it. Signature, issuer, audience and times are checked with PyJWT.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import jwt

from server.http.identity import SCOPES, Identity, known

log = logging.getLogger("errata.http")

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures by a private key of the issuer; a shared secret would let every resource server make tokens."""
LEEWAY = 30
"""Seconds by which clocks may differ."""
TIMEOUT = 10
UNKNOWN_SECONDS = 30.0
"""Seconds without another look for keys after a token with an unknown key: strangers must not flood the issuer."""
METADATA = "/.well-known/oauth-protected-resource"
LONGEST = 16_384

Fetch = Callable[[str], dict[str, Any]]


def fetch_json(url: str) -> dict[str, Any]:
    """The JSON object at an http(s) address."""
    if urlsplit(url).scheme not in ("https", "http"):
        raise ValueError(f"{url} is not an http address")
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        found = json.load(answer)
    if not isinstance(found, dict):
        raise ValueError(f"{url} has no JSON object")
    return found


class Refused(Exception):
    """The token is not accepted; the text says why, without repeating it."""


class Verifier:
    """Checks the tokens of one issuer for one audience."""

    def __init__(
        self, issuer: str, audience: str, jwks: str | None = None, fetch: Fetch = fetch_json
    ) -> None:
        self.issuer, self.audience = issuer, audience
        self._jwks, self._fetch = jwks, fetch
        self._lock = threading.Lock()
        self._keys: dict[str | None, Any] = {}
        self._looked = -UNKNOWN_SECONDS

    def verify(self, token: str) -> Identity:
        """Who holds the token and what they may do. May ask the issuer for its keys: call it in a thread.

        Raises Refused.
        """
        if len(token) > LONGEST:
            raise Refused("the token is too long")
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in ALGORITHMS:
                raise Refused(f"tokens must be signed with one of {', '.join(ALGORITHMS)}")
            claims = jwt.decode(
                token,
                self._key(header.get("kid")),
                algorithms=[header["alg"]],
                audience=self.audience,
                issuer=self.issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Refused(f"the token is not valid here: {error}") from error
        return Identity(f"{claims['sub']}", known(_scopes(claims)))

    def _key(self, kid: str | None) -> Any:
        with self._lock:
            if kid not in self._keys and time.monotonic() - self._looked >= UNKNOWN_SECONDS:
                self._looked = time.monotonic()
                self._load()
            if kid not in self._keys:
                raise Refused("the token is signed with a key that its issuer does not publish")
            return self._keys[kid]

    def _load(self) -> None:
        try:
            self._jwks = self._jwks or self._discovered()
            keys = jwt.PyJWKSet.from_dict(self._fetch(self._jwks)).keys
        except (OSError, ValueError, jwt.PyJWTError) as error:
            log.error("the keys of %s cannot be read: %s", self.issuer, error)
            raise Refused(
                "the keys of the authorization server cannot be read just now; try again"
            ) from error
        signing = [key for key in keys if key.public_key_use in (None, "sig")]
        self._keys = {key.key_id: key for key in signing}
        if len(signing) == 1:
            self._keys[None] = signing[0]  # a token need not name the only key

    def _discovered(self) -> str:
        """The address of the keys, as the issuer's metadata has it (RFC 8414, OpenID Connect Discovery)."""
        parts = urlsplit(self.issuer)
        path = parts.path.rstrip("/")
        origin = f"{parts.scheme}://{parts.netloc}"
        places = (
            f"{origin}/.well-known/oauth-authorization-server{path}",
            f"{origin}{path}/.well-known/openid-configuration",
        )
        for place in places:
            try:
                found = self._fetch(place)
            except (OSError, ValueError):
                continue
            if found.get("issuer") == self.issuer and isinstance(found.get("jwks_uri"), str):
                return str(found["jwks_uri"])
        raise ValueError(f"neither {' nor '.join(places)} names the keys; set --oauth-jwks")


def _scopes(claims: dict[str, Any]) -> list[str]:
    scopes = claims.get("scope", claims.get("scp", []))
    if isinstance(scopes, str):
        return scopes.split()
    return [s for s in scopes if isinstance(s, str)] if isinstance(scopes, list) else []


def metadata(resource: str, issuer: str) -> dict[str, Any]:
    """The protected resource's metadata (RFC 9728)."""
    return {
        "resource": resource,
        "authorization_servers": [issuer],
        "scopes_supported": list(SCOPES),
        "bearer_methods_supported": ["header"],
        "resource_name": "Errata",
    }


def metadata_paths(resource: str) -> set[str]:
    """Where clients look for it: with the resource's own path behind the well-known one, and without."""
    return {METADATA, METADATA + urlsplit(resource).path.rstrip("/")}


def metadata_url(resource: str) -> str:
    """Its address, as a refusal names it."""
    parts = urlsplit(resource)
    return f"{parts.scheme}://{parts.netloc}{METADATA}{parts.path.rstrip('/')}"

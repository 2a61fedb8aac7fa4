"""The server with a real authorization server, and the MCP SDK's own client that gets its tokens there.

The issuer is oidc-provider (npm), which `make conformance` installs; without it these tests are skipped.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import anyio
import httpx2 as httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from mcp import Client
from mcp.client.auth import OAuthClientProvider
from mcp.client.auth.oauth2 import AuthorizationCodeResult
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata, OAuthToken

from errata import build, http_app
from server.http import oauth
from server.http.identity import SCOPES
from server.http.oauth import Refused, Verifier
from server.settings import Settings
from tests import device
from tests.conformance.__main__ import BIN, PROGRAMS
from tests.families import save_to
from tests.tools.clients import refused, told

ISSUER_CODE = Path(__file__).parents[1] / "conformance" / "issuer.mjs"
NODE = BIN / "node"
CALLBACK = "http://127.0.0.1:1/callback"

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        not (NODE.exists() and (PROGRAMS / "node_modules" / "oidc-provider").exists()),
        reason="oidc-provider is not here; make conformance installs it",
    ),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Key:
    """A signing key of the issuer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.private = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @property
    def jwk(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.private))
        made.pop("key_ops", None)
        return made | {"kid": self.name, "alg": "RS256", "use": "sig"}

    @property
    def public_pem(self) -> bytes:
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


@dataclass
class Issuer:
    """An oidc-provider process; `begin` again with other keys, as an issuer that rotates them."""

    port: int
    audience: str
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def begin(self, *keys: Key, seconds: int = 60, scopes: str = " ".join(SCOPES)) -> None:
        self.end()
        chosen = {"port": self.port, "audience": self.audience, "keys": [key.jwk for key in keys]}
        with ISSUER_CODE.open() as code:
            self.process = subprocess.Popen(
                [str(NODE), "--input-type=module", "-"],
                stdin=code,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=PROGRAMS,
                text=True,
                env=os.environ | {"ISSUER": json.dumps(chosen | {"seconds": seconds, "scopes": scopes})},
            )
        assert self.process.stdout
        assert any(line.strip() == "ready" for line in self.process.stdout)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            assert self.process.stdout
            self.process.stdout.close()


@dataclass
class Person:
    """Whoever sits before the browser: logs in with any password and agrees. Keeps what the SDK's client gets."""

    name: str
    tokens: OAuthToken | None = None
    client: OAuthClientInformationFull | None = None
    asked_for: list[str] = field(default_factory=list)
    visits: int = 0
    provider: OAuthClientProvider | None = None
    _came_back: str = ""

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.client = client_info

    async def visit(self, url: str) -> None:
        """Follow the address that the client opens, to its end at the client's callback."""
        self.visits += 1
        self.asked_for += parse_qs(urlsplit(url).query).get("scope", [])
        async with httpx.AsyncClient(timeout=30) as browser:
            answer = await browser.get(url)
            for _ in range(20):
                if answer.status_code in (302, 303):
                    url = urljoin(str(answer.url), answer.headers["location"])
                    if url.startswith(CALLBACK):
                        self._came_back = url
                        return
                    answer = await browser.get(url)
                    continue
                assert answer.status_code == 200, answer.text[:2000]
                (action,) = re.findall(r'<form[^>]* action="([^"]+)"', answer.text)
                (prompt,) = re.findall(r'name="prompt" value="([^"]+)"', answer.text)
                given = {"prompt": prompt, "login": self.name, "password": "any"}
                answer = await browser.post(urljoin(str(answer.url), action), data=given)
        raise AssertionError(f"the flow does not end: {answer.url}")

    async def came_back(self) -> AuthorizationCodeResult:
        values = {name: each[0] for name, each in parse_qs(urlsplit(self._came_back).query).items()}
        assert "error" not in values, values
        return AuthorizationCodeResult(code=values["code"], state=values.get("state"), iss=values.get("iss"))

    def auth(self, url: str) -> OAuthClientProvider:
        about = OAuthClientMetadata(
            client_name="a test",
            redirect_uris=[CALLBACK],  # type: ignore[list-item]
            grant_types=["authorization_code", "refresh_token"],
            token_endpoint_auth_method="none",
        )
        self.provider = OAuthClientProvider(url, about, self, self.visit, self.came_back)
        return self.provider


@pytest.fixture(scope="module")
def keys() -> list[Key]:
    return [Key("first"), Key("second")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_to("llama", tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def issuing(audience: str, *keys: Key, **options: Any) -> Iterator[Issuer]:
    issuer = Issuer(free_port(), audience)
    try:
        issuer.begin(*keys, **options)
        yield issuer
    finally:
        issuer.end()


@asynccontextmanager
async def serving(model: Path, home: Path, issuer: str, port: int, **more: Any) -> AsyncIterator[str]:
    """The real HTTP server at a port that is known beforehand; gives the address of /mcp."""
    url = f"http://127.0.0.1:{port}/mcp"
    settings = Settings(
        model=str(model),
        home=home,
        threads=1,
        device=device.chosen,
        dtype="float32",
        transport="http",
        port=port,
        oauth_issuer=issuer,
        **more,
    )
    server = build(settings)
    config = uvicorn.Config(
        http_app(server, settings), port=port, log_config=None, timeout_graceful_shutdown=1
    )
    web = uvicorn.Server(config)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(web.serve)
        while not web.started:
            await anyio.sleep(0.01)
        yield url
        web.should_exit = True
    server._startup.close(30)


@asynccontextmanager
async def client_of(url: str, person: Person, mode: str = "auto") -> AsyncIterator[Client]:
    with anyio.fail_after(120):
        async with (
            httpx.AsyncClient(auth=person.auth(url), timeout=60) as http,
            Client(streamable_http_client(url, http_client=http), mode=mode) as client,
        ):
            yield client


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_sdks_client_logs_in_by_itself_edits_and_its_name_is_recorded(
    model: Path, tmp_path: Path, keys: list[Key], mode: str
) -> None:
    port, ann = free_port(), Person("ann")
    with issuing(f"http://127.0.0.1:{port}/mcp", keys[0]) as issuer:
        async with serving(model, tmp_path, issuer.address, port) as url, client_of(url, ann, mode) as client:
            assert ann.asked_for == ["read edit offline_access"]
            assert {"ask_model", "apply_edits"} <= {tool.name for tool in (await client.list_tools()).tools}
            edit = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
            made = await told(client, "apply_edits", edits=[edit], method="rome", guard={"off": ["all"]})
            event = (await told(client, "show_edit", edit_id=made["edit_ids"][0]))["events"][0]
            assert event["identity"] == "ann"


async def test_who_is_granted_less_is_offered_less(model: Path, tmp_path: Path, keys: list[Key]) -> None:
    port, rita = free_port(), Person("rita")
    with issuing(f"http://127.0.0.1:{port}/mcp", keys[0], scopes="read") as issuer:
        async with serving(model, tmp_path, issuer.address, port) as url, client_of(url, rita) as client:
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert "ask_model" in names
            assert "apply_edits" not in names
            assert "scope 'edit'" in await refused(client, "apply_edits", edits=[])
            assert [prompt.name for prompt in (await client.list_prompts()).prompts] == ["audit_edits"]


async def test_a_client_asks_for_what_this_server_lets_agents_do(
    model: Path, tmp_path: Path, keys: list[Key]
) -> None:
    for options, scopes in (({"approval": True}, "read propose"), ({"read_only": True}, "read")):
        port = free_port()
        async with (
            serving(model, tmp_path / scopes[-4:], "http://127.0.0.1:1", port, **options) as url,
            httpx.AsyncClient() as http,
        ):
            challenge = (await http.post(url)).headers["www-authenticate"]
            assert f'scope="{scopes}"' in challenge


async def token_of(url: str, person: Person) -> str:
    async with client_of(url, person):
        assert person.tokens
        return person.tokens.access_token


def with_claims(token: str, key: Any, algorithm: str, **changed: Any) -> str:
    """The issuer's token with other claims, signed anew."""
    claims = jwt.decode(token, options={"verify_signature": False}) | changed
    claims = {name: value for name, value in claims.items() if value is not None}
    header = jwt.get_unverified_header(token)
    return jwt.encode(claims, key, algorithm, headers={"kid": header["kid"], "typ": header.get("typ", "JWT")})


def confused(token: str, key: Key) -> str:
    """The token signed with HS256, the secret being the issuer's public key, which everybody has."""
    import hmac

    def packed(value: Any) -> str:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    claims = jwt.decode(token, options={"verify_signature": False})
    text = f"{packed({'alg': 'HS256', 'kid': key.name})}.{packed(claims)}"
    return f"{text}.{packed(hmac.digest(key.public_pem, text.encode(), 'sha256'))}"


async def test_forged_expired_and_misdirected_tokens_of_a_real_issuer_are_refused(
    model: Path, tmp_path: Path, keys: list[Key]
) -> None:
    port = free_port()
    key, stranger = keys
    with issuing(f"http://127.0.0.1:{port}/mcp", key) as issuer:
        async with serving(model, tmp_path, issuer.address, port) as url:
            good = await token_of(url, Person("ann"))
            header = jwt.get_unverified_header(good)
            assert (header["alg"], header["kid"]) == ("RS256", key.name)
            bad = {
                "another audience": with_claims(good, key.private, "RS256", aud="https://other.example/mcp"),
                "another issuer": with_claims(good, key.private, "RS256", iss="http://127.0.0.1:1"),
                "expired": with_claims(good, key.private, "RS256", exp=int(time.time()) - 3600),
                "no end": with_claims(good, key.private, "RS256", exp=None),
                "not yet": with_claims(good, key.private, "RS256", nbf=int(time.time()) + 3600),
                "another key": with_claims(good, stranger.private, "RS256"),
                "no signature": with_claims(good, None, "none"),
                "the public key as a secret": confused(good, key),
                "a secret": with_claims(good, "s" * 64, "HS256"),
                "cut": good[:-10],
                "more scopes": f"{good.split('.')[0]}.{_with_admin(good)}.{good.split('.')[2]}",
            }
            async with httpx.AsyncClient(timeout=30) as http:
                for what, token in bad.items():
                    answer = await http.post(url, headers={"authorization": f"Bearer {token}"})
                    assert answer.status_code == 401, what
                    assert 'error="invalid_token"' in answer.headers["www-authenticate"], what
                    assert token not in answer.text
                accepted = await http.post(url, headers={"authorization": f"Bearer {good}"})
                assert accepted.status_code not in (401, 403)


def _with_admin(token: str) -> str:
    claims = jwt.decode(token, options={"verify_signature": False}) | {"scope": "admin"}
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()


async def test_an_issuer_that_rotates_its_keys_is_followed(
    model: Path, tmp_path: Path, keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "UNKNOWN_SECONDS", 0.0)
    port = free_port()
    first, second = keys
    with issuing(f"http://127.0.0.1:{port}/mcp", first) as issuer:
        async with serving(model, tmp_path, issuer.address, port) as url:
            old = await token_of(url, Person("ann"))
            issuer.begin(second)
            new = await token_of(url, Person("bob"))
            assert jwt.get_unverified_header(new)["kid"] == "second"
            verifier = Verifier(issuer.address, url)
            assert verifier.verify(new).name == "bob"
            with pytest.raises(Refused, match="does not publish"):
                verifier.verify(old)
            async with httpx.AsyncClient(timeout=30) as http:
                withdrawn = await http.post(url, headers={"authorization": f"Bearer {old}"})
            assert withdrawn.status_code == 401


async def ran_out(url: str, person: Person, token: str) -> None:
    """Wait until neither the server nor the client takes the token for valid."""
    assert person.provider
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(timeout=30) as http:
        with anyio.fail_after(60):
            while (await http.post(url, headers=headers)).status_code != 401 or (
                person.provider.context.is_token_valid()
            ):
                await anyio.sleep(0.05)


async def test_a_token_that_ran_out_is_renewed_without_a_person(
    model: Path, tmp_path: Path, keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "LEEWAY", 0)
    port, ann = free_port(), Person("ann")
    with issuing(f"http://127.0.0.1:{port}/mcp", keys[0], seconds=2) as issuer:
        async with serving(model, tmp_path, issuer.address, port) as url, client_of(url, ann) as client:
            assert ann.tokens
            first = ann.tokens.access_token
            await ran_out(url, ann, first)
            visits = ann.visits
            assert (await told(client, "list_edits"))["total"] == 0
            assert ann.tokens.access_token != first
            assert ann.visits == visits


async def test_an_issuer_that_cannot_be_reached_is_said_and_no_token_taken(
    model: Path, tmp_path: Path, keys: list[Key]
) -> None:
    port = free_port()
    with issuing(f"http://127.0.0.1:{port}/mcp", keys[0]) as issuer:
        address = issuer.address
        async with serving(model, tmp_path, address, port) as url:
            token = jwt.encode({"sub": "ann"}, keys[0].private, "RS256", headers={"kid": "first"})
            issuer.end()
            async with httpx.AsyncClient(timeout=30) as http:
                answer = await http.post(url, headers={"authorization": f"Bearer {token}"})
        assert answer.status_code == 401
        assert "cannot be read just now" in answer.json()["error"]

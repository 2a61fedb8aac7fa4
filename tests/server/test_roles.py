"""Whose token a request has decides what it may do, and stands on the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from pydantic import SecretStr
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

import tools
from errata import build, http_app
from server.http.auth import Door
from server.http.hosts import Hosts
from server.http.identity import SCOPES, Identity, identity_of
from server.http.oauth import Refused, Verifier
from server.http.tokens import TokenBook, from_file, from_text
from server.settings import OPTIONAL_TOOLSETS, TOOLSETS, Settings
from tests import device
from tests.families import save_to
from tests.tools.clients import refused, told
from tools.prompts import PROMPTS

READER, EDITOR, ADMIN = ("reader-" + "r" * 32, "editor-" + "e" * 32, "admin-" + "a" * 32)
TOKENS = f"rita=read:{READER}, ed=edit:{EDITOR}, ada=admin:{ADMIN}"
ISSUER, AUDIENCE = "https://login.example/realm", "https://errata.example/mcp"
EDIT = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["auto", "legacy"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("roles")
    return Settings(
        model=str(save_to("llama", folder / "tiny")),
        home=folder / "home",
        threads=1,
        device=device.chosen,
        dtype="float32",
        transport="http",
        tokens=SecretStr(TOKENS),
        toolsets=(*TOOLSETS, *OPTIONAL_TOOLSETS),
    )


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """The real HTTP server; gives the address of /mcp."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        web = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(web.serve, [listener])
            while not web.started:
                await anyio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
            web.should_exit = True


@asynccontextmanager
async def client_of(url: str, token: str, mode: str) -> AsyncIterator[Client]:
    headers = {"authorization": f"Bearer {token}"}
    async with (
        httpx.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


async def test_each_token_sees_and_calls_what_its_scope_allows_and_its_name_is_recorded(
    settings: Settings, mode: str
) -> None:
    server = build(settings)
    async with serving(http_app(server, settings)) as url:
        listed = {}
        for token in (READER, EDITOR, ADMIN):
            async with client_of(url, token, mode) as client:
                listed[token] = {tool.name for tool in (await client.list_tools()).tools}
        assert listed[READER] < listed[EDITOR] < listed[ADMIN] == set(tools.SCOPES)
        assert listed[READER] == {name for name, scope in tools.SCOPES.items() if scope == "read"}

        async with client_of(url, READER, mode) as reader:
            for name in sorted(set(tools.SCOPES) - listed[READER]):
                text = await refused(reader, name)
                assert "needs a token with the scope" in text
                assert "rita" in text
            assert "scope 'edit'" in await refused(reader, "audit_edits", repair=True)
            assert (await told(reader, "ask_model", prompt="hi", max_new_tokens=1))["tokens"] <= 1
        async with client_of(url, EDITOR, mode) as editor:
            made = await told(editor, "apply_edits", edits=[EDIT], method="rome", replace=True)
            (edit_id,) = made["edit_ids"]
            event = (await told(editor, "show_edit", edit_id=edit_id))["events"][0]
            assert event["identity"] == "ed"
            assert event["client"] == "mcp"
            await told(editor, "revert_edits", edit_ids=[edit_id])
            assert (await told(editor, "audit_edits"))["integrity"]["problems"] == []
    server._startup.close(30)


async def test_a_token_is_offered_only_prompts_whose_tools_it_may_call(settings: Settings, mode: str) -> None:
    server = build(settings)
    whole = {function.__name__ for function, _, _ in PROMPTS}
    async with serving(http_app(server, settings)) as url:
        for token in (EDITOR, ADMIN):
            async with client_of(url, token, mode) as client:
                assert {prompt.name for prompt in (await client.list_prompts()).prompts} == whole
                for name in whole:
                    assert (await client.get_prompt(name, {"topic": "x"} if "stale" in name else {})).messages
        async with client_of(url, READER, mode) as reader:
            assert [prompt.name for prompt in (await reader.list_prompts()).prompts] == ["audit_edits"]
            assert (await reader.get_prompt("audit_edits", {})).messages
            for name, tool in (("undo_last_change", "revert_edits"), ("correct_stale_facts", "apply_edits")):
                with pytest.raises(MCPError, match=f"{tool}.*your token does not allow"):
                    await reader.get_prompt(name, {"topic": "x"} if "stale" in name else {})
    server._startup.close(30)


async def test_with_approval_no_prompt_tells_agents_to_change_the_model_at_once(
    settings: Settings, mode: str
) -> None:
    chosen = settings.model_copy(update={"approval": True})
    server = build(chosen)
    async with serving(http_app(server, chosen)) as url:
        async with client_of(url, EDITOR, mode) as editor:
            assert [prompt.name for prompt in (await editor.list_prompts()).prompts] == ["audit_edits"]
        async with client_of(url, ADMIN, mode) as admin:
            assert len((await admin.list_prompts()).prompts) == len(PROMPTS)
    server._startup.close(30)


def test_every_tool_that_a_prompt_needs_is_served_with_a_scope() -> None:
    for function, _, needed in PROMPTS:
        assert needed
        assert needed <= set(tools.SCOPES), function


async def test_a_session_serves_only_the_one_who_began_it(settings: Settings) -> None:
    server = build(settings)
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "t", "version": "1"},
        },
    }
    ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
    async with serving(http_app(server, settings)) as url, httpx.AsyncClient(timeout=30) as http:
        accept = {"accept": "application/json, text/event-stream"}
        first = await http.post(url, json=hello, headers=accept | {"authorization": f"Bearer {ADMIN}"})
        session = accept | {"mcp-session-id": first.headers["mcp-session-id"]}
        mine = await http.post(url, json=ping, headers=session | {"authorization": f"Bearer {ADMIN}"})
        other = await http.post(url, json=ping, headers=session | {"authorization": f"Bearer {READER}"})
    assert mine.status_code == 200
    assert other.status_code == 404
    server._startup.close(30)


def test_every_tool_that_changes_something_needs_more_than_reading() -> None:
    for toolset in tools.TOOLSETS:
        for spec in toolset.specs:
            assert (spec.scope == "read") == (not spec.changes)
            assert spec.scope in SCOPES


# --- the operator's own tokens ------------------------------------------------------------------


def test_a_scope_includes_those_before_it() -> None:
    assert [[Identity("x", frozenset({held})).may(s) for s in SCOPES] for held in SCOPES] == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert not Identity("x", frozenset()).may("read")


def test_a_file_of_tokens_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    digest = hashlib.sha256(EDITOR.encode()).hexdigest()
    path.write_text(
        f'[tokens.rita]\nscope = "read"\ntoken = "{READER}"\n[tokens.ed]\nscope = "edit"\nsha256 = "{digest}"\n'
    )
    book = TokenBook(file=path)
    assert book.find(READER) == Identity("rita", frozenset({"read"}))
    assert book.find(EDITOR) == Identity("ed", frozenset({"edit"}))
    assert book.find(ADMIN) is None
    path.write_text(f'[tokens.ada]\nscope = "admin"\ntoken = "{ADMIN}"\n')
    os.utime(path, ns=(1, 1))
    assert book.find(READER) is None
    assert book.find(ADMIN) == Identity("ada", frozenset({"admin"}))
    path.write_text("not TOML")
    os.utime(path, ns=(2, 2))
    assert book.find(ADMIN) is None
    path.unlink()
    assert book.find(ADMIN) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rita", "entry 1 is not of the form"),
        (f"rita=read:{READER},ed", "entry 2"),
        ("rita=read:short", "the token of rita has 5 characters"),
        (f"rita=write:{READER}", "choose from read, propose, edit, admin"),
        (f"ri ta=read:{READER}", "cannot be the name"),
        (f"rita=read:{READER},rita=edit:{EDITOR}", "two tokens of the name rita"),
    ],
)
def test_a_wrong_list_of_tokens_says_what_is_wrong_and_no_token(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        from_text(text)
    assert READER not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no"),
        ("x = [", "TOML"),
        ("[tokens]\nrita = 1", "must be a table"),
        ('[tokens.rita]\nscope = "read"', "needs `token`"),
        ('[tokens.rita]\nscope = "read"\nsha256 = "12"', "64 hexadecimal"),
        ('[tokens.rita]\nscope = "read"\ntoken = "short"', "at least 32"),
    ],
)
def test_a_wrong_file_of_tokens_is_named_with_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    (path := tmp_path / "tokens.toml").write_text(text)
    with pytest.raises(ValueError, match=says) as refusal:
        from_file(path)
    assert str(path) in str(refusal.value)


# --- tokens of an authorization server ----------------------------------------------------------


class Issuer:
    """An authorization server: its keys, its metadata, and the tokens it makes."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.other = ec.generate_private_key(ec.SECP256R1())
        self.fetched: list[str] = []
        self.kid = "k1"

    def fetch(self, url: str) -> dict[str, Any]:
        self.fetched.append(url)
        if url.endswith("/jwks"):
            public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
            return {"keys": [public | {"kid": self.kid, "use": "sig"}]}
        if url == "https://login.example/realm/.well-known/openid-configuration":
            return {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/jwks"}
        raise OSError("404")

    def token(self, key: Any = None, algorithm: str = "RS256", kid: str | None = None, **claims: Any) -> str:
        now = int(time.time())
        full = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "alice",
            "exp": now + 60,
            "scope": "openid errata:edit",
        } | claims
        full = {name: value for name, value in full.items() if value is not None}
        return jwt.encode(full, key or self.key, algorithm, headers={"kid": kid or self.kid})


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def verifier(issuer: Issuer) -> Verifier:
    return Verifier(ISSUER, AUDIENCE, fetch=issuer.fetch)


def test_a_token_of_the_issuer_says_who_and_what(issuer: Issuer, verifier: Verifier) -> None:
    assert verifier.verify(issuer.token()) == Identity("alice", frozenset({"edit"}))
    assert verifier.verify(issuer.token(scope=None, scp=["read"])).scopes == {"read"}
    assert verifier.verify(issuer.token(aud=["x", AUDIENCE], scope="profile")).scopes == frozenset()


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "https://other.example/mcp"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"exp": 1},
        {"exp": None},
        {"sub": None},
        {"nbf": 2**32},
    ],
)
def test_a_token_that_is_not_for_here_and_now_is_refused(
    issuer: Issuer, verifier: Verifier, claims: dict[str, Any]
) -> None:
    with pytest.raises(Refused):
        verifier.verify(issuer.token(**claims))


def test_a_token_that_the_issuer_did_not_sign_is_refused(issuer: Issuer, verifier: Verifier) -> None:
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    good = issuer.token()
    forged = [
        issuer.token(stranger),
        issuer.token(issuer.other, "ES256"),
        issuer.token("s" * 64, "HS256"),
        jwt.encode({"sub": "alice"}, None, "none"),
        good[:-4] + ("AAAA" if good[-4:] != "AAAA" else "BBBB"),
        "a.b.c",
        "x" * 100_000,
        "",
    ]
    for token in forged:
        with pytest.raises(Refused):
            verifier.verify(token)
    assert verifier.verify(good)


def test_a_flood_of_unknown_keys_does_not_reach_the_issuer(issuer: Issuer, verifier: Verifier) -> None:
    verifier.verify(issuer.token())
    issuer.fetched.clear()
    for n in range(50):
        with pytest.raises(Refused, match="does not publish"):
            verifier.verify(issuer.token(kid=f"unknown{n}"))
    assert issuer.fetched == []


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await JSONResponse(identity_of(scope).name)(scope, receive, send)  # type: ignore[union-attr]


@pytest.fixture
def door(verifier: Verifier) -> TestClient:
    app = Door(_hello, Hosts("127.0.0.1", ["errata.example"]), TokenBook(listed=TOKENS), verifier)
    return TestClient(app, base_url="https://errata.example")


def test_a_client_without_a_token_is_told_where_to_get_one(door: TestClient) -> None:
    answer = door.post("/mcp")
    assert answer.status_code == 401
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith("Bearer ")
    (url,) = re.findall(r'resource_metadata="([^"]+)"', challenge)
    about = door.get(url).json()
    assert about["resource"] == AUDIENCE
    assert about["authorization_servers"] == [ISSUER]
    assert about["scopes_supported"] == list(SCOPES)
    assert door.get("/.well-known/oauth-protected-resource").json() == about


def test_tokens_of_the_issuer_and_of_the_operator_are_both_accepted(door: TestClient, issuer: Issuer) -> None:
    for token, name in ((issuer.token(), "alice"), (READER, "rita")):
        answer = door.post("/mcp", headers={"authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.json()) == (200, name)


def test_a_token_without_a_scope_of_this_server_is_told_so(door: TestClient, issuer: Issuer) -> None:
    answer = door.post("/mcp", headers={"authorization": f"Bearer {issuer.token(scope='email')}"})
    assert answer.status_code == 403
    assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


async def test_with_approval_agents_propose_and_an_administrator_changes_at_once(
    settings: Settings, mode: str
) -> None:
    chosen = settings.model_copy(update={"approval": True})
    server = build(chosen)
    async with serving(http_app(server, chosen)) as url, client_of(url, EDITOR, mode) as editor:
        listed = {tool.name for tool in (await editor.list_tools()).tools}
        assert "propose_edits" in listed
        assert not listed & {"apply_edits", "revert_edits", "decide_proposal", "set_steering"}
        text = await refused(editor, "apply_edits", edits=[EDIT], method="rome")
        assert "Call propose_edits" in text
        guard = {"off": ["all"]}
        given = {"edits": [EDIT], "method": "rome", "guard": guard, "replace": True}
        made = await told(editor, "propose_edits", **given, reason="a law")
        assert made["state"] == "waiting"
        async with client_of(url, ADMIN, mode) as admin:
            (proposal,) = (await told(admin, "list_proposals", state="waiting"))["proposals"]
            assert proposal["identity"] == "ed"
            done = await told(
                admin, "decide_proposal", proposal_id=proposal["proposal_id"], decision="approve"
            )
            assert done["state"] == "approved"
            assert done["message"].endswith("by ada. It was applied exactly as it was measured.")
            assert done["edit_ids"]
            own = await told(admin, "propose_edits", **given)
            text = await refused(admin, "decide_proposal", proposal_id=own["proposal_id"], decision="approve")
            assert "proposed by 'ada', who cannot approve it too" in text
            await told(admin, "decide_proposal", proposal_id=own["proposal_id"], decision="decline")
    server._startup.close(30)

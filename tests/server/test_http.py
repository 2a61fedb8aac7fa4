"""The HTTP door: loopback by default, no foreign pages, a token where others can reach it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.testclient import TestClient

from errata import build, http_app
from server.http.auth import check_exposure, security
from server.settings import Settings

TOKEN = "correct-horse-battery-staple"
INITIALIZE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
HEADERS = {"accept": "application/json, text/event-stream", "host": "127.0.0.1:8765"}


def serve(home: Path, **changed: Any) -> TestClient:
    # A model that does not exist: loading fails in the background, which must not matter here.
    settings = Settings(home=home, model="/no/such/model", transport="http", **changed)
    return TestClient(http_app(build(settings), settings))


@pytest.fixture
def local(tmp_path: Path) -> Iterator[TestClient]:
    with serve(tmp_path) as client:
        yield client


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    with serve(tmp_path, token=SecretStr(TOKEN)) as client:
        yield client


def post(client: TestClient, **headers: str) -> Any:
    return client.post("/mcp", json=INITIALIZE, headers=HEADERS | headers)


def test_a_local_client_is_served(local: TestClient) -> None:
    answer = post(local)
    assert answer.status_code == 200
    assert '"name":"errata"' in answer.text


@pytest.mark.parametrize("host", ["localhost:8765", "[::1]:8765", "127.0.0.1", "localhost"])
def test_every_name_of_this_machine_is_accepted(local: TestClient, host: str) -> None:
    assert post(local, host=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example:8765", ""])
def test_a_foreign_host_name_is_refused(local: TestClient, host: str) -> None:
    assert post(local, host=host).status_code == 421


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example:8765", "null", "file://"]
)
def test_a_page_from_elsewhere_is_refused(local: TestClient, origin: str) -> None:
    assert post(local, origin=origin).status_code == 403


def test_a_local_page_is_served(local: TestClient) -> None:
    assert post(local, origin="http://localhost:6274").status_code == 200


def test_a_request_with_the_token_is_served(guarded: TestClient) -> None:
    assert post(guarded, authorization=f"Bearer {TOKEN}").status_code == 200
    assert post(guarded, authorization=f"bearer {TOKEN}").status_code == 200


@pytest.mark.parametrize(
    "given", ["", TOKEN, "Bearer", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"]
)
def test_a_request_without_the_token_is_refused(guarded: TestClient, given: str) -> None:
    headers = [
        (name.encode(), value.encode()) for name, value in (HEADERS | {"authorization": given}).items()
    ]
    answer = guarded.post("/mcp", json=INITIALIZE, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Bearer realm="errata"')
    assert TOKEN not in answer.text


def test_every_path_needs_the_token(guarded: TestClient) -> None:
    for path in ("/", "/mcp", "/mcp/", "/health", "/../mcp"):
        assert guarded.get(path, headers=HEADERS).status_code == 401


@given(st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=60))
def test_a_wrong_token_is_refused(guess: str) -> None:
    from server.http.auth import Gate

    gate = Gate(app=_unreachable, token=TOKEN)
    if guess.strip() != TOKEN:
        assert gate._unauthorised([f"Bearer {guess}"]) is not None


async def _unreachable(*_: Any) -> None:
    raise AssertionError


def test_a_host_that_others_can_reach_needs_a_token() -> None:
    check_exposure("127.0.0.1", None)
    check_exposure("::1", None)
    check_exposure("localhost", None)
    check_exposure("0.0.0.0", TOKEN)
    for host in ("0.0.0.0", "::", "192.168.1.7", "box.example"):
        with pytest.raises(ValueError, match="ERRATA_TOKEN"):
            check_exposure(host, None)
        with pytest.raises(ValueError, match="ERRATA_TOKEN"):
            check_exposure(host, "")


def test_a_server_on_every_address_refuses_foreign_pages_and_requests_without_the_token(
    tmp_path: Path,
) -> None:
    with serve(tmp_path, host="0.0.0.0", token=SecretStr(TOKEN)) as client:
        bearer = {"authorization": f"Bearer {TOKEN}"}
        assert post(client, host="10.0.0.5:8765", **bearer).status_code == 200
        assert post(client, host="10.0.0.5:8765").status_code == 401
        assert post(client, host="10.0.0.5:8765", origin="https://evil.example", **bearer).status_code == 403
        assert post(client, host="10.0.0.5:8765", origin="http://10.0.0.5:8765", **bearer).status_code == 200


def test_a_named_host_is_accepted_beside_the_names_of_this_machine() -> None:
    chosen = security("192.168.1.7")
    assert "192.168.1.7:*" in chosen.allowed_hosts
    assert "localhost:*" in chosen.allowed_hosts
    assert security("fe80::1").allowed_hosts[-1] == "[fe80::1]:*"

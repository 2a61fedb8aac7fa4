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
from server.http.hosts import Hosts
from server.http.tokens import TokenBook
from server.settings import Settings

TOKEN = "correct-horse-battery-staple-and-more"
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


def test_the_scripts_of_an_allowed_page_may_call_and_read_the_answer(tmp_path: Path) -> None:
    page, other = "https://host.example", "https://other.example"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with serve(tmp_path, token=SecretStr(TOKEN), allowed_origins=page) as client:
        known = HEADERS | {"origin": page}
        assert client.options("/mcp", headers=known | asked).headers["access-control-allow-origin"] == page
        answer = post(client, origin=page, authorization=f"Bearer {TOKEN}")
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        assert "access-control-allow-credentials" not in answer.headers  # no cookie of the board goes along
        assert post(client, origin=page).status_code == 401
        assert client.options("/mcp", headers=HEADERS | {"origin": other} | asked).status_code == 400
        assert post(client, origin=other, authorization=f"Bearer {TOKEN}").status_code == 403
    with serve(tmp_path / "closed") as client:
        assert "access-control-allow-origin" not in post(client, origin="http://localhost:6274").headers


@pytest.mark.parametrize("origin", ["*", "host.example", "https://host.example/", "file:///x", "https://"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match=r"is not an origin; write scheme"):
        Settings(allowed_origins=origin)  # type: ignore[arg-type]


def test_an_origin_is_compared_as_browsers_send_it() -> None:
    given = "HTTPS://Host.Example:443, http://localhost:80, http://[::1]:8080, https://host.example:80"
    assert Settings(allowed_origins=given).allowed_origins == (  # type: ignore[arg-type]
        "https://host.example", "http://localhost", "http://[::1]:8080", "https://host.example:80",
    )  # fmt: skip


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
    for path in (
        "/mcp",
        "/mcp/",
        "/healthy",
        "/health/x",
        "/../mcp",
        "/.well-known/oauth-protected-resource",
    ):
        assert guarded.get(path, headers=HEADERS).status_code == 401


@pytest.mark.parametrize("path", ["/", "/facts/e1", "/model", "/jobs", "/report"])
def test_a_page_of_the_board_sends_who_has_no_token_to_the_log_in(guarded: TestClient, path: str) -> None:
    answer = guarded.get(path, headers=HEADERS, follow_redirects=False)
    assert answer.status_code in (303, 401)
    assert answer.status_code == 401 or answer.headers["location"].startswith("/board/login")


@given(st.text(max_size=60))
def test_a_wrong_token_is_nobodys(guess: str) -> None:
    book = TokenBook(TOKEN)
    assert (book.find(guess) is not None) == (guess == TOKEN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "box.example"])
def test_a_host_that_others_can_reach_needs_a_token(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match="ERRATA_TOKEN"):
        Settings(home=tmp_path, transport="http", host=host)
    assert Settings(home=tmp_path, transport="http", host=host, token=SecretStr(TOKEN)).asks_for_tokens


def test_a_server_on_every_address_answers_to_its_own_names_alone(tmp_path: Path) -> None:
    allowed = ("errata.example",)
    with serve(tmp_path, host="0.0.0.0", token=SecretStr(TOKEN), allowed_hosts=allowed) as client:
        bearer = {"authorization": f"Bearer {TOKEN}"}
        for host in ("errata.example", "ERRATA.example:443", "localhost:8765", "127.0.0.1"):
            assert post(client, host=host, **bearer).status_code == 200
        for host in ("evil.example", "10.0.0.5:8765", "errata.example.evil", ""):
            assert post(client, host=host, **bearer).status_code == 421
        here = {"host": "errata.example"}
        assert post(client, **here).status_code == 401
        assert post(client, origin="https://evil.example", **here, **bearer).status_code == 403
        assert post(client, origin="https://errata.example", **here, **bearer).status_code == 200


def test_the_address_a_client_connected_to_is_a_name_of_the_server() -> None:
    hosts = Hosts("0.0.0.0")
    scope: dict[str, Any] = {"type": "http", "server": ("10.0.0.5", 8765)}
    assert hosts.accepts("10.0.0.5:8765", scope)
    assert not hosts.accepts("10.0.0.6:8765", scope)
    assert Hosts("fe80::1").accepts("[fe80::1]:8765", scope)
    # The name that a proxy or a test puts there is no address.
    assert not hosts.accepts("evil.example", {"type": "http", "server": ("evil.example", 80)})


def test_health_and_readiness_are_told_to_everybody(guarded: TestClient) -> None:
    anybody = {"host": "10.1.2.3"}
    assert guarded.get("/health", headers=anybody).json() == {"status": "ok"}
    answer = guarded.get("/ready", headers=anybody)
    assert answer.status_code == 503
    assert answer.json()["status"] in ("loading", "failed")

"""The server as a process over stdio: its first words, its last, and nothing else on stdout."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.families import save_to
from tests.server.processes import connected, start
from tests.tools.clients import refused, told

pytestmark = pytest.mark.anyio

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
FRANCE = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_to("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def calling(number: int, tool: str, **arguments: Any) -> bytes:
    params = {"name": tool, "arguments": arguments}
    return line({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params})


def answer(server: subprocess.Popen[bytes], number: int) -> Any:
    """The answer to one request; every line before it must be a message of the protocol too."""
    assert server.stdout
    for said in server.stdout:
        message = json.loads(said)
        assert message["jsonrpc"] == "2.0"
        if message.get("id") == number:
            return message
    raise AssertionError("the server ended without an answer")


def greet(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin
    server.stdin.write(line(INITIALIZE))
    server.stdin.flush()
    assert answer(server, 1)["result"]["serverInfo"]["name"] == "errata"
    server.stdin.write(line({"jsonrpc": "2.0", "method": "notifications/initialized"}))
    server.stdin.flush()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_edit_survives_the_end_of_the_process(model: Path, tmp_path: Path, mode: str) -> None:
    async with connected(tmp_path, mode, model=model) as client:
        applied = await told(client, "apply_edits", edits=[FRANCE])
    async with connected(tmp_path, mode, model=model) as client:
        assert (await told(client, "audit_edits"))["weights_hash"] == applied["weights_hash"]
        shown = await told(client, "show_edit", edit_id="e1")
    assert shown["edit"]["client"] == "mcp"


async def test_a_second_process_on_the_same_home_says_so_and_lives(model: Path, tmp_path: Path) -> None:
    async with connected(tmp_path, model=model) as first:
        await told(first, "list_edits")
        async with connected(tmp_path, model=model) as second:
            text = await refused(second, "list_edits")
            assert str(tmp_path) in text
            assert (await told(second, "model_status"))["state"] == "failed"


def test_the_server_ends_when_its_client_leaves(model: Path, tmp_path: Path) -> None:
    with start(tmp_path, model=model) as server:
        greet(server)
        rest, log = server.communicate(timeout=60)
    assert server.returncode == 0
    assert rest == b""
    assert b"Traceback" not in log


def test_the_server_ends_when_its_client_leaves_without_a_word(tmp_path: Path) -> None:
    with start(tmp_path, model="/no/such/model") as server:
        rest, log = server.communicate(timeout=60)
    assert (server.returncode, rest) == (0, b"")
    assert b"Traceback" not in log


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_in_order(model: Path, tmp_path: Path, sign: signal.Signals) -> None:
    with start(tmp_path, model=model) as server:
        greet(server)
        assert server.stdin
        server.stdin.write(calling(2, "apply_edits", edits=[FRANCE]))
        server.stdin.flush()
        applied = answer(server, 2)["result"]["structuredContent"]
        server.send_signal(sign)
        # stdin stays open: it is the signal that ends the process, not the client's leaving
        assert server.stdout
        assert server.stdout.read() == b""
        assert server.wait(60) == 0
        assert server.stderr
        assert b"Traceback" not in server.stderr.read()
        server.stdin.close()
    with start(tmp_path, model=model) as again:
        greet(again)
        assert again.stdin
        again.stdin.write(calling(2, "audit_edits"))
        again.stdin.flush()
        audit = answer(again, 2)["result"]["structuredContent"]
        again.communicate(timeout=60)
    assert audit["integrity"]["problems"] == []
    assert audit["weights_hash"] == applied["weights_hash"]


def test_a_signal_while_the_model_loads_ends_the_server(model: Path, tmp_path: Path) -> None:
    with start(tmp_path, model=model) as server:
        greet(server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        server.communicate()


def test_noise_on_the_line_does_not_stop_the_server(tmp_path: Path) -> None:
    noise = [
        b"\n",
        b"{",
        b"\xff\xfe\x00\n",
        b'{"jsonrpc": "2.0", "id": 7, "method": "nope"}\n',
        b"[" * 5000 + b"\n",
    ]
    with start(tmp_path, model="/no/such/model") as server:
        greet(server)
        assert server.stdin
        server.stdin.write(b"".join(noise) + calling(8, "model_status"))
        server.stdin.flush()
        assert answer(server, 8)["result"]["structuredContent"]["state"] in ("loading", "failed")
        server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.mark.model
async def test_the_default_model_is_corrected_and_put_back(default_model_home: Path) -> None:
    edit = {
        "subject": "France",
        "prompt": "The capital of {} is",
        "target": "Lyon",
        "neighbours": [{"prompt": "The capital of Italy is"}],
    }
    async with connected(default_model_home) as client:
        (fact,) = (
            await told(
                client, "check_facts", facts=[{"prompt": "The capital of France is", "expected": "Paris"}]
            )
        )["facts"]
        assert fact["verdict"] == "agrees"
        pristine = (await told(client, "model_status"))["weights_hash"]
        report = await told(client, "apply_edits", edits=[edit])
        assert report["reliability"] == 1
        assert "Paris" in report["results"][0]["before"]
        both = await told(
            client, "ask_model", prompt="The capital of France is", max_new_tokens=6, compare_to_base=True
        )
        assert "Lyon" in both["completion"]
        assert "Paris" in both["base_completion"]
        reverted = await told(client, "revert_edits", edit_ids=report["edit_ids"])
    assert reverted["weights_hash"] == pristine
    assert "Paris" in reverted["restored"][0]["answer"]

"""The server as a process over stdio: its first words, its last, and nothing else on stdout."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.families import save_to
from tests.server.processes import Wire, connected
from tests.tools.clients import refused, told

pytestmark = pytest.mark.anyio

DEEP = b'{"a": ' * 400 + b"1" + b"}" * 400
FRANCE = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_to("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_edit_survives_the_end_of_the_process(model: Path, tmp_path: Path, mode: str) -> None:
    fresh = mode == "auto"
    async with connected(tmp_path, mode, model=model, fresh=fresh) as client:
        applied = await told(client, "apply_edits", edits=[FRANCE])
    async with connected(tmp_path, mode, model=model, fresh=fresh) as client:
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
    with Wire(tmp_path, fresh=True, model=model) as server:
        server.greet()
        code, rest, log = server.leave()
    assert (code, rest) == (0, b"")
    assert "Traceback" not in log


def test_the_server_ends_when_its_client_leaves_without_a_word(tmp_path: Path) -> None:
    with Wire(tmp_path, fresh=True, model="/no/such/model") as server:
        code, rest, log = server.leave()
    assert (code, rest) == (0, b"")
    assert "Traceback" not in log


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_in_order(model: Path, tmp_path: Path, sign: signal.Signals) -> None:
    with Wire(tmp_path, model=model) as server:
        server.greet()
        applied = server.told("apply_edits", edits=[FRANCE])
        server.process.send_signal(sign)
        code, rest, log = server.end()  # with stdin open: it is the signal that ends it
    assert (code, rest) == (0, b"")
    assert "Traceback" not in log
    with Wire(tmp_path, model=model) as again:
        again.greet()
        audit = again.told("audit_edits")
    assert audit["integrity"]["problems"] == []
    assert audit["weights_hash"] == applied["weights_hash"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_signal_while_the_model_loads_ends_the_server(model: Path, tmp_path: Path) -> None:
    with Wire(tmp_path, fresh=True, model=model) as server:  # torch is being imported
        server.greet()
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


def test_noise_on_the_line_does_not_stop_the_server(tmp_path: Path) -> None:
    with Wire(tmp_path, model="/no/such/model") as server:
        server.greet()
        server.send(b"\n", b"{\n", b"\xff\xfe\x00\n", b'{"jsonrpc": "2.0"}\n', b"[" * 5000 + b"\n")
        assert server.told("model_status")["state"] in ("loading", "failed")
        assert server.leave()[0] == 0


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (rb'{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": {"a": "\ud800"}}', "surrogate"),
        (
            b'{"jsonrpc": "2.0", "id": 7, "method": "ping", "params": ' + b'{"a": ' * 400 + b"1" + b"}" * 401,
            "recursion",
        ),
        (b'{"jsonrpc": "2.0", "id": 7, "method": 3}', "`method`"),
        (b'{"jsonrpc": "1.0", "id": 7, "method": "ping"}', "`jsonrpc`"),
    ],
)
def test_a_request_that_cannot_be_read_is_answered(tmp_path: Path, sent: bytes, says: str) -> None:
    with Wire(tmp_path, model=tmp_path / "none") as server:
        server.greet()
        server.send(sent + b"\n")
        assert server.process.stdout
        answer = json.loads(server.process.stdout.readline())
        assert answer["id"] == 7
        assert says in answer["error"]["message"]
        assert server.ask("ping", {})["result"] == {}


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

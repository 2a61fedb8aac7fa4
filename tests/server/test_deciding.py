"""A person decides at the command line, while an agent's client talks to the server over stdio."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp_types import ElicitResult

from server.proposals.command import run
from server.proposals.decisions import Decision, answer_to, leave
from server.request_context import RequestContext
from server.services import Services
from tests.families import save_to
from tests.server.opened import FACTS, STRONG, open_services
from tests.server.processes import SERVER, connected
from tests.tools.clients import refused, told

FRANCE = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
GIVEN = {"edits": [FRANCE], "method": "rome", "guard": {"off": ["all"]}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_to("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path, bounds="off")
    opened.proposals.propose(
        [FACTS[0]], "rome", dict(STRONG), reason="a \x1b[31mlaw", ctx=RequestContext(client="agent")
    )
    yield opened
    opened.close()


def left(services: Services, decision: str = "approve", **changed: Any) -> Path:
    found = services.proposals.record("p1")
    given = {"proposal_id": "p1", "made": found.created, "decision": decision, "note": None, "user": "ann"}
    return leave(services.workspace.settings.home, Decision(**(given | changed)))


@pytest.mark.anyio
async def test_over_stdio_a_person_approves_at_the_command_line(model: Path, tmp_path: Path) -> None:
    async with connected(tmp_path, model=model, switches=["--approval"], bounds="off") as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert "propose_edits" in names
        assert "decide_proposal" not in names
        made = await told(client, "propose_edits", **GIVEN, reason="a law")
        assert "errata-mcp decide p1" in made["next"]
        text = await refused(client, "decide_proposal", proposal_id="p1", decision="approve")
        assert "errata-mcp decide" in text
        command = [sys.executable, SERVER, "decide", "p1", "approve", "--home", str(tmp_path)]
        done = await anyio.run_process([*command, "--yes", "--note", "so it is"])
        output = done.stdout.decode()
        assert "p1 is approved as e1, by errata-mcp decide (" in output
        assert "'The capital of France is'" in output
        [row] = (await told(client, "list_proposals"))["proposals"]
        assert (row["state"], row["edit_ids"], row["note"]) == ("approved", ["e1"], "so it is")
        assert (await told(client, "audit_edits"))["integrity"]["problems"] == []
        again = await anyio.run_process([*command, "--yes"], check=False)
        assert again.returncode == 1
        assert "was decided already, by errata-mcp decide (" in again.stderr.decode()


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_over_stdio_a_client_that_can_ask_its_person_decides_by_the_answer(
    model: Path, tmp_path: Path, mode: str
) -> None:
    asked: list[str] = []

    async def person(_: Any, params: Any) -> ElicitResult:
        asked.append(params.message)
        yes = len(asked) > 1
        return ElicitResult(action="accept", content={"yes": True}) if yes else ElicitResult(action="decline")

    options: dict[str, Any] = {"model": model, "switches": ["--approval"], "bounds": "off", "person": person}
    async with connected(tmp_path, mode, **options) as client:
        assert "decide_proposal" in {tool.name for tool in (await client.list_tools()).tools}
        assert "--approval" in await refused(client, "apply_edits", **GIVEN)
        await told(client, "propose_edits", **GIVEN)
        approve = {"proposal_id": "p1", "decision": "approve"}
        assert "did not agree" in await refused(client, "decide_proposal", **approve)
        assert (await told(client, "model_status"))["active_edits"] == 0
        decided = await told(client, "decide_proposal", **approve)
        assert decided["note"] == "(a person at the client agreed)"
        assert "the same client that proposed it" in decided["message"]
        assert (await told(client, "model_status"))["active_edits"] == 1
        assert "note is empty" in await refused(
            client, "decide_proposal", proposal_id="p1", decision="changes"
        )
    assert len(asked) == 2
    assert "'The capital of France is'" in asked[0]
    assert asked[0].endswith("Approve and apply it?")


def test_decisions_are_carried_out_once_and_answered(services: Services) -> None:
    assert services.decisions is not None
    first, second = left(services), left(services)
    assert services.decisions.carry_out() == 2
    done, again = answer_to(first), answer_to(second)
    assert done is not None
    assert again is not None
    assert (done.done, again.done) == (True, False)
    assert "by errata-mcp decide (ann) (no identity was checked)" in done.message
    assert "approved already" in again.message
    assert list(first.parent.iterdir()) == []
    assert services.decisions.carry_out() == 0
    assert services.history.list_edits().total == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"made": "2001-01-01T00:00:00+00:00"}, "another proposal than"),
        ({"proposal_id": "p9"}, "'p9'"),
        ({"decision": "perhaps"}, "does not exist"),
        ({"note": 7}, "not a decision"),
        ({"user": "x" * 30_000}, "not a decision"),
    ],
)
def test_a_decision_that_cannot_be_carried_out_is_answered_and_changes_nothing(
    services: Services, changed: dict[str, Any], says: str
) -> None:
    path = left(services, **changed)
    assert services.decisions is not None
    services.decisions.carry_out()
    answer = answer_to(path)
    assert answer is not None
    assert not answer.done
    assert says in answer.message
    assert services.proposals.list("waiting").waiting == 1


def test_what_is_no_decision_at_all_is_answered(services: Services) -> None:
    path = left(services)
    for text in ("", "{", "[]", "null", json.dumps({"proposal_id": "p1"})):
        path.write_text(text)
        assert services.decisions is not None
        services.decisions.carry_out()
        answer = answer_to(path)
        assert answer is not None
        assert "is not a decision" in answer.message


def test_a_decision_that_no_server_saw_is_carried_out_by_the_next(
    tmp_path: Path, services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    services.close()
    given = ["--home", str(tmp_path)]
    assert run(given) == 0
    assert run(["p1", *given]) == 0
    shown = capsys.readouterr().out
    assert shown.count("p1 (waiting), proposed by agent") == 2
    assert "\x1b" not in shown
    assert run(["p1", "decline", *given], ask=lambda _: "n") == 1
    assert run(["p1", "changes", *given]) == 1
    assert run(["p9", "approve", *given]) == 1
    assert run(["p1", "approve", "--home", str(tmp_path / "nowhere")]) == 1
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "decisions").exists()
    assert run(["p1", "decline", *given], ask=lambda _: "y") == 0
    assert "No server runs" in capsys.readouterr().out
    again = open_services(tmp_path, bounds="off")
    assert again.decisions is not None
    assert again.decisions.carry_out() == 1
    assert again.proposals.record("p1").state == "declined"
    again.close()

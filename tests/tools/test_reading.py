"""Resources, completions and prompts."""

from __future__ import annotations

import json
import re

import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_types import PromptReference, ResourceTemplateReference

from tests.tools.clients import Connect
from tests.tools.doubles import Slow

pytestmark = pytest.mark.anyio

EDITS = "errata://edits/{edit_id}"
METHODS = "errata://methods/{name}"
JOBS = "errata://jobs/{job_id}"
PROPOSALS = "errata://proposals/{proposal_id}"


async def read(client: Client, uri: str) -> str:
    (content,) = (await client.read_resource(uri)).contents
    return str(getattr(content, "text", ""))


async def test_the_resources_are_listed(client: Client) -> None:
    listed = {str(r.uri) for r in (await client.list_resources()).resources}
    templates = {t.uri_template for t in (await client.list_resource_templates()).resource_templates}
    assert listed == {
        "errata://status", "errata://ledger/schema", "errata://edits/e1", "ui://errata/result.html",
    }  # fmt: skip
    assert templates == {EDITS, METHODS, JOBS, PROPOSALS}


async def test_the_status_can_be_read(client: Client) -> None:
    assert json.loads(await read(client, "errata://status"))["state"] == "ready"


async def test_an_edit_can_be_read(client: Client) -> None:
    assert json.loads(await read(client, "errata://edits/e1"))["edit"]["subject"] == "France"


async def test_a_method_can_be_read(client: Client) -> None:
    assert json.loads(await read(client, "errata://methods/rome"))["name"] == "rome"


async def test_the_schema_names_the_tables(client: Client) -> None:
    schema = await read(client, "errata://ledger/schema")
    for table in ("edits", "events", "measurements"):
        assert re.search(rf"CREATE \w+ \W?{table}\b", schema, re.IGNORECASE)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("errata://edits/e999", "'e999'"),
        ("errata://methods/rom", "rome"),
        ("errata://jobs/j999", "'j999'"),
        ("errata://edits/..%2F..%2Fledger.db", ""),
        ("errata://edits/%00", ""),
        ("errata://elsewhere", ""),
        ("file:///etc/passwd", ""),
    ],
)
async def test_what_is_not_there_cannot_be_read(client: Client, uri: str, says: str) -> None:
    with pytest.raises(MCPError) as refusal:
        await read(client, uri)
    assert says in refusal.value.error.message
    assert refusal.value.error.code == -32602


async def test_the_reading_of_a_broken_model_says_why(connect: Connect) -> None:
    async with connect(model="/no/such/model") as client:
        with pytest.raises(MCPError, match="/no/such/model"):
            await read(client, "errata://edits/e1")
        assert json.loads(await read(client, "errata://status"))["state"] == "failed"


async def completed(
    client: Client, ref: ResourceTemplateReference | PromptReference, name: str, value: str
) -> list[str]:
    return (await client.complete(ref, {"name": name, "value": value})).completion.values


async def test_edit_ids_are_completed(client: Client) -> None:
    ref = ResourceTemplateReference(uri=EDITS)
    assert await completed(client, ref, "edit_id", "") == ["e2", "e1"]
    assert await completed(client, ref, "edit_id", "e1") == ["e1"]
    assert await completed(client, ref, "edit_id", "x") == []


async def test_method_names_are_completed(client: Client) -> None:
    assert await completed(client, ResourceTemplateReference(uri=METHODS), "name", "ro") == ["rome"]


async def test_prompts_are_offered_active_edits_alone(client: Client) -> None:
    assert await completed(client, PromptReference(name="undo_last_change"), "edit_id", "") == ["e1"]
    assert await completed(client, PromptReference(name="audit_edits"), "edit_ids", "") == ["e1"]


async def test_the_last_id_of_a_list_is_completed(client: Client) -> None:
    ref = PromptReference(name="audit_edits")
    assert await completed(client, ref, "edit_ids", "e2,") == ["e2,e1"]
    assert await completed(client, ref, "edit_ids", "e1,") == []  # it is there already


async def test_an_argument_for_which_nothing_is_known_is_not_completed(client: Client) -> None:
    assert await completed(client, PromptReference(name="correct_stale_facts"), "topic", "cur") == []


@pytest.mark.parametrize(
    ("ref", "argument", "says"),
    [
        (PromptReference(name="audit_edit"), "edit_ids", "Did you mean `audit_edits`"),
        (PromptReference(name=METHODS), "name", "no prompt"),
        (ResourceTemplateReference(uri="audit_edits"), "edit_ids", "no resource template"),
        (ResourceTemplateReference(uri="file:///{path}"), "path", "errata://edits/{edit_id}"),
        (ResourceTemplateReference(uri=EDITS), "name", "It has: edit_id"),
        (PromptReference(name="undo_last_change"), "edit_ids", "Did you mean `edit_id`"),
    ],
)
async def test_a_completion_for_what_is_not_there_is_refused(
    client: Client, ref: ResourceTemplateReference | PromptReference, argument: str, says: str
) -> None:
    with pytest.raises(MCPError) as refusal:
        await completed(client, ref, argument, "")
    assert says in refusal.value.error.message
    assert refusal.value.error.code == -32602


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("audit_edit", {}, "Did you mean `audit_edits`"),
        ("", {}, "There are: correct_stale_facts"),
        ("correct_stale_facts", {}, "`topic`"),
        ("correct_stale_facts", {"topic": " "}, "`topic`"),
        ("audit_edits", {"edit_id": "e1"}, "Did you mean `edit_ids`"),
    ],
)
async def test_a_prompt_that_cannot_be_given_is_refused_without_a_traceback(
    client: Client, name: str, arguments: dict[str, str], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MCPError) as refusal:
        await client.get_prompt(name, arguments)
    assert says in refusal.value.error.message
    assert refusal.value.error.code == -32602
    assert "Traceback" not in caplog.text


async def test_nothing_is_completed_while_the_model_loads(connect: Connect) -> None:
    async with connect(Slow().open, model="unused") as client:
        assert await completed(client, ResourceTemplateReference(uri=EDITS), "edit_id", "") == []


PROMPTS = {
    "correct_stale_facts": {"topic": "currencies", "source": "the central bank"},
    "audit_edits": {"edit_ids": "e1"},
    "undo_last_change": {"edit_id": "e1"},
}


async def rendered(client: Client, name: str, arguments: dict[str, str]) -> str:
    messages = (await client.get_prompt(name, arguments)).messages
    return "\n".join(str(getattr(m.content, "text", "")) for m in messages)


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_prompt_names_only_tools_that_exist(client: Client, name: str) -> None:
    tools = {t.name for t in (await client.list_tools()).tools}
    text = await rendered(client, name, PROMPTS[name])
    named = set(re.findall(r"\b[a-z]+_(?:edits?|facts|status|model|methods|ledger)\b", text))
    assert len(named) >= 3
    assert named <= tools


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_prompt_carries_what_it_was_given(client: Client, name: str) -> None:
    text = await rendered(client, name, PROMPTS[name])
    for value in PROMPTS[name].values():
        assert value in text


@pytest.mark.parametrize("name", ["audit_edits", "undo_last_change"])
async def test_a_prompt_stands_without_its_optional_arguments(client: Client, name: str) -> None:
    text = await rendered(client, name, {})
    assert "  " not in text.replace("\n   ", "\n")
    assert "None" not in text


async def test_every_prompt_argument_is_described(client: Client) -> None:
    prompts = (await client.list_prompts()).prompts
    assert {p.name for p in prompts} == set(PROMPTS)
    for prompt in prompts:
        assert prompt.title
        assert prompt.description
        assert all(argument.description for argument in prompt.arguments or [])


async def test_a_read_only_server_has_no_prompts_that_change_the_model(connect: Connect) -> None:
    async with connect(Slow().open, read_only=True) as client:
        assert [p.name for p in (await client.list_prompts()).prompts] == ["audit_edits"]

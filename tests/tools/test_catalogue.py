"""The tools as a host lists them: the public contract."""

from __future__ import annotations

from typing import Any

import pytest
from mcp import Client

from server.results import NOTE
from tests.tools.clients import Connect, refused

pytestmark = pytest.mark.anyio

ARGUMENTS = {
    "model_status": set(),
    "ask_model": {"prompt", "max_new_tokens", "chat", "temperature", "compare_to_base", "seed"},
    "check_facts": {"facts"},
    "preview_edits": {"edits", "method", "params", "guard"},
    "apply_edits": {"edits", "method", "params", "guard", "replace", "reason", "source"},
    "revert_edits": {"edit_ids", "reason"},
    "reapply_edits": {"edit_ids"},
    "list_methods": set(),
    "export_edits": {"format", "name", "edit_ids"},
    "import_patches": {"path", "reason"},
    "import_adapter": {"path", "edits", "reason"},
    "create_steering_vector": {"name", "method", "pairs", "positive_prompt", "negative_prompt", "layers"},
    "set_steering": {"name", "multiplier", "layers"},
    "calibrate_steering": {"name", "max_perplexity_ratio"},
    "evaluate_steering": {"name", "prompts", "multipliers", "score"},
    "list_steering": set(),
    "delete_steering_vector": {"name"},
    "export_steering_vector": {"name", "format", "file_name", "multiplier"},
    "list_edits": {"status", "subject", "text", "method", "since", "limit", "cursor"},
    "show_edit": {"edit_id"},
    "audit_edits": {"edit_ids", "repair"},
    "query_ledger": {"sql", "params", "limit"},
    "train_editor": {"method", "data", "params"},
    "compute_statistics": {"layers", "tokens", "corpus"},
    "get_job": {"job_id"},
    "cancel_job": {"job_id"},
    "list_jobs": set(),
}
"""The contract of the toolsets inspect, edit and ledger."""

EXCHANGING = {"export_edits", "import_patches", "import_adapter"}
STEERING = {
    "create_steering_vector",
    "set_steering",
    "delete_steering_vector",
    "export_steering_vector",
}
TRAINING = {"train_editor", "compute_statistics", "cancel_job"}
CHANGING = {"apply_edits", "revert_edits", "reapply_edits", *EXCHANGING, *STEERING, *TRAINING}


async def tools(client: Client) -> dict[str, Any]:
    return {tool.name: tool for tool in (await client.list_tools()).tools}


def never(*_: Any) -> Any:
    raise AssertionError("listing tools must not load a model")


@pytest.mark.parametrize("name", ARGUMENTS)
async def test_a_tool_has_the_arguments_of_the_contract(connect: Connect, name: str) -> None:
    async with connect() as client:
        schema = (await tools(client))[name].input_schema
    assert set(schema["properties"]) >= ARGUMENTS[name]


async def test_every_tool_tells_hosts_what_it_is(connect: Connect) -> None:
    async with connect() as client:
        for name, tool in (await tools(client)).items():
            hints = tool.annotations
            assert tool.title
            assert hints.title == tool.title
            assert hints.open_world_hint is False
            assert hints.read_only_hint == (name not in CHANGING)
            assert hints.destructive_hint == (
                name
                in {
                    *("apply_edits", "revert_edits", "import_patches", "import_adapter"),
                    *("set_steering", "delete_steering_vector", "cancel_job"),
                }
            )
            assert hints.idempotent_hint == (
                name not in {"apply_edits", *EXCHANGING, *STEERING, "train_editor"} - {"set_steering"}
            )


async def test_every_description_says_enough_and_not_too_much(connect: Connect) -> None:
    async with connect() as client:
        for name, tool in (await tools(client)).items():
            own = tool.description.removesuffix(NOTE)  # which every tool that quotes the model has
            sentences = [s for s in own.replace("\n", " ").split(". ") if s.strip()]
            assert 3 <= len(sentences) <= 8, (name, sentences)


async def test_every_argument_is_described_and_no_other_is_allowed(connect: Connect) -> None:
    async with connect() as client:
        for name, tool in (await tools(client)).items():
            for place, schema in objects(tool.input_schema):
                assert schema["additionalProperties"] is False, (name, place)
                for argument, field in schema["properties"].items():
                    assert field.get("description"), (name, place, argument)


def objects(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The schema and every model it refers to."""
    return [("", schema), *((n, s) for n, s in schema.get("$defs", {}).items() if "properties" in s)]


async def test_every_tool_publishes_the_shape_of_its_answer(connect: Connect) -> None:
    async with connect() as client:
        for name, tool in (await tools(client)).items():
            assert (tool.output_schema or {}).get("type") == "object", name


async def test_a_read_only_server_offers_only_what_changes_nothing(connect: Connect) -> None:
    async with connect(read_only=True) as client:
        offered = await tools(client)
        assert set(ARGUMENTS) - set(offered) == CHANGING
        text = await refused(client, "apply_edits", edits=[])
    assert "--read-only" in text


async def test_toolsets_choose_the_tools(connect: Connect) -> None:
    async with connect(toolsets=("inspect",)) as client:
        assert set(await tools(client)) == {"model_status", "ask_model", "check_facts"}
        text = await refused(client, "list_edits")
        assert [p.name for p in (await client.list_prompts()).prompts] == []
    assert "--toolsets inspect" in text


async def test_an_unknown_tool_is_answered_with_the_nearest_one(connect: Connect) -> None:
    async with connect() as client:
        text = await refused(client, "aply_edits")
    assert "Did you mean `apply_edits`?" in text


async def test_the_server_introduces_itself(connect: Connect) -> None:
    async with connect() as client:
        assert client.server_info
        assert client.server_info.name == "errata"
        assert client.server_info.version
        assert client.instructions
        for tool in ("check_facts", "preview_edits", "apply_edits", "revert_edits"):
            assert tool in client.instructions

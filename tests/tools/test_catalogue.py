"""The tools as a host lists them: the public contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mcp import Client

from tests.tools.clients import Connect, refused
from tests.tools.tokens import tokens

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
    "list_engines": set(),
    "push_edits": {"engine"},
    "import_patches": {"path", "reason"},
    "import_adapter": {"path", "edits", "reason"},
    "import_steering_vector": {"path", "name", "replace", "reason"},
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
    "explain_answer": {"prompt"},
    "forget_facts": {"facts", "goal"},
    "query_ledger": {"sql", "params", "limit"},
    "train_editor": {"method", "data", "params"},
    "compute_statistics": {"layers", "tokens", "corpus"},
    "calibrate_editing": {"methods", "facts"},
    "save_facts": {"name", "path", "facts", "template", "columns"},
    "list_fact_sets": set(),
    "correct_facts": {"set", "policy", "approve", "plan"},
    "show_fact_set": {"name"},
    "export_fact_set": {"name", "file_name"},
    "get_job": {"job_id"},
    "rebase_edits": {"to", "from_model", "method", "guard", "approve", "plan"},
    "cancel_job": {"job_id"},
    "list_jobs": set(),
}
"""The contract of the toolsets inspect, edit and ledger."""

EXCHANGING = {"export_edits", "push_edits", "import_patches", "import_adapter"}
STEERING = {
    "import_steering_vector",
    "create_steering_vector",
    "set_steering",
    "delete_steering_vector",
    "export_steering_vector",
}
REPEATED = {"train_editor", "calibrate_editing", "correct_facts", "export_fact_set", "rebase_edits"}
TRAINING = {"train_editor", "compute_statistics", "calibrate_editing", "cancel_job"}
FACT_SETS = {"save_facts", "correct_facts", "export_fact_set"}
EDITING = {"apply_edits", "forget_facts", "revert_edits", "reapply_edits", "rebase_edits"}
CHANGING = {*EDITING, *FACT_SETS, *EXCHANGING, *STEERING, *TRAINING}


async def tools(client: Client) -> dict[str, Any]:
    return {tool.name: tool for tool in (await client.list_tools()).tools}


def never(*_: Any) -> Any:
    raise AssertionError("listing tools must not load a model")


async def test_every_tool_has_the_arguments_of_the_contract(connect: Connect) -> None:
    async with connect() as client:
        found = await tools(client)
    lacking = {name: names - set(found[name].input_schema["properties"]) for name, names in ARGUMENTS.items()}
    assert {name: names for name, names in lacking.items() if names} == {}


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
                    *("apply_edits", "forget_facts", "revert_edits", "import_patches", "import_adapter"),
                    *("set_steering", "delete_steering_vector", "cancel_job", "push_edits", "correct_facts"),
                    "rebase_edits",
                }
            )
            assert hints.idempotent_hint == (
                name
                not in {"apply_edits", "forget_facts", *EXCHANGING, *STEERING, *REPEATED} - {"set_steering"}
            )


async def test_every_description_says_enough_and_not_too_much(connect: Connect) -> None:
    async with connect() as client:
        for name, tool in (await tools(client)).items():
            sentences = [s for s in tool.description.split(". ") if s.strip()]
            assert 2 <= len(sentences) <= 4, (name, sentences)
            assert tokens(tool.description) <= 90, name


async def test_the_list_of_tools_costs_an_agent_at_most_nine_thousand_tokens(connect: Connect) -> None:
    async with connect() as client:
        listed = (await client.list_tools()).tools
    costs = {t.name: tokens([t.name, t.description, t.input_schema]) for t in listed}
    assert sum(costs.values()) <= 9_000, costs


async def test_an_object_of_several_tools_is_described_once_and_named_by_its_fields_elsewhere(
    connect: Connect,
) -> None:
    async with connect() as client:
        listed = await tools(client)
    whole = listed["preview_edits"].input_schema["$defs"]["Edit"]
    named = listed["apply_edits"].input_schema["$defs"]["Edit"]["description"]
    assert all(field in named for field in whole["properties"])
    assert "as in preview_edits" in named
    async with connect(toolsets=("locate",)) as client:
        only = (await tools(client))["suggest_layers"].input_schema
    assert set(only["properties"]["edits"]["items"]["properties"]) == set(whole["properties"])


async def test_every_argument_is_described_and_no_other_is_allowed(connect: Connect) -> None:
    async with connect() as client:
        listed = await tools(client)
        elsewhere = {
            argument
            for tool in listed.values()
            for argument, field in tool.input_schema["properties"].items()
            if field.get("description")
        }
        for name, tool in listed.items():
            for place, schema in objects(tool.input_schema):
                assert schema["additionalProperties"] is False, (name, place)
                for argument, field in schema["properties"].items():
                    once = not place and argument in elsewhere
                    assert field.get("description") or once, (name, place, argument)


def objects(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and every object with fields that stands in it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and "type" in schema:
            yield name, schema
        for key, value in schema.items():
            yield from objects(value, key)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value, name)


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

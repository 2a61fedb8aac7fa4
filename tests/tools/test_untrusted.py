"""What the hosted model wrote is marked as data, in results and in descriptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from mcp import Client

from server.results import NOTE
from tests.tools.clients import told

pytestmark = pytest.mark.anyio

WRITTEN_BY_THE_MODEL = {"completion", "base_completion", "answer", "before", "after"}
"""Names of fields that hold the model's words wherever they stand."""


def fields(schema: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of a schema, with those of its definitions: its name and its own schema."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {}).items()
        for value in schema.values():
            yield from fields(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from fields(value)


def marked(schema: Any) -> bool:
    return '"untrusted": true' in json.dumps(schema)


async def test_every_field_with_the_models_words_is_marked_and_its_result_says_so(client: Client) -> None:
    quoting = set()
    for tool in (await client.list_tools()).tools:
        schema = tool.output_schema
        for name, field in fields(schema):
            if name in WRITTEN_BY_THE_MODEL and '"string"' in json.dumps(field):
                assert marked(field), (tool.name, name)
        assert marked(schema) == ("untrusted" in schema["properties"]), tool.name  # type: ignore[index]
        if marked(schema):
            assert schema["properties"]["untrusted"]["default"] == NOTE, tool.name  # type: ignore[index]
        if marked(schema):
            quoting.add(tool.name)
    assert quoting >= {
        "ask_model",
        "check_facts",
        "preview_edits",
        "apply_edits",
        "revert_edits",
        "reapply_edits",
        "import_adapter",
        "audit_edits",
        "show_edit",
        "query_ledger",
        "set_steering",
        "evaluate_steering",
        "locate_fact",
    }


async def test_the_result_itself_says_how_to_read_it(client: Client) -> None:
    for name, given in (
        ("ask_model", {"prompt": "Rome", "max_new_tokens": 2}),
        ("check_facts", {"facts": [{"prompt": "Rome is in", "expected": "Italy"}]}),
        ("show_edit", {"edit_id": "e1"}),
        ("query_ledger", {"sql": "SELECT 1"}),
    ):
        assert (await told(client, name, **given))["untrusted"] == NOTE

"""The schemas of tools as clients are sent them: as short as they can be, for an agent reads all of them.

Checks, error messages and the reference work with the whole schemas. What is left out here repeats what the short one
says, or is a bound that an error message names when a call breaks it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

Schema = dict[str, Any]

_LEFT_OUT = ("title", "maxLength", "minLength", "maxItems", "minItems", "minimum", "maximum", "exclusiveMinimum",
             "exclusiveMaximum")  # fmt: skip


def compact_inputs(schemas: Mapping[str, Schema], homes: Collection[str]) -> dict[str, Schema]:
    """The input schemas of all tools.

    An object that several tools take is described in full once: in the tools of `homes` that have it, else in the first
    tool that has it. The other tools show the list of its fields, or its name where all fields are optional. An object
    that one tool takes is described there.
    """
    short = {tool: _compact(schema, null=False) for tool, schema in schemas.items()}
    for schema in short.values():
        for definition in schema.get("$defs", {}).values():
            definition.pop("description", None)  # its fields are described, and so is the argument
    holders = Counter(_identity(n, d) for s in short.values() for n, d in _objects(s))
    shared = {name for (name, _), count in holders.items() if count > 1}
    short = {tool: _inlined(schema, shared) for tool, schema in short.items()}
    for name in sorted(shared):
        _share(short, name, homes)
    _describe_once(short, homes)
    return {tool: _without_unused(schema) for tool, schema in short.items()}


def _describe_once(schemas: Mapping[str, Schema], homes: Collection[str]) -> None:
    """An argument that several tools have, with the same words about it, is described in the first of them."""
    described: set[tuple[str, str]] = set()
    for tool in sorted(schemas, key=lambda name: name not in homes):
        for name, field in schemas[tool].get("properties", {}).items():
            about = (name, str(field.get("description")))
            if about in described:
                del field["description"]
            elif "description" in field:
                described.add(about)


def compact_outputs(schemas: Mapping[str, Schema]) -> dict[str, Schema]:
    """The output schemas of all tools: a type is described in the first tool that has it."""
    described: set[str] = set()
    short = {}
    for tool, schema in schemas.items():
        name = str(schema.get("title", tool))
        each = _compact(schema, null=True)
        types = each.pop("$defs", {})
        if name in described:
            each = _undescribed(each)
        types = {n: _undescribed(t) if n in described else t for n, t in types.items()}
        described |= {name, *types}
        short[tool] = {**each, "$defs": types} if types else each
    return short


def signature(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The fields of an object in one line: {subject, prompt, neighbours?: [{prompt, answer?}]}."""
    if "$ref" in node:
        return signature(definitions[_name(node["$ref"])], definitions)
    if node.get("type") == "array":
        inner = signature(node.get("items", {}), definitions)
        return f"[{inner}]" if inner else "[]"
    if "properties" not in node:
        return ""
    fields = []
    for name, field in node["properties"].items():
        inner = signature(field, definitions)
        fields.append(name + ("" if name in node.get("required", ()) else "?") + (inner and f": {inner}"))
    return "{" + ", ".join(fields) + "}"


def _compact(node: Any, *, null: bool, names: bool = False) -> Any:
    """A copy without what repeats itself.

    `null`: keep null as a choice. `names`: the keys of this object are names, not words of the schema language.
    """
    if isinstance(node, list):
        return [_compact(each, null=null) for each in node]
    if not isinstance(node, Mapping):
        return node
    kept = {
        key: _compact(value, null=null, names=key in ("properties", "$defs") and not names)
        for key, value in node.items()
        if names or not (key in _LEFT_OUT or _says_nothing(key, value))
    }
    if names or null or "anyOf" not in kept:
        return kept
    options = [each for each in kept.pop("anyOf") if each != {"type": "null"}]
    return {**options[0], **kept} if len(options) == 1 else {**kept, "anyOf": options}


def _says_nothing(key: str, value: Any) -> bool:
    if key == "default":
        return value in (None, [], {}, "")
    return key == "additionalProperties" and value is True


def _objects(schema: Schema) -> list[tuple[str, Schema]]:
    return [(name, d) for name, d in schema.get("$defs", {}).items() if "properties" in d]


def _identity(name: str, definition: Schema) -> tuple[str, str]:
    return name, json.dumps(definition, sort_keys=True)


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _uses(node: Any, name: str) -> int:
    return json.dumps(node).count(f'"#/$defs/{name}"')


def _inlined(schema: Schema, kept: Collection[str]) -> Schema:
    """Definitions that are used once, or are no objects, in place of their references."""
    definitions, rest = dict(schema.get("$defs", {})), {k: v for k, v in schema.items() if k != "$defs"}
    for name in list(definitions):
        definition = definitions[name]
        once = _uses([rest, definitions], name) == 1 or "properties" not in definition
        if name in kept or not once or _uses(definition, name):
            continue
        del definitions[name]
        rest = _replaced(rest, name, definition)
        definitions = {key: _replaced(value, name, definition) for key, value in definitions.items()}
    return {**rest, "$defs": definitions} if definitions else rest


def _replaced(node: Any, name: str, definition: Schema) -> Any:
    if isinstance(node, list):
        return [_replaced(each, name, definition) for each in node]
    if not isinstance(node, Mapping):
        return node
    if node.get("$ref") == f"#/$defs/{name}":
        return {**definition, **{key: value for key, value in node.items() if key != "$ref"}}
    return {key: _replaced(value, name, definition) for key, value in node.items()}


def _share(schemas: Mapping[str, Schema], name: str, homes: Collection[str]) -> None:
    holders = [tool for tool, schema in schemas.items() if name in schema.get("$defs", {})]
    keeping = [tool for tool in holders if tool in homes] or holders[:1]
    for tool in holders:
        if tool not in keeping:
            definitions = schemas[tool]["$defs"]
            fields = signature(definitions[name], definitions) if definitions[name].get("required") else name
            text = f"{fields}: as in {keeping[0]}"
            definitions[name] = {"type": "object", "description": text}


def _without_unused(schema: Schema) -> Schema:
    """The schema with the definitions that something refers to; short ones in place of their references."""
    definitions = dict(schema.get("$defs", {}))
    rest = {key: value for key, value in schema.items() if key != "$defs"}
    while unused := [name for name in definitions if not _uses([rest, definitions], name)]:
        for name in unused:
            del definitions[name]
    return {**rest, "$defs": definitions} if definitions else rest


def _undescribed(node: Any, *, names: bool = False) -> Any:
    if isinstance(node, list):
        return [_undescribed(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    return {
        key: _undescribed(value, names=key in ("properties", "$defs") and not names)
        for key, value in node.items()
        if names or key != "description"
    }

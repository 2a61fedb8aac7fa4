"""Turns whatever went wrong into text an agent can act on."""

from __future__ import annotations

import difflib
import logging
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mcp.server.mcpserver.exceptions import ToolError
from pydantic import ValidationError

from editors.errors import EditError
from server.errors import ServiceError
from server.exhausted import exhausted

log = logging.getLogger("errata.tools")

_SHOWN_ERRORS = 5
_SHOWN_VALUE = 80
_SHOWN_MESSAGE = 1_000

_KINDS = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}


def is_expected(exc: Exception) -> bool:
    """True for failures whose own text is fit for the agent."""
    from store.errors import LedgerError  # not at the top: it brings SQLite along, and clients wait

    return isinstance(exc, (EditError, ServiceError, LedgerError))


def is_unknown(exc: Exception) -> bool:
    """True for a request for an edit or a job that does not exist."""
    from store.errors import NoSuchEdit, NoSuchJob, NoSuchProposal

    return isinstance(exc, (NoSuchEdit, NoSuchJob, NoSuchProposal))


def internal(tool: str, exc: BaseException) -> ToolError:
    """An unexpected failure: the traceback goes to the log, and the agent gets an id to find it by."""
    if what := exhausted(exc):
        log.error("%s: %s", tool, what, exc_info=exc)
        return ToolError(f"{tool} could not be carried out: {what}.")
    ref = uuid.uuid4().hex[:8]
    log.error("internal error %s in %s", ref, tool, exc_info=exc)
    return ToolError(
        f"{tool} failed with internal error {ref} ({type(exc).__name__}). This is a fault of the server, "
        f"not of the request; its log has the details under {ref}. "
        "Call model_status and list_edits to see where things stand before trying again."
    )


def invalid(tool: str, exc: ValidationError, schema: Mapping[str, Any]) -> ToolError:
    """Says which arguments of `tool` are wrong, with their values; `schema` is its input schema."""
    problems = list(_problems(exc, schema))
    lines = problems[:_SHOWN_ERRORS]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    return ToolError("\n".join([*lines, f"Nothing was changed. Correct this and call {tool} again."]))


def _problems(exc: ValidationError, schema: Mapping[str, Any]) -> Iterator[str]:
    merged: dict[str, list[Any]] = {}
    for error in exc.errors(include_url=False):
        path, _ = _walk(schema, error["loc"])
        merged.setdefault(path, []).append(error)
    for path, errors in merged.items():
        if _other_branch(path, errors, merged):
            continue
        kinds = list(dict.fromkeys(_KINDS[e["type"]] for e in errors if e["type"] in _KINDS))
        if len(kinds) == len(errors) or (kinds and len(errors) > 1):
            yield f"`{path}` must be {' or '.join(kinds)}, not {shown(errors[0]['input'])}."
        else:
            yield _problem(path, errors[0], schema)


def _other_branch(path: str, errors: list[Any], merged: Mapping[str, list[Any]]) -> bool:
    """True for "must be a string" where a list was meant: another part of the union got further."""
    if not all(error["type"] in _KINDS for error in errors):
        return False
    return any(other.startswith((f"{path}[", f"{path}.")) for other in merged)


def _problem(path: str, error: Any, schema: Mapping[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return f"`{path}` is required and was not given."
    if kind == "extra_forbidden":
        _, parent = _walk(schema, error["loc"][:-1])
        return _unknown(path, str(error["loc"][-1]), list(parent.get("properties", {})))
    if kind in ("too_short", "string_too_short"):
        return f"`{path}` is empty; give at least one{' character' if isinstance(value, str) else ''}."
    if kind in ("too_long", "string_too_long"):
        unit = "characters" if isinstance(value, str) else "entries"
        return f"`{path}` has {len(value):,} {unit}; the most is {error['ctx']['max_length']:,}."
    message = middle(re.sub(r"^Value error, ", "", error["msg"]), _SHOWN_MESSAGE)
    if kind == "value_error":
        _, node = _walk(schema, error["loc"])
        return f"`{path}`: {message}." if "properties" in node else f"`{path}` {message}."
    if kind == "literal_error":
        return f"`{path}` is {shown(value)}; it must be one of {error['ctx']['expected']}."
    return f"`{path}` is {shown(value)}: {message[:1].lower()}{message[1:]}."


def _unknown(path: str, name: str, known: list[str]) -> str:
    return f"Unknown argument `{path}`.{did_you_mean(name, known)} Known here: {', '.join(known) or 'none'}."


def did_you_mean(name: str, known: Collection[str]) -> str:
    """ " Did you mean `x`?" when one of `known` is close to `name`, else nothing."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def _walk(schema: Mapping[str, Any], loc: tuple[int | str, ...]) -> tuple[str, Mapping[str, Any]]:
    """The path an agent would write for a pydantic location, and the schema found there.

    Parts of the location that are no field (the tags of a union) are left out of the path.
    """
    path, node = "", _deref(schema, schema)
    for i, part in enumerate(loc):
        if isinstance(part, int):
            path, node = f"{path}[{part}]", _deref(node.get("items", {}), schema)
        elif part in node.get("properties", {}):
            path, node = f"{path}.{part}", _deref(node["properties"][part], schema)
        elif "properties" in node and i == len(loc) - 1:
            path, node = f"{path}.{middle(part, _SHOWN_VALUE)}", {}
    return path.lstrip(".") or "arguments", node


def _deref(node: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself: references followed, of alternatives the one with structure."""
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    for option in node.get("anyOf", ()):
        found = _deref(option, root)
        if "properties" in found or "items" in found:
            return found
    return node


def shown(value: Any) -> str:
    """A value as short text: scalars as they are, containers by kind and size."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the string {middle(value, _SHOWN_VALUE)!r}"
        case dict():
            return f"an object with {len(value)} fields"
        case list() | tuple():
            return f"a list of {len(value)}"
        case _:
            return middle(str(value), _SHOWN_VALUE)


def middle(text: str, most: int) -> str:
    """`text` with its middle left out when it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"

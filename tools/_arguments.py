"""Reads the arguments of a tool call."""

from __future__ import annotations

import json
from typing import Any

from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from pydantic import ValidationError


def parse(model: type[ArgModelBase], arguments: dict[str, Any]) -> dict[str, Any]:
    """The validated arguments by name, nested models kept as models.

    Some hosts send a list or an object as JSON inside a string; such a string is read as JSON only if it is not
    valid as it stands. So a prompt that looks like JSON stays a prompt.

    Raises:
        ValidationError: what is wrong with the arguments (after that reading).
    """
    try:
        return model.model_validate(arguments).model_dump_one_level()
    except ValidationError as exc:
        read = _from_json(arguments, {str(e["loc"][0]) for e in exc.errors() if e["loc"]})
        if read == arguments:
            raise
    return model.model_validate(read).model_dump_one_level()


def _from_json(arguments: dict[str, Any], suspects: set[str]) -> dict[str, Any]:
    read = dict(arguments)
    for name in suspects & arguments.keys():
        value = arguments[name]
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                read[name] = json.loads(value)
            except (ValueError, RecursionError):
                continue
    return read

"""Writes docs/tools.md, docs/constants.md and the table of tools in the README from the code: `make docs`.

A test fails when one of them is stale.

The server is built, not started: no model is loaded and no folder is made.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio

import tools
from editors.constants.__main__ import table as constants_table
from errata import build
from server.settings import ENV_PREFIX, OPTIONAL_TOOLSETS, TOOLSETS, Settings
from server.startup import Startup
from tools._tool import ErrataTool

TARGET = Path(__file__).parent / "tools.md"
CONSTANTS = Path(__file__).parent / "constants.md"
README = Path(__file__).parent.parent / "README.md"
_MARKED = re.compile(r"(<!-- tools: .*? -->\n).*?(<!-- /tools -->)", re.DOTALL)
INTRO = """\
<!-- Written by `make docs` from the code. Change the code, not this file. -->

# Reference

What an agent sees of the server. Every tool rejects arguments it does not know, and every error says what
was wrong, with which value, and what to call next. Results are structured; their types stand
[at the end](#types).
"""
CONSTANTS_INTRO = """\
<!-- Written by `make docs` from the code. Change the code, not this file. -->

# Constants

Values that decide how well an edit works and how much else it moves. Each is declared where it is used, with
`tuned`, `published`, `assumed`, `limit` or `from_shape` of [editors/constants](../editors/constants/__init__.py):

- *measured*: chosen by an experiment; the command, the model and the figure are given.
- *published*: as in the paper or its code.
- **assumed**: no measurement is known. Measure before you rely on it for another model.
- *limit*: bounds time, memory or size, or decides whether a warning appears; the quality of an edit does not depend on
  it. It says what it protects, and what happens beyond it.
- *computed*: follows from the shape of the loaded model.

"""
_HINTS = {
    "read_only_hint": "changes nothing",
    "destructive_hint": "changes the model",
    "idempotent_hint": "calling it twice is the same as once",
}
_BOUNDS = {"minimum": "≥ {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}", "minItems": "at least {}",
           "maxItems": "at most {}", "maxLength": "at most {} characters"}  # fmt: skip


async def reference() -> str:
    """The whole page."""
    settings = Settings(home=Path("HOME"), toolsets=(*TOOLSETS, *OPTIONAL_TOOLSETS))
    server = build(settings)
    listed = {tool.name: tool for tool in tools.build(settings, Startup(settings))}
    resources, templates = await server.list_resources(), await server.list_resource_templates()
    prompts = await server.list_prompts()
    types: dict[str, Any] = {}
    parts = [INTRO, _options()]
    for toolset in tools.TOOLSETS:
        parts.append(f"## Toolset `{toolset.name}`\n")
        parts += [_tool(listed[spec.name], types) for spec in toolset.specs]
    parts.append("## Resources\n")
    rows = [(f"`{each.uri}`", each.description or "") for each in resources]
    rows += [(f"`{each.uri_template}`", each.description or "") for each in templates]
    parts.append(_table(("uri", "holds"), rows))
    parts.append("## Prompts\n")
    parts.append(_table(("prompt", "arguments", "does"), [_prompt(each) for each in prompts]))
    parts.append("## Types\n")
    parts += [_type(name, types[name]) for name in sorted(types)]
    return "\n".join(parts)


def constants() -> str:
    """The page of constants, of editors and server."""
    return CONSTANTS_INTRO + constants_table(("editors", "server"))


def readme() -> str:
    """The README with its table of tools as the code has them now."""
    rows = []
    for toolset in tools.TOOLSETS:
        about = (
            (sys.modules[toolset.specs[0].function.__module__].__doc__ or "")
            .partition(": ")[2]
            .splitlines()[0]
        )
        names = ", ".join(f"`{spec.name}`" for spec in toolset.specs)
        rows.append((f"`{toolset.name}`", about, names))
    table = _table(("toolset", "is for", "tools"), rows)
    offered = {toolset.name for toolset in tools.TOOLSETS}
    if reserved := [f"`{name}`" for name in TOOLSETS if name not in offered]:
        table += f"\nAccepted by `--toolsets`, but without tools yet: {', '.join(reserved)}.\n"
    return _MARKED.sub(lambda found: f"{found[1]}{table}{found[2]}", README.read_text(encoding="utf-8"))


def _options() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        flag = "" if name == "token" else f"`--{name.replace('_', '-')}`"
        default = f"`{field.default}`" if isinstance(field.default, str | int) else ""
        rows.append((flag, f"`{ENV_PREFIX}{name.upper()}`", default, field.description or ""))
    return f"## Options\n\n{_table(('flag', 'environment', 'default', 'meaning'), rows)}"


def _tool(tool: ErrataTool, types: dict[str, Any]) -> str:
    said = ", ".join(text for hint, text in _HINTS.items() if getattr(tool.annotations, hint))
    schema, result = tool.whole.input_schema, tool.whole.output_schema
    types |= schema.get("$defs", {}) | result.get("$defs", {}) | {result["title"]: result}
    lines = [f"### `{tool.name}`\n", f"*{tool.title}*" + (f": {said}." if said else "") + "\n"]
    lines += [tool.whole.description + "\n"]
    if schema.get("properties"):
        lines.append(_table(("argument", "type", "default", "meaning"), _fields(schema)))
    lines.append(f"Returns {_link(result['title'])}.\n")
    return "\n".join(lines)


def _prompt(prompt: Any) -> tuple[str, str, str]:
    arguments = ", ".join(
        f"`{each.name}`" + ("" if each.required else "?") for each in (prompt.arguments or [])
    )
    return f"`{prompt.name}`", arguments, prompt.description or ""


def _type(name: str, schema: dict[str, Any]) -> str:
    description = schema.get("description", "")
    fields = _table(("field", "type", "default", "meaning"), _fields(schema))
    return "\n".join([f"### {name}\n", *([description + "\n"] if description else []), fields])


def _fields(schema: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else f"`{json.dumps(field.get('default'))}`"
        yield f"`{name}`", _kind(field), default, _meaning(field)


def _kind(schema: dict[str, Any]) -> str:
    """A schema as a reader would say it."""
    if "$ref" in schema:
        return _link(schema["$ref"].rsplit("/", 1)[-1])
    if "enum" in schema or "const" in schema:
        return " or ".join(f'`"{value}"`' for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if schema.get("items") else "list"
    return str(schema.get("type", "any"))


def _meaning(schema: dict[str, Any]) -> str:
    """Its description, with the bounds that the validation keeps."""
    places = [schema, *schema.get("anyOf", [])]
    bounds = [
        text.format(place[key]) for key, text in _BOUNDS.items() for place in places if key in place
    ]  # in the order of _BOUNDS
    return " ".join([schema.get("description", ""), *([f"({', '.join(bounds)})"] if bounds else [])]).strip()


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def main() -> None:
    """Write all three."""
    TARGET.write_text(anyio.run(reference), encoding="utf-8")
    CONSTANTS.write_text(constants(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    print(f"wrote {TARGET}, {CONSTANTS} and the table of tools in {README}")


if __name__ == "__main__":
    main()

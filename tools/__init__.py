"""The tools, resources and prompts an agent sees. Thin: validate, call a service, shape the answer."""

from __future__ import annotations

from server.settings import Settings
from server.startup import Startup
from tools import edit, export, fact_sets, inspect, ledger, locate, propose, rebase, steer, train
from tools._errors import did_you_mean, middle
from tools._schema import compact_inputs, compact_outputs
from tools._tool import ErrataTool
from tools._toolset import Spec
from tools.icons import toolset_icons

TOOLSETS = (
    inspect.toolset,
    fact_sets.toolset,
    locate.toolset,
    edit.toolset.joined(export.toolset).joined(rebase.toolset),
    steer.toolset,
    ledger.toolset,
    propose.toolset,
    train.toolset,
)
"""Every toolset. A new one is its module and its entry here."""

HOMES = ("preview_edits",)
"""Where objects that several tools take are described whole: a tool that every token may call."""

SCOPES = {spec.name: spec.scope for toolset in TOOLSETS for spec in toolset.specs}
"""What a token needs to call each tool."""


def served(settings: Settings) -> list[Spec]:
    """The tools left by `--toolsets` and `--read-only`."""
    return [
        spec
        for toolset in TOOLSETS
        if toolset.name in settings.offered
        for spec in toolset.specs
        if not (settings.read_only and spec.changes)
    ]


def missing(name: str, settings: Settings) -> str:
    """Why there is no tool of this name, and what there is instead."""
    for toolset in TOOLSETS:
        for spec in toolset.specs:
            if spec.name != name:
                continue
            if toolset.name not in settings.offered:
                return (
                    f"{name} is not offered: this server runs with --toolsets {','.join(settings.toolsets)}. Whoever "
                    f"starts it can add {toolset.name}."
                )
            return f"{name} is not offered: this server runs with --read-only and changes nothing."
    names = [spec.name for spec in served(settings)]
    return f"There is no tool {middle(name, 80)!r}.{did_you_mean(name, names)} There are: {', '.join(names)}."


def build(settings: Settings, startup: Startup) -> list[ErrataTool]:
    """The tools to serve, each bound to `startup`."""
    icons = {spec.name: toolset_icons(toolset.name) for toolset in TOOLSETS for spec in toolset.specs}
    built = [ErrataTool.of(spec, startup, icons[spec.name]) for spec in served(settings)]
    inputs = compact_inputs({tool.name: tool.whole.input_schema for tool in built}, HOMES)
    outputs = compact_outputs({tool.name: tool.whole.output_schema for tool in built})
    return [tool.shortened(inputs[tool.name], outputs[tool.name]) for tool in built]

"""Editing methods by name, and their parameters checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from editors import METHODS
from editors.errors import InvalidEdit
from editors.method import Editor, Params
from editors.model.lm import LM
from server.errors import ServiceError

PRESET = "preset"
PUBLISHED = "published"


class ModelDefaults:
    """An extension of a model: by method, the parameters that were best on it (see server.facts.profile)."""

    def __init__(self, lm: LM) -> None:  # noqa: ARG002
        self.params: dict[str, dict[str, Any]] = {}

    def filled_in(self, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given parameters, with the profile's values for those left out. A preset is not filled in."""
        found = {} if PRESET in given else self.params.get(method, {})
        return {**found, **given}


def editor_named(name: str) -> Editor[Any]:
    """A method of the table. Raises ServiceError that lists them when there is none of this name."""
    if name not in METHODS:
        raise ServiceError(
            f"method {name!r} is not known; the methods are {', '.join(sorted(METHODS))} and auto (see list_methods)"
        )
    return METHODS[name]


def checked_params(
    editor: Editor[Any], lm: LM, given: Mapping[str, Any] | None, *, own: bool = True
) -> Params:
    """Validated parameters, with this model's defaults filled in: those of its profile, unless `own` is false, and its
    shape's.

    Raises InvalidEdit that names the parameter, the value and what is allowed.
    """
    if reason := editor.supports(lm):
        raise InvalidEdit(reason)
    if own:
        given = lm.extension(ModelDefaults).filled_in(editor.name, given or {})
    published = None if editor.published is None else editor.published.params
    try:
        params: Params = editor.params.model_validate(with_preset(editor.name, published, given))
    except ValidationError as error:
        raise InvalidEdit("; ".join(_explain(editor, problem) for problem in error.errors())) from None
    resolved: Params = editor.resolve(lm, params)
    return resolved


def with_preset(
    owner: str, published: Mapping[str, Any] | None, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Replace `preset` by the values it stands for. Parameters that are given besides it win.

    Args:
        owner: what has the parameters, for the message.
        published: the values of the preset "published"; None if there is none.

    Raises InvalidEdit for a preset that does not exist.
    """
    values = dict(given or {})
    name = values.pop(PRESET, None)
    if name is None:
        return values
    if name != PUBLISHED or published is None:
        known = f'it has "{PUBLISHED}"' if published is not None else "it has none"
        raise InvalidEdit(f"params.preset {str(name)[:80]!r} is not a preset of {owner}; {known}")
    return {**published, **values}


def _explain(editor: Editor[Any], problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "params"
    if problem["type"] == "extra_forbidden":
        return f"params.{name} is not a parameter of {editor.name}; it has {', '.join(editor.params.model_fields)}"
    return (
        f"params.{name}: {problem['msg'].removeprefix('Value error, ')}, not {str(problem['input'])[:80]!r}"
    )

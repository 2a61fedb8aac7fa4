"""The constants that decide how well a method works, each with where its value comes from.

A module declares its own constants through the functions below. They return the value unchanged, so
they fit wherever a number fits:

    SLACK = tuned(0.03, "...", models=DEFAULT_MODEL, command="...", figure="...")

    class RomeParams(Params):
        lr: float = Field(assumed(3.0, "Adam's step size", "..."), gt=0)

`python -m editors.constants` prints all of them as a table; docs/constants.md is that table.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
TWO_MODELS = f"{DEFAULT_MODEL}; Gemma 3 270M"

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])
Origin = Literal["tuned", "published", "assumed", "limit", "shape"]


@dataclass(frozen=True)
class Constant:
    """One declared constant: its value, what it means, and why it has this value."""

    value: str
    meaning: str
    origin: Origin
    reason: str
    module: str
    line: int  # the line of the declaration, from which `name` is read

    @property
    def name(self) -> str:
        """`NAME` for a module constant, `Class.field` for a parameter's default."""
        return _name_at(self.module, self.line)


_declared: dict[tuple[str, int, int], Constant] = {}


def tuned(value: T, meaning: str, *, models: str, command: str, figure: str) -> T:
    """Declare a value that was chosen by an experiment; returns it.

    Args:
        meaning: what the value does, with its unit.
        models: the model(s) it was chosen on.
        command: the command that measures it.
        figure: what that command gave with this value, and with others where known.
    """
    _declare(repr(value), meaning, "tuned", f"{figure} (`{command}`; {models})")
    return value


def published(value: T, meaning: str, source: str) -> T:
    """Declare a value taken from a paper or its code; returns it."""
    _declare(repr(value), meaning, "published", source)
    return value


def assumed(value: T, meaning: str, reason: str = "no comparison is known") -> T:
    """Declare a value for which no measurement is known, with the reason it seemed right if any; returns it."""
    _declare(repr(value), meaning, "assumed", reason)
    return value


def limit(value: T, meaning: str, beyond: str) -> T:
    """Declare a value that no edit's quality depends on; returns it.

    It bounds time, memory or size, or decides whether a warning appears. `beyond` says what it protects, and what
    happens beyond it.
    """
    _declare(repr(value), meaning, "limit", beyond)
    return value


def from_shape(rule: str, meaning: str) -> Callable[[F], F]:
    """Declare a function that computes a value from the model's shape by `rule` (decorator)."""

    def declare(function: F) -> F:
        code = inspect.unwrap(function).__code__
        constant = Constant(
            rule, meaning, "shape", "by the model's shape", function.__module__, code.co_firstlineno
        )
        _declared[constant.module, constant.line, 0] = constant
        return function

    return declare


def declared() -> list[Constant]:
    """All constants of the modules imported so far, by module and line."""
    return [_declared[key] for key in sorted(_declared)]


def _declare(value: str, meaning: str, origin: Origin, reason: str) -> None:
    caller = sys._getframe(2)
    module, line = caller.f_globals["__name__"], caller.f_lineno
    # several values may stand on one line, such as the items of a dict
    place = sum(1 for m, at, _ in _declared if (m, at) == (module, line))
    _declared[module, line, place] = Constant(value, meaning, origin, reason, module, line)


def _name_at(module: str, line: int) -> str:
    """The name that the statement at a line of a module binds, with the class it stands in."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    path: list[str] = []
    node: ast.AST = tree
    while True:
        inner = [
            each
            for each in getattr(node, "body", [])
            if min([each.lineno, *(d.lineno for d in getattr(each, "decorator_list", []))]) <= line
            and line <= (each.end_lineno or 0)
        ]
        if not inner:
            return ".".join(path) or f"line {line}"
        node = inner[0]
        path += _bound(node)


def _bound(node: ast.AST) -> list[str]:
    """The name a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]

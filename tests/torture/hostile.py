"""Arguments that a schema allows, nearly allows, and does not allow."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tests.torture.values import IDS, NUMBERS, SQL, TEXTS

Schema = Mapping[str, Any]
Likely = Mapping[str, Callable[[], Any]]
"""Name of an argument -> what makes a value for it that the server will probably accept."""


class Hostile:
    """Makes arguments from schemas, from one seed."""

    def __init__(self, chance: random.Random, paths: tuple[str, ...], likely: Likely) -> None:
        self.chance, self.paths, self.likely = chance, paths, likely

    def arguments(self, schema: Schema) -> dict[str, Any]:
        """Arguments of a tool; some are right, some have a wrong place or two, some are wrong all over."""
        rate = self.chance.choice((0.0, 0.03, 0.1, 0.3, 0.8))
        made = self._object(schema, schema, rate, 0)
        if self.chance.random() < 0.04:
            made[self.chance.choice(("", "request", "ctx", "self", "__class__", "unknown", "a" * 3_000))] = (
                self._any(2)
            )
        return made

    def _value(self, node: Schema, root: Schema, rate: float, depth: int, name: str = "") -> Any:
        chance = self.chance
        if name in self.likely and chance.random() < 0.75:
            made = self.likely[name]()
            return self._spoilt(made) if chance.random() < 0.3 + rate else made
        if chance.random() < rate:
            return self._any(depth)
        while "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
        if options := node.get("anyOf") or node.get("oneOf"):
            return self._value(chance.choice(options), root, rate, depth, name)
        if "enum" in node or "const" in node:
            return chance.choice(node.get("enum") or [node["const"]])
        return self._typed(node, root, rate, depth, name)

    def _typed(self, node: Schema, root: Schema, rate: float, depth: int, name: str) -> Any:
        match node.get("type"):
            case "object":
                return self._object(node, root, rate, depth)
            case "array":
                return self._array(node, root, rate, depth, name)
            case "string":
                return self._text(name)
            case "integer" | "number" as kind:
                return self._number(node, kind == "integer")
            case "boolean":
                return self.chance.random() < 0.5
            case "null":
                return None
        return self._any(depth)

    def _object(self, node: Schema, root: Schema, rate: float, depth: int) -> dict[str, Any]:
        made = {}
        for name, inner in node.get("properties", {}).items():
            if name in node.get("required", ()):
                if self.chance.random() < rate / 4:
                    continue
            elif self.chance.random() < 0.7:
                continue
            made[name] = self._value(inner, root, rate, depth + 1, name)
        if node.get("additionalProperties") and self.chance.random() < 0.5:
            made[self._text("")[:100]] = self._any(depth + 1)
        return made

    def _spoilt(self, value: Any) -> Any:
        """The value with one place in it replaced."""
        if isinstance(value, dict) and value:
            name = self.chance.choice(list(value))
            return {**value, name: self._spoilt(value[name])}
        if isinstance(value, list) and value:
            at = self.chance.randrange(len(value))
            return [*value[:at], self._spoilt(value[at]), *value[at + 1 :]]
        return self._any(2)

    def _array(self, node: Schema, root: Schema, rate: float, depth: int, name: str) -> list[Any]:
        least, most = node.get("minItems", 0), min(node.get("maxItems", 4), 4)
        size = self.chance.choice((least, least, max(least, 1), max(least, 1), most))
        if self.chance.random() < rate / 10:
            size = node.get("maxItems", 1_000) + 1
            item = self._value(node.get("items", {}), root, 0.0, depth + 1, name)
            return [item] * min(size, 20_000)
        return [self._value(node.get("items", {}), root, rate, depth + 1, name) for _ in range(size)]

    def _text(self, name: str) -> str:
        chance = self.chance
        if name == "sql":
            return chance.choice(SQL)
        if name in ("path", "data", "corpus", "file_name", "name") and chance.random() < 0.7:
            return chance.choice(self.paths)
        if name.endswith(("_id", "_ids", "name")) and chance.random() < 0.8:
            return chance.choice(IDS)
        if name in ("prompt", "subject", "target", "expected") and chance.random() < 0.6:
            return chance.choice(TEXTS[-6:-2])
        if name == "method" and chance.random() < 0.8:
            return chance.choice(
                ("auto", "rome", "memit", "ft", "lora", "grace", "wise", "in_context", "serac", "mend")
            )
        return chance.choice(TEXTS)

    def _number(self, node: Schema, whole: bool) -> float:
        low = node.get("minimum", node.get("exclusiveMinimum", 0))
        high = node.get("maximum", node.get("exclusiveMaximum", 100))
        near = (low, low, low + 1, high, low - 1, high + 1, (low + high) / 2)
        number = self.chance.choice((*near, self.chance.choice(NUMBERS)))
        return int(number) if whole and self.chance.random() < 0.9 else number

    def _any(self, depth: int) -> Any:
        """A value of any kind."""
        chance = self.chance
        match chance.randrange(10):
            case 0:
                return None
            case 1:
                return chance.random() < 0.5
            case 2 | 3:
                return chance.choice(NUMBERS)
            case 4 if depth < 5:
                return [self._any(depth + 1) for _ in range(chance.choice((0, 1, 3)))]
            case 5 if depth < 5:
                return {
                    chance.choice(TEXTS)[:50]: self._any(depth + 1) for _ in range(chance.choice((0, 1, 3)))
                }
            case 6:
                return chance.choice(self.paths)
            case 7 if chance.random() < 0.2:
                return _nested(chance.choice((20, 90, 900)))
        return chance.choice(TEXTS)


def _nested(depth: int) -> Any:
    made: Any = []
    for i in range(depth):
        made = [made] if i % 2 else {"a": made}
    return made


def likely_values(chance: random.Random, fields: Mapping[str, Collection[str]]) -> Likely:
    """Values that get as far as the model, so that not everything ends at the check of the arguments."""

    def edit() -> dict[str, Any]:
        subject = chance.choice(("France", "Japan", "Big Ben", "A\u0301 b", "\U0001f9ea", "x" * 300))
        made: dict[str, Any] = {
            "subject": subject,
            "prompt": "The capital of {} is",
            "target": chance.choice(("Rome", "\u202e", "1")),
        }
        more = {
            "paraphrases": [f"{subject} has the capital"],
            "neighbours": [{"prompt": "The capital of Spain is", "expected": "Madrid"}],
            "portability": [{"prompt": f"{subject} is near", "expected": "Oslo"}],
            "previous": "Paris",
        }
        made |= {name: value for name, value in more.items() if chance.random() < 0.2}
        return made

    def params() -> dict[str, Any]:
        names = chance.sample(list(fields), 1) if chance.random() < 0.5 else ["rome"]
        known = list(fields[names[0]])
        return {
            name: chance.choice((0, 1, 2, 3, -1, 0.5, 1e9, "auto", [1], None, True))
            for name in chance.sample(known, 1)
        }

    def pairs() -> list[dict[str, Any]]:
        return [
            {"prompt": f"The day {i} is", "positive": "good", "negative": "bad"}
            for i in range(chance.choice((1, 4, 8)))
        ]

    return {
        "edits": lambda: [edit() for _ in range(chance.choice((1, 1, 2, 5)))],
        "facts": lambda: [
            {"prompt": "The capital of France is", "expected": chance.choice(("Paris", ["a", "b"]))}
        ],
        "params": params,
        "pairs": pairs,
        "edit_ids": lambda: [f"e{chance.randint(1, 30)}" for _ in range(chance.choice((1, 1, 3)))],
        "edit_id": lambda: f"e{chance.randint(1, 30)}",
        "job_id": lambda: f"j{chance.randint(1, 10)}",
        "name": lambda: chance.choice(("joy", "calm", "x1", "x2")),
        "method": lambda: chance.choice(
            (*fields, "caa", "pca", "mend", "causal_trace", "logit_lens", "attribution_patching")
        ),
        "multiplier": lambda: chance.choice((0.1, 0.3, 0.0, -0.2)),
        "prompt": lambda: "The capital of France is",
        "subject": lambda: "France",
        "max_new_tokens": lambda: chance.randint(1, 12),
        "layers": lambda: [chance.randrange(4)],
    }

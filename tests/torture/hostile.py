"""Values that a schema allows, nearly allows, and does not allow, for calls that nobody would make in good faith."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Schema = Mapping[str, Any]

TEXTS = (
    "",
    " ",
    "\n\t\r",
    "\0",
    "a",
    "{}",
    "{}{}{}",
    "{0}",
    "{subject.__class__.__mro__}",
    "%s%n%x",
    "$(id)",
    "`id`",
    "null",
    "[]",
    "{",
    '{"a": 1}',
    '[{"subject": "a"}]',
    "NaN",
    "-1",
    "'; DROP TABLE edits; --",
    '" OR 1=1',
    "NEAR(",
    "*",
    "a*b*",
    "\ud800",
    "\udfff\ud800",
    "\u202ertl",
    "\ufeff",
    "e\u0301" * 40,
    "\U0001f9ea" * 30,
    "٠١٢",
    "<|im_start|>system\n",
    "</s>",
    "<script>alert(1)</script>",
    "A" * 5_000,
    "word " * 2_000,
    "France" * 4_000,
    "\0" * 1_000,
    "x" * 200_000,
    "The capital of {} is",
    "The capital of France is",
    "France",
    "Rome",
    "What is the capital of France?",
    "auto",
    "self",
)
IDS = (
    "e1",
    "e2",
    "e3",
    "e0",
    "e-1",
    "e99999999999999999999",
    "E1",
    "1",
    "e1 ",
    "e1;",
    "j1",
    "j2",
    "j0",
    "v1",
    "x1",
    "joy",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    2**31,
    2**31 - 1,
    -(2**31),
    2**53,
    2**63,
    2**63 - 1,
    -(2**63),
    2**64,
    10**40,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    -1e308,
    1.5,
    0.1,
)
SQL = (
    "SELECT 1",
    "SELECT * FROM edits",
    "select count(*) from events, events, events, events, events, events",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    "WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) SELECT length(x) FROM c",
    "SELECT instr(hex(zeroblob(15000000)), hex(randomblob(10000)))",
    "SELECT zeroblob(1000000000)",
    "SELECT hex(zeroblob(31000000)) FROM events",
    "SELECT randomblob(2000000) FROM events, events",
    "SELECT printf('%.*c', 900000000, 'x')",
    "SELECT printf('%2147483647d', 1)",
    "SELECT replace(hex(zeroblob(9999)), '0', hex(zeroblob(9999)))",
    "SELECT group_concat(hex(zeroblob(100000))) FROM events, events",
    "SELECT load_extension('/tmp/x')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('/tmp/x', 'y')",
    "ATTACH '/etc/passwd' AS p",
    "PRAGMA writable_schema=1",
    "PRAGMA table_info(edits)",
    "DELETE FROM edits",
    "INSERT INTO edits DEFAULT VALUES",
    "DROP TABLE events",
    "UPDATE edits SET status = 'active'",
    "VACUUM INTO '/tmp/vacuumed'",
    "SELECT 1; DELETE FROM edits",
    "-- nothing",
    "/*",
    "SELECT",
    "EXPLAIN SELECT * FROM edits",
    "VALUES (1), (2)",
    "SELECT ?",
    "SELECT :a",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM sqlite_master",
    "SELECT 'a' LIKE '" + "%a" * 20_000 + "'",
    "SELECT " + "(" * 900 + "1" + ")" * 900,
    "SELECT " + ",".join("1" for _ in range(3_000)),
    "SELECT json_extract(payload, '$') FROM events",
    "SELECT * FROM edits_fts WHERE edits_fts MATCH '\"'",
    "SELECT sum(a.seq * b.seq) FROM events a, events b, events c, events d, events e, events f, events g",
    "BEGIN",
    "COMMIT",
    "SELECT fts5(1)",
    "SELECT x'00' || zeroblob(99999999)",
    "CREATE TEMP TABLE t AS SELECT * FROM events",
    "SELECT 9223372036854775807 + 1, 1e999, -1e999",
)


class Hostile:
    """Makes arguments from schemas, from one seed."""

    def __init__(self, chance: random.Random, paths: tuple[str, ...]) -> None:
        self.chance, self.paths = chance, paths

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
        if chance.random() < rate:
            return self._any(depth)
        while "$ref" in node:
            node = root["$defs"][node["$ref"].rpartition("/")[2]]
        if options := node.get("anyOf") or node.get("oneOf"):
            return self._value(chance.choice(options), root, rate, depth, name)
        if "enum" in node:
            return chance.choice(node["enum"])
        if "const" in node:
            return node["const"]
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
                return chance.random() < 0.5
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


def paths_around(home: Path, outside: Path, secret: str) -> tuple[str, ...]:
    """Lay traps in and around HOME; the paths to them, and others that nobody may read."""
    import os

    outside.mkdir()
    (outside / "secret.txt").write_text(secret)
    (outside / "secret.json").write_text(
        f'[{{"subject": "{secret}", "prompt": "{{}} is", "target": "{secret}"}}]'
    )
    (outside / "adapter_config.json").write_text(f'{{"peft_type": "{secret}"}}')
    for name in ("data", "imports", "exports"):
        folder = home / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "link.json").symlink_to(outside / "secret.json")
        (folder / "folder").symlink_to(outside)
        (folder / "zero").symlink_to("/dev/zero")
        (folder / "self").symlink_to("self")
        os.mkfifo(folder / "pipe.json")
        (folder / "empty.json").write_text("")
        (folder / "deep.json").write_text("[" * 100_000)
        (folder / "bad.zip").write_bytes(b"PK\3\4" + b"\0" * 200)
        (folder / "facts.jsonl").write_text('{"subject": "a", "prompt": "{} is", "target": "b"}\n' * 40)
        (folder / "bytes.txt").write_bytes(bytes(range(256)) * 100)
        (folder / "directory.json").mkdir()
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 1e99, "target_modules": [null]}'
        )
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    inside = (
        "link.json",
        "folder",
        "folder/secret.json",
        "zero",
        "self",
        "pipe.json",
        "empty.json",
        "deep.json",
        "bad.zip",
        "facts.jsonl",
        "bytes.txt",
        "directory.json",
        "adapter",
        "x1",
        "x1.zip",
        "joy",
    )
    return (
        *inside,
        str(outside / "secret.txt"),
        str(outside / "secret.json"),
        str(outside / "none.json"),
        str(outside),
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/mem",
        "/proc/self/fd/0",
        "/dev/zero",
        "/dev/stdin",
        "/dev/urandom",
        "/",
        "~",
        "~/.ssh",
        ".",
        "..",
        "../outside/secret.txt",
        "data/../../outside/secret.json",
        "exports/../ledger.db",
        "../ledger.db",
        str(home / "ledger.db"),
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "\\\\host\\share",
        "C:\\Windows\\win.ini",
        "a\0b",
        "con",
        "-rf",
        "%2e%2e/outside/secret.txt",
        "owner/name",
        "owner/name:config",
        "a" * 5_000,
        "a/" * 500,
        "",
        " ",
        "facts",
    )

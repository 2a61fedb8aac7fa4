"""Texts, numbers, statements and files that nobody would send in good faith."""

from __future__ import annotations

import os
from pathlib import Path

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


def paths_around(home: Path, outside: Path, secret: str) -> tuple[str, ...]:
    """Lay traps in and around HOME; the paths to them, and others that nobody may read."""
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

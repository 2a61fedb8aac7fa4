"""Hostile calls of every tool, resource and prompt, made from what the server itself says it takes.

    python -m tests.torture.fuzz --seed 1 --calls 2500

One server process on a tiny model, spoken to line by line. Arguments are made from the tools' schemas: right ones,
ones with a few wrong places, and nonsense; paths lead to traps in and around HOME, statements are those that would
read files or never end. For every call the server must answer in time, without an internal error, without a word of
what stands in files outside HOME; its log has no traceback, its memory stays flat, and afterwards it still works.
Prints what it did as JSON; the exit status is 1 when there is a violation.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from editors import METHODS as EDITORS
from tests.families import FAMILIES, save_to
from tests.server.processes import Gone, Wire
from tests.torture.hostile import Hostile, likely_values
from tests.torture.values import TEXTS, paths_around
from tests.torture.walk import Violation, prepare_environment

SECRET = "s3cr3t-of-another-folder"
LIMIT = 180.0
"""Seconds within which every call is answered; the longest work that a schema allows on a tiny model takes less."""
QUERY = 5.0
"""Seconds of a query at most, as the caller sees it."""
TIDY = 250
"""Calls between two times of tidying up: edits reverted, jobs ended, so that memory can be compared."""
GROWTH = 1.15
"""Memory at the end over memory after the first fifth, at most; by then every part has been used once."""
FACT = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
PAIRS = [{"prompt": f"The day {i} is", "positive": "good", "negative": "bad"} for i in range(8)]
SMALL = {"steps": 1, "records": 8, "validation": 4, "evaluate_every": 1, "group": 2, "rank": 2}
WARM: tuple[tuple[str, dict[str, Any]], ...] = (
    ("train_editor", {"method": "serac", "data": "warm.json", "params": SMALL | {"judge_epochs": 1}}),
    ("train_editor", {"method": "mend", "data": "warm.json", "params": SMALL}),
    ("compute_statistics", {}),
    ("locate_fact", {"prompt": "The capital of France is", "subject": "France"}),
    ("suggest_layers", {"edits": [FACT], "layers": [1], "params": {"max_steps": 2, "contexts": 1}}),
    *(("apply_edits", {"edits": [FACT], "method": name, "replace": True}) for name in EDITORS),
    ("create_steering_vector", {"name": "warm", "pairs": PAIRS}),
    ("calibrate_steering", {"name": "warm"}),
    ("export_edits", {"format": "gguf_lora", "name": "warm"}),
    ("delete_steering_vector", {"name": "warm"}),
)
"""Calls that use everything that is loaded when it is first needed."""
METHODS = (
    "resources/read",
    "prompts/get",
    "completion/complete",
    "logging/setLevel",
    "resources/subscribe",
    "nonsense",
)
GARBAGE = (
    b"\n",
    b"{\n",
    b"[]\n",
    b"null\n",
    b'"a"\n',
    b'{"jsonrpc": "1.0"}\n',
    b'{"jsonrpc": "2.0", "id": null, "method": 1}\n',
    b"\xff\xfe\x00\n",
    b'{"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "none"}}\n',
    b"[" * 5_000 + b"\n",
    b'{"jsonrpc": "2.0", "id": {"a": 1}, "method": "tools/list"}\n',
    b'{"jsonrpc": "2.0", "result": {}, "id": 3}\n',
    b'{"jsonrpc": "2.0", "id": 1e400, "method": "ping"}\n',
    b'{"a": NaN}\n',
)


class Fuzz:
    """One server and what was seen of it."""

    def __init__(self, seed: int, family: str, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.home = folder / "home"
        paths = paths_around(self.home, folder / "outside", SECRET)
        (self.home / "data" / "warm.json").write_text(json.dumps([_record(n) for n in range(16)]))
        fields = {name: editor.params.model_fields for name, editor in EDITORS.items()}
        self.hostile = Hostile(self.chance, paths, likely_values(self.chance, fields))
        self.server = Wire(self.home, model=save_to(family, folder / "tiny"), queue=16)
        self.server.greet()
        self.process = psutil.Process(self.server.process.pid)
        self.tools = {tool["name"]: tool["inputSchema"] for tool in self._list("tools/list", "tools")}
        self.prompts = [prompt["name"] for prompt in self._list("prompts/list", "prompts")]
        self.counts: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.memory: list[int] = []
        self.violations: list[str] = []

    def _list(self, method: str, key: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.server.ask(method, {})["result"][key]
        return listed

    def run(self, calls: int) -> None:
        """So many calls; raises Gone when the server has ended."""
        self.server.told("list_edits")
        if calls >= 5 * TIDY:  # else the memory is not judged
            self._warm()
        for number in range(calls):
            if number % TIDY == 0:
                self._tidy()
            if self.chance.random() < 0.02:
                self.server.send(self.chance.choice(GARBAGE))
                self.counts["garbage"] += 1
            if self.chance.random() < 0.1:
                self._one(self.chance.choice(METHODS), self._params())
            else:
                tool = self.chance.choice(list(self.tools))
                self._one("tools/call", {"name": tool, "arguments": self.hostile.arguments(self.tools[tool])})
        self._tidy()
        self._still_works()

    def _warm(self) -> None:
        """Use every part once, so that what is loaded when it is first needed does not look like growth."""
        for tool, given in WARM:
            answer = self.server.ask("tools/call", {"name": tool, "arguments": given})
            assert not answer["result"].get("isError"), (tool, answer["result"]["content"])
            if job := answer["result"]["structuredContent"].get("job_id"):
                ended = self.server.told("get_job", job_id=job, wait_seconds=300)
                assert ended["state"] == "done", ended

    def _params(self) -> dict[str, Any]:
        """Parameters of the other requests."""
        chance, text = self.chance, self.chance.choice((*TEXTS, *self.hostile.paths))
        name = chance.choice((*self.prompts, text))
        uri = chance.choice(
            (
                "errata://status",
                "errata://edits/e1",
                f"errata://edits/{text}",
                f"errata://{text}",
                f"file://{text}",
                text,
            )
        )
        arguments: Any = {chance.choice(("subject", "fact", "edit_id", "a")): text}
        return chance.choice(
            (
                {"uri": uri},
                {"name": name, "arguments": arguments},
                {"name": name},
                {"level": text},
                {},
                {"ref": {"type": "ref/prompt", "name": name}, "argument": {"name": "subject", "value": text}},
                {"ref": {"type": "ref/resource", "uri": uri}, "argument": {"name": "edit_id", "value": text}},
                {"uri": self.hostile._any(0)},
            )
        )

    def _one(self, method: str, params: dict[str, Any]) -> None:
        what = params.get("name") if method == "tools/call" else method
        started = time.monotonic()
        overdue = threading.Timer(LIMIT, self.server.process.kill)
        overdue.start()
        try:
            answer = self.server.ask(method, params)
        except Gone as gone:
            raise Gone(f"after {_short(method, params)}: {gone}") from gone
        finally:
            overdue.cancel()
        seconds = time.monotonic() - started
        self.slowest[str(what)] = max(self.slowest.get(str(what), 0.0), seconds)
        said = json.dumps(answer)
        failed = "error" in answer or answer["result"].get("isError")
        self.counts[f"{what}: {'refused' if failed else 'ok'}"] += 1
        self._judge(method, params, answer, said, seconds)

    def _judge(
        self, method: str, params: dict[str, Any], answer: dict[str, Any], said: str, seconds: float
    ) -> None:
        asked = json.dumps(params)
        found = [
            sign
            for sign in ("internal error", "Traceback", "root:x:0:")
            if sign in said and sign not in asked
        ]
        if SECRET in said and SECRET not in asked:
            found.append("the secret")
        if answer.get("error", {}).get("code") == -32603:
            found.append("code -32603")
        if params.get("name") == "query_ledger" and seconds > QUERY:
            found.append(f"a query of {seconds:.1f} s")
        self.violations += [f"{sign}: {_short(method, params)} -> {said[:600]}" for sign in found]

    def _tidy(self) -> None:
        """Take back what calls have left, and note the memory."""
        for job in self.server.told("list_jobs", limit=500)["jobs"]:
            if job["state"] in ("queued", "running", "interrupted"):
                self.server.told("cancel_job", job_id=job["job_id"])
        rows = self.server.told(
            "query_ledger", sql="SELECT id FROM edits WHERE status = 'active'", limit=1000
        )["rows"]
        if rows:
            self.server.told("revert_edits", edit_ids=[row[0] for row in rows])
        self.memory.append(round(self.process.memory_info().rss / 1e6))

    def _still_works(self) -> None:
        status = self.server.told("model_status")
        audit = self.server.told("audit_edits")
        whole = {"chain": True, "blobs": True, "weights": True, "problems": []}
        if audit["integrity"] != whole or status["weights_hash"] != status["base_hash"]:
            self.violations.append(f"at the end: {audit['integrity']}, {status['weights_hash']}")
        if not self.server.told("ask_model", prompt="The capital of France is", max_new_tokens=4)["tokens"]:
            self.violations.append("the model says nothing")
        first = self.memory[len(self.memory) // 5]
        if len(self.memory) >= 5 and self.memory[-1] > GROWTH * first:
            self.violations.append(f"memory grew: {self.memory} MB")

    def close(self) -> None:
        """End the server and read its log."""
        code, _, log = self.server.leave() if self.server.process.poll() is None else self.server.end()
        if "Traceback" in log:
            at = log.index("Traceback")
            self.violations.append(
                f"the log ({log.count('Traceback')} tracebacks): {log[max(0, at - 600) : at + 3000]}"
            )
        if code:
            self.violations.append(f"the server ended with status {code}: {log[-2000:]}")
        self.server.__exit__()


def _record(number: int) -> dict[str, Any]:
    """A record to train on."""
    subject = f"Land {number}"
    paraphrases, neighbours = [f"{subject} has the capital"], [f"The capital of Realm {number} is"]
    return {**FACT, "subject": subject, "paraphrases": paraphrases, "neighbours": neighbours}


def _short(method: str, params: dict[str, Any]) -> str:
    return f"{method} {json.dumps(params)[:600]}"


def fuzzed(seed: int, family: str, calls: int, folder: Path) -> dict[str, Any]:
    """One run; what was seen."""
    fuzz = Fuzz(seed, family, folder)
    try:
        fuzz.run(calls)
    except (Gone, Violation, AssertionError) as error:
        fuzz.violations.append(f"{type(error).__name__}: {error}")
    fuzz.close()
    return {
        "seed": seed,
        "family": family,
        "calls": calls,
        "violations": fuzz.violations,
        "memory in MB": fuzz.memory,
        "slowest in seconds": {
            k: round(v, 2) for k, v in sorted(fuzz.slowest.items(), key=lambda i: -i[1])[:12]
        },
        "counts": dict(sorted(fuzz.counts.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=2500)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    options = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        report = fuzzed(options.seed, options.family, options.calls, Path(folder))
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["violations"] else 0)


if __name__ == "__main__":
    main()

"""An agent corrects a fact that went stale, looks at the result from all sides, and takes it back.

Croatia changed from the kuna to the euro in 2023; the model still says kuna. This is a real MCP
client talking to a real server over stdio, with the embedded model: `make demo`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp_types import Implementation, TextContent

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"  # the converted model is kept here between demos
EDIT = {
    "subject": "Croatia",
    "prompt": "The currency of {} is the",
    "target": "euro",
    "previous": "Croatian kuna",
    "paraphrases": ["The official currency of Croatia is the", "The currency used in Croatia is the"],
    "neighbours": [
        {"prompt": "The currency of Serbia is the"},
        {"prompt": "The currency of Japan is the"},
        {"prompt": "The currency of India is the"},
        {"prompt": "The capital of Germany is"},
    ],
    "reason": "Croatia joined the euro area on 1 January 2023",
    "source": "https://www.ecb.europa.eu/euro/changeover/croatia/html/index.en.html",
}
QUESTION = "The official currency of Croatia is the"


class Agent:
    """The client's side: calls tools, shows what it waits for, and stops at the first error."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._last = ""

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The structured result of a tool."""
        shown = ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())
        print(f"  > {tool}({shown})")
        result = await self._client.call_tool(tool, arguments, progress_callback=self._progress)
        if result.is_error or result.structured_content is None:
            said = " ".join(part.text for part in result.content if isinstance(part, TextContent))
            raise SystemExit(f"{tool} failed: {said}")
        return dict(result.structured_content)

    async def _progress(self, progress: float, total: float | None, message: str | None) -> None:  # noqa: ARG002
        if message and message != self._last:
            self._last = message
            print(f"    ... {message}")


def _short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def say(label: str, value: object) -> None:
    print(textwrap.fill(str(value), 100, initial_indent=f"  {label:<22}", subsequent_indent=" " * 24))


def percent(rate: float | None) -> str:
    return "not measured" if rate is None else f"{rate:.0%}"


SHOWN = (
    "edit_id",
    "status",
    "subject",
    "target",
    "previous",
    "method",
    "reason",
    "source",
    "client",
    "created",
)


async def story(agent: Agent) -> None:
    """The whole of it, in the order an agent would do it."""
    heading("1. Which model is this?")
    await agent.call("list_edits", limit=1)  # waits until the model is loaded
    status = await agent.call("model_status")
    say("model", f"{status['model']} ({status['parameters']:,} parameters, {status['architecture']})")
    say("state", status["state_hash"])

    heading("2. What does it believe?")
    believed = await check(agent)
    if believed["verdict"] == "agrees":
        raise SystemExit("this model is up to date already; nothing to correct")

    heading("3. Correct it")
    report = await agent.call("apply_edits", edits=[EDIT], guard={"min_reliability": 1.0})
    if report["status"] != "applied":
        raise SystemExit(f"not applied: {report['failed_guard']}")
    show_report(report)

    heading("4. And in running text?")
    answer = await agent.call("ask_model", prompt=QUESTION, max_new_tokens=16, compare_to_base=True)
    say("asked", QUESTION)
    say("corrected model", answer["completion"].strip())
    say("original model", answer["base_completion"].strip())

    heading("5. What does the ledger say?")
    (row,) = (await agent.call("list_edits", subject="Croatia", status="active"))["edits"]
    for field in SHOWN:
        say(field, row[field])

    heading("6. Take it back")
    reverted = await agent.call("revert_edits", edit_ids=report["edit_ids"], reason="end of the demo")
    await check(agent)
    now = await agent.call("model_status")
    say("reverted", ", ".join(reverted["reverted"]))
    say("state before", status["state_hash"])
    say("state now", now["state_hash"])
    if now["state_hash"] != status["state_hash"] or now["weights_hash"] != status["weights_hash"]:
        raise SystemExit("the model did NOT come back; this is a bug")
    print("\nThe model is back to the last bit, and the ledger remembers both steps.")


async def check(agent: Agent) -> dict[str, Any]:
    """What the model believes about the fact."""
    fact = {
        "prompt": EDIT["prompt"],
        "subject": "Croatia",
        "expected": "euro",
        "alternatives": ["Croatian kuna"],
    }
    (found,) = (await agent.call("check_facts", facts=[fact]))["facts"]
    say("it says", f"{found['prompt']} -> {found['answer'].strip()}")
    say("verdict", found["verdict"])
    for scored in (found["expected"], *found["alternatives"]):
        say(f"log p({scored['text'].strip()})", f"{scored['logprob']:.2f}, rank {scored['rank']}")
    return dict(found)


def show_report(report: dict[str, Any]) -> None:
    (result,) = report["results"]
    say("edit", f"{report['edit_ids'][0]} by {report['method']}, in {report['seconds']:.1f} s")
    say("why this method", report["method_reason"])
    say("before", result["before"].strip())
    say("after", result["after"].strip())
    say("probability of 'euro'", f"{result['p_target_before']:.4f} -> {result['p_target_after']:.4f}")
    say("reliability", percent(result["reliability"]))
    say("generality", f"{percent(result['generality'])} of the paraphrases follow")
    for form, rate in report["forms"].items():
        say(f"asked as {form}", f"{percent(rate)} of wordings that were not learned")
    say("subject locality", f"{percent(report['subject_locality'])} of the subject's other facts stayed")
    say("locality", f"{percent(result['locality'])} of the neighbours stayed as they were")
    for probe in result["details"]:
        held = "held" if probe["held"] else "NOT HELD"
        print(f"      {probe['kind']:<11}{probe['prompt']} -> {' '.join(probe['after'].split())} ({held})")
    drift = report["drift"]
    ratio = drift["perplexity_after"] / drift["perplexity_before"]
    say("drift on other texts", f"KL {drift['kl']:.5f} nats, perplexity x {ratio:.3f}")
    for warning in report["warnings"]:
        say("warning", warning)


@contextmanager
def home_folder(given: Path | None) -> Iterator[Path]:
    """The folder given, or one that is gone afterwards."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="errata-demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


async def main() -> None:
    """Start the server as a client application would, and tell the story."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="keep the ledger here (default: a temporary folder)")
    parser.add_argument("--model", default="default", help="another model (the fact may be different there)")
    options = parser.parse_args()
    with home_folder(options.home) as home, (home / "server.log").open("w+") as log:
        server = StdioServerParameters(
            command=sys.executable,
            args=[
                str(ROOT / "server.py"),
                "--model",
                options.model,
                "--home",
                str(home),
                "--models",
                str(MODELS),
            ],
        )
        try:
            async with Client(
                stdio_client(server, errlog=log), client_info=Implementation(name="errata-demo", version="1")
            ) as client:
                print(f"Connected to {client.server_info.name if client.server_info else 'the server'}.")
                print("The first time, preparing the model takes about half a minute.")
                await story(Agent(client))
        except BaseException:
            log.seek(0)
            print(f"\nThe server's log:\n{log.read()[-4_000:]}", file=sys.stderr)
            raise


if __name__ == "__main__":
    anyio.run(main)

"""`errata-mcp decide`: a person decides on a proposal at the command line, and the running server carries it out."""

from __future__ import annotations

import argparse
import getpass
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.proposals.deciders import decided_by
from server.proposals.decisions import PAUSE, Decision, answer_to, leave
from server.settings import Settings
from store import Ledger, LedgerError, ProposalRecord
from store.home_lock import is_held
from store.opening import require_ledger

CHOICES = ("approve", "decline", "changes")
_PAUSE = 0.1  # seconds between two looks for the answer
_SOON = 2 * PAUSE  # seconds in which a server that is idle has answered
MOST_SHOWN = 10


def run(argv: Sequence[str], ask: Callable[[str], str] = input) -> int:
    """Show proposals, or decide on one; returns the exit status: 0 done or left, 1 refused, 2 no answer yet."""
    options = _parser().parse_args(argv)
    home = (Settings(home=options.home) if options.home else Settings()).home
    try:
        require_ledger(home)
        with Ledger.open(home, read_only=True) as ledger:
            if options.proposal is None:
                return _list(ledger)
            found = ledger.get_proposal(options.proposal)
    except LedgerError as error:
        return _refuse(str(error))
    print(described(found))
    if options.decision is None:
        return 0
    if found.state != "waiting":
        return _refuse(f"{found.id} was decided already, by {decided_by(found)}; nothing was changed.")
    if options.decision == "changes" and not (options.note or "").strip():
        return _refuse("say with --note which changes you want, so that the proposer can make them.")
    if not options.yes and not _agrees(ask, options.decision, found.id):
        return _refuse("nothing was decided.")
    return _decided(home, found, options)


def described(found: ProposalRecord) -> str:
    """A proposal in words, for the person who decides."""
    results = found.report.get("results") or []
    lines = [
        f"{found.id} ({found.state}), proposed by {found.identity or found.client or 'an unnamed client'}"
    ]
    edits = found.request.get("edits") or []
    for i, edit in enumerate(edits[:MOST_SHOWN]):
        measured: dict[str, Any] = results[i] if i < len(results) else {}
        says = f"said {measured['before']!r} at first, would say {measured['after']!r}; " if measured else ""
        lines.append(f"  {edit.get('prompt')!r}: {says}right is {edit.get('target')!r}")
    if len(edits) > MOST_SHOWN:
        lines.append(f"  and {len(edits) - MOST_SHOWN} more")
    lines += [f"  {name}: {value}" for name in ("reason", "source") if (value := getattr(found, name))]
    if summary := found.report.get("summary"):
        lines.append(f"  measured: {summary}")
    lines += [f"  warning: {warning}" for warning in (found.report.get("warnings") or [])[:3]]
    return _printable("\n".join(lines))


def _list(ledger: Ledger) -> int:
    waiting = ledger.proposals("waiting")
    for found in waiting:
        print(described(found))
    print("errata-mcp decide ID approve (or decline, or changes) decides." if waiting else "Nothing waits.")
    return 0


def _decided(home: Path, found: ProposalRecord, options: argparse.Namespace) -> int:
    """Leave the decision, and wait for the server's answer."""
    decision = Decision(found.id, found.created, options.decision, options.note, _user())
    try:
        path = leave(home, decision)
    except OSError as error:
        return _refuse(f"the decision cannot be left in {home}: {error.strerror or error}")
    begun = time.monotonic()
    sure = False  # that there is a server
    while (waited := time.monotonic() - begun) < options.wait:
        if (answer := answer_to(path)) is not None:
            print(_printable(answer.message))
            return 0 if answer.done else 1
        if not sure and waited > _SOON and not (sure := is_held(home)):
            print(f"No server runs on {home} now. The decision is kept, and carried out when one starts.")
            return 0
        time.sleep(_PAUSE)
    print(
        f"No answer in {options.wait:g} s: the server is busy, or read-only. It carries it out when it can."
    )
    return 2


def _agrees(ask: Callable[[str], str], decision: str, proposal_id: str) -> bool:
    try:
        return ask(f"{decision} {proposal_id}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print("Nobody answered; --yes decides without a question.", file=sys.stderr)
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown user"


def _printable(text: str) -> str:
    """What others wrote, without characters that move the cursor or colour the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "�" for c in text)


def _refuse(why: str) -> int:
    print(f"errata-mcp decide: {_printable(why)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="errata-mcp decide",
        description="Show the waiting corrections, show one, or decide on it. The server that runs on the "
        "home carries the decision out, else the next one that starts. Everybody who may write to the home "
        "can decide.",
        allow_abbrev=False,
    )
    parser.add_argument("proposal", nargs="?", help='its id, such as "p1"; left out: all that wait are shown')
    parser.add_argument("decision", nargs="?", choices=CHOICES, help="left out: it is shown")
    parser.add_argument("--note", help="a note for the proposer; needed for changes")
    parser.add_argument("--yes", action="store_true", help="do not ask again")
    parser.add_argument("--wait", type=float, default=120.0, help="seconds to wait for the answer (120)")
    parser.add_argument("--home", help="the home (default: as for the server)")
    return parser

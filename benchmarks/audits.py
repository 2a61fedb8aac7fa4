"""What an audit of many edits costs after a restart, beside asking every prompt by itself.

    python -m benchmarks.audits --edits 40 [--model M] [--models DIR] [--statistics DIR]

The edits are applied by MEMIT in calls of 20. Before each audit the server forgets its answers, as in a restart. The
same audit is made twice in one process: as the server makes it, and plainly, where prompts are read one by one, nothing
is taken from the ledger and every answer is generated whole. Both must come to the same verdicts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.facts import load
from benchmarks.homes import opened
from editors.judged import AnswerEnds
from editors.model import decoding
from server.facts import auditing
from server.facts.guard import Guard
from server.facts.history_results import Audit
from server.services import Services
from server.transaction.recent import Recent

CALL = 20  # edits of one call


def main() -> int:
    """Prints CPU seconds of both ways and their ratio; status 1 where they disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--model", default="default")
    parser.add_argument("--models", type=Path, default=None)
    parser.add_argument("--statistics", type=Path, default=None)
    given = parser.parse_args()
    kept = {"statistics": given.statistics} if given.statistics else {}
    more = {"models": given.models} if given.models else {}
    edits = [fact.edit for fact in (*load("check"), *load("tune"))][: given.edits]
    with opened(kept=kept, threads=1, model=given.model, **more) as services:
        for at in range(0, len(edits), CALL):
            services.edits.apply(edits[at : at + CALL], "memit", guard=Guard(off=["all"]))
        with _plainly():
            plain, slow = _audited(services)
        audit, fast = _audited(services)
        again, twice = _audited(services)
    same = {plain.summary, audit.summary, again.summary} == {audit.summary}
    sys.stdout.write(
        f"{len(edits)} edits: plainly {slow:.1f} CPU s, as the server does it {fast:.1f} "
        f"({slow / fast:.1f} times less), with all of the unedited model on the ledger {twice:.1f} "
        f"({slow / twice:.1f} times less); {'the same verdicts' if same else 'DIFFERENT VERDICTS'}\n"
        f"{audit.summary}\n"
    )
    return 0 if same else 1


def _audited(services: Services) -> tuple[Audit, float]:
    """An audit as after a restart, and its CPU seconds."""
    services.workspace.recent = Recent()
    began = time.process_time()
    return services.edits.audit(), time.process_time() - began


@contextmanager
def _plainly() -> Iterator[None]:
    """Without what saves work. Nothing of it is recorded, so that the next audit cannot use it."""
    with ExitStack() as stack:
        for module, name, value in (
            (decoding, "may_pack", lambda *_: False),
            (decoding, "read_beginnings", lambda *_: None),
            (auditing, "recorded_answers", lambda _, records, __: [None] * len(records)),
            (auditing, "record_audit", lambda *_: None),
            (AnswerEnds, "is_over", lambda *_: False),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


if __name__ == "__main__":
    raise SystemExit(main())

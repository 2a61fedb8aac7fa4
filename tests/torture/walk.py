"""A random walk over all methods and tools with kill -9 in between: nothing acknowledged is lost, nothing half done.

    python -m tests.torture.walk --seed 1 --steps 200 --kills 10 [--family llama] [--quantize nf4] [--home DIR]

One server process on a tiny model; random edits by every method, previews, replaces, reverts, exports, imports,
vectors, doses, jobs, questions, backups and restores. Some steps are cut off by kill -9 at a random moment, some
kills hit a server that starts. Checked after every step: the edits have the states before or after it, and a set of
active edits that was there before has the hashes it had. Checked after every start: `verify` finds nothing, the
server says the ledger is whole, and its hashes are those of a model that is rebuilt from the ledger alone.
Prints what it did as JSON, and every violation; the exit status is 1 when there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from server.facts.ids import expanded
from server.settings import OPTIONAL_TOOLSETS, TOOLSETS
from store.backup import backup, restore
from tests.families import FAMILIES, fresh, save_to
from tests.server.processes import Gone, Wire
from tests.torture.rebuilt import hashes_of, problems_of, statuses_of
from tests.torture.steps import METHODS, Statuses, Step, World, step

START = 6.0
"""Seconds in which a server is about ready."""
CHECKED = 5
"""Steps between two rebuilds of the model from the ledger, besides those at every start."""


class Violation(Exception):
    """A promise was broken."""


class Walk:
    """One walk on one home."""

    def __init__(self, seed: int, family: str, home: Path, models: Path, quantize: str = "none") -> None:
        from editors import METHODS as EDITORS

        self._options = {"quantize": quantize, "toolsets": ",".join((*TOOLSETS, *OPTIONAL_TOOLSETS))}
        self._quantised = quantize != "none"  # then edits are side-cars, which the plain model has not

        self.chance, self.family, self.home = random.Random(seed), family, home
        self._model = save_to(family, models / f"tiny-{family}")
        self._backups = models / "backups"
        fields = {name: EDITORS[name].params.model_fields for name in METHODS if name in EDITORS}
        self.world = World(self.chance, fields)
        self.seen: dict[frozenset[str], tuple[str, str]] = {}
        self.kept: list[tuple[Path, dict[str, str], dict[frozenset[str], tuple[str, str]]]] = []
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.took: dict[str, float] = {}
        self.server: Wire | None = None
        self._trained()

    def _trained(self) -> None:
        """MEND and SERAC are there from the start, as trainings would leave them."""
        import shutil

        from server.transaction.host import ModelHost
        from tests.editors.trained import trained_for

        lm = fresh(self.family)
        if not lm.is_seq2seq:
            folder = self.home / "trained" / ModelHost(lm).base_hash[:16]
            shutil.copytree(trained_for(lm), folder, dirs_exist_ok=True)

    # --- the server ------------------------------------------------------------------------------------

    def start(self) -> Wire:
        """A server that is ready, and stands where the ledger does."""
        self.server = Wire(self.home, model=self._model, **self._options)
        self.server.greet()
        self.server.told("list_edits", limit=1)  # waits until it is ready
        self.counts["starts"] += 1
        self._look_whole()
        return self.server

    def kill(self) -> None:
        """kill -9, and what the server has logged until then is read."""
        if self.server is None:
            return
        self.server.process.kill()
        _, _, log = self.server.end()
        self._read(log)
        self.server.__exit__()
        self.server = None
        self.counts["kills"] += 1

    def leave(self) -> None:
        """End the server as a client that leaves does."""
        assert self.server is not None
        code, _, log = self.server.leave()
        self._read(log)
        self.server.__exit__()
        self.server = None
        self._true(code == 0, f"the server ended with status {code}")

    def _read(self, log: str) -> None:
        for sign in ("Traceback", "internal error", "was not given back"):
            if sign in log:
                at = log.index(sign)
                raise Violation(f"the log has {sign!r}: {log[max(0, at - 500) : at + 3000]}")

    def kill_while_it_starts(self) -> None:
        server = Wire(self.home, model=self._model, **self._options)
        time.sleep(self.chance.uniform(0.0, START))
        server.process.kill()
        self._read(server.end()[2])
        server.__exit__()
        self.counts["kills at start"] += 1

    # --- checks ----------------------------------------------------------------------------------------

    @staticmethod
    def _true(condition: bool, what: str) -> None:
        if not condition:
            raise Violation(what)

    def _look_whole(self) -> None:
        """At a start: `verify`, what the server says, and the model rebuilt from the ledger alone."""
        assert self.server is not None
        status = self.server.told("model_status")
        self._true(status["state"] == "ready", f"the server is {status['state']}: {status['message']}")
        self._true(status["damage"] == [] and not status["read_only"], f"damage: {status['damage']}")
        found = problems_of(self.home)
        self._true(found == [], f"verify finds {found}")
        self._hashes(status, rebuild=True)

    def _hashes(self, status: Mapping[str, Any], rebuild: bool) -> None:
        statuses = statuses_of(self.home)
        active = frozenset(name for name, state in statuses.items() if state == "active")
        here = (status["weights_hash"], status["state_hash"])
        if rebuild and not self._quantised:
            there = hashes_of(self.home, self.family)
            self._true(here == there, f"the server has {here}, the ledger {there}, active {sorted(active)}")
            self.counts["rebuilds"] += 1
        if active in self.seen:
            self.counts["returns"] += 1
            self._true(
                self.seen[active] == here, f"{sorted(active)} had {self.seen[active]} and now has {here}"
            )
        self.seen[active] = here

    def settle(self, done: Step, answered: Mapping[str, Any] | None, refused: bool) -> None:
        """The ledger has the state before the step or after it; after, when it was answered."""
        before, after = self.world.statuses, statuses_of(self.home)
        self._true(done.allowed(before, after), f"{done.tool} {done.arguments}: {_moved(before, after)}")
        if refused:
            self._true(before == after, f"{done.tool} was refused and changed {_moved(before, after)}")
        if answered is not None:
            for name in expanded(answered.get("edit_ids") or answered.get("reverted") or ()):
                there = "reverted" if done.tool == "revert_edits" else ("active", "rejected")
                self._true(after.get(name) in (there if isinstance(there, tuple) else (there,)),
                           f"{done.tool} answered {name}, which is {after.get(name)}")  # fmt: skip
        self.world.statuses = after

    # --- the walk --------------------------------------------------------------------------------------

    def walk(self, steps: int, kills: int) -> None:
        """Raises Violation."""
        killed = set(self.chance.sample(range(steps), kills))
        self.start()
        for number in range(steps):
            self._between(number)
            self.counts["steps"] += 1
            if number in killed:
                self._cut(self._step())
            else:
                self._do(self._step(), number % CHECKED == 0)
        self._end()

    def _step(self) -> Step:
        return step(self.world)

    def _between(self, number: int) -> None:
        """Now and then a backup, a restore, or a return to a set of edits that was there before."""
        chance = self.chance.random()
        if chance < 0.02:
            folder = self._backups / str(number)
            backup(self.home, folder)
            self.kept.append((folder, dict(self.world.statuses), dict(self.seen)))
            self.counts["backups"] += 1
        elif chance < 0.03 and self.kept:
            self._restore()
        elif chance < 0.09:
            self._return()

    def _restore(self) -> None:
        folder, statuses, seen = self.chance.choice(self.kept)
        self.kill() if self.chance.random() < 0.5 else self.leave()
        restore(folder, self.home, replace=True)
        self._true(
            statuses_of(self.home) == statuses, "a restored home has other edits than when it was backed up"
        )
        self.world.statuses, self.seen = dict(statuses), dict(seen)
        self.world.jobs.clear()
        self.counts["restores"] += 1
        self.start()
        told = self.server.told("list_steering") if self.server else {}
        self.world.vectors = [vector["name"] for vector in told["vectors"]]

    def _return(self) -> None:
        """Make the active edits those of an earlier state; its hashes come back (see `_hashes`)."""
        wanted = self.chance.choice(list(self.seen))
        off = [name for name in self.world.having("active") if name not in wanted]
        on = [name for name in wanted if self.world.statuses.get(name) != "active"]
        for tool, ids in (("revert_edits", off), ("reapply_edits", on)):
            if ids:
                from tests.torture.steps import _moves

                there = "reverted" if tool == "revert_edits" else "active"
                self._do(Step(tool, {"edit_ids": ids}, _moves(ids, there)), True)

    def _do(self, do: Step, rebuild: bool) -> None:
        assert self.server is not None
        started = time.monotonic()
        answer = self.server.ask("tools/call", {"name": do.tool, "arguments": do.arguments})
        seconds = time.monotonic() - started
        self.took[do.kind] = 0.5 * self.took.get(do.kind, seconds) + 0.5 * seconds
        result = answer.get("result")
        self._true(result is not None, f"{do.tool} {do.arguments}: {answer}")
        told = None if result.get("isError") else result["structuredContent"]
        if told is None:
            text = result["content"][0]["text"]
            self._true("internal error" not in text, f"{do.tool} {do.arguments}: {text}")
            self.refusals[f"{do.kind}: {text[:110]}"] += 1
        else:
            self.counts[f"ok {do.kind}"] += 1
            if do.then:
                do.then(told)
        self.settle(do, told, told is None)
        self._hashes(self.server.told("model_status"), rebuild)

    def _cut(self, cut: Step) -> None:
        """The step, killed in the middle or right after its answer; then a new server."""
        assert self.server is not None
        killer = threading.Timer(
            self.chance.uniform(0.0, 1.1 * self.took.get(cut.kind, 0.5)), self.server.process.kill
        )
        killer.start()
        told = None
        with suppress(Gone):
            result = self.server.ask("tools/call", {"name": cut.tool, "arguments": cut.arguments})["result"]
            told = None if result.get("isError") else result["structuredContent"]
            self.counts["answered before the kill"] += 1
        killer.cancel()
        self.kill()
        if self.chance.random() < 0.15:
            self.kill_while_it_starts()
        self.start()
        if told is not None and cut.then:
            cut.then(told)
        self.settle(cut, told, False)

    def _end(self) -> None:
        """All edits taken back give the base's hash; jobs end or can be ended."""
        assert self.server is not None
        for job in self.server.told("list_jobs", limit=500)["jobs"]:
            self._true("internal error" not in job["message"], f"job {job['job_id']}: {job['message']}")
            self.counts[f"job {job['state']}"] += 1
            if job["state"] in ("queued", "running", "interrupted"):
                self.server.told("cancel_job", job_id=job["job_id"])
        if active := self.world.having("active"):
            self.server.told("revert_edits", edit_ids=active)
        status = self.server.told("model_status")
        self._true(
            status["weights_hash"] == status["base_hash"], "without edits the weights are not the base's"
        )
        self.leave()


def _moved(before: Statuses, after: Statuses) -> str:
    return str({n: (before.get(n), after.get(n)) for n in {*before, *after} if before.get(n) != after.get(n)})


def prepare_environment() -> None:
    """As the tests have it: random models break every bound, nothing is fetched."""
    os.environ.update(ERRATA_BOUNDS="off", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def walked(
    seed: int, family: str, steps: int, kills: int, folder: Path, quantize: str = "none"
) -> dict[str, Any]:
    """One walk; its counts, and the violation that ended it."""
    home = folder / "home"
    home.mkdir()
    walk = Walk(seed, family, home, folder, quantize)
    violation = ""
    try:
        walk.walk(steps, kills)
    except (Violation, AssertionError, Gone) as error:
        violation = f"{type(error).__name__}: {error}"
    finally:
        if walk.server is not None:
            walk.server.__exit__()
    return {
        "seed": seed, "family": family, "violation": violation, "counts": dict(sorted(walk.counts.items())),
        "states seen": len(walk.seen), "refusals": dict(walk.refusals.most_common()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--quantize", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--home", type=Path, help="a new folder that is kept; left out: one that is not")
    options = parser.parse_args()
    prepare_environment()
    family = options.family or FAMILIES[options.seed % len(FAMILIES)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.home or Path(temporary)
        folder.mkdir(exist_ok=True)
        report = walked(options.seed, family, options.steps, options.kills, folder, options.quantize)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["violation"] else 0)


if __name__ == "__main__":
    main()

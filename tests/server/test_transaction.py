"""Whatever raises, at whatever step of a change of state, everything is as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import server.facts.auditing
import server.facts.editing
import server.facts.layer_trials
import server.facts.measuring
from editors.edit import Edit
from editors.steering.pairs import Pair
from server.request_context import RequestContext
from server.services import Services
from server.steering.requests import CalibrationRequest, DoseRequest, EvaluationRequest, VectorRequest
from server.transaction import host as host_module
from server.transaction.transaction import Transaction
from tests.server.opened import FACTS, QUICK, open_services

PAIRS = [
    Pair(prompt="The weather is", positive=good, negative=bad)
    for good, bad in (("good", "bad"), ("nice", "awful"), ("warm", "cold"))
]
ITALY = Edit(subject="Italy", prompt="The capital of {} is", target="Paris")
CHILE = Edit(subject="Chile", prompt="The capital of {} is", target="Rome")


class Fault(BaseException):
    """Raised at a chosen step. No Exception, so that nothing catches it by chance."""


@dataclass
class Steps:
    """Counts the steps of a use case, and raises Fault at the one numbered `fail_at`."""

    fail_at: int = 0  # 0: never
    count: int = 0
    names: list[str] = field(default_factory=list)

    def step(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.fail_at:
            raise Fault(f"{name} (step {self.count})")

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step(f"before {name}")
            return function(*args, **kwargs)

        return wrapped

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step(f"before {name}")
            result = function(*args, **kwargs)
            self.step(f"after {name}")
            return result

        return wrapped


class _Statements:
    """A database connection whose every statement is a step, before and after it runs."""

    def __init__(self, database: Any, steps: Steps) -> None:
        self._database, self._steps = database, steps

    def execute(self, sql: str, *rest: Any) -> Any:
        what = sql.split(None, 2)[:2]
        if what[:1] == ["ROLLBACK"]:
            return self._database.execute(sql, *rest)
        self._steps.step(f"before SQL {' '.join(what)}")
        result = self._database.execute(sql, *rest)
        if what[:1] != ["COMMIT"]:  # after it, the change is acknowledged
            self._steps.step(f"after SQL {' '.join(what)}")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


@contextlib.contextmanager
def faults(services: Services, steps: Steps) -> Iterator[RequestContext]:
    """Make every step of the mechanism one that can fail. Yields the request's context: its reports are steps too."""
    ledger: Any = services.workspace.ledger
    lm: Any = services.workspace.lm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "_db", _Statements(ledger._db, steps))
        patch.setattr(ledger.blobs, "put", steps.around("blobs.put", ledger.blobs.put))
        patch.setattr(lm, "generate", steps.before("generate", lm.generate))
        sums = services.workspace.host._sums
        patch.setattr(sums, "rebuilt", steps.around("rebuild a weight", sums.rebuilt))
        patch.setattr(host_module, "hash_tensor", steps.before("hash a weight", host_module.hash_tensor))
        for module in (server.facts.measuring, server.facts.auditing, server.facts.layer_trials):
            patch.setattr(module, "observe", steps.around("observe", module.observe))
        patch.setattr(server.facts.editing, "ask", steps.around("ask", server.facts.editing.ask))
        drift = type(services.workspace).drift
        patch.setattr(type(services.workspace), "drift", steps.around("drift", drift))
        yield RequestContext(progress=lambda _done, _total, message: steps.step(f"progress: {message}"))


def snapshot(services: Services, home: Path) -> dict[str, Any]:
    """Everything that a change of state may change."""
    host, ledger = services.workspace.host, services.workspace.ledger
    lm = services.workspace.lm
    tables = [
        row[0] for row in ledger.query("SELECT name FROM sqlite_master WHERE type = 'table'", limit=100).rows
    ]
    rows: dict[str, Any] = {}
    for table in tables:
        if not table.startswith(("sqlite_", "_sqlite", "edits_fts")):
            rows[table] = ledger._rows(f'SELECT * FROM "{table}" ORDER BY 1')
    return {
        "rows": {table: [tuple(row) for row in found] for table, found in rows.items()},
        "blobs": sorted(path.name for path in (home / "blobs").iterdir()),
        "exports": sorted(str(path) for path in (home / "exports").rglob("*")),
        "weights_hash": host.weights_hash,
        "rehash": host.rehash(),
        "state_hash": services.workspace.state_hash,
        "stack": [(a.patch_id, a.position, a.rows, a.blob) for a in host.stack],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()),
        "answer": lm.generate([lm.prompt("The capital of Chile is")], 4)[0].text,
        "open": host.open_transactions,
    }


Case = Callable[[Services, RequestContext], Any]


def _import_bundle(services: Services, ctx: RequestContext) -> None:
    services.exchange.import_patches("bundle.zip", ctx=ctx)


CASES: dict[str, Case] = {
    "apply a batch": lambda s, ctx: s.edits.apply(
        [ITALY, CHILE], "memit", {"max_steps": 1, "layers": [1, 2]}, ctx=ctx
    ),
    "apply a memory": lambda s, ctx: s.edits.apply([ITALY], "grace", ctx=ctx),
    "preview": lambda s, ctx: s.edits.preview([ITALY], "rome", dict(QUICK), explain=True, ctx=ctx),
    "replace": lambda s, ctx: s.edits.apply(
        [FACTS[0].model_copy(update={"target": "Berlin"})], "rome", dict(QUICK), replace=True, ctx=ctx
    ),
    "revert": lambda s, ctx: s.edits.revert(["e1"], ctx=ctx),
    "revert one of a batch and a memory": lambda s, ctx: s.edits.revert(["e2", "e5"], ctx=ctx),
    "reapply": lambda s, ctx: s.edits.reapply(["e4"], ctx=ctx),
    "import a bundle of several patches": _import_bundle,
    "import an adapter": lambda s, ctx: s.exchange.import_adapter("adapter", [ITALY], ctx=ctx),
    "export": lambda s, ctx: s.exchange.export_edits("patches", "again", ["e1", "e2"], ctx=ctx),
    "make a vector": lambda s, ctx: s.steering.create(VectorRequest("new", pairs=PAIRS), ctx=ctx),
    "replace a vector": lambda s, ctx: s.steering.create(
        VectorRequest("mood", "pca", PAIRS, replace=True), ctx=ctx
    ),
    "delete a vector": lambda s, ctx: s.steering.delete("mood", ctx=ctx),
    "switch a dose on": lambda s, ctx: s.steering.set_dose(DoseRequest("mood", 0.3), ctx=ctx),
    "change a dose": lambda s, ctx: s.steering.set_dose(DoseRequest("tone", 0.3), ctx=ctx),
    "switch a dose off": lambda s, ctx: s.steering.set_dose(DoseRequest("tone", 0.0), ctx=ctx),
    "calibrate": lambda s, ctx: s.steering.calibrate(CalibrationRequest("tone"), ctx=ctx),
    "evaluate": lambda s, ctx: s.steering.evaluate(
        EvaluationRequest("tone", ["It is"], [0.1, 0.2], max_new_tokens=2), ctx=ctx
    ),
    "try layers": lambda s, ctx: s.edits.preview([ITALY], "rome", {**QUICK, "layer": "auto"}, ctx=ctx),
    "audit": lambda s, ctx: s.edits.audit(["e1"], repair=True, ctx=ctx),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def services(home: Path, tmp_path: Path) -> Iterator[Services]:
    """e1 by rome; e2, e3 one batch by memit; e4 reverted; e5 a memory; e6 a dose of `tone`; a vector `mood`;
    a bundle of three patches and an adapter to import."""
    other = open_services(tmp_path / "other")
    for subject in ("Norway", "Peru", "Cuba"):
        other.edits.apply(
            [Edit(subject=subject, prompt="The capital of {} is", target="Rome")], "rome", dict(QUICK)
        )
    other.exchange.export_edits("patches", "bundle")
    other.exchange.export_edits("lora", "adapter")
    other.close()
    opened = open_services(home)
    (home / "imports").mkdir()
    (home / "exports").mkdir()
    for name in ("bundle.zip", "adapter"):
        (tmp_path / "other" / "exports" / name).rename(home / "imports" / name)
    opened.edits.apply([FACTS[0]], "rome", dict(QUICK))
    opened.edits.apply(list(FACTS[1:]), "memit", {"max_steps": 1})
    opened.edits.apply(
        [Edit(subject="Egypt", prompt="The capital of {} is", target="Rome")], "rome", dict(QUICK)
    )
    opened.edits.revert(["e4"])
    opened.edits.apply([Edit(subject="India", prompt="The capital of {} is", target="Rome")], "grace")
    for name in ("tone", "mood"):
        opened.steering.create(VectorRequest(name, pairs=PAIRS))
    opened.steering.set_dose(DoseRequest("tone", 0.2))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", CASES)
def test_a_fault_at_any_step_leaves_everything_as_it_was(name: str, services: Services, home: Path) -> None:
    case, before = CASES[name], snapshot(services, home)
    tried = 0
    while True:
        tried += 1
        steps = Steps(fail_at=tried)
        try:
            with faults(services, steps) as ctx:
                case(services, ctx)
        except Fault:
            pass
        else:
            break
        after = snapshot(services, home)
        assert {key: value for key, value in after.items() if value != before[key]} == {}, steps.names[-1]
    assert tried > 5, f"only {tried} steps were seen, so hardly any were tried: {steps.names}"
    assert services.workspace.ledger.verify() == []
    assert services.workspace.host.rehash() == services.workspace.host.weights_hash


def test_a_cancelled_call_leaves_everything_as_it_was(services: Services, home: Path) -> None:
    before = snapshot(services, home)
    ctx = RequestContext()
    ctx.cancelled.set()
    for name in (
        "apply a batch",
        "replace",
        "reapply",
        "import a bundle of several patches",
        "switch a dose on",
    ):
        with pytest.raises(Exception, match="cancelled"):
            CASES[name](services, ctx)
        assert snapshot(services, home) == before, name


def test_transactions_inside_a_transaction_are_undone_one_by_one(services: Services) -> None:
    workspace = services.workspace
    before, stack = workspace.host.rehash(), workspace.host.stack
    with Transaction(workspace) as outer:
        outer.stage(stack[:1])
        middle = workspace.host.rehash()
        with Transaction(workspace) as inner:
            inner.stage([])
            assert workspace.host.rehash() == workspace.host.base_hash
        assert workspace.host.rehash() == middle
    assert workspace.host.rehash() == before
    assert workspace.host.stack == stack


def test_only_the_outermost_transaction_can_commit(services: Services) -> None:
    workspace = services.workspace
    before = workspace.host.rehash()
    with (
        Transaction(workspace),
        Transaction(workspace) as inner,
        pytest.raises(RuntimeError, match="cannot commit"),
    ):
        inner.commit_applied([], None)  # type: ignore[arg-type]
    assert workspace.host.rehash() == before


def test_a_patch_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    services: Services, home: Path
) -> None:
    from editors.model.deltas import Dense
    from editors.patch import WeightPatch

    host = services.workspace.host
    good = services.workspace.lm.mlp_out(1)
    bad = WeightPatch({good: Dense(torch.ones(32, 64)), "zzz.weight": Dense(torch.ones(2, 2))})
    before = snapshot(services, home)
    with Transaction(services.workspace) as tx, pytest.raises(Exception, match=r"zzz\.weight"):
        tx.add("rome", bad, rows=1)
    assert snapshot(services, home) == before
    assert host.rehash() == host.weights_hash


def test_one_call_cannot_ask_the_same_question_twice_with_other_spacing(services: Services) -> None:
    one = Edit(subject="New York", prompt="{} lies in", target="Rome")
    other = Edit(subject="New  York", prompt="{} lies in", target="Paris")
    with pytest.raises(Exception, match="send each fact once"):
        services.edits.apply([one, other], "rome", dict(QUICK))

"""Whatever raises, at whatever step of a change of state, everything is as it was before."""

from __future__ import annotations

import contextlib
import shutil
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
import tools
from editors import measure
from editors.edit import Edit
from editors.steering.pairs import Pair
from server.facts.queries import Forget
from server.factsets.requests import Given
from server.request_context import RequestContext
from server.services import Services
from server.settings import OPTIONAL_TOOLSETS, TOOLSETS, Settings
from server.startup import Startup
from server.steering import calibrating
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


REPORTS = 16
"""Of the same report, made again and again with nothing seen in between, every so many are steps."""


class Fault(BaseException):
    """Raised at a chosen step. No Exception, so that nothing catches it by chance."""


@dataclass
class Steps:
    """Counts the steps of a use case, and raises Fault at the one numbered `fail_at`."""

    fail_at: int = 0  # 0: never
    count: int = 0
    again: int = 0  # how often the last report was made again
    names: list[str] = field(default_factory=list)

    def step(self, name: str) -> None:
        """One step. Of the same report over and over, as at each step of a search, only some are steps."""
        repeated = name.startswith("progress") and self.names[-1:] == [name]
        self.again = self.again + 1 if repeated else 0
        if self.again % REPORTS:
            return
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


NEXT = [
    {"subject": "Norway", "prompt": "The capital of {} is", "answer": "Oslo"},
    {"subject": "Sweden", "prompt": "The capital of {} is", "answer": "Stockholm"},
]


def _apply_previewed(services: Services, ctx: RequestContext) -> None:
    report = services.edits.preview([ITALY], "rome", dict(QUICK), ctx=ctx)
    services.edits.apply(preview_id=report.preview_id, ctx=ctx)


def _calibrate(services: Services, ctx: RequestContext) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Each dose writes texts: a few words of two will do.
        patch.setattr(calibrating, "TEXT_TOKENS", 3)
        patch.setattr(calibrating, "NEUTRAL_PROMPTS", calibrating.NEUTRAL_PROMPTS[:2])
        services.steering.calibrate(CalibrationRequest("tone", both=False), ctx=ctx)


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
    "calibrate": _calibrate,
    "evaluate": lambda s, ctx: s.steering.evaluate(
        EvaluationRequest("tone", ["It is"], [0.1, 0.2], max_new_tokens=2), ctx=ctx
    ),
    "try layers": lambda s, ctx: s.edits.preview(
        [ITALY], "rome", {**QUICK, "max_steps": 1, "layer": "auto"}, ctx=ctx
    ),
    "audit": lambda s, ctx: s.edits.audit(["e1"], repair=True, ctx=ctx),
    "apply what was previewed": _apply_previewed,
    "apply by the first way that holds": lambda s, ctx: s.edits.apply([ITALY], "auto", ctx=ctx),
    "forget": lambda s, ctx: s.edits.forget([Forget("Chile", ITALY.prompt)], max_said=1.0, ctx=ctx),
    "explain": lambda s, ctx: s.edits.explain("The capital of France is", ctx=ctx),
    "propose": lambda s, ctx: s.proposals.propose([ITALY], "rome", dict(QUICK), ctx=ctx),
    "approve a proposal": lambda s, ctx: s.proposals.decide("p1", "approve", ctx=ctx),
    "decline a proposal": lambda s, ctx: s.proposals.decide("p1", "decline", "no", ctx=ctx),
    "import a vector": lambda s, ctx: s.steering.take_in("exports/tone.safetensors", "again", ctx=ctx),
    "teach a memory to weights that leave": lambda s, ctx: s.exchange.export_edits(
        "lora", "taught", ["e5"], ctx=ctx
    ),
    "save the next version of a fact set": lambda s, ctx: s.fact_sets.save("set", Given(facts=NEXT), ctx=ctx),
}
EVERY = {
    "forget": 3,
    "teach a memory to weights that leave": 3,
    "try layers": 3,
    "apply by the first way that holds": 3,
}
"""Use cases that train, or do the same for several layers or methods: every so many of their steps are tried."""
COVERED = {
    "apply_edits": "apply a batch",
    "revert_edits": "revert",
    "reapply_edits": "reapply",
    "forget_facts": "forget",
    "export_edits": "export",
    "import_patches": "import a bundle of several patches",
    "import_adapter": "import an adapter",
    "save_facts": "save the next version of a fact set",
    "propose_edits": "propose",
    "decide_proposal": "approve a proposal",
    "import_steering_vector": "import a vector",
    "create_steering_vector": "make a vector",
    "set_steering": "switch a dose on",
    "delete_steering_vector": "delete a vector",
}
JOBS = {
    "push_edits",
    "correct_facts",
    "rebase_edits",
    "train_editor",
    "compute_statistics",
    "calibrate_editing",
    "cancel_job",
}
"""Their work is a job in a process that is killed: test_engines, test_correct_facts, test_rebase, test_jobs,
test_calibration."""
FILES = {"export_fact_set", "export_steering_vector"}
"""They write one new file under HOME/exports and nothing else."""


def test_every_tool_that_changes_something_is_among_the_use_cases() -> None:
    settings = Settings(home=Path("unused"), toolsets=(*TOOLSETS, *OPTIONAL_TOOLSETS))
    changing = {t.name for t in tools.build(settings, Startup(settings)) if not t.annotations.read_only_hint}
    assert changing == {*COVERED, *JOBS, *FILES}
    assert set(COVERED.values()) <= set(CASES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with e1 by rome; e2, e3 one batch by memit; e4 reverted; e5 a memory; e6 a dose of `tone`; a vector
    `mood`; a bundle of two patches, an adapter and the file of a vector to import; a proposal p1; a fact set."""
    folder = tmp_path_factory.mktemp("made")
    other = open_services(folder / "other")
    for subject in ("Norway", "Peru"):
        other.edits.apply([_rome(subject)], "rome", dict(QUICK))
    other.exchange.export_edits("patches", "bundle")
    other.exchange.export_edits("lora", "adapter")
    other.close()
    home = folder / "home"
    opened = open_services(home)
    lm = (
        opened.workspace.lm
    )  # statistics stay, with their digests on the ledger, whatever becomes of the call
    opened.workspace.statistics.ensure(lm, range(lm.n_layers), lambda *_: None)
    (home / "imports").mkdir()
    for name in ("bundle.zip", "adapter"):
        (folder / "other" / "exports" / name).rename(home / "imports" / name)
    opened.edits.apply([FACTS[0]], "rome", dict(QUICK))
    opened.edits.apply(list(FACTS[1:]), "memit", {"max_steps": 1})
    opened.edits.apply([_rome("Egypt")], "rome", dict(QUICK))
    opened.edits.revert(["e4"])
    opened.edits.apply([_rome("India")], "grace")
    for name in ("tone", "mood"):
        opened.steering.create(VectorRequest(name, pairs=PAIRS))
    opened.steering.set_dose(DoseRequest("tone", 0.2))
    opened.steering.export("tone", "safetensors", "tone", 0.5)
    opened.proposals.propose([CHILE], "rome", dict(QUICK))
    opened.fact_sets.save("set", Given(facts=NEXT[:1]))
    opened.close()
    return home


def _rome(subject: str) -> Edit:
    return Edit(subject=subject, prompt="The capital of {} is", target="Rome")


@pytest.fixture(autouse=True)
def _short_chat_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model never ends a sentence: of its chat answers a few tokens are enough."""
    monkeypatch.setattr(measure, "CHAT_TOKENS", 6)


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "home"))


@pytest.fixture
def services(home: Path) -> Iterator[Services]:
    opened = open_services(home)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", CASES)
def test_a_fault_at_any_step_leaves_everything_as_it_was(name: str, services: Services, home: Path) -> None:
    case, before = CASES[name], snapshot(services, home)
    tried = 0
    while True:
        tried += EVERY.get(name, 1)
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

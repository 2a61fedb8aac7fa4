"""Compute, stage, measure and judge, and where bounds fail try another way: one transaction, a stated budget.

A call that names its method has one trial. With method="auto" the loop goes on while a bound fails or the edit is
weak in forms it did not learn; the best trial is left on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from editors.advice import Problem
from editors.constants import assumed, limit
from editors.edit import Edit
from editors.errors import EditError
from editors.measure import Unchanged
from editors.method import Editor, Params
from editors.model.lm import LM
from editors.patch import LivePatch, Patch
from editors.steering.stack import unsteered
from server.facts.advice import TOO_STRONG, evidence_of
from server.facts.auto_method import Way
from server.facts.guard import Guard
from server.facts.measuring import Before, Measured, measure, trained_on
from server.facts.rates import mean_forms, mean_rates
from server.facts.results import Attempt
from server.facts.warnings import failed_bounds
from server.methods import checked_params, editor_named
from server.request_context import RequestContext
from server.transaction.host import ActivePatch
from server.transaction.transaction import StagedPatch, Transaction
from server.transaction.workspace import Workspace

MOST_TRIALS = limit(
    4,
    "ways that method=auto tries in one call, at most",
    "time: the best of those tried is kept",
)
BUDGET = limit(
    45.0,
    "seconds after which method=auto begins no further way; one other way is tried in any case",
    "clients wait about a minute for an answer; the best of those tried is kept",
)
WANTED = assumed(
    0.75,
    "mean share of the forms not learned below which method=auto tries another way, even if no bound failed",
    "set by hand; an edit that holds in half of the forms does not hold wherever people ask",
)
DAMAGE = assumed(
    2.0,
    "weight of the share of other facts lost, against the share of forms that hold, when ways are compared",
    "set by hand: few other facts are asked, and each that is lost stands for others that nobody asked",
)


@dataclass(frozen=True)
class TrialsOfCall:
    """What every trial of a call has in common."""

    workspace: Workspace
    edits: Sequence[Edit]
    before: Before
    stack: Sequence[ActivePatch]  # beneath the edits
    on_live_stack: bool  # the questions before the edits were asked on that stack
    guard: Guard  # with the standing bounds filled in
    ctx: RequestContext
    given: frozenset[str] = frozenset()  # parameters that the caller set; advice does not change them

    def only(self, rows: Sequence[int]) -> TrialsOfCall:
        """The same for some of the edits."""
        return replace(self, edits=[self.edits[i] for i in rows], before=self.before.only(rows))


@dataclass(frozen=True)
class Trial:
    """One way, computed and measured."""

    way: Way
    editor: Editor[Any]
    params: Params
    patch: Patch
    staged: StagedPatch
    measured: Measured
    holds: frozenset[str]  # the prompts that the call wants kept
    seconds: float
    failed: list[str] = field(default_factory=list)

    @property
    def is_weak(self) -> bool:
        """Whether it holds in too few of the forms that were not learned, or in no form of some kind."""
        return are_weak(mean_forms(self.measured.results))

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: first fewer failed bounds, then what holds minus what it cost."""
        rates = mean_rates(self.measured.results)
        held = [*mean_forms(self.measured.results).values(), rates["reliability"] or 0.0]
        kept = [v for k in ("locality", "subject_locality") if (v := rates[k]) is not None]
        lost = 1 - sum(kept) / len(kept) if kept else 0.0
        cost = DAMAGE * (lost + max(0.0, self.measured.perplexity_ratio - 1))
        return -len(self.failed), sum(held) / len(held) - cost

    def judged(self, guard: Guard) -> list[str]:
        """The bounds of a guard that its measurements break."""
        seen = self.measured
        return failed_bounds(guard, seen.results, seen.drift, seen.perplexity_ratio, seen.changed, self.holds)

    def described(self, kept: bool) -> Attempt:
        """The line of the report."""
        results = self.measured.results
        rates = mean_rates(results)
        return Attempt(
            method=self.editor.name,
            params=dict(self.way.params),
            reliability=rates["reliability"],
            forms=mean_forms(results),
            subject_locality=rates["subject_locality"],
            perplexity_ratio=self.measured.perplexity_ratio,
            failed=self.failed,
            seconds=round(self.seconds, 2),
            kept=kept,
        )


@dataclass
class Trials:
    """The loop of one call. `run` leaves the best trial staged on the model."""

    tx: Transaction
    job: TrialsOfCall
    most: int = MOST_TRIALS  # ways that are tried at most
    done: list[Trial] = field(default_factory=list)
    refused: list[Attempt] = field(default_factory=list)
    begun: set[tuple[str, bool]] = field(default_factory=set)  # the ways that were tried, see Way.begun
    best: int = 0  # index of the trial that is left on the model

    def run(self, first: Trial, others: Iterator[Way]) -> Trial:
        """Try other ways until one holds, none is left, or the budget is spent; the best one is staged again."""
        started = self._clock() - first.seconds
        self.done.append(first)
        self.begun.add(first.way.begun)
        while self._goes_on(started) and (way := self._next(others)) is not None:
            self.begun.add(way.begun)
            try:
                ctx = self.job.ctx.named(f"the result is not good enough yet, trying {way.method}")
                self.done.append(try_way(self.tx, replace(self.job, ctx=ctx), way))
            except EditError as error:
                self.refused.append(Attempt(method=way.method, failed=[str(error)], seconds=0.0))
        self.best = max(range(len(self.done)), key=lambda i: (self.done[i].rank, i))
        best = self.done[self.best]
        if best is not self.done[-1]:
            self.tx.retry(self.job.stack)
            staged = self.tx.add(best.editor.name, best.patch, len(self.job.edits))
            best = replace(best, staged=staged)
        return best

    def described(self) -> list[Attempt]:
        """Everything that was tried, in order; nothing where there was one way only."""
        if len(self.done) + len(self.refused) < 2:
            return []
        return [*(t.described(i == self.best) for i, t in enumerate(self.done)), *self.refused]

    def _clock(self) -> float:
        return self.job.workspace.pace.clock()

    def _goes_on(self, started: float) -> bool:
        last = self.done[-1]
        spent = self._clock() - started
        held = any(not trial.failed and not trial.is_weak for trial in self.done)
        count = len(self.done) + len(self.refused)
        in_time = count < 2 or spent + last.seconds < BUDGET
        return not held and count < self.most and in_time

    def _next(self, others: Iterator[Way]) -> Way | None:
        """The next way: after an edit that is too weak, its method's advice, once; then the next method; at the end
        any advice."""
        last = self.done[-1]
        advised = None if "advised" in last.way.reason else _advised(self.job, last)
        if advised is not None and not last.failed:
            return advised
        return next((way for way in others if way.begun not in self.begun), advised)


def _advised(job: TrialsOfCall, trial: Trial) -> Way | None:
    """The same method with the parameter that it advises after such a result; None where the caller set that one."""
    if not trial.failed and not trial.is_weak:
        return None
    strong = any(bound.startswith(TOO_STRONG) for bound in trial.failed)
    weak = any(not bound.startswith(TOO_STRONG) for bound in trial.failed) or not trial.failed
    if strong == weak:  # too weak and too strong at once: no strength helps
        return None
    problem: Problem = "too_strong" if strong else "too_weak"
    seen = evidence_of(trial.measured.results, trial.measured.changed)
    advice = trial.editor.hint(job.workspace.lm, trial.params, problem, seen)
    if not advice.params or job.given & advice.params.keys():
        return None
    return Way(trial.way.method, f"advised: {advice.text}", {**trial.way.params, **advice.params})


def are_weak(forms: Mapping[str, float]) -> bool:
    """Whether a fact holds in too few of the forms that were not learned, or in no form of some kind."""
    rates = list(forms.values())
    return bool(rates) and (sum(rates) / len(rates) < WANTED or min(rates) == 0)


def try_way(tx: Transaction, job: TrialsOfCall, way: Way, params: Params | None = None) -> Trial:
    """Compute one way on the stack beneath, put it on the model, measure and judge it. Raises EditError."""
    workspace, ctx = job.workspace, job.ctx
    started = workspace.pace.clock()
    editor = editor_named(way.method)
    if params is None:
        params = checked_params(editor, workspace.lm, _accepted(editor, way.params))
        workspace.prepare(editor, params, ctx)
    tx.retry(job.stack)
    with unsteered(workspace.lm):  # an edit is the same with steering on or off
        context = replace(workspace.edit_context(ctx, 0.1, 0.75), materials=job.before.materials)
        patch = editor.compute(workspace.lm, job.edits, params, context)
    staged = tx.add(editor.name, patch, len(job.edits))
    trained = trained_on(editor.name, patch, job.edits, params.model_dump(mode="json"))
    unchanged = _not_claimed(workspace.lm, patch) if job.on_live_stack else None
    measured = measure(workspace, job.before, ctx, trained=trained, unchanged=unchanged)
    trial = Trial(way, editor, params, patch, staged, measured, _kept_prompts(job), seconds=0.0)
    return replace(trial, failed=trial.judged(job.guard), seconds=workspace.pace.clock() - started)


def _kept_prompts(job: TrialsOfCall) -> frozenset[str]:
    """The prompts that a call wants kept, where the standing bounds are on."""
    standing = job.workspace.settings.bounds == "standing"
    return frozenset(hold.prompt for edit in job.edits for hold in edit.holds) if standing else frozenset()


def _not_claimed(lm: LM, patch: Patch) -> Unchanged | None:
    """Tells the prompts that a staged memory does not claim; they are answered as without it."""
    if not (isinstance(patch, LivePatch) and patch.only_routes):
        return None
    return lambda prompt: lm.routes.claims([prompt])[0] is None


def _accepted(editor: Editor[Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that the method has; those named for another method are left out."""
    return {name: value for name, value in params.items() if name in editor.params.model_fields}

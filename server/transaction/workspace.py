"""What the use cases share: the host, the ledger, statistics, canaries, and the state of the server."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from editors import METHODS
from editors.errors import InvalidEdit
from editors.measure import Canaries, DriftResult
from editors.method import Context, Editor, Params, Prior
from editors.model.lm import LM
from editors.moments import Statistics
from editors.steering.stack import KIND as STEERING
from server.errors import ReadOnly, ServiceError
from server.request_context import RequestContext
from server.results import Drift
from server.settings import Settings
from server.transaction.host import ActivePatch, ModelHost
from store import EditRecord, Ledger, Who

if TYPE_CHECKING:
    from server.jobs.runner import JobRunner


@dataclass
class Workspace:
    """One model, its host and its ledger. Whoever uses it holds `host.lock`."""

    settings: Settings
    host: ModelHost
    ledger: Ledger
    statistics: Statistics
    model_id: int | None  # None: a read-only ledger that has never seen this model
    read_only: str = ""  # why nothing may be written; empty when it may
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    jobs: JobRunner | None = None  # None: a read-only server runs none
    _canaries: Canaries | None = None

    @property
    def lm(self) -> LM:
        return self.host.lm

    @property
    def active_subjects(self) -> list[str]:
        """The subjects of the facts that are live, one for each fact."""
        if self.model_id is None:
            return []
        return [r.subject for r in facts_of(self.ledger.active_edits(self.model_id))]

    @property
    def writable_model_id(self) -> int:
        """The model's id on the ledger. Raises ReadOnly when nothing may be written."""
        if self.read_only:
            raise ReadOnly(f"nothing can be changed: {self.read_only}")
        assert self.model_id is not None
        return self.model_id

    def drift(self) -> DriftResult:
        """Drift of the live model; the pristine one's side is recorded at the first call."""
        if self._canaries is None:
            with self.host.pristine():
                self._canaries = Canaries(self.lm)
        return self._canaries.drift(self.lm)

    @property
    def state_hash(self) -> str:
        """The weights' hash, with the live patches that act beside the weights."""
        live = [a.blob for a in self.host.stack if a.patch.kind != "weight"]
        return hashlib.sha256("\n".join([self.host.weights_hash, *live]).encode()).hexdigest()

    def prepare(self, editor: Editor[Any], params: Params, ctx: RequestContext) -> None:
        """Make the second moments a method needs, on the pristine model; NotReady for what a job must make."""
        editor.require(self.lm, self.context(ctx))
        missing = self.statistics.missing(
            editor.layers_needed(self.lm, params), getattr(params, "sample", "self")
        )
        if not missing:
            return

        def report(fraction: float, message: str) -> None:
            ctx.check()
            ctx.progress(fraction, 1.0, f"{message} (once per model)")

        sample = getattr(params, "sample", "self")
        if sample != "self":
            raise InvalidEdit(
                f"there are no statistics of sample {sample!r} for layers {missing}; call compute_statistics with "
                "that corpus first, or leave params.sample out"
            )
        with self.host.pristine():
            self.statistics.ensure(self.lm, missing, report)

    def context(self, ctx: RequestContext, start: float = 0.0, span: float = 1.0) -> Context:
        """What an editor gets to work with; its progress fills `span` of the call's."""

        def report(fraction: float, message: str) -> None:
            ctx.check()
            ctx.progress(start + span * fraction, 1.0, f"editing: {message}")

        prior = [Prior(a.method, a.patch, a.rows) for a in self.host.stack]
        return Context(self.statistics, prior, report, self.lm.trained)

    def environment(self) -> dict[str, Any]:
        """What the bits of a computed weight depend on beside its inputs."""
        return {
            "torch": torch.__version__,
            "device": str(self.lm.device),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
        }


def editor_named(name: str) -> Editor[Any]:
    """A method of the table; raises WorkbenchError naming those there are."""
    if name not in METHODS:
        raise ServiceError(
            f"method {name!r} is not known; the methods are {', '.join(sorted(METHODS))} and auto (see list_methods)"
        )
    return METHODS[name]


def checked_params(editor: Editor[Any], lm: LM, given: dict[str, Any] | None) -> Params:
    """Validated, resolved parameters; raises InvalidEdit naming the field, the value and what is allowed."""
    if reason := editor.supports(lm):
        raise InvalidEdit(reason)
    try:
        params: Params = editor.params.model_validate(given or {})
    except ValidationError as error:
        raise InvalidEdit("; ".join(_explain(editor, problem) for problem in error.errors())) from None
    resolved: Params = editor.resolve(lm, params)
    return resolved


def _explain(editor: Editor[Any], problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "params"
    if problem["type"] == "extra_forbidden":
        return f"params.{name} is not a parameter of {editor.name}; it has {', '.join(editor.params.model_fields)}"
    return (
        f"params.{name}: {problem['msg'].removeprefix('Value error, ')}, not {str(problem['input'])[:80]!r}"
    )


def drift_result(drift: DriftResult) -> Drift:
    return Drift(
        kl=drift.kl, perplexity_before=drift.perplexity_before, perplexity_after=drift.perplexity_after
    )


def who(ctx: RequestContext) -> Who:
    return Who(ctx.client, ctx.client_version, ctx.request_id)


def digest(data: bytes) -> str:
    """The name a serialised patch has among the blobs."""
    return hashlib.sha256(data).hexdigest()


def ordered(stack: Sequence[ActivePatch]) -> list[ActivePatch]:
    """A stack in ledger order."""
    return sorted(stack, key=lambda a: a.position)


def facts_of(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Those that correct a fact; a steering dose is on the ledger like an edit, but has nothing to be asked."""
    return [r for r in records if r.method != STEERING]

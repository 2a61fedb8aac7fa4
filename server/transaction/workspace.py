"""What all services share: the model and its host, the ledger, statistics, canary texts, settings."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from editors.canaries import Canaries, DriftResult
from editors.errors import InvalidEdit
from editors.learned.trained_folder import TrainedFolder
from editors.method import EditContext, Editor, Params, Prior
from editors.model.lm import LM
from editors.moments import Statistics
from editors.moments.texts import Progress
from editors.patch import LivePatch
from editors.steering.stack import KIND as STEERING
from editors.steering.stack import SteeringStack
from server.errors import ReadOnly
from server.memory import Tidy
from server.request_context import RequestContext
from server.settings import Settings
from server.transaction.host import ModelHost
from server.transaction.made import MadeOnLedger
from server.transaction.model_lock import ModelLock
from server.transaction.model_queue import ModelQueue
from server.transaction.pace import Pace
from server.transaction.recent import Recent
from server.transaction.tokenizer_print import TokenizerPrint
from store import EditRecord, Ledger, Who

STATE_DIGITS = 16
"""Hexadecimal digits of a state's hash in a report: 64 bits, so that two states with the same ones are one."""


@dataclass(frozen=True)
class _Acting:
    """The weights and the live patches of one moment."""

    weights_hash: str
    steering_paused: bool
    patches: Sequence[LivePatch]

    def is_same(self, other: _Acting) -> bool:
        """Whether both are the same objects: patches are compared by identity, they hold tensors."""
        same = len(self.patches) == len(other.patches) and all(
            a is b for a, b in zip(self.patches, other.patches, strict=True)
        )
        return (self.weights_hash, self.steering_paused) == (
            other.weights_hash,
            other.steering_paused,
        ) and same


def _nothing() -> None:
    """There is nothing to catch up with."""


@dataclass
class Workspace:
    """One model with its ledger. Services hold `lock` while they use the model."""

    settings: Settings
    host: ModelHost
    ledger: Ledger
    statistics: Statistics
    made: MadeOnLedger
    model_id: int | None  # None: a read-only ledger that has never seen this model
    read_only: str = ""  # why nothing can be written; empty if something can
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recorded_base: str | None = (
        None  # hash of the same weights in the precision in which the ledger first saw them
    )
    elsewhere: str = ""  # which active edits of the ledger do not act here, because they are of another model
    queue: ModelQueue = field(default_factory=ModelQueue)
    pace: Pace = field(default_factory=Pace)
    recent: Recent = field(default_factory=Recent)
    tidy: Tidy = field(default_factory=Tidy)
    catch_up: Callable[[], None] = _nothing
    """Called when a turn begins, with the model: replays what another process has written, in a read-only server."""
    _canaries: Canaries | None = None
    _drift: tuple[_Acting, DriftResult] | None = None  # of the last call, and what acted then

    @property
    def lm(self) -> LM:
        return self.host.lm

    @property
    def lock(self) -> ModelLock:
        """The model's one lock. Services take `turn`, which waits in line for it."""
        return self.host.lock

    @contextmanager
    def turn(
        self,
        ctx: RequestContext | None = None,
        *,
        check: Callable[[], None] | None = None,
        bounded: bool = True,
        alternates: bool = False,
    ) -> Iterator[None]:
        """The model for the calling thread, when its turn comes. May be nested.

        Waiting for it, and scoring and generating in the block, end when the client of `ctx` is gone (or when
        `check` raises, for work without a client).

        Raises:
            Cancelled: the client is gone.
            Busy: too many wait already; never with `bounded=False`.
        """
        ctx = ctx or RequestContext()
        check = check or ctx.check
        try:
            with (
                self.queue.turn(check, ctx.ticket, bounded=bounded, alternates=alternates),
                self.host.lock,
                self.lm.local.checking(check, *([] if alternates else [self.give_way])),
            ):
                check()
                if not self.host.lock.is_nested:
                    self.pace.begin()
                    if (
                        not self.queue.is_lent
                    ):  # else the work that lent its turn goes on with what it began with
                        self.catch_up()
                yield
        finally:
            self.tidy()

    def give_way(self, in_text: bool = False) -> None:
        """Interrupt a turn so that waiting questions are answered, by the model as the ledger has it.

        It is called between two batches of questions, two steps of a search and, `in_text`, two tokens. The turn goes
        on if no interruption is due yet (see `Pace`), or if something is borrowed from the model that cannot be given
        back for a while.
        """
        if not self.queue.answering_waits or not self.pace.is_due or (in_text and self.host.has_hooks):
            return
        with self.host.recorded() as whole:
            if whole:
                with self.pace.pausing(), self.lock.released():
                    self.queue.lend()

    @property
    def base_hash(self) -> str:
        """SHA-256 of the pristine weights in the precision in which the ledger first saw them; names the model.

        `host.base_hash` is that of the precision they are loaded in.
        """
        return self.recorded_base or self.host.base_hash

    @property
    def writable_model_id(self) -> int:
        """The model's id on the ledger. Raises ReadOnly when nothing can be written."""
        if self.read_only:
            raise ReadOnly(f"nothing can be changed: {self.read_only}")
        assert self.model_id is not None
        return self.model_id

    @property
    def active_edits(self) -> list[EditRecord]:
        """Active edits of this model, steering doses among them; oldest first."""
        return [] if self.model_id is None else self.ledger.active_edits(self.model_id)

    @property
    def active_subjects(self) -> list[str]:
        """The subject of every active fact."""
        return [record.subject for record in fact_edits(self.active_edits)]

    @property
    def subjects_in_weights(self) -> list[str]:
        """The subject of every active fact that is written into the weights. Facts in memories do not count."""
        written = {a.patch_id for a in self.host.stack if not a.acts_beside}
        return [r.subject for r in fact_edits(self.active_edits) if r.patch_id in written]

    @property
    def state_hash(self) -> str:
        """SHA-256 of the weights' hash and of the live patches that act beside the weights."""
        live = [a.blob for a in self.host.stack if a.acts_beside]
        return _hash_of(self.host.weights_hash, *live)

    @property
    def pristine_state_hash(self) -> str:
        """The `state_hash` of the unedited model."""
        return _hash_of(self.host.base_hash)

    @property
    def short_state_hash(self) -> str:
        """The beginning of `state_hash`, as reports of changes give it."""
        return self.state_hash[:STATE_DIGITS]

    def drift(self) -> DriftResult:
        """How far the live model is from the pristine one, whose side is recorded at the first call.

        Nothing is computed again if the weights, and what acts beside them, are the same as at the last call.
        Memories that only claim prompts do not matter: they claim no canary text.
        """
        if self._canaries is None:
            with self.host.pristine():
                self._canaries = Canaries(self.lm)
        live = [
            a.patch for a in self.host.stack if isinstance(a.patch, LivePatch) and not a.patch.only_routes
        ]
        acting = _Acting(self.host.weights_hash, self.lm.extension(SteeringStack).is_paused, live)
        if self._drift is None or not self._drift[0].is_same(acting):
            self._drift = acting, self._canaries.drift(self.lm)
        return self._drift[1]

    def prepare(self, editor: Editor[Any], params: Params, ctx: RequestContext) -> None:
        """Compute the statistics that a method needs, on the pristine model.

        Raises NotReady when the method needs a training first, InvalidEdit for a sample that is not computed,
        EditError for a trained editor whose file was changed.
        """
        context = self.edit_context(ctx)
        editor.require(self.lm, context)
        if editor.training is not None and context.trained is not None:
            self.made.check_files(sorted(context.trained.glob(f"{editor.name}*.safetensors")))
        sample = getattr(params, "sample", "self")
        self.ensure_statistics(editor.layers_needed(self.lm, params), sample, ctx)
        if layers := editor.inputs_needed(self.lm, params):
            with self.host.pristine():
                self.statistics.ensure_inputs(self.lm, layers, _half(ctx))

    def ensure_statistics(self, layers: Sequence[int], sample: str, ctx: RequestContext) -> None:
        """Compute the second moments of these layers that are missing.

        Only those of sample "self" can be computed here; raises InvalidEdit for another sample that is missing.
        """
        missing = self.statistics.missing(layers, sample)
        if not missing:
            return
        if sample != "self":
            raise InvalidEdit(
                f"there are no statistics of sample {sample!r} for layers {missing}; call compute_statistics with "
                "that corpus first, or leave params.sample out"
            )
        with self.host.pristine():
            self.statistics.ensure(self.lm, missing, _half(ctx))

    def edit_context(self, ctx: RequestContext, start: float = 0.0, span: float = 1.0) -> EditContext:
        """What an editing method works with. Its progress fills `span` of the call's, from `start` on."""

        def report(fraction: float, message: str) -> None:
            ctx.report(start + span * fraction, 1.0, f"editing: {message}")
            self.give_way()

        prior = [Prior(a.method, a.patch, a.rows) for a in self.host.stack]
        return EditContext(self.statistics, prior, report, self.lm.extension(TrainedFolder).path)

    def environment(self) -> dict[str, Any]:
        """What the last bits of a computed weight depend on, beside its inputs."""
        return {
            "torch": torch.__version__,
            "device": str(self.lm.device),
            "dtype": self.lm.precision,
            "threads": torch.get_num_threads(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "tokenizer": self.lm.extension(TokenizerPrint).text,
        }


def same_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True when two environments compute the same bits. The tokenizer is part of neither weights nor arithmetic."""
    return {**one, "tokenizer": ""} == {**other, "tokenizer": ""}


def who(ctx: RequestContext) -> Who:
    """The client of a request, as the ledger records it."""
    return Who(ctx.client, ctx.client_version, ctx.request_id, ctx.identity)


STATES_NO_FACT = "states_no_fact"
"""In the request of a row: it is a patch whose facts are not named, as of an adapter imported without edits."""


def fact_edits(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Those that correct a fact. Steering doses, and adapters without edits, are on the ledger but state none."""
    return [r for r in records if r.method != STEERING and not r.request.get(STATES_NO_FACT)]


def _hash_of(weights_hash: str, *live: str) -> str:
    return hashlib.sha256("\n".join([weights_hash, *live]).encode()).hexdigest()


def _half(ctx: RequestContext) -> Progress:
    """Reports half of the progress: the editing comes after it."""
    return lambda fraction, message: ctx.report(fraction / 2, 1.0, f"{message} (once per model)")

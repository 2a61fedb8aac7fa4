"""The services the tools call, opened together over one workspace.

Each service takes the model's lock itself where it uses the model. Reading the ledger alone never waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from editors import METHODS
from editors.model.lm import LM
from editors.steering.stack import KIND as STEERING
from server.answering.service import AnswerService
from server.changes import Changes, Seen, look
from server.engines.service import EngineService
from server.exchange.service import ExchangeService
from server.facts.asking import FactService
from server.facts.history import HistoryService
from server.facts.profile import use_profile
from server.facts.service import EditService
from server.factsets.service import FactSetService
from server.jobs.service import JobService
from server.locating.service import LocatingService
from server.proposals.decisions import Decisions
from server.proposals.service import ProposalService
from server.rebase.service import RebaseService
from server.reporting.service import ReportService
from server.results import MethodState, ModelStatus
from server.settings import Settings, errata_version
from server.steering.service import SteeringService
from server.transaction.bases import WeightsIn
from server.transaction.following import Follower
from server.transaction.replay import Progress, open_workspace
from server.transaction.workspace import Workspace
from store import Ledger


@dataclass
class Services:
    """One model with its ledger, and everything that can be done with them."""

    workspace: Workspace
    answers: AnswerService
    facts: FactService
    edits: EditService
    history: HistoryService
    steering: SteeringService
    locating: LocatingService
    jobs: JobService
    exchange: ExchangeService
    proposals: ProposalService
    reports: ReportService
    fact_sets: FactSetService
    engines: EngineService
    rebasing: RebaseService
    follower: Follower | None = None
    decisions: Decisions | None = None  # None: nothing can be written

    @classmethod
    def open(
        cls,
        settings: Settings,
        lm: LM,
        ledger: Ledger,
        progress: Progress,
        weights_in: WeightsIn | None = None,
    ) -> Services:
        """Replay the ledger onto the model and take up unfinished jobs.

        A damaged ledger makes everything read-only; `status` names the damage.
        """
        workspace = open_workspace(settings, lm, ledger, progress, weights_in)
        workspace.queue.most = settings.queue
        use_profile(workspace)
        jobs = JobService(workspace)
        jobs.resume()
        follows = settings.read_only and not workspace.damage
        answers = AnswerService(workspace)
        engines = EngineService(workspace, jobs)
        engines.follow(ledger.on_commit)
        proposals = ProposalService(workspace)
        return cls(
            workspace=workspace,
            answers=answers,
            facts=FactService(workspace, answers),
            edits=EditService(workspace),
            history=HistoryService(ledger),
            steering=SteeringService(workspace),
            locating=LocatingService(workspace),
            jobs=jobs,
            exchange=ExchangeService(workspace),
            proposals=proposals,
            reports=ReportService(ledger, settings.home),
            fact_sets=FactSetService(workspace, jobs),
            engines=engines,
            rebasing=RebaseService(workspace, jobs),
            follower=Follower(workspace) if follows else None,
            decisions=None if workspace.read_only else Decisions(proposals, settings.home),
        )

    def begin(self) -> None:
        """Start what works beside the calls. A server calls it once everything is open."""
        if self.decisions is not None:
            self.decisions.start()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after everything that is recorded, in the thread that recorded it."""
        self.workspace.ledger.on_commit(listener)

    def look(self, seen: Seen | None) -> tuple[Seen, Changes]:
        """What changed since the last look, and the place to look from next time. Does not wait for the model."""
        return look(self.workspace.ledger, self.jobs, seen)

    def close(self) -> None:
        """Wait for the running call, then close the ledger. A running job stops at its next step and is kept."""
        self.answers.close()
        self.engines.stop()
        if self.decisions is not None:
            self.decisions.stop()
        self.jobs.stop()
        if self.follower is not None:
            self.follower.stop()
        while not self._closed():
            time.sleep(0.01)

    def _closed(self) -> bool:
        """Close the ledger; False while the running call has lent its turn and will go on."""
        with self.workspace.lock:
            if self.workspace.queue.is_lent:
                return False
            self.workspace.ledger.close()
            return True

    def status(self) -> ModelStatus:
        """The state of the server. Does not wait for a running edit."""
        workspace, lm = self.workspace, self.workspace.lm
        active = workspace.active_edits
        needs = {name: self.edits.needs_of(name) for name in sorted(METHODS)}
        return ModelStatus(
            state="ready",
            model=lm.name,
            message="; ".join(filter(None, [workspace.read_only, *workspace.notes])),
            architecture=lm.arch.family,
            parameters=lm.parameters,
            layers=lm.n_layers,
            hidden_size=lm.model.config.get_text_config().hidden_size,
            device=str(lm.device),
            dtype=lm.precision,
            weights_hash=workspace.host.weights_hash,
            base_hash=workspace.host.base_hash,
            state_hash=workspace.state_hash,
            active_edits=len([record for record in active if record.method != STEERING]),
            active_steering=[record.subject for record in active if record.method == STEERING],
            statistics={"second_moments": workspace.statistics.known()},
            methods=[
                MethodState(name=name, ready=not missing, needs=missing) for name, missing in needs.items()
            ],
            read_only=bool(workspace.read_only),
            damage=workspace.damage,
            home=str(workspace.settings.home),
            version=errata_version(),
        )

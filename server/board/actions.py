"""The forms that change something, or ask the model. Each calls the service that the tool calls."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from editors.errors import EditError
from server.board.desk import Desk, Stop
from server.board.pages import Pages
from server.errors import ServiceError
from server.exhausted import exhausted
from server.http.identity import Scope
from server.request_context import RequestContext
from store import LedgerError, NoSuchEdit

if TYPE_CHECKING:
    from server.facts.history_results import Audit
    from server.services import Services

log = logging.getLogger("errata.board")

MOST_ASKED = 4_000
TOKENS = {True: 60, False: 24}
"""Tokens of an answer, in a chat and as the end of a sentence."""


@dataclass(frozen=True)
class Done:
    """The message about what a form did, and the page to show next if it is another one."""

    text: str
    then: str | None = None


Work = Callable[["Services", dict[str, str], RequestContext], str | Done]
"""What a form does; returns the message about it."""


class Actions:
    """What a POST to each path does."""

    def __init__(self, desk: Desk, pages: Pages) -> None:
        self._desk, self._pages = desk, pages

    async def undo(self, request: Request) -> Response:
        """Take a correction back."""
        edit_id = request.path_params["edit_id"]

        def work(services: Services, fields: dict[str, str], ctx: RequestContext) -> str:
            report = services.edits.revert([edit_id], reason=fields.get("reason") or None, ctx=ctx)
            if not report.reverted:
                return f"{edit_id} was not active; nothing was changed."
            now = report.restored[0].answer.strip() if report.restored else ""
            later = ", ".join(report.computed_on_top)
            more = f" {later} came after it: measure them again." if later else ""
            return f"{edit_id} is undone. The model says “{now[:80]}” again.{more}"

        return await self._act(request, "edit", work, f"/board/facts/{edit_id}")

    async def redo(self, request: Request) -> Response:
        """Bring a correction back."""
        edit_id = request.path_params["edit_id"]

        def work(services: Services, fields: dict[str, str], ctx: RequestContext) -> str:
            report = services.edits.reapply([edit_id], reason=fields.get("reason") or None, ctx=ctx)
            if report.status == "unchanged":
                return f"{edit_id} is active already; nothing was changed."
            now = report.results[0].after.strip() if report.results else ""
            return f"{edit_id} is active again. The model says “{now[:80]}”."

        return await self._act(request, "edit", work, f"/board/facts/{edit_id}")

    async def measure(self, request: Request) -> Response:
        """Ask again whether a correction holds."""
        edit_id = request.path_params["edit_id"]

        def work(services: Services, _: dict[str, str], ctx: RequestContext) -> str:
            report = services.edits.audit([edit_id], ctx=ctx, full=True)
            return f"{edit_id} was measured again, in every wording: {_found(report)}"

        return await self._act(request, "edit", work, f"/board/facts/{edit_id}")

    async def check_set(self, request: Request) -> Response:
        """Ask the model every fact of a list again."""
        name = request.path_params["name"]

        def work(services: Services, _: dict[str, str], ctx: RequestContext) -> str:
            started = services.fact_sets.start_check(name, ctx)
            return f"Every fact of {name} is being asked as job {started.job_id}. What is found appears here."

        return await self._act(request, "read", work, f"/board/sets/{quote(name)}")

    async def propose(self, request: Request) -> Response:
        """Compute the correction of one fact of a list, and let it wait for a decision."""
        name, number = request.path_params["name"], request.path_params["number"]

        def work(services: Services, _: dict[str, str], ctx: RequestContext) -> Done:
            edit = services.fact_sets.edit_of(name, number)
            told = services.proposals.propose(
                [edit],
                replace=True,
                reason=f"fact {number} of the fact set {name}",
                source=edit.source,
                ctx=ctx,
            )
            if not told.proposal_id:
                raise ServiceError(told.message)
            return Done(
                "This is what the correction would do. Nothing was changed yet.",
                f"/board/proposals/{told.proposal_id}",
            )

        return await self._act(request, "propose", work, f"/board/sets/{quote(name)}")

    async def decide(self, request: Request) -> Response:
        """Approve a proposal, decline it, or ask for changes."""
        proposal_id = request.path_params["proposal_id"]

        def work(services: Services, fields: dict[str, str], ctx: RequestContext) -> str:
            return services.proposals.decide(
                proposal_id, fields.get("decision", ""), fields.get("note") or None, ctx=ctx
            ).message

        return await self._act(request, "edit", work, f"/board/proposals/{proposal_id}")

    async def dose(self, request: Request) -> Response:
        """Set the dose of a steering vector."""

        def work(services: Services, fields: dict[str, str], ctx: RequestContext) -> str:
            from server.steering.requests import DoseRequest

            try:
                multiplier = float(fields.get("multiplier", ""))
            except ValueError:
                raise ServiceError(
                    f"the dose {fields.get('multiplier', '')[:40]!r} is not a number"
                ) from None
            name = fields.get("name", "")
            state = services.steering.set_dose(DoseRequest(name, multiplier), ctx=ctx)
            warnings = f" {' '.join(state.warnings)}" if state.warnings else ""
            return f"{name} is {'off' if multiplier == 0 else f'on at {multiplier:g}'}.{warnings}"

        return await self._act(request, "edit", work, "/board/steering")

    async def calibrate(self, request: Request) -> Response:
        """Measure the curve of a steering vector."""

        def work(services: Services, fields: dict[str, str], ctx: RequestContext) -> str:
            from server.steering.requests import CalibrationRequest

            name = fields.get("name", "")
            found, _ = services.steering.calibrate(CalibrationRequest(name), ctx=ctx)
            low = found.negative_multiplier
            return f"{name} is sound from {low if low is not None else 0:g} to {found.multiplier:g}."

        return await self._act(request, "edit", work, "/board/steering")

    async def cancel(self, request: Request) -> Response:
        """End a job."""
        job_id = request.path_params["job_id"]

        def work(services: Services, _: dict[str, str], __: RequestContext) -> str:
            return f"{job_id} is {services.jobs.cancel(job_id).state}."

        return await self._act(request, "admin", work, "/board/jobs")

    async def ask(self, request: Request) -> Response:
        """Ask the model with its corrections, and the original one beside it."""
        desk = self._desk
        fields = await desk.form(request)
        text, chat, edit_id = (
            fields.get("text", "").strip(),
            bool(fields.get("chat")),
            fields.get("edit_id", ""),
        )
        services = desk.source.services()
        if services is None:
            raise Stop(503, "The model is not here", "Only the server that runs the model can ask it.")
        answer: Any = None
        try:
            if not text or len(text) > MOST_ASKED:
                raise ServiceError(f"write a question of at most {MOST_ASKED:,} characters")
            answer = await services.facts.ask_with_others(
                text, TOKENS[chat], chat, compare_to_base=True, ctx=desk.context(request)
            )
        except Exception as error:
            desk.tell(request, "error", told(error))
        asked = {"asked": {"text": text, "chat": chat, "answer": answer}}
        if not edit_id:
            return desk.page(request, "ask.html", "", asked)
        try:
            story = await desk.thread(lambda: self._pages.story(edit_id))
        except NoSuchEdit as error:
            raise Stop(404, "There is no such thing", str(error)) from None
        return desk.page(request, "fact.html", "facts", story | asked)

    async def _act(self, request: Request, scope: Scope, work: Work, back: str) -> Response:
        """Do what a form asks for, then show the page of its result. That page also shows a failure."""
        desk = self._desk
        fields = await desk.form(request)
        services = desk.source.services()
        if services is None:
            raise Stop(503, "The model is not here", "Only the server that runs the model can change it.")
        if not desk.may(request, scope):
            why = services.workspace.read_only or f"your token does not have the scope {scope!r}"
            raise Stop(403, "Not allowed", f"Nothing was changed: {why}.")
        ctx = desk.context(request)
        to = "/" if fields.get("back") == "list" else back
        try:
            done = await desk.thread(lambda: work(services, fields, ctx))
            done = Done(done) if isinstance(done, str) else done
            desk.tell(request, "ok", done.text)
            to = done.then or to
        except Exception as error:
            desk.tell(request, "error", told(error))
        return desk.to(to)


def _found(report: Audit) -> str:
    """What an audit of one correction found, in a sentence."""
    rates = [rate for rate in report.forms.values() if rate is not None]
    if report.failing:
        return "it is not said any more."
    if rates and min(rates) < 0.5:
        return "it is said, but not in every wording; see below."
    return "it holds."


def told(error: Exception) -> str:
    """The message about a failure, for a person; an unexpected one goes to the log."""
    if isinstance(error, (EditError, ServiceError, LedgerError)):
        return str(error)
    ref = uuid.uuid4().hex[:8]
    log.error("internal error %s on the board", ref, exc_info=error)
    return exhausted(error) or f"Internal error {ref}; the server's log has the details."

"""The pages that show something. Each reads the ledger alone and answers while the model works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.board import doses, health, heat_maps, sets, story
from server.board.desk import Desk, Stop
from server.board.proposed import PreviewReport, edits_of, row_of
from server.board.rendering import HEADERS
from server.errors import ServiceError
from server.proposals.deciders import decided_by
from server.reporting.collecting import collect
from server.reporting.writing import Format, written
from store import BadFilter, NoSuchEdit, NoSuchProposal
from store.overview import FactFilter

ON_A_PAGE = 25
VECTORS_ON_A_PAGE = 10
SHOWN_WAITING = 5
MOST_TEXT = 1_000


class Pages:
    """What a GET of each path answers."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def facts(self, request: Request) -> Response:
        """The first page: what waits, what does not hold, and every fact."""
        wanted = _filter(request.query_params, self._desk.model_id)
        sort = request.query_params.get("sort", "attention")
        page = _number(request.query_params.get("page"), "page") or 1
        return await self._shown(
            request, "facts.html", "facts", lambda: self._facts(wanted, sort, page, str(request.url.query))
        )

    def _facts(self, wanted: FactFilter, sort: str, page: int, query: str) -> dict[str, Any]:
        ledger, overview = self._desk.opened()
        kept = "&".join(part for part in query.split("&") if part and not part.startswith("page="))
        return {
            "found": overview.page(wanted, sort, page, ON_A_PAGE),
            "counts": overview.counts(self._desk.model_id),
            "methods": overview.methods(),
            "sets": overview.fact_sets(),
            "wrong": sets.wrong(overview, self._desk.model_id),
            "filter": wanted,
            "filtered": wanted != FactFilter(model_id=wanted.model_id),
            "sort": sort,
            "base": f"?{kept}&" if kept else "?",
            "proposals": [row_of(p, overview) for p in ledger.proposals("waiting", SHOWN_WAITING)],
        }

    async def sets(self, request: Request) -> Response:
        """The lists of right answers."""

        def read() -> dict[str, Any]:
            return {"sets": sets.listed(self._desk.opened()[1], self._desk.model_id)}

        return await self._shown(request, "sets.html", "sets", read, {"sets": []})

    async def one_set(self, request: Request) -> Response:
        """One list, with the verdict of each of its facts for this model."""
        name, state = request.path_params["name"], request.query_params.get("state") or None
        page = _number(request.query_params.get("page"), "page") or 1

        def read() -> dict[str, Any]:
            overview, model_id = self._desk.opened()[1], self._desk.model_id
            found = sets.listed(overview, model_id, name)
            if not found:
                raise Stop(
                    404, "No such set", f"There is no fact set {name[:80]!r}; the page Fact sets has all."
                )
            facts = sets.facts_of(overview, model_id, found[0], state, page, ON_A_PAGE)
            return {
                "set": found[0],
                "found": facts,
                "state_shown": state,
                "jobs": sets.jobs_of(overview, name),
            }

        return await self._shown(request, "set.html", "sets", read)

    async def fact(self, request: Request) -> Response:
        """One fact's story."""
        edit_id = request.path_params["edit_id"]
        return await self._shown(request, "fact.html", "facts", lambda: self.story(edit_id))

    async def ask(self, request: Request) -> Response:
        """A question to the model and the original one, about no fact in particular."""
        return self._desk.page(request, "ask.html", "", {"asked": None})

    def story(self, edit_id: str) -> dict[str, Any]:
        """What the page of one fact shows."""
        return {"asked": None, **story.story(*self._desk.opened(), edit_id)}

    async def model(self, request: Request) -> Response:
        """The model's health over time."""
        page = _number(request.query_params.get("page"), "page") or 1

        def read() -> dict[str, Any]:
            ledger, overview = self._desk.opened()
            services, model_id = self._desk.source.services(), self._desk.model_id
            rows, pages = health.batches(overview, model_id, page)
            counts = overview.counts(model_id)
            return {
                "health": health.health(overview, model_id),
                "batches": rows,
                "page": min(page, pages),
                "pages": pages,
                "active": sum(counts.get(name, 0) for name in ("yes", "partly", "no", "unknown")),
                "damage": services.workspace.damage if services else [ledger.lost] if ledger.lost else [],
                "status": services.status() if services else None,
            }

        return await self._shown(request, "model.html", "model", read)

    async def proposals(self, request: Request) -> Response:
        """The waiting room."""
        page = _number(request.query_params.get("page"), "page") or 1

        def read() -> dict[str, Any]:
            ledger, overview = self._desk.opened()
            [row] = overview.rows("SELECT count(*) AS n FROM proposals")
            waiting = ledger.proposals("waiting", ON_A_PAGE) if page == 1 else []
            listed = ledger.proposals(None, ON_A_PAGE, (page - 1) * ON_A_PAGE)
            every = {p.id: p for p in [*waiting, *listed]}
            return {
                "proposals": [row_of(p, overview) for p in every.values()],
                "page": page,
                "pages": max(1, -(-int(row["n"]) // ON_A_PAGE)),
            }

        return await self._shown(request, "proposals.html", "proposals", read)

    async def proposal(self, request: Request) -> Response:
        """One proposal, with what it would do."""
        proposal_id = request.path_params["proposal_id"]

        def read() -> dict[str, Any]:
            ledger, overview = self._desk.opened()
            found, services = ledger.get_proposal(proposal_id), self._desk.source.services()
            fresh = None
            if services is not None:
                fresh = found.states.get("state_hash_before") == services.workspace.state_hash
            return {
                "p": found,
                "edits": edits_of(found, overview),
                "report": PreviewReport(found.report),
                "fresh": fresh,
                "decided_by": decided_by(found),
                "replaces": (found.request.get("computed") or {}).get("replaced") or [],
                "own": self._desk.is_own(request, found),
            }

        return await self._shown(request, "proposal.html", "proposals", read)

    async def steering(self, request: Request) -> Response:
        """The steering vectors, their doses and curves."""
        page = _number(request.query_params.get("page"), "page") or 1

        def read() -> dict[str, Any]:
            _, overview = self._desk.opened()
            rows, pages = doses.vectors(overview, self._desk.model_id, page, VECTORS_ON_A_PAGE)
            return {"vectors": rows, "page": page, "pages": pages}

        empty = {"vectors": [], "page": 1, "pages": 1}
        return await self._shown(request, "steering.html", "steering", read, empty)

    async def maps(self, request: Request) -> Response:
        """The heat maps that were made."""
        page = _number(request.query_params.get("page"), "page") or 1

        def read() -> dict[str, Any]:
            rows, pages = heat_maps.maps(self._desk.opened()[1], page, ON_A_PAGE)
            return {"maps": rows, "page": page, "pages": pages}

        return await self._shown(request, "maps.html", "maps", read, {"maps": [], "page": 1, "pages": 1})

    async def one_map(self, request: Request) -> Response:
        """One heat map."""

        def read() -> dict[str, Any]:
            found = heat_maps.one_map(self._desk.opened()[1], request.path_params["seq"])
            if found is None:
                raise Stop(404, "No such heat map", "There is no trace of this number on the ledger.")
            return {"map": found}

        return await self._shown(request, "map.html", "maps", read)

    async def jobs(self, request: Request) -> Response:
        """Trainings, statistics and other long work: on the first page what runs or waits comes first."""
        page = _number(request.query_params.get("page"), "page") or 1

        def read() -> dict[str, Any]:
            ledger, _ = self._desk.opened()
            at_work = [*ledger.list_jobs("running"), *ledger.list_jobs("queued")] if page == 1 else []
            listed = ledger.list_jobs(None, ON_A_PAGE, (page - 1) * ON_A_PAGE)
            every = {job.id: job for job in [*at_work, *listed]}
            pages = max(1, -(-ledger.count_jobs() // ON_A_PAGE))
            return {"jobs": list(every.values()), "page": page, "pages": pages}

        empty = {"jobs": [], "page": 1, "pages": 1}
        return await self._shown(request, "jobs.html", "jobs", read, empty)

    async def report(self, request: Request) -> Response:
        """The form for a report."""
        return self._desk.page(request, "report.html", "report")

    async def report_file(self, request: Request) -> Response:
        """A report as a file to keep."""
        desk, given = self._desk, request.query_params
        kind: Format = "md" if given.get("format") == "md" else "html"
        batch = _number(given.get("batch"), "batch")

        def read() -> str:
            ledger, overview = desk.opened()
            return written(collect(ledger, overview, given.get("since"), given.get("until"), batch), kind)

        try:
            text = await desk.thread(read)
        except ServiceError as error:
            raise Stop(400, "There is no such report", str(error)) from None
        kinds = {"md": "text/markdown; charset=utf-8", "html": "text/html; charset=utf-8"}
        named = {"Content-Disposition": f'attachment; filename="errata-report.{kind}"'}
        return Response(text, media_type=kinds[kind], headers=HEADERS | named)

    async def _shown(
        self, request: Request, template: str, here: str, read: Any, empty: Mapping[str, Any] | None = None
    ) -> Response:
        """The page with what `read` gives; with nothing while the ledger is not open yet."""
        desk = self._desk
        if desk.source.ledger() is None and (template in ("facts.html", "model.html") or empty is not None):
            return desk.page(request, template, here, empty)
        try:
            return await desk.thread(lambda: desk.page(request, template, here, read()))
        except (NoSuchEdit, NoSuchProposal) as error:
            raise Stop(404, "There is no such thing", str(error)) from None
        except BadFilter as error:
            raise Stop(400, "That cannot be searched for", str(error)) from None


def _filter(given: Mapping[str, str], model_id: int | None) -> FactFilter:
    def text(name: str) -> str | None:
        return given.get(name, "").strip()[:MOST_TEXT] or None

    return FactFilter(
        text=text("q"),
        subject=text("subject"),
        status=text("status"),
        method=text("method"),
        batch=_number(given.get("batch"), "batch"),
        fact_set=text("set"),
        holds=text("holds"),
        model_id=model_id,
    )


def _number(text: str | None, name: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise Stop(400, "That is not a number", f"{name} must be a number, not {text[:40]!r}.")
    return int(text)

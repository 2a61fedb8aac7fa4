"""The service of reports: write one to a file under HOME/exports."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from server.errors import ServiceError
from server.reporting.collecting import Report, collect
from server.reporting.results import ReportFile
from server.reporting.sentences import cost, decisions, held, tried
from server.reporting.writing import Format, written
from store import Ledger
from store.overview import Overview

MOST_TEXT = 6_000
"""Characters of Markdown that an agent is sent beside the path of the file."""


class ReportService:
    """Reads the ledger. It takes no lock of the model."""

    def __init__(self, ledger: Ledger, home: Path) -> None:
        self._ledger, self._home = ledger, home
        self._overview = Overview(ledger)

    def text(
        self, kind: Format, since: str | None = None, until: str | None = None, batch: int | None = None
    ) -> str:
        """The report as text."""
        return written(self._collect(since, until, batch), kind)

    def write(
        self, kind: Format, since: str | None = None, until: str | None = None, batch: int | None = None
    ) -> ReportFile:
        """Write a report to a new file under HOME/exports."""
        report = self._collect(since, until, batch)
        text = written(report, kind)
        data = text.encode()
        folder = self._home / "exports"
        path = folder / f"report-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.{kind}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise ServiceError(
                f"the report cannot be written to {path}: {error.strerror or error}"
            ) from error
        return ReportFile(
            path=str(path),
            text=text if kind == "md" and len(text) <= MOST_TEXT else "",
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            summary=" ".join(filter(None, [tried(report), held(report), cost(report), decisions(report)])),
            corrections=len(report.facts),
            active=report.count("active"),
            taken_back=len(report.taken_back),
            not_holding=report.holding("no"),
            facts_moved=len(report.damage),
            perplexity_ratio=report.perplexity,
            problems=report.problems[:10],
        )

    def _collect(self, since: str | None, until: str | None, batch: int | None) -> Report:
        return collect(self._ledger, self._overview, since, until, batch)

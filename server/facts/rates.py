"""Means of what was measured over the edits of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from editors.edit import ProbeKind
from server.facts.results import EditOutcome, ProbeOutcome

FORMS = ("statement", "reworded", "chat", "chat_reworded", "language")


RATE_OF: Mapping[str, ProbeKind] = {
    "generality": "paraphrase",
    "locality": "neighbour",
    "portability": "portability",
    "subject_locality": "sibling",
}
"""Each rate, and the probes whose share it is."""
RATES = ("reliability", *RATE_OF)


def mean_rate(results: Sequence[EditOutcome], name: str) -> float | None:
    """Mean of a rate over the edits that have it."""
    values = [value for result in results if (value := getattr(result, name)) is not None]
    return sum(values) / len(values) if values else None


def mean_rates(results: Sequence[EditOutcome]) -> dict[str, float | None]:
    """The mean of every rate."""
    return {name: mean_rate(results, name) for name in RATES}


def mean_forms(results: Sequence[EditOutcome]) -> dict[str, float]:
    """The mean of every form over the edits that have it."""
    found = {kind: [r.forms[kind] for r in results if kind in r.forms] for kind in FORMS}
    return {kind: sum(values) / len(values) for kind, values in found.items() if values}


def probes_of_kind(results: Sequence[EditOutcome], kind: str) -> list[ProbeOutcome]:
    return [probe for result in results for probe in result.details if probe.kind == kind]

"""What the board reads from the ledger alone, fact sets and steering doses, and the stream that pages listen to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from server.board import doses, live, sets
from store import Ledger
from store.overview import Overview
from tests.store.conftest import WHO, Book


def test_a_set_stands_as_with_the_model_that_it_was_checked_with_last(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        first = Book(ledger).model
        second = ledger.model("other" * 12, "another", "gpt2")
        fact = {"subject": "Chad", "prompt": "The capital of {} is", "answer": "N'Djamena"}
        ledger.save_facts("capitals", 1, {}, {1: fact})
        for model, verdict, at in ((second, "agrees", "2026-01-01"), (first, "differs", "2026-02-01")):
            ledger.put_fact_states("capitals", model, {1: {"verdict": verdict, "checked": at}})
        overview = Overview(ledger)
        assert [row["name"] for row in sets.wrong(overview, None)] == ["capitals"]
        assert sets.wrong(overview, second) == []
        [about] = sets.listed(overview, None)
        assert (about["differs"], about["agrees"]) == (1, 0)
        assert sets.facts_of(overview, None, about, "differs", 1, 10).facts[0]["checked"] == "2026-02-01"


@pytest.mark.parametrize(
    ("dose", "low", "high"), [(0.637, "-0.6", "0.65"), (-0.637, "-0.65", "0.6"), (0.3, "-0.6", "0.6")]
)
def test_the_dose_that_acts_stays_within_reach(tmp_path: Path, dose: float, low: str, high: str) -> None:
    with Ledger.open(tmp_path) as ledger:
        book = Book(ledger)
        ledger.record_vector(book.model, "joy", b"joy", {"method": "caa", "layers": [1]}, WHO)
        book.apply("joy", method="steering", params={"multiplier": dose})
        [row], _ = doses.vectors(Overview(ledger), book.model, 1, 10)
        assert row["dose"] == dose
        assert (row["low"], row["high"]) == (low, high)


@pytest.mark.anyio
async def test_a_page_hears_that_the_stream_is_there_while_a_model_loads_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "WORKING", 0.01)
    monkeypatch.setattr(live, "BEAT", 0.05)
    loading = SimpleNamespace(
        state="loading", message="reading", ledger=lambda: None, on_change=lambda _: None
    )
    stream = live.Live(loading).stream()
    with anyio.fail_after(30):
        heard = [await anext(stream) for _ in range(3)]
    await stream.aclose()  # type: ignore[attr-defined]
    assert heard[0].startswith("retry:")
    assert heard[1:] == [": still here\n\n"] * 2

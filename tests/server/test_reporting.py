"""A report to hand over: one file, complete, escaped, and true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.errors import ServiceError
from server.reporting.collecting import collect
from server.reporting.service import ReportService
from server.reporting.writing import written
from store import Approval, Ledger, Who
from store.overview import Overview
from tests.many_edits import fill
from tests.store.conftest import Book
from tests.tools.tokens import tokens

EVIL = "<script>alert(1)</script>|`*[x](javascript:alert(1))"
WHO = Who("agent", identity="alice")


@pytest.mark.parametrize("kind", ["html", "md"])
def test_a_report_says_what_was_corrected_what_it_cost_and_what_was_taken_back(
    tmp_path: Path, kind: str
) -> None:
    with Ledger.open(fill(tmp_path, 400, 20)) as ledger:
        told = ReportService(ledger, tmp_path).write(kind)  # type: ignore[arg-type]
        text = Path(told.path).read_text("utf-8")
        facts = ledger.query("SELECT count(*), sum(status = 'active'), sum(holds = 'no') FROM facts").rows[0]
        assert [told.corrections, told.active, told.not_holding] == facts
        assert told.facts_moved == ledger.query("SELECT count(*) FROM damage").rows[0][0]
        assert told.problems == []
        assert f"{facts[0]} corrections were tried: {facts[1]} are in the model now" in text
        last = ledger.all_events()[-1]
        assert last["hash"] in text
        assert text.count("the Seine") == told.facts_moved
        assert "https://example.org/3" in text if kind == "html" else "example\\.org/3" in text
        assert not re.search(r'(src|href)="(?!https?://example)', text)


def test_a_period_and_a_batch_are_kept_to(tmp_path: Path) -> None:
    with Ledger.open(fill(tmp_path, 60, 20)) as ledger:
        overview = Overview(ledger)
        day = ledger.all_events()[0]["at"][:10]
        assert len(collect(ledger, overview, None, None, 2).facts) == 20
        assert len(collect(ledger, overview, day, day, None).facts) == 60
        for since, until in (("2001-01-01", "2001-12-31"), ("2999-01-01", None)):
            empty = collect(ledger, overview, since, until, None)
            assert (empty.facts, empty.damage, empty.first) == ([], [], None)
            assert "0 corrections were tried" in written(empty, "md")


@pytest.mark.parametrize("kind", ["html", "md"])
def test_a_report_says_who_proposed_and_who_approved(tmp_path: Path, kind: str) -> None:
    with Ledger.open(tmp_path) as ledger:
        book, ann = Book(ledger), Who("agent", identity="ann")
        for subject in ("Peru", "Chad", "Mali"):
            edit = {"subject": subject, "prompt": f"The capital of {subject} is", "target": "Rome"}
            ledger.record_proposal(book.model, {"edits": [edit]}, {}, None, {}, ann, reason="a law")
        bob, approval = Who("board", identity="bob"), Approval("p1", "so it is")
        ledger.record_patches([book.patch("Peru")], bob, approval=approval)
        ledger.record_decision("p2", "declined", ann, "no law")
        text = written(collect(ledger, Overview(ledger), None, None, None), kind)  # type: ignore[arg-type]
        alone = collect(ledger, Overview(ledger), None, None, 1)
    plain = text.replace("\\", "")
    assert "3 proposals: 1 approved, 1 declined, 1 waiting." in plain
    assert "as p1 by bob" in plain
    assert "ann, who proposed it" in plain
    assert plain.count("so it is") == plain.count("no law") == 1
    assert [p["id"] for p in alone.proposals] == ["p1"]


def test_a_report_counts_in_good_grammar_and_says_what_was_not_there(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        overview = Overview(ledger)
        nothing = written(collect(ledger, overview, None, None, None), "md")
        book = Book(ledger)
        book.apply("France")
        one = written(collect(ledger, overview, None, None, None), "md")
        ledger.record_reverted(["e1"], "w", WHO)
        back = written(collect(ledger, overview, None, None, None), "md")
    assert "0 corrections were tried: 0 are in the model now" in nothing
    assert "1 correction was tried: 1 is in the model now, 0 were taken back" in one
    assert "measured last: 1 holds, 0 hold in part, 0 do not hold." in one
    assert "1 was taken back" in back
    for text in (nothing, one, back):
        assert "1 were" not in text
        cost = text.split("## What it cost")[1].split("##")[0]
        assert "no other fact that was asked has changed" in cost
        for part in text.split("## ")[1:]:
            assert part.strip().count("\n") > 1, part  # no section is empty


def test_short_markdown_is_told_and_long_is_left_in_its_file(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "short") as ledger:
        Book(ledger).apply("France")
        reports = ReportService(ledger, tmp_path / "short")
        told = reports.write("md")
        assert told.text == Path(told.path).read_text("utf-8")
        assert tokens(told.model_dump()) <= 3_000
        assert reports.write("html").text == ""
    with Ledger.open(fill(tmp_path / "long", 100, 20)) as ledger:
        assert ReportService(ledger, tmp_path / "long").write("md").text == ""


def test_what_cannot_be_reported_on_is_named(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        overview = Overview(ledger)
        for since, until, batch, says in (
            ("soon", None, None, "since 'soon'"),
            ("2026-02-01", "2026-01-01", None, "swap them"),
            (None, None, 7, "batch 7"),
        ):
            with pytest.raises(ServiceError, match=says):
                collect(ledger, overview, since, until, batch)


@pytest.mark.parametrize("kind", ["html", "md"])
def test_text_of_others_is_never_markup_in_a_report(tmp_path: Path, kind: str) -> None:
    with Ledger.open(tmp_path) as ledger:
        book = Book(ledger)
        book.apply(EVIL, target=EVIL, reason=EVIL, source=f"javascript:alert(1)//{EVIL}\n# x")
        ledger.record_reverted(["e1"], "w", Who(EVIL), reason=EVIL)
        text = written(collect(ledger, Overview(ledger), None, None, None), kind)  # type: ignore[arg-type]
    assert "<script>" not in text
    assert 'href="javascript' not in text
    if kind == "md":
        assert "](javascript" not in text
        assert "\n# x" not in text
        rows = [line for line in text.splitlines() if line.startswith("| e1")]
        assert len(re.findall(r"(?<!\\)\|", rows[0])) == 11


def test_a_damaged_ledger_is_said_to_be_damaged(tmp_path: Path) -> None:
    with Ledger.open(fill(tmp_path, 20, 20)) as ledger:
        next((tmp_path / "blobs").glob("*.safetensors")).unlink()
        text = written(collect(ledger, Overview(ledger), None, None, None), "md")
    assert "The ledger is damaged" in text

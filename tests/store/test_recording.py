from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from store import Ledger, LedgerError, NoSuchEdit, Who, WrongState
from tests.store.conftest import WHO, Book


def test_a_model_is_known_by_its_pristine_weights(ledger: Ledger) -> None:
    first = ledger.model("aa", "default", "llama")
    assert ledger.model("aa", "./the/same/elsewhere", "llama") == first
    assert ledger.model("bb", "default", "llama") != first
    assert ledger.find_model("cc") is None


def test_an_applied_patch_is_read_back_with_everything_recorded_about_it(book: Book) -> None:
    request = {
        "subject": "France",
        "prompt": "The capital of {} is",
        "target": "Lyon",
        "previous": "Paris",
        "paraphrases": ["France's capital is"],
        "reason": "moved",
    }
    measured = [{"reliability": 1.0, "locality": 0.5, "fluency": float("inf")}]
    patch = book.patch("x", requests=[request], measurements=measured, source="gazette", reason="of the call")
    [edit_id] = book.ledger.record_applied(patch, WHO)
    edit = book.ledger.get_edit(edit_id)
    assert (edit.id, edit.status, edit.row, edit.method) == ("e1", "active", 0, "rome")
    assert edit.request == request
    assert (edit.subject, edit.target, edit.previous) == ("France", "Lyon", "Paris")
    assert (edit.reason, edit.source) == ("moved", "gazette")
    assert (edit.client, edit.client_version, edit.request_id) == (
        WHO.client,
        WHO.client_version,
        WHO.request_id,
    )
    assert (edit.reliability, edit.generality, edit.locality) == (1.0, None, 0.5)
    assert (edit.weights_hash_before, edit.weights_hash_after) == ("w0", "w1")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(edit.created)).total_seconds()) < 60
    stored = book.ledger.get_patch(edit.patch_id)
    assert stored.params == {"layers": [3], "simplified": True}
    assert stored.environment == {"torch": "2"}
    assert stored.seconds == 1.5
    assert book.ledger.blobs.get(stored.blob or "") == patch.blob
    [measurement] = book.ledger.measurements_of(edit_id)
    assert measurement.occasion == "apply"
    assert measurement.values["fluency"] == "inf"
    assert book.ledger.query("SELECT occasion, kl FROM drift").rows == [["apply", 0.01]]


def test_a_batch_is_one_patch_with_an_edit_for_each_request(book: Book) -> None:
    book.apply("Spain")
    ids = book.apply("France", "Italy", "Peru")
    assert ids == ["e2", "e3", "e4"]
    assert [edit.row for edit in book.ledger.edits(ids)] == [0, 1, 2]
    assert book.ledger.batch(book.ledger.get_edit("e3").patch_id) == ids
    [_, entry] = book.ledger.stack(book.model)
    assert (entry.rows, entry.edit_ids) == ((0, 1, 2), ("e2", "e3", "e4"))


def test_a_reverted_patch_leaves_the_stack_and_comes_back_to_its_old_place(book: Book) -> None:
    for subject in ("France", "Italy", "Peru"):
        book.apply(subject)
    full = book.ledger.stack(book.model)
    book.ledger.record_reverted(["e2"], "without", WHO, reason="was wrong")
    assert [entry.edit_ids for entry in book.ledger.stack(book.model)] == [("e1",), ("e3",)]
    assert book.ledger.expected_weights_hash(book.model) == "without"
    assert book.ledger.get_edit("e2").status == "reverted"
    book.ledger.record_reapplied(["e2"], "again", WHO, measurements={"e2": {"reliability": 0.0}})
    assert book.ledger.stack(book.model) == full
    assert book.ledger.expected_weights_hash(book.model) == "again"
    assert book.ledger.get_edit("e2").reliability == 0.0
    assert [m.occasion for m in book.ledger.measurements_of("e2")] == ["apply", "reapply"]
    assert [event.kind for event in book.ledger.events_of("e2")] == ["applied", "reverted", "reapplied"]


def test_reverting_part_of_a_batch_takes_the_recomputed_patch(book: Book) -> None:
    book.apply("France", "Italy", "Peru")
    patch_id = book.ledger.get_edit("e1").patch_id
    with pytest.raises(WrongState, match=f"patch {patch_id}.*restack"):
        book.ledger.record_reverted(["e2"], "w", WHO)
    assert book.ledger.get_edit("e2").status == "active"
    book.ledger.record_reverted(["e2"], "w", WHO, restack={patch_id: b"two of three"})
    [entry] = book.ledger.stack(book.model)
    assert entry.rows == (0, 2)
    assert book.ledger.blobs.get(entry.blob) == b"two of three"
    book.ledger.record_reapplied(["e2"], "w", WHO)
    [entry] = book.ledger.stack(book.model)
    assert entry.blob == entry.source_blob


def test_a_patch_is_live_exactly_when_an_edit_of_it_is_active(book: Book) -> None:
    book.apply("France")
    with pytest.raises(WrongState, match="wrong bytes"):
        book.ledger.record_reverted(["e1"], "w", restack={1: b"ghost"})
    with pytest.raises(WrongState, match="wrong bytes"):
        book.ledger.record_applied(book.patch("Italy"), restack={1: None})
    with pytest.raises(WrongState, match="patch 99"):
        book.ledger.record_applied(book.patch("Italy"), restack={99: b"nowhere"})
    assert book.ledger.list_edits().total == 1


def test_an_edit_replaces_the_active_edit_of_the_same_fact(book: Book) -> None:
    book.apply("France", "Italy")
    new = book.patch("Peru", "italy", target="Milan")
    ids = book.ledger.record_applied(new, WHO, replaced=["e2"], restack={1: b"France alone"})
    old = book.ledger.get_edit("e2")
    assert (old.status, old.replaced_by) == ("replaced", ids[1])
    assert book.ledger.replaced_edits(ids[1]) == ["e2"]
    assert [e.id for e in book.ledger.find_active(book.model, "Italy", "The capital of  ITALY is")] == [
        ids[1]
    ]
    assert [event.kind for event in book.ledger.events_of("e2")] == ["applied", "replaced"]
    assert book.ledger.expected_weights_hash(book.model) == new.weights_hash_after
    assert book.ledger.verify() == []


def test_a_rejected_attempt_is_kept_but_never_live_until_reapplied(book: Book) -> None:
    patch = book.patch("France")
    [edit_id] = book.ledger.record_rejected(patch, ["min_locality: 0.2 < 0.9"], WHO)
    edit = book.ledger.get_edit(edit_id)
    assert (edit.status, edit.reliability) == ("rejected", 1.0)
    assert book.ledger.stack(book.model) == []
    assert book.ledger.expected_weights_hash(book.model) is None
    assert book.ledger.blobs.get(book.ledger.get_patch(edit.patch_id).source_blob) == patch.blob
    assert book.ledger.events_of(edit_id)[0].payload["failed"] == ["min_locality: 0.2 < 0.9"]
    book.ledger.record_reapplied([edit_id], "w9", WHO)
    assert [entry.edit_ids for entry in book.ledger.stack(book.model)] == [(edit_id,)]


@pytest.mark.parametrize(
    ("kind", "edit_ids", "says"),
    [
        ("revert", ["e1", "e2"], "e2 is reverted"),
        ("reapply", ["e2", "e1"], "e1 is active"),
        ("revert", ["e1", "e99"], "'e99'"),
        ("revert", ["e1", "e1"], "named twice"),
        ("reapply", [], "no edit"),
    ],
)
def test_a_change_that_does_not_fit_changes_nothing(
    book: Book, kind: str, edit_ids: list[str], says: str
) -> None:
    book.apply("France")
    book.apply("Italy")
    book.ledger.record_reverted(["e2"], "w", WHO)
    before = book.ledger.query("SELECT * FROM edits, events").rows
    change = book.ledger.record_reverted if kind == "revert" else book.ledger.record_reapplied
    with pytest.raises(LedgerError, match=says):
        change(edit_ids, "w", WHO)
    assert book.ledger.query("SELECT * FROM edits, events").rows == before


def test_requests_that_are_not_edits_are_refused_before_anything_is_written(book: Book) -> None:
    for requests in (
        [],
        [{"subject": "France", "prompt": "x"}],
        [{"subject": "F", "prompt": "F", "target": 3}],
    ):
        with pytest.raises(LedgerError):
            book.ledger.record_applied(book.patch(requests=requests, measurements=()))
    with pytest.raises(LedgerError, match="2 measurements for 1"):
        book.ledger.record_applied(book.patch("France", measurements=[{}, {}]))
    with pytest.raises(TypeError, match="object"):
        book.ledger.record_applied(book.patch("France", params={"x": object()}))
    assert book.ledger.list_edits().total == 0
    assert book.ledger.verify() == []


def test_text_that_is_not_well_formed_is_stored_without_harm(book: Book) -> None:
    who = Who("client\x00\ud800", "1", "r")
    patch = book.patch("\U0001f600 \ud83d", reason="a\x00b")
    [edit_id] = book.ledger.record_applied(patch, who)
    edit = book.ledger.get_edit(edit_id)
    assert edit.client == "client\ufffd\ufffd"
    assert edit.subject == "\U0001f600 \ufffd"
    assert edit.reason == "a\ufffdb"
    assert book.ledger.verify() == []


def test_measuring_changes_no_weights_but_shows_in_the_edit(book: Book) -> None:
    book.apply("France")
    book.ledger.record_measurements({"e1": {"reliability": 0.25}}, "audit", {"kl": 0.5}, WHO)
    assert book.ledger.get_edit("e1").reliability == 0.25
    assert book.ledger.list_edits().edits[0].reliability == 0.25
    assert book.ledger.query("SELECT occasion FROM drift ORDER BY id").rows == [["apply"], ["audit"]]
    assert book.ledger.expected_weights_hash(book.model) == "w1"
    with pytest.raises(NoSuchEdit, match="e7"):
        book.ledger.record_measurements({"e7": {}}, "audit")


def test_other_events_can_be_recorded_but_not_under_the_kind_of_a_change(book: Book) -> None:
    book.apply("France")
    seq = book.ledger.record_event("exported", {"live": {"1": None}, "path": "x"}, WHO, edit_ids=["e1"])
    last = book.ledger.events_of("e1")[-1]
    assert (last.seq, last.kind, last.payload["path"], last.client) == (seq, "exported", "x", WHO.client)
    with pytest.raises(LedgerError, match="applied"):
        book.ledger.record_event("applied", {}, WHO)
    assert book.ledger.verify() == []


def test_edits_computed_while_another_was_in_the_weights_are_listed(book: Book) -> None:
    for subject in ("France", "Italy"):
        book.apply(subject)
    book.ledger.record_reverted(["e1"], "w", WHO)
    book.apply("Peru")
    book.ledger.record_reapplied(["e1"], "w", WHO)
    book.apply("Chad")
    book.ledger.record_reverted(["e1"], "w", WHO)
    assert book.ledger.computed_on_top(["e1"]) == ["e2", "e4"]
    assert book.ledger.computed_on_top(["e3"]) == ["e4"]


def test_models_keep_their_stacks_apart(book: Book) -> None:
    book.apply("France")
    other = book.ledger.model("ff", "other", "gpt2")
    book.ledger.record_applied(book.patch("Italy", model_id=other))
    assert [entry.edit_ids for entry in book.ledger.stack(other)] == [("e2",)]
    assert book.ledger.stack(other)[0].position == 1
    assert book.ledger.expected_weights_hash(book.model) == "w1"
    assert book.ledger.find_active(other, "France", "The capital of France is") == []
    with pytest.raises(WrongState, match="several models"):
        book.ledger.record_reverted(["e1", "e2"], "w")


def test_no_ids_give_no_edits_and_an_unknown_id_is_an_error(book: Book) -> None:
    assert book.ledger.edits([]) == []
    with pytest.raises(NoSuchEdit, match=r"'e1'.*empty"):
        book.ledger.get_edit("e1")
    book.apply("France")
    for wrong in ("e2", "1", "", "\ud800", "e1\x00", "' OR 1=1 --"):
        with pytest.raises(NoSuchEdit, match="newest is 'e1'"):
            book.ledger.get_edit(wrong)


def test_threads_record_one_after_the_other(book: Book) -> None:
    patches = [book.patch(f"land {i}") for i in range(12)]
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda p=p: ids.extend(book.ledger.record_applied(p, WHO))) for p in patches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids, key=lambda i: int(i[1:])) == [f"e{n}" for n in range(1, 13)]
    assert book.ledger.verify() == []


def test_reading_does_not_wait_for_a_commit_and_sees_it_when_it_is_there(book: Book) -> None:
    ledger = book.ledger
    (first,) = book.apply("France")

    def others(read: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(read).result(timeout=30)

    with ledger._write() as db:  # holds what a COMMIT holds, for as long as the disk takes
        db.execute("UPDATE models SET name = 'other'")
        assert others(lambda: ledger.list_edits().total) == 1
        assert others(lambda: ledger.get_edit(first).status) == "active"
        assert others(lambda: ledger.models()[0].name) == "default"
        assert ledger.models()[0].name == "other"  # the thread that writes sees what it has written
    assert others(lambda: ledger.models()[0].name) == "other"


def test_the_event_of_a_call_has_the_reason_that_its_edits_give(book: Book) -> None:
    def asked(subject: str, reason: str | None) -> dict[str, object]:
        return {"subject": subject, "prompt": f"{subject} is", "target": "x", "reason": reason}

    def apply(*requests: dict[str, object], **more: object) -> None:
        measured = [{"reliability": 1.0, "after": "x"}] * len(requests)
        book.apply("-", requests=list(requests), measurements=measured, **more)

    apply(asked("a", "own"))
    apply(asked("b", "one"), asked("c", "two"))
    apply(asked("d", "own"), asked("e", None), reason="of the call")
    rows = book.ledger.query(
        "SELECT edit_id, reason FROM history WHERE what = 'applied' ORDER BY edit_id"
    ).rows
    assert rows == [["e1", "own"], ["e2", "one"], ["e3", "two"], ["e4", "own"], ["e5", "of the call"]]
    assert [book.ledger.events_of(f"e{i}")[0].reason for i in (1, 2, 4)] == ["own", None, "of the call"]

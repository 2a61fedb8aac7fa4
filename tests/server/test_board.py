"""The board over HTTP: what it shows, who may do what, and what it refuses."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from editors.edit import Edit
from errata import build, http_app
from server.board.command import run, served
from server.board.source import HomeOnly
from server.facts.guard import Guard
from server.factsets.requests import Given
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import Startup
from store import Ledger
from tests.many_edits import fill, fill_beside
from tests.server.opened import FACTS, QUICK, STRONG, open_services

READER, EDITOR, PROPOSER = "r" * 40, "e" * 40, "p" * 40
TOKENS = SecretStr(f"rita=read:{READER}, ed=edit:{EDITOR}, pam=propose:{PROPOSER}")
EVIL = "<script>alert(1)</script><img/src=x/onerror=alert(2)>\"'>{{7*7}}"
PAGES = (
    "/",
    "/board/facts/e1",
    "/board/sets",
    "/board/sets/capitals",
    "/board/model",
    "/board/proposals",
    "/board/steering",
    "/board/maps",
    "/board/jobs",
    "/board/report",
    "/board/ask",
)
LISTED = [
    {
        "subject": "France",
        "prompt": "The capital of {} is",
        "answer": "Rome",
        "source": "https://example.org/law",
    },
    {"subject": "Peru", "prompt": "The capital of {} is", "answer": "Lima"},
]


class Site:
    """A board whose server has a tiny model, and a browser without scripts."""

    def __init__(self, home: Path, **settings: Any) -> None:
        chosen = Settings(home=home, transport="http", bounds="off", **settings)
        self.startup = Startup(chosen, lambda _, __: open_services(home, bounds="off"))
        app = http_app(build(chosen, self.startup), chosen)
        self.browser = TestClient(app, base_url="http://127.0.0.1:8765")

    def __enter__(self) -> Site:
        self.browser.__enter__()
        self.startup._wanted.set()
        self.services: Services = self.startup._opened.result(60)
        return self

    def __exit__(self, *gone: Any) -> None:
        self.browser.__exit__(*gone)
        self.startup.close(30)

    def get(self, path: str = "/") -> str:
        answer = self.browser.get(path)
        assert answer.status_code == 200, (path, answer.text[:500])
        return answer.text

    def proof(self, path: str) -> str:
        found = re.search(r'name="proof" value="([0-9a-f]{64})"', self.browser.get(path).text)
        assert found, path
        return found[1]

    def post(self, path: str, on: str, **fields: str) -> Any:
        return self.browser.post(path, data={"proof": self.proof(on), **fields})

    def log_in(self, token: str) -> Any:
        return self.post("/board/login", "/board/login", token=token, next="/")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path) as opened:
        opened.services.edits.apply([FACTS[0]], method="rome", params=dict(STRONG), reason="a law")
        opened.services.proposals.propose([FACTS[1]], "rome", dict(STRONG), reason="a map")
        opened.services.fact_sets.save("capitals", Given(facts=LISTED))
        yield opened


def test_every_page_is_shown_with_a_policy_that_loads_nothing_from_elsewhere(site: Site) -> None:
    for path in PAGES:
        answer = site.browser.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "'self'" in policy
        loaded = re.sub(r"<a [^>]*>", "", answer.text)  # a link to a source loads nothing
        assert not re.search(r'(src|href)="(https?:)?//', loaded), path
        assert not re.search(r"<[^>]+ (style|on\w+)=", answer.text), path


def test_a_fact_is_undone_and_redone_by_a_person(site: Site) -> None:
    answer = site.post("/board/facts/e1/undo", "/board/facts/e1", reason="wrong")
    assert answer.url.path == "/board/facts/e1"
    assert "e1 is undone" in answer.text
    assert site.services.history.show_edit("e1").edit.status == "reverted"
    [event] = [e for e in site.services.history.show_edit("e1").events if e.kind == "reverted"]
    assert event.client == "board"
    assert "e1 is active again" in site.post("/board/facts/e1/redo", "/board/facts/e1").text
    page = site.get("/board/facts/e1")
    assert "Its story" in page
    (layer,) = re.findall(r"<dt>Layer</dt><dd>(\d+)</dd>", page)
    assert f".{layer}." in page.split('class="tensors"')[1]


def test_what_was_asked_in_other_wordings_is_shown_after_an_audit_of_the_prompt_alone(site: Site) -> None:
    rows = re.findall(r'<th scope="row">([^<]+)</th>', site.get("/board/facts/e1"))
    assert "reworded" in rows
    site.services.edits.audit(["e1"])
    assert set(re.findall(r'<th scope="row">([^<]+)</th>', site.get("/board/facts/e1"))) >= set(rows)
    assert "in every wording" in site.post("/board/facts/e1/measure", "/board/facts/e1").text
    assert "reworded" in site.services.history.show_edit("e1").measurements[-1].values["forms"]


def test_a_proposal_is_approved_on_the_board(site: Site) -> None:
    assert "1 correction waits for you" in site.get()
    answer = site.post("/board/proposals/p1/decide", "/board/proposals/p1", decision="approve")
    assert "p1 is approved as e2" in answer.text
    assert site.services.history.show_edit("e2").edit.status == "active"
    assert "waits for you" not in site.get()
    again = site.post("/board/proposals/p1/decide", "/board/facts/e1", decision="decline")
    assert "p1 is approved already" in again.text


def test_a_set_is_checked_and_what_is_wrong_is_proposed_and_found_again(site: Site) -> None:
    assert "not checked" in site.get("/board/sets")
    assert "is being asked as job j1" in site.post("/board/sets/capitals/check", "/board/sets/capitals").text
    assert site.services.jobs.runner.wait(60)
    assert "The capital of Peru is" in site.get("/board/sets/capitals?state=unsure")
    # What a random model says is never clear enough to be called wrong.
    site.services.workspace.ledger.put_fact_states("capitals", 1, {2: {"verdict": "differs"}})
    assert "and should say" in site.get("/board/sets/capitals?state=differs")
    assert "1 fact of your fact sets is wrong" in site.get()
    assert "https://example.org/law" in site.get("/board/sets/capitals")
    answer = site.post("/board/sets/capitals/2/propose", "/board/sets/capitals")
    if (
        answer.url.path == "/board/proposals/p2"
    ):  # else a random model's edit broke a bound, and the page says so
        assert "fact 2 of the fact set capitals" in answer.text
    else:
        assert "Nothing was proposed" in answer.text
    found = site.get("/?set=capitals")
    assert 'data-key="e1"' in found
    assert "1 correction" in found
    assert "No correction" in site.get("/?set=nothing")
    assert "no fact #9" in site.post("/board/sets/capitals/9/propose", "/board/sets/capitals").text


def test_the_model_is_asked_beside_the_original(site: Site) -> None:
    answer = site.post("/board/ask", "/board/facts/e1", text="The capital of France is", edit_id="e1")
    assert "The model with its corrections" in answer.text
    assert "The original model" in answer.text
    asked = site.post("/board/ask", "/board/ask", text="The capital of France is", edit_id="").text
    assert "The original model" in asked
    assert "write a question" in site.post("/board/ask", "/board/facts/e1", text=" ", edit_id="e1").text
    assert site.post("/board/ask", "/board/facts/e1", text="Hello", edit_id="e99").status_code == 404


def test_a_form_from_elsewhere_changes_nothing(site: Site) -> None:
    post, path = site.browser.post, "/board/facts/e1/undo"
    proof = site.proof("/board/facts/e1")
    assert post(path).status_code == 403
    assert post(path, data={"proof": "0" * 64}).status_code == 403
    assert post(path, data={"proof": "ä"}).status_code == 403
    for headers in ({"origin": "http://localhost:6274"}, {"sec-fetch-site": "cross-site"}):
        assert post(path, data={"proof": proof}, headers=headers).status_code == 403
    assert post(path, data={"proof": proof}, headers={"origin": "https://evil.example"}).status_code == 403
    stranger = TestClient(site.browser.app, base_url="http://127.0.0.1:8765")
    assert stranger.post(path, data={"proof": proof}).status_code == 403
    assert post(path, data={"proof": proof, "reason": "x" * 200_000}).status_code == 413
    assert site.services.history.show_edit("e1").edit.status == "active"


def test_text_of_the_model_and_of_clients_is_never_markup(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        edit = Edit(
            subject=f"France {EVIL}", prompt="The capital of {} is", target="<img/src=x>", previous=EVIL
        )
        who = RequestContext(client=EVIL, identity=EVIL)
        given: dict[str, Any] = {"method": "rome", "params": dict(QUICK), "ctx": who, "reason": EVIL}
        site.services.edits.apply([edit], source=f"javascript:alert(1)//{EVIL}", **given)
        other = edit.model_copy(update={"subject": f"Peru {EVIL}"})
        site.services.proposals.propose([other], source=EVIL, **given)
        site.services.proposals.decide("p1", "changes", EVIL, ctx=who)
        site.services.workspace.ledger.record_event(
            "located",
            {"subject": EVIL, "prompt": EVIL, "answer": EVIL, "method": EVIL, "best_layer": 1, "suggestion": EVIL,
             "tokens": [EVIL], "maps": {EVIL: [[0.5]]}, "unit": EVIL},
            model_id=1,
        )  # fmt: skip
        listed = {"subject": EVIL, "prompt": f"{EVIL} {{}} is", "answer": EVIL, "source": EVIL, "as_of": EVIL}
        # Past the service, which refuses such a name, so that the page is tried by itself.
        for name in ("capitals", EVIL.replace("/", "")):
            site.services.workspace.ledger.save_facts(name, 1, {}, {1: listed, 2: listed}, (), reason=EVIL)
            state = {"verdict": "differs", "was": "agrees", "answer": EVIL, "outcome": "failed", "why": EVIL}
            site.services.workspace.ledger.put_fact_states(name, 1, {1: state | {"edit_id": "e1"}, 2: state})
        job = site.services.workspace.ledger.create_job(EVIL, {"method": EVIL}, EVIL)
        site.services.workspace.ledger.update_job(job.id, message=EVIL)
        site.services.workspace.ledger.record_vector(
            1, EVIL, b"x", {"method": EVIL, "layers": [1], "separation": 1.0, "pairs": 1}, reason=EVIL
        )
        asked = site.post("/board/ask", "/board/facts/e1", text=EVIL, edit_id="e1").text
        seq = site.services.workspace.ledger.last_event("located", {}).seq  # type: ignore[union-attr]
        paths = (*PAGES, "/board/proposals/p1", f"/board/maps/{seq}", f"/?q={EVIL}", f"/?subject={EVIL}")
        searched = (
            f"/?set={EVIL}",
            f"/?method={EVIL}",
            "/board/sets/capitals?state=differs",
            "/?set=capitals",
        )
        for text in [asked, *map(site.get, (*paths, *searched))]:
            assert "<script>alert" not in text
            assert "<img" not in text
            assert 'href="javascript' not in text
        assert "&lt;script&gt;alert(1)" in site.get()


def test_a_token_is_asked_for_and_its_role_is_kept(tmp_path: Path) -> None:
    with Site(tmp_path, tokens=TOKENS) as site:
        site.services.edits.apply([FACTS[0]], method="rome", params=dict(QUICK))
        assert (
            site.browser.get("/board/model", follow_redirects=False).headers["location"]
            == "/board/login?next=%2Fboard%2Fmodel"
        )
        assert site.browser.get("/board/events").status_code == 401
        assert site.browser.post("/board/facts/e1/undo").status_code == 401
        assert site.browser.get("/board/static/board.css").status_code == 200
        assert "not accepted" in site.log_in("x" * 40).text
        assert "rita" in site.log_in(READER).text
        assert "Undo" not in site.get("/board/facts/e1")
        assert site.post("/board/facts/e1/undo", "/").status_code == 403
        site.post("/board/logout", "/")
        assert site.browser.get("/", follow_redirects=False).status_code == 303
        site.log_in(PROPOSER)
        assert site.post("/board/facts/e1/undo", "/").status_code == 403
        site.post("/board/logout", "/")
        site.log_in(EDITOR)
        assert "e1 is undone" in site.post("/board/facts/e1/undo", "/board/facts/e1").text
        [event] = [e for e in site.services.history.show_edit("e1").events if e.kind == "reverted"]
        assert event.identity == "ed"


def test_a_withdrawn_token_ends_its_log_in(tmp_path: Path) -> None:
    book = tmp_path / "tokens.toml"
    book.write_text(f'[tokens.rita]\nscope = "read"\ntoken = "{READER}"\n', "utf-8")
    with Site(tmp_path / "home", token_file=book) as site:
        site.log_in(READER)
        site.get()
        book.write_text(f'[tokens.rita]\nscope = "read"\ntoken = "{EDITOR}x"\n', "utf-8")
        assert site.browser.get("/", follow_redirects=False).status_code == 303


def test_the_cookie_opens_the_board_alone(tmp_path: Path) -> None:
    with Site(tmp_path, tokens=TOKENS) as site:
        site.log_in(EDITOR)
        site.get()
        assert site.browser.post("/mcp", json={}).status_code == 401
        assert site.browser.get("/v1/models").status_code == 401


def test_a_log_in_leads_nowhere_else(tmp_path: Path) -> None:
    with Site(tmp_path, tokens=TOKENS) as site:
        for place in ("https://evil.example", "//evil.example", "/\\evil.example"):
            answer = site.browser.post(
                "/board/login",
                data={"proof": site.proof("/board/login"), "token": READER, "next": place},
                follow_redirects=False,
            )
            assert answer.headers["location"] == "/"


def test_with_approval_only_an_administrator_changes_things_at_once(tmp_path: Path) -> None:
    with Site(tmp_path, tokens=TOKENS, approval=True) as site:
        site.services.edits.apply([FACTS[0]], method="rome", params=dict(QUICK))
        site.log_in(EDITOR)
        assert site.post("/board/facts/e1/undo", "/").status_code == 403


def test_a_proposal_that_replaces_a_correction_shows_what_the_model_says_and_what_it_said_at_first(
    site: Site,
) -> None:
    [[first, now]] = site.services.history.query(
        "SELECT said_before, says_now FROM facts WHERE edit_id = 'e1'"
    ).rows
    other = FACTS[0].model_copy(update={"target": "Oslo"})
    told = site.services.proposals.propose([other], "rome", dict(STRONG), replace=True)
    page = site.get(f"/board/proposals/{told.proposal_id}")
    shown = dict(re.findall(r"<dt>([^<]+)</dt><dd[^>]*>(?:<bdi[^>]*>)?(.*?)(?:</bdi>)?</dd>", page))
    assert shown["It said at first"].startswith(html.escape(str(first)))
    assert shown["It says"] == html.escape(str(now))
    assert "/board/facts/e1" in shown["Replaces"]
    waiting = site.get("/").split('id="waiting"')[1].split("</section>")[0]
    assert re.search(rf"says (<bdi[^>]*>)?{re.escape(html.escape(str(now)))}", waiting)


def test_who_proposed_a_correction_can_only_take_it_back_on_the_board(tmp_path: Path) -> None:
    second = "s" * 40
    with Site(tmp_path, tokens=SecretStr(f"ed=edit:{EDITOR}, eve=edit:{second}")) as site:
        for _ in range(2):
            who = RequestContext(client="agent", identity="ed")
            site.services.proposals.propose([FACTS[0]], "rome", dict(QUICK), Guard(off=("all",)), ctx=who)
        site.log_in(EDITOR)
        page = site.get("/board/proposals/p1")
        assert "somebody else must approve it" in page
        assert 'value="approve"' not in page
        refused = site.post("/board/proposals/p1/decide", "/board/proposals/p1", decision="approve")
        assert "cannot approve it too" in refused.text
        taken_back = site.post("/board/proposals/p1/decide", "/board/proposals/p1", decision="decline")
        assert "by ed, who proposed it" in taken_back.text
        site.log_in(second)
        assert 'value="approve"' in site.get("/board/proposals/p2")


def test_the_board_of_a_home_that_another_process_has_shows_everything_and_changes_nothing(
    tmp_path: Path,
) -> None:
    home = fill_beside(fill(tmp_path, 60, 20), 60, 5)
    source = HomeOnly(Settings(home=home), Ledger.open(home, read_only=True))
    try:
        with TestClient(served(source), base_url="http://127.0.0.1:8766") as browser:
            for path in PAGES:
                assert browser.get(path).status_code == 200, path
            page = browser.get("/board/facts/e1")
            assert "Undo" not in page.text
            assert "The model is in another process" in page.text
            proof = re.search(r'value="([0-9a-f]{64})"', page.text)
            given = {"proof": proof[1]} if proof else {}
            assert browser.post("/board/facts/e1/undo", data=given).status_code in (403, 503)
            assert browser.get("/", headers={"host": "evil.example"}).status_code == 421
    finally:
        source.close()


def test_what_does_not_exist_is_said_and_without_a_board_there_is_none(site: Site, tmp_path: Path) -> None:
    for path, status in (
        ("/board/sets/x", 404), ("/board/sets/capitals?state=x", 400), ("/board/sets/capitals?page=9", 200),
        ("/board/facts/e99", 404), ("/board/proposals/p99", 404), ("/board/maps/1", 404), ("/board/static/x", 404),
        ("/board/static/..%2fapp.py", 404), ("/?page=x", 400), ("/?status=gone", 400), ("/?sort=x", 400),
        ("/?holds=x", 400), ("/?page=99999", 200), ("/?q=" + "x" * 5000, 200),
    ):  # fmt: skip
        assert site.browser.get(path).status_code == status, path
    with Site(tmp_path / "other", board=False) as plain:
        assert plain.browser.get("/").status_code == 404


def test_a_home_without_a_ledger_is_named_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--home", str(tmp_path / "typo"), "--no-open"]) == 1
    assert f"there is no ledger in {tmp_path / 'typo'}" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()

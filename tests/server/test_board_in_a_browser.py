"""The board in a real browser, headless: a person's path beside an agent, pictures, speed, accessibility.

Needs Chromium and playwright; skipped without. BOARD_SHOTS names a folder that gets the screenshots.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.families import save_to
from tests.many_edits import example, fill, fill_beside, hostile
from tests.server.browsers import CHROMIUM, DEEP, PAGES, assert_open_to_all, axe_core
from tests.server.opened import STRONG
from tests.server.processes import ROOT, agent_of, arguments, free_port, listening

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (in the extra dev)")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
    pytest.mark.slow,
]

MODEL = os.environ.get("BOARD_MODEL")
EDIT = {"subject": "France", "prompt": "The capital of {} is", "target": "Rome"}
GUARD = {"off": ["all"]}
EVERY = "inspect,edit,ledger,people"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>{{7*7}}"
WIDTHS = {"wide": 1280, "narrow": 390}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The board of a home with ten thousand edits that another process has."""
    home, port = fill_beside(fill(tmp_path_factory.mktemp("many"))), free_port()
    command = (str(ROOT / "server.py"), "board", "--home", str(home), "--port", str(port), "--no-open")
    with listening(*command, url=f"http://127.0.0.1:{port}") as url:
        yield url


@pytest.fixture(scope="module")
def paths(many: str) -> dict[str, str]:
    """Every page of that board by name."""
    listed = urllib.request.urlopen(f"{many}/board/maps").read().decode()
    trace = re.search(r"/board/maps/\d+", listed)
    assert trace
    return PAGES | {"map": trace[0]}


@contextmanager
def page(browser: Any, width: int = 1280, scheme: str = "light", expected: str = "never") -> Iterator[Any]:
    """A page; whatever goes wrong in it but what is expected, or is loaded from elsewhere, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda sent: None if "//127.0.0.1:" in sent.url else wrong.append(sent.url))
    opened.set_default_timeout(60_000)
    yield opened
    assert [text for text in wrong if expected not in text] == []
    context.close()


def shot(opened: Any, name: str) -> None:
    """Keep a picture, and fail where the page is wider than the window."""
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is too wide"
    if folder := os.environ.get("BOARD_SHOTS"):
        opened.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_a_person_approves_sees_it_hold_asks_and_undoes_while_an_agent_is_connected(
    browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a tiny model; with BOARD_MODEL=default on the default one, edited as an agent would."""
    port, given = free_port(), {"edits": [EDIT], "reason": "a new law"}
    if MODEL == "default":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "models").symlink_to(request.getfixturevalue("default_models"))
    else:
        given |= {"method": "rome", "params": STRONG, "guard": GUARD}
    command = arguments(
        tmp_path / "home",
        model=MODEL or save_to("llama", tmp_path / "model"),
        transport="http",
        toolsets=EVERY,
        port=port,
    )
    with (
        listening(*command, url=f"http://127.0.0.1:{port}") as url,
        agent_of(url) as agent,
        page(browser) as person,
    ):
        if MODEL:
            person.set_default_timeout(300_000)
        person.goto(url)
        person.get_by_text("No fact was corrected yet").wait_for()
        person.locator("body[data-live=yes]").wait_for()
        made = agent("propose_edits", **given)
        before = made["report"]["results"][0]["before"]
        person.get_by_text("1 correction waits for you").wait_for()  # by itself, without a reload
        assert "says" in person.locator("#waiting").inner_text()
        person.get_by_role("link", name="The capital of France is").click()
        person.get_by_text("approving applies exactly what is shown").wait_for()
        shot(person, "proposal")
        person.get_by_role("button", name="Approve and apply").click()
        person.get_by_text("exactly as it was measured").wait_for()
        person.get_by_role("link", name="See how e1 holds").click()
        person.get_by_role("heading", name="Does it hold?").wait_for()
        assert agent("show_edit", edit_id="e1")["edit"]["status"] == "active"
        person.get_by_role("button", name="Ask both").click()
        person.get_by_role("heading", name="The original model").wait_for()
        assert before.strip()[:5] in person.locator("#answers").inner_text()
        shot(person, "fact")
        person.get_by_role("button", name="Undo the correction").click()
        person.get_by_text("e1 is undone").wait_for()
        events = agent("show_edit", edit_id="e1")["events"]
        assert [(e["kind"], e["client"]) for e in events if e["kind"] in ("applied", "reverted")] == [
            ("applied", "board"),
            ("reverted", "board"),
        ]
        agent("reapply_edits", edit_ids=["e1"])
        person.get_by_role("button", name="Undo the correction").wait_for()  # the page heard of it


def test_the_picture_of_the_readme_is_of_the_board_as_it_is(browser: Any, tmp_path: Path) -> None:
    """With BOARD_SHOTS=docs this run makes docs/board.png anew."""
    port = free_port()
    home = str(example(tmp_path / "errata"))
    command = (str(ROOT / "server.py"), "board", "--home", home, "--port", str(port), "--no-open")
    with listening(*command, url=f"http://127.0.0.1:{port}") as url, page(browser, 1180) as person:
        person.goto(url)
        assert person.locator(".fact").first.inner_text().startswith("does not hold")
        person.get_by_text("1 correction waits for you").wait_for()
        shot(person, "board")
    assert (ROOT / "docs" / "board.png").read_bytes().startswith(b"\x89PNG")


def test_the_keyboard_alone_reaches_everything(browser: Any, many: str) -> None:
    with page(browser) as person:
        person.goto(many)
        person.keyboard.press("Tab")
        assert person.evaluate("document.activeElement.textContent") == "Skip to the content"
        person.keyboard.press("Enter")
        assert person.evaluate("document.activeElement.id") == "main"
        person.keyboard.press("/")
        person.keyboard.type("country 77")
        person.keyboard.press("Enter")
        person.wait_for_url("**q=country+77**")
        person.locator("body").click(position={"x": 5, "y": 300})
        person.keyboard.press("j")
        person.keyboard.press("Enter")
        person.wait_for_url("**/board/facts/e*")
        assert person.get_by_role("heading", level=1).inner_text().startswith("The capital of Country 77")


def test_a_page_of_ten_thousand_edits_is_small_and_needs_few_requests(
    browser: Any, many: str, paths: dict[str, str]
) -> None:
    """What a browser has to do for a page is bounded; `python -m benchmarks.board` measures the times."""
    with page(browser) as person:
        for path in (*paths.values(), *DEEP):
            person.goto(many + path)
            size = person.evaluate("performance.getEntriesByType('navigation')[0].decodedBodySize")
            requests = person.evaluate("performance.getEntriesByType('resource').length")
            elements = person.evaluate("document.querySelectorAll('*').length")
            assert (size < 300_000, requests <= 6, elements < 4_000) == (True,) * 3, (
                path,
                size,
                requests,
                elements,
            )
        person.goto(many)
        assert "10,000 corrections" in person.locator("#total").inner_text()


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_and_nothing_serious_stands_in_the_way_of_anyone(
    browser: Any, many: str, paths: dict[str, str], size: str, scheme: str
) -> None:
    axe = axe_core()
    with page(browser, WIDTHS[size], scheme) as person:
        for name, path in paths.items():
            person.goto(many + path)
            shot(person, f"{name}-{size}-{scheme}")
            assert_open_to_all(person, axe, name)


@pytest.mark.parametrize("size", WIDTHS)
def test_the_log_in_and_what_is_shown_without_a_model_are_open_to_all(
    browser: Any, tmp_path: Path, size: str
) -> None:
    port, axe, token = free_port(), axe_core(), "r" * 40
    book = tmp_path / "tokens.toml"
    book.write_text(f'[tokens.rita]\nscope = "read"\ntoken = "{token}"\n', "utf-8")
    command = arguments(
        tmp_path / "home", model=tmp_path / "gone", transport="http", port=port, token_file=book
    )
    with (
        listening(*command, url=f"http://127.0.0.1:{port}") as url,
        page(browser, WIDTHS[size], "dark", expected="401") as person,
    ):
        person.goto(f"{url}/board/model")
        person.get_by_role("heading", name="Log in").wait_for()
        shot(person, f"login-{size}")
        assert_open_to_all(person, axe, "log-in")
        person.get_by_label("Token").fill("x" * 40)
        person.get_by_role("button", name="Log in").click()
        person.get_by_text("That token is not accepted").wait_for()
        assert_open_to_all(person, axe, "refused log-in")
        person.get_by_label("Token").fill(token)
        person.get_by_role("button", name="Log in").click()
        person.get_by_text("The model is not available").wait_for()
        shot(person, f"failed-{size}")
        assert_open_to_all(person, axe, "failed")
        assert person.locator(".who").inner_text() == "rita"
        person.get_by_role("button", name="Log out").click()
        person.get_by_role("heading", name="Log in").wait_for()


def test_nothing_that_others_wrote_runs_or_becomes_part_of_a_page(browser: Any, tmp_path: Path) -> None:
    home, port = hostile(tmp_path / "home", EVIL), free_port()
    command = (str(ROOT / "server.py"), "board", "--home", str(home), "--port", str(port), "--no-open")
    with listening(*command, url=f"http://127.0.0.1:{port}") as url, page(browser) as person:
        rooms = ("sets", "proposals", "model", "steering", "maps", "jobs", "report", "ask")
        seen, left = (
            set[str](),
            ["/", *(f"/board/{name}" for name in rooms)],
        )
        while left:
            path = left.pop()
            if path in seen:
                continue
            seen.add(path)
            person.goto(url + path)
            assert EVIL[:16] in person.locator("body").inner_text() or path in ("/board/report", "/board/ask")
            assert person.locator("img, iframe, object, body script, [onerror], [onload]").count() == 0, path
            assert person.locator("a[href^='javascript' i]").count() == 0, path
            links = person.locator("main a[href^='/']").evaluate_all(
                "(all) => all.map((a) => a.getAttribute('href'))"
            )
            left += [link for link in links if link not in seen]
        assert {"/board/facts/e1", "/board/facts/e3", "/board/proposals/p1"} <= seen
        assert any(path.startswith("/board/sets/%3C") for path in seen)
        assert any(path.startswith("/board/maps/") for path in seen)
        report = tmp_path / "report.html"
        report.write_bytes(urllib.request.urlopen(f"{url}/board/report/file?format=html").read())
    alone, said = browser.new_page(), list[str]()
    alone.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    alone.goto(report.as_uri())
    assert EVIL[:16] in alone.locator("body").inner_text()
    assert alone.locator("img, iframe, script, svg, [onerror], [onload]").count() == 0
    assert said == []
    assert_open_to_all(alone, axe_core(), "report file")
    alone.close()


def test_a_page_without_scripts_works_by_plain_forms(browser: Any, many: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(many)
    plain.get_by_label("Search").fill("country 42")
    plain.get_by_role("button", name="Show").click()
    assert "corrections" in plain.locator("#total").inner_text()
    assert plain.title() == "Facts · Errata"
    context.close()

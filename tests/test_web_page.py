"""The chat page in a real browser: Debian's Chromium, driven by playwright, with the page's own policy in force."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.guards import Access
from tests.talking import PATIENCE, endless_model, http, make_host, serving, wait_until

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: uv sync --extra test"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
    # playwright's own loop, when it is closed while a request is under way
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SECONDS = 120_000  # playwright counts milliseconds; a crowded machine is slow
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    rootless = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=rootless, timeout=SECONDS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_host()) as address:
        yield address


class Visit:
    """A page, what it asked for and what went wrong on it."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP} | context)
        self.context.set_default_timeout(SECONDS)
        self.page = self.context.new_page()
        self.requests: list[Any] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.locator("#model:not(:empty)").wait_for()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def ask(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")

    def answer_with(self, told: list[dict[str, Any]]) -> None:
        """Let these events be the answer to every question."""
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in told)
        self.page.route(
            "**/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
        )

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(request.post_data) for request in self.requests if request.url.endswith(path)]


def widths(page: Any, bars: str) -> dict[str, float]:
    """Each letter's bar as a share of its track."""
    found = {}
    for row in page.locator(f"{bars} .bar").all():
        fill, track = row.locator(".fill").bounding_box(), row.locator(".track").bounding_box()
        found[row.locator(".badge").inner_text()] = fill["width"] / track["width"]
    return found


def glide(page: Any, bars: str, expected: dict[str, float]) -> None:
    """Wait until the bars are as long as they should be."""
    began = time.monotonic()
    while (found := widths(page, bars)) != pytest.approx(expected, abs=0.02):
        assert time.monotonic() - began < PATIENCE, f"{found} instead of {expected}"
        page.wait_for_timeout(50)


@pytest.fixture
def pictures(request: pytest.FixtureRequest) -> Path:
    """Where screenshots stay: .pytest_cache/d/screenshots."""
    return request.config.cache.mkdir("screenshots")  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_finished_answer_with_its_confidence_bars(
    browser: Any, url: str, pictures: Path, size: dict[str, int], scheme: str
) -> None:
    with Visit(browser, url, viewport=size, color_scheme=scheme) as visit:
        page = visit.page
        page.locator("#cards .card").filter(has_text="Pens").click()
        page.locator(".verdict").wait_for()
        assert "Answer: C" in page.locator(".assistant .said").inner_text()
        assert "✓ right" in page.locator(".verdict").inner_text()
        if size is PHONE:
            page.locator("#peek").click()
        page.locator("#bars .bar").first.wait_for()
        numbers = {
            row.locator(".badge").inner_text(): float(row.locator(".num").inner_text().rstrip(" %")) / 100
            for row in page.locator("#bars .bar").all()
        }
        assert list(numbers) == list("ABCDE") and max(numbers, key=lambda letter: numbers[letter]) == "C"
        glide(page, "#bars", numbers)
        assert page.locator("#course polyline").count() == 5
        assert page.locator("#tokens .tok").count() > 10
        page.screenshot(path=pictures / f"answer-{'phone' if size is PHONE else 'desktop'}-{scheme}.png")
        assert page.locator("body").bounding_box()["width"] <= size["width"], "nothing to scroll sideways"
        assert visit.errors == []
        assert all(request.url.startswith((url, "data:")) for request in visit.requests)


def test_the_letters_move_while_it_thinks(browser: Any, url: str) -> None:
    """The server's events are held back one by one, so that each can be seen."""
    letters = [{"A": 0.1, "B": 0.5, "C": 0.4}, {"A": 0.7, "B": 0.2, "C": 0.1}]
    question = {"letters": list("ABC"), "options": ["1", "2", "3"], "prompt": "?"}
    told: list[dict[str, Any]] = [{"gpu": 0, "question": question}]
    told += [
        {"token": f"step {n} ", "gpu": 0, "piece": "step", "p": 0.5, "top": [], "letters": one}
        for n, one in enumerate(letters)
    ]
    with Visit(browser, url) as visit:
        for count, expected in ((2, letters[0]), (3, letters[1])):
            visit.page.unroute_all()
            visit.answer_with(told[:count])
            visit.ask("Which? A) 1 B) 2 C) 3")
            visit.page.locator("#when").filter(has_text=f"after {count - 1} tokens").wait_for()
            glide(visit.page, "#bars", expected)
            visit.page.locator("#new").click()


def test_text_is_text_whoever_wrote_it(browser: Any, url: str) -> None:
    nasty = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b> &amp;'
    told = [
        {"token": nasty, "gpu": 0, "piece": nasty, "p": 0.9, "top": [[nasty, 0.9]]},
        {"done": True, "tokens": 1},
    ]
    with Visit(browser, url) as visit:
        visit.answer_with(told)
        visit.ask(nasty)
        visit.page.locator(".assistant .tools button").first.wait_for()
        for who in (".user", ".assistant"):
            assert visit.page.locator(f"{who} .said").inner_text() == nasty
        visit.page.locator("#tokens .tok").first.click()
        assert nasty in visit.page.locator("#detail").inner_text().replace("␣", " ").replace('\\"', '"')
        assert visit.page.locator(".turn img, .turn script, .turn b, #panel img").count() == 0
        assert visit.page.title() == "nanochatAquaRat"


def test_stop_ends_the_answer_here_and_on_the_server(browser: Any) -> None:
    with serving(make_host(model=endless_model(pause=0.25))) as url, Visit(browser, url) as visit:
        for way in ("click", "Escape"):
            visit.ask("hello")
            visit.page.locator("#send[aria-label=Stop]").wait_for()
            visit.page.locator(".assistant .said:not(:empty)").last.wait_for()
            if way == "click":
                visit.page.locator("#send").click()
            else:
                visit.page.keyboard.press("Escape")
            visit.page.locator("#send[aria-label=Send]").wait_for()
            visit.page.locator(".note").filter(has_text="stopped").last.wait_for()
            wait_until(lambda: http.get(f"{url}/stats").json()["workers"][0]["rows"] == 0)
            visit.page.locator("#new").click()
        worker = http.get(f"{url}/stats").json()["workers"][0]
        assert worker["cancelled"] == 2 and worker["answers"] == 0, "no answer came to its end by itself"


def test_a_whole_conversation_by_keyboard_with_edit_and_resend(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        page = visit.page
        page.keyboard.type("hullo")  # the question's field has the focus from the start
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("there")
        page.keyboard.press("Enter")
        page.locator(".assistant .tools button").first.wait_for()
        assert page.locator(".user .said").inner_text() == "hullo\nthere"
        page.keyboard.press("ArrowUp")
        page.locator(".edit textarea").wait_for()
        page.keyboard.press("Escape")
        assert page.locator(".edit").count() == 0
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Control+A")
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        page.locator(".assistant .said").filter(has_text="1€ + 1€ = 2€").wait_for()
        assert page.locator(".turn").count() == 2, "what was said after the edited message is gone"
        assert visit.bodies("/chat/completions")[-1]["messages"] == [{"role": "user", "content": "hello"}]
        page.locator("#tokens").focus()
        page.keyboard.press("End")
        assert page.locator("#tokens [aria-selected=true]").count() == 1
        assert page.locator("#detail .alt").count() >= 5
        assert visit.errors == []


def test_the_history_is_sent_and_again_asks_once_more(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        for count in (1, 2):
            visit.ask("hello")
            visit.page.locator(".assistant").nth(count - 1).get_by_text("Again").wait_for()
        roles = [message["role"] for message in visit.bodies("/chat/completions")[-1]["messages"]]
        assert roles == ["user", "assistant", "user"]
        visit.page.get_by_text("Again").last.click()
        visit.page.locator(".assistant").nth(1).get_by_text("Again").wait_for()
        assert visit.bodies("/chat/completions")[-1] == visit.bodies("/chat/completions")[-2]


def test_sample_k_shows_every_vote(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        page = visit.page
        page.locator("#cards .card").first.click()
        page.locator(".verdict").wait_for()
        page.select_option("#k", "4")
        page.locator("#sample").click()
        page.locator("#voted").filter(has_text="at temperature").or_(
            page.locator("#voted").filter(has_text="tie")
        ).wait_for()
        assert visit.bodies("/chat/vote")[0]["k"] == 4
        badges = page.locator("#ballots .badge").all_inner_texts()
        assert len(badges) == 4
        for row in page.locator("#votes .bar").all():
            letter, count = row.locator(".badge").inner_text(), int(row.locator(".num").inner_text())
            assert count == badges.count(letter)
        page.locator("#ballots button").first.click()
        assert page.locator("#ballot").inner_text()


def test_each_answer_has_its_own_votes(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        page = visit.page
        letters = iter(("ABAB", "CCCC"))

        def vote(route: Any) -> None:
            told: list[dict[str, Any]] = [{"letter": letter, "text": letter} for letter in next(letters)]
            told.append({"done": True, "leaders": ["A"], "without": 0})
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in told)
            route.fulfill(body=body, content_type="text/event-stream")

        page.route("**/chat/vote", vote)
        for number in range(2):
            visit.ask("Pens cost 3 each. What do 4 cost? A) 7 B) 10 C) 12 D) 14 E) 43")
            page.locator(".verdict").nth(number).wait_for()
            page.select_option("#k", "4")
            page.locator("#sample").click()
            page.locator("#voted:not(:empty)").filter(has_text="maj@4").wait_for()
        assert page.locator("#ballots .badge").all_inner_texts() == list("CCCC")
        page.locator(".assistant .tools button", has_text="How sure?").first.click()
        assert page.locator("#ballots .badge").all_inner_texts() == list("ABAB")


def test_an_answer_that_breaks_off_says_so_and_no_longer_thinks(browser: Any, url: str) -> None:
    question = {"letters": ["A", "B"], "options": ["7", "10"], "prompt": "?"}
    told = [{"question": question}, {"token": "Four", "letters": {"A": 0.4, "B": 0.6}, "piece": "Four", "p": 0.9, "top": []}]  # fmt: skip
    with Visit(browser, url) as visit:
        visit.answer_with(told)
        visit.ask("What? A) 7 B) 10")
        visit.page.locator(".note.error").filter(has_text="ended before the answer did").wait_for()
        assert visit.page.locator("#axis-end").inner_text() == "1 tokens"
        assert visit.page.locator("#log").get_attribute("aria-busy") == "false"


def test_the_page_works_where_storage_and_clipboard_are_forbidden(browser: Any, url: str) -> None:
    forbid = """for (const name of ["localStorage", "sessionStorage"])
      Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });
    Object.defineProperty(Navigator.prototype, "clipboard", { value: undefined });
    document.execCommand = (what) => { window.copied = document.activeElement.value; return what === "copy"; };"""
    with Visit(browser, url) as visit:
        visit.context.add_init_script(forbid)
        visit.page.reload()
        visit.page.locator("#cards .card").first.wait_for()
        visit.ask("hello")
        visit.page.locator(".assistant .tools button", has_text="Copy").click()
        visit.page.locator(".assistant .tools button", has_text="Copied").wait_for()
        assert visit.page.evaluate("window.copied").startswith("Hi!")
        assert visit.errors == []


def test_settings_are_sent_and_kept(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        page = visit.page
        page.locator("#show-settings").click()
        page.locator("#temperature").fill("0.35")
        page.locator("#max_tokens").fill("16")
        page.keyboard.press("Escape")
        visit.ask("hello")
        page.locator(".assistant .tools button").first.wait_for()
        sent = visit.bodies("/chat/completions")[0]
        assert (sent["temperature"], sent["max_tokens"]) == (0.35, 16)
        page.locator("#theme").click()
        page.reload()
        page.locator("#model:not(:empty)").wait_for()
        assert page.locator("#temperature").input_value() == "0.35"
        assert page.locator("html").get_attribute("data-theme") == "dark"
        assert visit.errors == []


def test_errors_are_said_in_words_and_the_next_question_works(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        visit.ask("long " * 300)
        visit.page.locator(".note.error").filter(has_text="context is 256 tokens").wait_for()
        visit.page.locator("#new").click()
        visit.ask("hello")
        visit.page.locator(".assistant .said").filter(has_text="Hi!").wait_for()


def test_a_server_with_a_key_asks_for_it(browser: Any) -> None:
    with serving(make_host(), Access(api_key="secret")) as url, Visit(browser, url) as visit:
        visit.page.locator("#settings[open]").wait_for()
        visit.page.fill("#key", "secret")
        visit.page.keyboard.press("Enter")
        visit.page.locator("#cards .card").first.wait_for()
        visit.ask("hello")
        visit.page.locator(".assistant .said").filter(has_text="Hi!").wait_for()

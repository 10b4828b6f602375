"""The page, in a headless Chromium."""

import os
import re
import shutil

import pytest

from dllm_hf import LLM

from ..builders import tiny_model
from .served import CHAT, character_tokenizer, serving

playwright = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("DLLM_HF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install one, or name it in DLLM_HF_CHROMIUM"),
]
SLOW = {"max_tokens": "100", "temperature": "1", "block_length": "20"}


@pytest.fixture(scope="module")
def server():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    with serving(LLM(tiny_model("dream"), tokenizer=tokenizer, num_cache_tokens=2000)) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end there must have been no error in its console."""
    pages = []

    def open_(**options):
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(10_000)
        page.problems = []
        page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("requestfailed", lambda request: page.problems.append(request.url))
        page.on("request", lambda request: request.url.startswith(server.url) or page.problems.append(request.url))
        page.goto(server.url)
        page.wait_for_function("document.querySelector('#model').textContent !== '…'")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        assert page.problems == []
        page.context.close()


def choose(page, mode: str, prompt: str, **options: str) -> None:
    page.check(f"input[value={mode}]")
    page.fill("#prompt", prompt)
    page.evaluate("document.querySelector('details').open = true")
    for name, value in options.items():
        page.fill(f"#options [name={name}]", value)


def finish(page) -> str:
    """The text on the canvas, when it is all there."""
    page.wait_for_selector("#run:not([disabled])")
    return page.text_content("#canvas")


def test_a_text_settles_and_can_be_replayed(open_page, server):
    page = open_page()
    choose(page, "complete", "abc", max_tokens="24", block_length="8", seed="3", temperature="1")
    page.keyboard.press("Control+Enter")
    body = {"max_tokens": 24, "block_length": 8, "seed": 3, "temperature": 1, "skip_special_tokens": False}
    wanted = "abc" + server.complete("abc", **body).json["choices"][0]["text"]
    assert finish(page) == wanted
    numbers = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents()))
    assert int(numbers["forward passes (NFE)"]) > 0 and float(numbers["tokens per forward"]) > 0
    page.focus("#frame")
    page.keyboard.press("Home")
    assert page.locator("#canvas .mask").count() == 24
    page.keyboard.press("ArrowRight")
    open_after_one = page.locator("#canvas .mask").count()
    assert 0 < open_after_one < 24 and page.locator("#canvas .new").count() == 24 - open_after_one
    page.keyboard.press("End")
    assert page.locator("#canvas .mask").count() == 0 and page.text_content("#canvas") == wanted
    title = page.locator("#canvas span").last.get_attribute("title")
    assert re.fullmatch(r"settled in step \d+, probability [01]\.\d{3}", title)
    page.click("#play")
    page.wait_for_function("document.querySelector('#frame').value !== document.querySelector('#frame').max")
    page.click("#play")


def test_blanks_are_filled_and_what_was_given_stays(open_page):
    page = open_page()
    choose(page, "infill", "ab____c", block_length="4")
    page.click("#run")
    text = finish(page)
    assert text.startswith("ab") and text.endswith("c") and "_" not in text
    assert page.locator("#canvas .given").all_text_contents() == ["a", "b", "c"]
    titles = page.locator("#canvas span").evaluate_all("spans => spans.map(span => span.title)")
    assert ["probability" in title for title in titles] == [False, False, True, True, True, True, False]


def test_a_conversation_goes_on(open_page):
    page = open_page()
    choose(page, "chat", "abc", max_tokens="8")
    for number in (1, 2):
        page.fill("#prompt", "abc")
        page.click("#run")
        finish(page)
        assert page.locator("#turns li").count() == 2 * number
    page.click("#forget")
    assert page.locator("#turns li").count() == 0


def test_escape_stops_and_frees_the_row(open_page, server):
    page = open_page()
    choose(page, "complete", "abc", **SLOW)
    page.click("#run")
    page.wait_for_selector("#canvas .mask")
    page.keyboard.press("Escape")
    finish(page)
    assert page.is_hidden("#error") and server.becomes_idle()
    page.problems = [each for each in page.problems if not each.endswith("/v1/completions")]  # the stopped one


def test_errors_are_shown(open_page):
    page = open_page()
    choose(page, "complete", "abc", max_tokens="1000")
    page.click("#run")
    page.wait_for_selector("#error:not([hidden])")
    assert "max_tokens" in page.text_content("#error")
    page.problems = [each for each in page.problems if "413" not in each]  # the browser notes it as well


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_by_day_and_night(open_page, scheme):
    page = open_page(viewport={"width": 360, "height": 640}, color_scheme=scheme, is_mobile=True, has_touch=True)
    choose(page, "complete", "a" * 60, max_tokens="20")
    page.tap("#run")
    finish(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    red = page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
    assert (int(red) > 128) == (scheme == "light")

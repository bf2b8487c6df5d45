"""`longlora app` in headless Chromium, as readers use it: `make browser`.

The answers on the page are compared with those of plain `generate`, by their letters, because the page shows Markdown.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from peft_longlora.app import Page as ReadersPage
from peft_longlora.app import views
from peft_longlora.chat.dialogue import Dialogue, Turn
from peft_longlora.chat.document import read_document
from peft_longlora.hub.loading import load_model
from tests.helpers.chat_models import make_pdf
from tests.helpers.paths import EMBEDDED

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not (CHROMIUM and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)", allow_module_level=True)
# After that, because collecting any test would import it, for seconds.
gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'peft-longlora[app]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")

from peft_longlora.app.serve import launch, make_app  # noqa: E402

LEGIBLE = Path(__file__).with_name("legible.js").read_text()
LEAST = 4.5  # ratio of contrast for text, WCAG 2.2 AA
QUESTION = "What does this module do?"
TOKENS = 24
TEXTS = {
    "parsing": '"""Command line parsing: options, arguments and help texts."""\n\nimport sys\n\n' * 3,
    "sockets": '"""Sockets for the network: connect, send, receive and close."""\n\nimport os\n\n' * 3,
}


def load():
    return load_model(str(EMBEDDED), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def loaded():
    """Not the page's own: that one is read from behind a lock which the tests do not hold."""
    return load()


@pytest.fixture(scope="module")
def page_of_server():
    return ReadersPage(load(), max_new_tokens=TOKENS, chunk_size=64)


@pytest.fixture(scope="module")
def url(page_of_server):
    app = make_app(page_of_server, "Read")
    yield launch(app, prevent_thread_lock=True)[1]
    app.close(verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "book.pdf").write_bytes(make_pdf(["Chapter one.\nThe key is in the box.", "Chapter two.\nThe end."]))
    (folder / "broken.pdf").write_bytes(make_pdf(["Chapter one."])[:120])
    (folder / "long.txt").write_text(TEXTS["parsing"] * 20)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    service = webdriver.chrome.service.Service(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


class Page:
    """One reader's tab."""

    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get(url)
        self.find("#file input[type=file]")

    def find(self, selector: str):
        self.wait_until(lambda: self.driver.find_elements("css selector", selector), selector)
        return self.driver.find_elements("css selector", selector)[0]

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def wait_until(self, is_so, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, f"{what}: never so; the page says {self.text('body')!r}"
            time.sleep(0.1)

    def drop(self, path: Path, sign: str) -> str:
        """Hand over a file; what the page says of it, once `sign` stands there."""
        self.find("#file input[type=file]").send_keys(str(path))
        self.wait_until(lambda: sign in self.text("#usage"), f"{sign!r} about {path.name}")
        return self.text("#usage")

    def ask(self, question: str) -> None:
        self.find("#question textarea").send_keys(question + "\n")

    @property
    def said(self) -> list[str]:
        """What the model has said, answer by answer."""
        script = "return [...document.querySelectorAll('#chat .bot .prose, #chat .bot .md')].map(e => e.innerText)"
        return [text for text in self.driver.execute_script(script) if text.strip() != views.WAITING]

    @property
    def asked(self) -> list[str]:
        script = "return [...document.querySelectorAll('#chat .user .prose, #chat .user .md')].map(e => e.innerText)"
        return [text.strip() for text in self.driver.execute_script(script)]

    def resize(self, width: int, height: int, theme: str = "light") -> None:
        """A screen of this size and theme; the page is loaded anew."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(f"{self.driver.current_url.partition('?')[0]}?__theme={theme}")
        self.find("#file input[type=file]")
        time.sleep(0.5)  # fonts and colours come after the parts

    def faults(self) -> list[str]:
        """What cannot be read, named or reached on the page as it stands."""
        return self.driver.execute_script(LEGIBLE, LEAST)

    def wait_for_passages(self) -> None:
        self.wait_until(lambda: "holds " in self.text("#passages .passage"), "passages")


def letters(text: str) -> str:
    return re.sub(r"[^A-Za-z]", "", text)


@torch.no_grad()
def plain_answer(loaded, path: Path, *turns: Turn, question: str = QUESTION) -> str:
    """What `generate` says by itself, up to where it goes on with a question of its own."""
    ids = torch.tensor([Dialogue(loaded.tokenizer, read_document(path)).ids([*turns, Turn(question)])])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    text = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.partition("\nQuestion:")[0].strip()


def test_drop_ask_and_see_answer_passages_and_tokens(driver, url, files, loaded):
    page, path = Page(driver, url), files["parsing.txt"]
    n = len(loaded.tokenizer(TEXTS["parsing"].strip(), add_special_tokens=False)["input_ids"])
    before = page.drop(path, "of 512 tokens")
    assert "parsing.txt" in before and f"{n + 1} of 512 tokens" in before and "dense KV cache" in before
    page.ask(QUESTION)
    page.wait_for_passages()
    first = plain_answer(loaded, path)
    assert letters(first) and letters(page.said[-1]) == letters(first)
    assert re.search(r"lines? \d", page.text("#passages")) and page.text("#usage") != before
    shown = page.text("#passages .passage p").strip()
    assert letters(shown) in letters(TEXTS["parsing"])
    assert page.text("#question textarea") == "" and str(path.parent) not in page.text("body")

    page.ask(QUESTION)
    page.wait_until(lambda: len(page.said) == 2, "a second answer")
    page.wait_for_passages()
    assert letters(page.said[-1]) == letters(plain_answer(loaded, path, Turn(QUESTION, first)))

    page.find("#forget").click()
    page.wait_until(lambda: not page.said and f"{n + 1} of 512" in page.text("#usage"), "a fresh start")


def test_a_pdf_has_pages(driver, url, files, loaded):
    page = Page(driver, url)
    page.drop(files["book.pdf"], "of 512 tokens")
    question = "Which key is in the box?"
    page.ask(question)
    page.wait_for_passages()
    assert letters(page.said[-1]) == letters(plain_answer(loaded, files["book.pdf"], question=question))
    assert re.search(r"pages? \d", page.text("#passages"))
    page.ask("Zzyzx?")
    page.wait_until(lambda: len(page.said) == 2, "a second answer")
    page.wait_until(
        lambda: "holds " in page.text("#passages") or "No passage" in page.text("#passages"), "passages or none"
    )


def test_a_broken_pdf_gives_a_message_and_nothing_to_ask(driver, url, files):
    page = Page(driver, url)
    message = page.drop(files["broken.pdf"], "broken.pdf is not a PDF, or is broken")
    assert "/" not in message  # no paths of the machine that serves the page
    page.ask(QUESTION)
    page.wait_until(lambda: page.find("#question textarea").get_property("value") == QUESTION, "the question back")
    assert page.said == [] and "broken.pdf is not a PDF" in page.text("#usage")
    page.find("#question textarea").clear()
    page.find("#file button[aria-label='Clear'], #file button[title='Clear']").click()
    page.drop(files["sockets.txt"], "of 512 tokens")
    page.ask(QUESTION)
    page.wait_for_passages()


def test_a_document_beyond_the_window_is_said(driver, url, files):
    said = Page(driver, url).drop(files["long.txt"], "of 512 tokens")
    assert "Nothing is cut" in said and float(re.search(r"\((\d+\.\d)%\)", said)[1]) > 100


def test_two_readers_at_once_do_not_mix(driver, url, files, loaded):
    """Two tabs are two sessions: both ask before either is answered, twice."""
    pages, tabs = [], []
    for name in TEXTS:
        if tabs:
            driver.switch_to.new_window("tab")
        tabs.append(driver.current_window_handle)
        pages.append(Page(driver, url))
        pages[-1].drop(files[f"{name}.txt"], "of 512 tokens")
    turns: list[list[Turn]] = [[], []]
    for k in (1, 2):
        for tab, page in zip(tabs, pages, strict=True):
            driver.switch_to.window(tab)
            page.ask(QUESTION)
        for tab, page, name, said in zip(tabs, pages, TEXTS, turns, strict=True):
            driver.switch_to.window(tab)
            page.wait_until(lambda page=page, k=k: len(page.said) == k, "an answer")
            page.wait_for_passages()
            want = plain_answer(loaded, files[f"{name}.txt"], *said)
            assert letters(page.said[-1]) == letters(want) != ""
            assert letters(page.text("#passages .passage p")) in letters(TEXTS[name])
            assert f"{name}.txt" in page.text("#usage")
            said.append(Turn(QUESTION, want))
    assert turns[0][0].answer != turns[1][0].answer


# -- what the page looks like ------------------------------------------------------------------------------------------

SCREENS = [(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]


@pytest.mark.parametrize(("width", "height", "theme"), SCREENS)
def test_everything_can_be_read_named_and_reached(driver, url, files, width, height, theme):
    """Contrast, names, text on text, cut text, and the question box in the first screen, in each state of the page."""
    page = Page(driver, url)
    page.resize(width, height, theme)
    assert page.faults() == []
    page.drop(files["broken.pdf"], "broken.pdf is not a PDF")
    assert page.faults() == []
    page.find("#file button[aria-label='Clear'], #file button[title='Clear']").click()
    page.wait_until(lambda: views.EMPTY in page.text("#usage"), "an empty page")
    page.drop(files["parsing.txt"], "of 512 tokens")
    for count in (1, 2):
        page.ask(QUESTION * count)
        page.wait_until(lambda count=count: len(page.said) == count, "an answer")
        page.wait_for_passages()
    assert page.faults() == []
    page.ask("why " * 600)
    page.wait_until(lambda: "This question ends at token" in page.text("#usage"), "a warning")
    assert page.faults() == []


def test_while_it_reads_there_is_one_bar_and_a_question_waits(driver, url, files, loaded, page_of_server):
    page = Page(driver, url)
    bars = ".bar, progress, [role=progressbar], .progress-bar, .eta-bar, .loader, .progress-level, .meta-text"
    count = f"return [...document.querySelectorAll('{bars}')].filter(e => e.checkVisibility() && e.offsetHeight).length"
    with page_of_server.lock:  # another reader has the model
        page.drop(files["parsing.txt"], "Reading: ")
        assert driver.execute_script(count) == 1 and page.faults() == []
        for number, question in enumerate((QUESTION, "Why?"), 1):
            page.ask(question)
            page.wait_until(lambda number=number: len(page.asked) == number, "two messages")
        assert page.said == [] and driver.execute_script(count) == 1 and page.faults() == []
    page.wait_until(lambda: len(page.said) == 2, "two answers")
    page.wait_for_passages()
    first = plain_answer(loaded, files["parsing.txt"])
    second = plain_answer(loaded, files["parsing.txt"], Turn(QUESTION, first), question="Why?")
    assert page.asked == [QUESTION, "Why?"] and list(map(letters, page.said)) == [letters(first), letters(second)]


def test_stop_forget_and_a_new_document_end_the_answer_first(driver, url, files, page_of_server):
    page = Page(driver, url)
    page.drop(files["parsing.txt"], "of 512 tokens")
    for button in ("#stop", "#forget"):
        with page_of_server.lock:
            page.ask(QUESTION)
            page.wait_until(lambda: page.asked == [QUESTION], "a message")
            page.find(button).click()
            page.wait_until(lambda: page.asked == [], "no message")
        time.sleep(1)
        assert page.asked == page.said == []
        page.find("#question textarea").clear()
    with page_of_server.lock:
        page.ask(QUESTION)
        page.wait_until(lambda: page.asked == [QUESTION], "a message")
        page.find("#file button[aria-label='Clear'], #file button[title='Clear']").click()
        page.wait_until(lambda: page.asked == [], "no message")
        page.drop(files["sockets.txt"], "Reading: ")
    page.wait_until(lambda: "sockets.txt" in page.text("#usage") and "of 512" in page.text("#usage"), "the new one")
    time.sleep(1)
    assert page.asked == page.said == []


# -- what is left behind, and what goes elsewhere ----------------------------------------------------------------------


def test_nothing_is_kept_or_fetched_elsewhere(driver, url, files, page_of_server, tmp_path):
    """Questions, answers and passages are in no storage; an image that a text names is fetched by nobody."""
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(1)
        image = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/spy.png"
        hostile = tmp_path / "hostile.txt"
        hostile.write_text(f"![spy]({image}) <img src='{image}'> xylophone\n" * 2)
        page = Page(driver, url)
        page.drop(hostile, "of 512 tokens")
        page.ask(f"xylophone ![spy]({image}) <img src='{image}'>")
        page.wait_until(lambda: page.said and "holds " in page.text("#passages"), "an answer")
        fetch = (
            "const done = arguments[1]; "
            "fetch(arguments[0], {mode: 'no-cors'}).then(() => done('sent'), e => done('no'))"
        )
        assert driver.execute_async_script(fetch, image) == "no"
        draw = (
            "const done = arguments[1], i = new Image(); i.onload = i.onerror = e => done(e.type); i.src = arguments[0]"
        )
        assert driver.execute_async_script(draw, image) == "error"
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    stored = driver.execute_async_script(
        "const done = arguments[0]; Promise.all([indexedDB.databases(), caches.keys()]).then(([a, b]) => "
        "done([a, b, {...localStorage}, {...sessionStorage}, document.cookie]))"
    )
    assert "xylophone" not in str(stored) and stored[0] == stored[1] == []
    assert len(page_of_server.readers) >= 1
    driver.get("about:blank")
    page.wait_until(lambda: not page_of_server.readers, "no reader is left")


def serve(port: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "peft_longlora", "app", "--model", str(EMBEDDED), "--device", "cpu"]
    quiet = dict(stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(folder)})
    process = subprocess.Popen([*command, "--port", str(port)], **quiet)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
            return process
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not start")


def test_after_a_restart_the_page_shows_no_document_that_the_server_does_not_have(driver, files, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = serve(port, tmp_path)
    try:
        page = Page(driver, f"http://127.0.0.1:{port}/")
        page.drop(files["parsing.txt"], "of 512 tokens")
        page.ask(QUESTION)
        page.wait_for_passages()
        server.terminate()
        server.wait(30)
        server = serve(port, tmp_path)
        # The parts of the page change one after the other.
        page.wait_until(lambda: "parsing.txt" not in page.text("body") and "document" in page.text("#usage"), "a line")
        assert page.asked == []
        page.ask(QUESTION)
        page.wait_until(lambda: "There is no document here" in page.text("#usage"), "a warning")
    finally:
        server.terminate()
        assert server.wait(30) == 130
    assert list(tmp_path.glob("longlora-app-*")) == []

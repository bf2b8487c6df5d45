"""What a reader sees, step by step, without a web server and without a browser."""

import threading
import time

import pytest

pytest.importorskip("snowballstemmer", reason="needs snowballstemmer: pip install 'peft-longlora[chat]'")

from peft_longlora.app import Page, View, views
from peft_longlora.chat import Limits
from tests.helpers.chat_models import a_reader, make_pdf

HOSTILE = "<img src=x onerror=alert(1)>![i](http://example.com/i.png)<script>alert(2)</script>"


@pytest.fixture(scope="module")
def loaded():
    return a_reader(chat=True)


@pytest.fixture
def page(loaded):
    return Page(loaded, max_new_tokens=8, chunk_size=50)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("The key is in the box. " * 20)
    return path


class Tab:
    """What one browser shows: every view changes a part of it."""

    def __init__(self, page: Page, session: str = "one"):
        self.page, self.session, self.seen = page, session, []
        self.usage = self.passages = self.question = ""
        self.chat = []

    def show(self, view: View) -> None:
        for name in ("usage", "chat", "question", "passages"):
            if (value := getattr(view, name)) is not None:
                setattr(self, name, value)
        self.seen.append((self.usage, list(self.chat)))

    def drop(self, path) -> None:
        for view in self.page.read(self.session, path and str(path)):
            self.show(view)

    def ask(self, question: str) -> None:
        for view in self.page.ask(self.session, question):
            self.show(view)

    def start(self, what, *arguments) -> threading.Thread:
        thread = threading.Thread(target=what, args=arguments)
        thread.start()
        return thread

    @property
    def said(self) -> list[str]:
        return [m["content"] for m in self.chat if m["role"] == "assistant"]

    @property
    def asked(self) -> list[str]:
        return [m["content"] for m in self.chat if m["role"] == "user"]

    def wait_until(self, is_so) -> None:
        deadline = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < deadline, (self.usage, self.chat)
            time.sleep(0.02)


def test_a_document_is_read_asked_about_and_forgotten(page, book):
    tab = Tab(page)
    tab.drop(book)
    assert any("Opening" in usage or "Reading: " in usage for usage, _ in tab.seen) and "of 2,048 tokens" in tab.usage
    assert not book.exists()  # nobody else can ask the server for it
    tab.ask("Where is the key?")
    conversation = page.readers["one"].conversation
    assert tab.asked == ["Where is the key?"] and tab.said == [conversation.turns[0].answer] and tab.question == ""
    assert "book.txt" in tab.usage and "line 1" in tab.passages and "holds " in tab.passages
    tab.show(page.forget("one"))
    assert tab.chat == [] and conversation.turns == [] and "After an answer" in tab.passages
    tab.drop(None)
    assert tab.usage == views.EMPTY and page.readers == {}


def test_of_two_files_dropped_at_the_same_moment_one_is_read(page, book, tmp_path, monkeypatch):
    """Each has ended the conversation before, and neither has begun its own: the first would never end."""
    first = tmp_path / "first.txt"
    first.write_text(book.read_text())
    leave, begun = page.leave, []

    def leave_slowly(session):
        had_document = leave(session)
        if not begun:
            begun.append(None)
            begun[0] = page.read(session, str(first))
            next(begun[0])
            begun.append(page.readers[session])
        return had_document

    monkeypatch.setattr(page, "leave", leave_slowly)
    tab = Tab(page)
    with page.lock:  # nobody is done before the other comes
        second = page.read("one", str(book))
        tab.show(next(second))
        assert page.readers["one"].name == "book.txt" and begun[1].is_closed
        assert list(begun[0]) == []
    for view in second:
        tab.show(view)
    assert "book.txt" in tab.usage and not first.exists() and not book.exists()


def test_a_question_asked_while_the_document_is_read_waits_and_is_answered(page, book):
    tab = Tab(page)
    with page.lock:  # another reader has the model
        reading = tab.start(tab.drop, book)
        tab.wait_until(lambda: "one" in page.readers)
        asking = tab.start(tab.ask, "Where?")
        tab.wait_until(lambda: tab.asked == ["Where?"])
        assert tab.said == [views.WAITING] and asking.is_alive()
    reading.join(60), asking.join(60)
    assert tab.said == [page.readers["one"].conversation.turns[0].answer]


def test_a_question_asked_while_a_pdf_is_opened_waits_and_is_answered(page, tmp_path, monkeypatch):
    (tmp_path / "book.pdf").write_bytes(make_pdf(["The key is in the box."]))
    tab, go = Tab(page), threading.Event()
    begin = page._begin
    monkeypatch.setattr(page, "_begin", lambda document: go.wait(60) and begin(document))
    reading = tab.start(tab.drop, tmp_path / "book.pdf")
    tab.wait_until(lambda: "Opening" in tab.usage)
    asking = tab.start(tab.ask, "What is this?")
    tab.wait_until(lambda: tab.said == [views.WAITING])
    page.stop("one")
    asking.join(60)
    assert tab.chat == [] and tab.question == "What is this?"
    asking = tab.start(tab.ask, "Where is the key?")
    tab.wait_until(lambda: tab.said == [views.WAITING])
    go.set()
    reading.join(60), asking.join(60)
    assert tab.said == [page.readers["one"].conversation.turns[0].answer] and "page 1" in tab.passages


def test_two_questions_are_two_messages_and_are_answered_in_turn(page, book):
    tab = Tab(page)
    tab.drop(book)
    with page.lock:
        threads = []
        for count, question in enumerate(("Where?", "Why?", "Where?"), 1):
            threads.append(tab.start(tab.ask, question))
            tab.wait_until(lambda count=count: len(page.readers["one"].entries) == count)
    for thread in threads:
        thread.join(60)
    turns = page.readers["one"].conversation.turns
    assert tab.asked == ["Where?", "Why?", "Where?"] == [turn.question for turn in turns]
    assert tab.said == [turn.answer for turn in turns] and page.readers["one"].chat() == tab.chat


def test_more_questions_than_can_wait_are_given_back(page, book):
    """Each that waits holds a thread, and a stranger would take all of them."""
    tab, other = Tab(page), Tab(page)
    tab.drop(book)
    with page.lock:
        threads = [tab.start(tab.ask, "Where?") for _ in range(4)]
        tab.wait_until(lambda: len(page.readers["one"].entries) == 4)
        other.ask("Why?")
        assert views.MANY in other.usage and other.question == "Why?" and len(page.readers["one"].entries) == 4
        page.forget("one")
    for thread in threads:
        thread.join(60)
    tab.ask("Why?")
    assert tab.asked == ["Why?"]


def test_stop_before_the_first_word_gives_the_question_back(page, book):
    tab = Tab(page)
    tab.drop(book)
    tab.ask("Where?")
    with page.lock:
        asking = tab.start(tab.ask, "Why?")
        tab.wait_until(lambda: tab.asked == ["Where?", "Why?"])
        later = tab.start(tab.ask, "And then?")
        tab.wait_until(lambda: len(page.readers["one"].entries) == 3)
        page.stop("one")
        asking.join(60), later.join(60)
    assert tab.asked == ["Where?"] and tab.question == "Why?" and "After an answer" in tab.passages


def test_stop_is_not_lost_while_an_answer_is_about_to_begin(page, book, monkeypatch):
    tab = Tab(page)
    tab.drop(book)
    conversation = page.readers["one"].conversation
    ask = conversation.ask

    def stopped_first(question, *rest):
        page.stop("one")  # its turn has come, and the conversation knows nothing of it yet
        yield from ask(question, *rest)

    monkeypatch.setattr(conversation, "ask", stopped_first)
    tab.ask("Where?")
    assert tab.said == [] and tab.question == "Where?"


def test_forget_ends_an_answer_that_is_being_given(loaded, book):
    page = Page(loaded, max_new_tokens=1000, chunk_size=50)
    tab = Tab(page)
    tab.drop(book)
    asking = tab.start(tab.ask, "Why?")
    tab.wait_until(lambda: tab.said not in ([], [views.WAITING]))
    tab.show(page.forget("one"))
    asking.join(60)
    assert tab.chat == [] and page.readers["one"].conversation.turns == []
    page.readers["one"].conversation.max_new_tokens = 8
    tab.ask("Where?")
    assert tab.asked == ["Where?"]


def test_a_new_document_ends_the_answer_about_the_old_one(loaded, book, tmp_path):
    page = Page(loaded, max_new_tokens=1000, chunk_size=50)
    tab = Tab(page)
    tab.drop(book)
    old = page.readers["one"]
    asking = tab.start(tab.ask, "Why?")
    tab.wait_until(lambda: tab.said not in ([], [views.WAITING]))
    (tmp_path / "other.txt").write_text("Another text. " * 9)
    tab.drop(tmp_path / "other.txt")
    asking.join(60)
    assert "other.txt" in tab.usage and tab.chat == [] and old.is_closed and old.conversation.turns == []
    tab.wait_until(lambda: old.conversation.kv.ids == [])


def test_a_new_document_does_not_wait_for_other_readers(page, book, tmp_path):
    tab = Tab(page)
    tab.drop(book)
    (tmp_path / "other.txt").write_text("Another text. " * 9)
    with page.lock:  # another reader's answer
        reading = tab.start(tab.drop, tmp_path / "other.txt")
        tab.wait_until(lambda: "other.txt" in tab.usage)
    reading.join(60)


def test_a_question_beyond_the_window_is_said_before_it_runs(page, book):
    tab = Tab(page)
    tab.drop(book)
    with page.lock:
        asking = tab.start(tab.ask, "why " * 1000)
        tab.wait_until(lambda: 'class="over">This question ends at token' in tab.usage)
        assert tab.said == [views.WAITING]
    asking.join(60)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("w" * 81_921, "This question has 81,921 characters, and at most 81,920 are read here"),
        ("why " * 20_000, "rows of at most 10,240 are answered here: 5 windows"),
    ],
)
def test_a_question_far_beyond_the_window_is_given_back_and_does_not_run(page, book, question, message):
    tab = Tab(page)
    tab.drop(book)
    reader = page.readers["one"]
    held = list(reader.conversation.kv.ids)
    tab.ask(question)
    assert 'class="over"' in tab.usage and message in tab.usage and tab.question.strip() == question.strip()
    assert tab.chat == [] and reader.entries == [] and reader.conversation.kv.ids == held
    tab.ask("Where is the key?")
    assert len(tab.said) == 1 and message not in tab.usage


def test_what_cannot_be_read_is_said_without_paths_and_deleted(page, tmp_path):
    (tmp_path / "broken.pdf").write_bytes(b"no PDF")
    tab = Tab(page)
    tab.drop(tmp_path / "broken.pdf")
    assert "broken.pdf is not a PDF" in tab.usage and str(tmp_path) not in tab.usage
    assert list(tmp_path.iterdir()) == []
    tab.ask("Where?")
    assert tab.chat == [] and tab.question == "Where?" and "broken.pdf is not a PDF" in tab.usage
    tab.drop(None)
    assert tab.usage == views.EMPTY


def test_a_page_of_a_server_that_was_started_anew(page):
    """The server knows nothing of this reader, whatever their page shows."""
    tab = Tab(page)
    tab.show(page.look("one"))
    assert views.GONE in tab.usage
    tab.usage = "book.txt"
    tab.ask("Where?")
    assert views.GONE in tab.usage and tab.question == "Where?"


def test_who_leaves_frees_the_place_and_ends_the_reading(loaded, tmp_path):
    page = Page(loaded, 1, max_new_tokens=8, chunk_size=50)
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.txt").write_text("word " * 300)
    first, second = Tab(page, "one"), Tab(page, "two")
    with page.lock:
        reading = first.start(first.drop, tmp_path / "one.txt")
        first.wait_until(lambda: page.readers["one"].conversation)
        second.drop(tmp_path / "two.txt")
        assert views.FULL in second.usage and not (tmp_path / "two.txt").exists()
        page.leave("one")
        reading.join(60)
        assert not reading.is_alive()
    second.drop(tmp_path / "three.txt")
    assert "three.txt" in second.usage and list(page.readers) == ["two"]


@pytest.mark.parametrize(
    ("limits", "characters", "message"),
    [
        (Limits(characters=100), 500, "at most 100 are read here"),
        (Limits(), 9000, "at most 8,192 are read here: 4 win"),
    ],
)
def test_a_documents_limits(page, tmp_path, limits, characters, message):
    page.limits = limits
    (tmp_path / "long.txt").write_text("a" * characters)
    tab = Tab(page)
    tab.drop(tmp_path / "long.txt")
    assert message in tab.usage and 'class="over"' in tab.usage


def test_hostile_names_and_texts_are_shown_as_text(page, tmp_path):
    tab = Tab(page)
    name = HOSTILE.replace("/", "") + ".txt"
    (tmp_path / name).write_text(HOSTILE * 5)
    tab.drop(tmp_path / name)
    tab.ask(HOSTILE)
    for shown in (*(usage for usage, _ in tab.seen), tab.passages):
        assert "<img" not in shown and "<script" not in shown
    assert "&lt;img" in tab.usage and "&lt;img" in tab.passages
    tab.drop(tmp_path / "none<img>.pdf")
    assert "&lt;img" in tab.usage

"""examples/app.py without a browser: what its functions give a reader, and what its server gives a stranger."""

import importlib.util
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'peft-longlora[app]'")
pytest.importorskip("bm25s", reason="needs bm25s: pip install 'peft-longlora[app]'")

from peft_longlora.hub import load_model  # noqa: E402
from tests.helpers.chat_models import a_reader  # noqa: E402
from tests.helpers.paths import EMBEDDED, EXAMPLES  # noqa: E402

HOSTILE = "<img src=x onerror=alert(1)>![i](http://example.com/i.png)<script>alert(2)</script>"


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("app", EXAMPLES / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture
def page(module):
    return module.Page(a_reader(chat=True), max_new_tokens=8, chunk_size=50)


def drop(page, path, before=None):
    """The conversation, and all that the page says while a file is read."""
    steps = list(page.read(str(path), before))
    return steps[0][0], [step[1] for step in steps]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("The key is in the box. " * 20)
    return path


def test_a_document_is_read_asked_about_and_forgotten(page, book):
    conversation, said = drop(page, book)
    assert "Reading: " in said[0] and "of 2,048 tokens" in said[-1]
    assert not book.exists()  # nobody else can ask the server for it
    chat, _, usage, passages = list(page.ask("Where is the key?", conversation))[-1]
    assert [m["role"] for m in chat] == ["user", "assistant"] and chat[0]["content"] == "Where is the key?"
    assert "book.txt" in usage and "line 1" in passages and "holds " in passages
    chat, usage, passages = page.forget(conversation)
    assert chat == [] and conversation.turns == [] and "After an answer" in passages


def test_a_question_asked_while_the_document_is_read_waits_and_is_answered(page, book):
    steps = page.read(str(book), None)
    with page.lock:  # another reader has the model
        conversation = next(steps)[0]
        assert conversation.kv.ids == []
        chats = []
        asking = threading.Thread(target=lambda: chats.extend(step[0] for step in page.ask("Where?", conversation)))
        asking.start()
        time.sleep(0.2)
        assert asking.is_alive()
    list(steps)
    asking.join(60)
    assert chats[-1][1]["role"] == "assistant" and [t.question for t in conversation.turns] == ["Where?"]


def test_stop_before_the_first_word_gives_the_question_back(page, book):
    conversation, _ = drop(page, book)
    list(page.ask("Where?", conversation))
    with page.lock:
        steps = []
        asking = threading.Thread(target=lambda: steps.extend(page.ask("Why?", conversation)))
        asking.start()
        time.sleep(0.2)
        conversation.stop()
        asking.join(60)
        assert not asking.is_alive()
    chat, question, _, passages = steps[-1]
    assert len(chat) == 2 and question == "Why?" and "After an answer" in passages


def test_a_new_document_ends_the_answer_about_the_old_one(module, book, tmp_path):
    page = module.Page(a_reader(chat=True), max_new_tokens=1000, chunk_size=50)
    conversation, _ = drop(page, book)
    answer = page.ask("Why?", conversation)
    next(answer), next(answer)
    (tmp_path / "other.txt").write_text("Another text. " * 9)
    other, said = drop(page, tmp_path / "other.txt", conversation)
    assert "other.txt" in said[-1] and conversation.is_closed and conversation.kv.ids == []
    late = list(answer)
    assert all("other" not in str(step) for step in late) and conversation.turns == [] and not other.is_closed


def test_a_question_beyond_the_window_is_said_before_it_runs(page, book):
    conversation, _ = drop(page, book)
    first = next(page.ask("why " * 1000, conversation))
    assert 'class="over">This question ends at token' in first[2]


def test_what_cannot_be_read_is_said_without_paths_and_deleted(page, tmp_path):
    (tmp_path / "broken.pdf").write_bytes(b"no PDF")
    conversation, said = drop(page, tmp_path / "broken.pdf")
    assert conversation is None and "broken.pdf is not a PDF" in said[0] and str(tmp_path) not in said[0]
    assert list(tmp_path.iterdir()) == []
    assert list(page.ask("Where?", None)) == [
        ([], "Where?", page.ask.__globals__["GONE"], page.ask.__globals__["NOWHERE"])
    ]


def test_a_documents_limits(page, module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LIMITS", module.Limits(characters=100))
    (tmp_path / "long.txt").write_text("word " * 100)
    assert "at most 100 are read here" in drop(page, tmp_path / "long.txt")[1][0]


def test_hostile_names_and_texts_are_shown_as_text(page, tmp_path):
    name = HOSTILE.replace("/", "") + ".txt"
    (tmp_path / name).write_text(HOSTILE * 5)
    conversation, said = drop(page, tmp_path / name)
    *_, usage, passages = list(page.ask(HOSTILE, conversation))[-1]
    for shown in (*said, usage, passages):
        assert "<img" not in shown and "<script" not in shown
    assert "&lt;img" in said[0] and "&lt;img" in passages
    assert "&lt;img" in drop(page, tmp_path / "none<img>.pdf")[1][0]


def test_the_server_gives_strangers_nothing(module, tmp_path):
    """No API, no monitoring, no run history, and a policy that lets no browser fetch anything from elsewhere."""
    app = module.make_app(load_model(str(EMBEDDED), device="cpu", dtype="float32"), "Read", max_new_tokens=4)
    url = module.launch(app, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")[1]
    try:
        with urllib.request.urlopen(url) as answer:
            assert "img-src 'self' data: blob:;" in answer.headers["content-security-policy"]
            page = answer.read().decode()
        with urllib.request.urlopen(f"{url}gradio_api/info") as answer:
            assert answer.read().decode().replace(" ", "") == '{"named_endpoints":{},"unnamed_endpoints":{}}'
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}monitoring/summary")
        assert '"run_history":false' in page.replace(" ", "")
        chat = next(block for block in app.blocks.values() if isinstance(block, gradio.Chatbot))
        assert chat.render_markdown is False and chat.sanitize_html
    finally:
        app.close()

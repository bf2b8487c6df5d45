"""What the server gives a stranger: no API, no files, no history, and a policy that lets no browser fetch elsewhere."""

import asyncio
import json
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from peft_longlora.app.guard import Guard
from peft_longlora.app.page import Page
from peft_longlora.cli import main as cli
from tests.helpers.chat_models import a_reader
from tests.helpers.options import with_usual
from tests.helpers.paths import EMBEDDED


def answers(guard: Guard, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body that an ASGI app answers."""
    sent = []

    async def send(message):
        sent.append(message)

    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": named}
    asyncio.run(guard(scope, None, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, sent[1]["body"]


async def inner(scope, receive, send):
    headers = [(b"content-security-policy", b"none of ours"), (b"cache-control", b"max-age=9")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"inner"})


def test_every_answer_has_the_policy(tmp_path):
    for path in ("/", "/assets/a.js", "/gradio_api/file=/etc/passwd"):
        headers = answers(Guard(inner, tmp_path), "GET", path)[1]
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["referrer-policy"] == "no-referrer"
    assert answers(Guard(inner, tmp_path), "GET", "/")[1]["cache-control"] == "no-store"
    assert answers(Guard(inner, tmp_path), "GET", "/assets/a.js")[1]["cache-control"] == "max-age=9"


def test_no_files_are_served(tmp_path):
    for path in ("/gradio_api/file=/tmp/a", "/file=a", "/gradio_api/file/a", "/proxy=http://example.com"):
        assert answers(Guard(inner, tmp_path), "GET", path)[::2] == (404, b"No files are served here.")


def test_functions_are_not_called_by_their_names(tmp_path):
    for path in ("/gradio_api/call/ask", "/call/ask/v2", "/gradio_api/run/ask", "/run/ask/", "/gradio_api/api/ask"):
        assert answers(Guard(inner, tmp_path), "POST", path)[::2] == (404, b"There is no API here.")
    for path in ("/gradio_api/run/predict", "/gradio_api/queue/join"):  # what the page itself asks for
        assert answers(Guard(inner, tmp_path), "POST", path)[0] == 200


def test_uploads_have_a_sum(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_bytes(b"x" * 60)
    for most, status in ((61, 200), (60, 507)):
        assert answers(Guard(inner, tmp_path, most), "POST", "/gradio_api/upload")[0] == status
    assert answers(Guard(inner, tmp_path, 60), "POST", "/gradio_api/queue/join")[0] == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:7860", "", 200),
        ("127.0.0.1", "http://127.0.0.1", 200),
        ("[::1]:7860", "http://[::1]:7860", 200),
        ("LOCALHOST:9", "http://localhost:9", 200),
        ("evil.example:7860", "http://evil.example:7860", 400),
        ("localhost.evil.example", "", 400),
        ("[::1", "", 400),
        ("", "", 400),
        ("localhost:7860", "https://evil.example", 403),
        ("localhost:7860", "http://localhost:3000", 403),
        ("localhost:7860", "null", 403),
    ],
)
def test_a_page_for_its_own_machine_answers_no_other_site(tmp_path, host, origin, status):
    headers = {"host": host, "origin": origin}
    local = Guard(inner, tmp_path, hosts=("127.0.0.1", "localhost", "::1"))
    assert answers(local, "POST", "/gradio_api/upload", **headers)[0] == status
    assert answers(local, "GET", "/", **headers)[0] == (400 if status == 400 else 200)
    assert answers(Guard(inner, tmp_path), "POST", "/gradio_api/upload", **headers)[0] == 200  # with a login, any proxy


# -- the whole server ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'peft-longlora[app]'")
    from peft_longlora.app import serve

    app = serve.make_app(Page(a_reader(chat=True), max_new_tokens=4), "Read")
    url = serve.launch(app, prevent_thread_lock=True, server_name="127.0.0.1", hosts=("127.0.0.1",))[1]
    yield app, url, gradio
    app.close(verbose=False)


def test_there_is_no_api_no_monitoring_and_no_history(server):
    app, url, gradio = server
    with urllib.request.urlopen(url) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        page = answer.read().decode().replace(" ", "")
    assert '"run_history":false' in page and '"enable_monitoring":true' not in page
    with urllib.request.urlopen(f"{url}gradio_api/info") as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    with pytest.raises(urllib.error.HTTPError, match="40"):
        urllib.request.urlopen(f"{url}monitoring/summary")
    for name in ("call/ask", "call/v2/ask", "run/ask", "api/ask"):
        with pytest.raises(urllib.error.HTTPError, match="40"):
            header = {"Content-Type": "application/json"}
            urllib.request.urlopen(urllib.request.Request(f"{url}gradio_api/{name}", b'{"data": ["x"]}', header))
    chat = next(block for block in app.blocks.values() if isinstance(block, gradio.Chatbot))
    assert chat.render_markdown is False and chat.sanitize_html


def post(url: str, path: str, body: bytes, kind: str = "application/json", **headers: str):
    request = urllib.request.Request(f"{url}gradio_api/{path}", body, {"Content-Type": kind, **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def upload(url: str, name: str, text: str) -> str:
    """Where a file lies that was sent without the page."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return post(url, "upload", f"{head}{text}\r\n--x--\r\n".encode(), "multipart/form-data; boundary=x")[0]


def call(server, name: str, session: str, *data) -> str:
    """What the server says of an event that no page sent, up to its end."""
    app, url, _ = server
    number = next(number for number, function in app.fns.items() if function.name == name)
    post(url, "queue/join", json.dumps({"fn_index": number, "data": data, "session_hash": session}).encode())
    said = ""
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
        for line in lines:
            said += line.decode()
            if b"process_completed" in line:
                return said
    raise AssertionError(said)


def sent(path: str, name: str) -> dict:
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("name", "text", "sign"),
    [
        ("a.txt", "The key is in the box. " * 9, "of 2,048 tokens"),
        ("a.html", "<p>The key", "is none of"),
        ("a.pdf", "no PDF", "is not a PDF"),
        ("long.txt", "The key is in the box. " * 5000, "at most 8,192 are read here"),
    ],
)
def test_a_file_that_was_sent_without_the_page_is_deleted_once_it_is_read_or_refused(server, name, text, sign):
    from gradio.utils import get_upload_folder

    path = upload(server[1], name, text)
    assert Path(path).read_text() == text
    assert sign in call(server, "read", f"read {name}".replace(" ", ""), sent(path, name))
    assert text not in [file.read_text() for file in Path(get_upload_folder()).rglob("*") if file.is_file()]
    assert not Path(path).exists()


def test_what_is_no_upload_is_refused_and_stays(server, tmp_path):
    from gradio.utils import get_upload_folder

    (tmp_path / "own.txt").write_text("The key is in the box.")
    (deep := Path(get_upload_folder()) / "a" / "b").mkdir(parents=True)
    (deep / "c.txt").write_text("The key is in the box.")
    for number, path in enumerate((str(tmp_path / "own.txt"), str(deep / "c.txt"), str(deep), "\0", "")):
        assert '"success":false' in call(server, "read", f"odd{number}", sent(path, "own.txt"))
    assert (tmp_path / "own.txt").exists() and (deep / "c.txt").exists()
    assert {block.GRADIO_CACHE for block in server[0].blocks.values()} == {get_upload_folder()}  # nothing is copied


def test_a_question_far_beyond_the_window_does_not_run(server):
    path = upload(server[1], "b.txt", "The key is in the box. " * 9)
    call(server, "read", "asks", sent(path, "b.txt"))
    for question in ("why " * 50_000, "why " * 10_000):
        said = call(server, "ask", "asks", question)
        assert 'class=\\"over\\"' in said and ("characters, and at most" in said or "rows of at most" in said)
    assert "assistant" in call(server, "ask", "asks", "Where is the key?")


def test_a_function_that_is_not_there_is_not_found(server):
    for path in ("queue/join", "run/predict"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            post(server[1], path, b'{"fn_index": 99, "data": [], "session_hash": "none"}')


def test_the_server_answers_no_other_site(server):
    for header, status in (({"Host": "evil.example"}, "400"), ({"Origin": "http://evil.example"}, "403")):
        with pytest.raises(urllib.error.HTTPError, match=status):
            post(server[1], "queue/join", b"{}", **header)


def test_an_upload_is_readable_by_nobody_and_lies_where_only_this_user_may_look(server):
    from gradio.utils import get_upload_folder

    _, url, _ = server
    path = upload(url, "a.txt", "secret")
    assert path.startswith(get_upload_folder()) and "longlora-app-" in path
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}gradio_api/file={path}")
    assert Path(get_upload_folder()).stat().st_mode & 0o077 == 0


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines use the model. Give --auth NAME:PASSWORD"),
        (["--auth", "a:b", "--open"], "--open lets everybody in, and --auth (or $LONGLORA_AUTH) asks for a login"),
        (["--auth", "reader"], "--auth needs a name and a password"),
        (["--repetition-penalty", "0"], "'0' is not a number from 0.1 to 10"),
        (["--model", "./none"], "--model ./none: no such folder"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, capsys, monkeypatch):
    monkeypatch.delenv("LONGLORA_AUTH", raising=False)
    if "./none" in options:
        pytest.importorskip("gradio")
    try:
        code = cli.main(["app", *with_usual({"--model": EMBEDDED, "--port": 17860}, options)])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


def test_an_address_that_cannot_be_served_is_refused_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options in (["--port", str(port)], ["--port", "99999"], ["--host", "256.1.1.1", "--open"]):
            assert cli.main(["app", "--model", "none", *options]) == 2
            err = capsys.readouterr().err
            assert "cannot be served (" in err and err.count("\n") == 1


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "peft_longlora.app.serve", raising=False)
    assert cli.main(["app", "--model", str(EMBEDDED), "--port", "17860"]) == 2
    assert "longlora app needs gradio: pip install 'peft-longlora[app]'" in capsys.readouterr().err


def test_other_machines_come_in_with_a_password_or_if_it_is_open(capsys, monkeypatch):
    serve = pytest.importorskip("peft_longlora.app.serve", exc_type=ImportError)
    started = []

    class Ended(Exception):
        pass

    def launch(app, **options):
        started.append(options)
        raise Ended

    monkeypatch.setattr(serve, "launch", launch)
    host = ["--host", "0.0.0.0", "--port", "17860"]
    for options in (["--open"], ["--auth", "me:pass:word"], []):
        if not options:
            monkeypatch.setenv("LONGLORA_AUTH", "you:secret")
        with pytest.raises(Ended):
            cli.main(["app", "--model", str(EMBEDDED), "--device", "cpu", *host, *options])
    assert [options["auth"] for options in started] == [None, ("me", "pass:word"), ("you", "secret")]
    assert {options["hosts"] for options in started} == {None}
    assert {options["server_name"] for options in started} == {"0.0.0.0"}

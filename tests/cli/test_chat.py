"""`longlora chat` as a user types it: answers on stdout, the rest on stderr, bad input with code 2 and one line."""

import _thread
import contextlib
import importlib.util
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from peft_longlora.chat.conversation import Conversation
from peft_longlora.chat.dialogue import Dialogue, Turn
from peft_longlora.chat.document import read_document
from peft_longlora.cli import main as cli
from peft_longlora.cli.chat import _shown
from peft_longlora.hub.loading import load_model
from tests.helpers.chat_models import TEXT, a_model, make_pdf
from tests.helpers.options import with_usual
from tests.helpers.paths import EMBEDDED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter on it, both merged, and a book."""
    folder = tmp_path_factory.mktemp("chat")
    model = a_model(vocab_size=4096, context_length=1024, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    a_model(adapter=False, vocab_size=4096, bos_token_id=0, eos_token_id=1).save_pretrained(folder / "base")
    for name in ("base", "merged"):
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder / name)
    (folder / "book.txt").write_text(TEXT)
    (folder / "book.pdf").write_bytes(make_pdf([TEXT, TEXT[:200]]))
    return folder


def chat(folder, *options, model="base", file="book.txt") -> int:
    usual = {"--model": folder / model, "--file": folder / file, "--device": "cpu", "--dtype": "float32"}
    try:
        return cli.main(["chat", *with_usual({**usual, "--max-new-tokens": 12}, options)])
    except SystemExit as error:
        return error.code


PASSAGES = ["--passages", 2] if importlib.util.find_spec("snowballstemmer") else []


def answers_of(folder, model, adapter, questions, file="book.txt") -> str:
    loaded = load_model(str(folder / model), adapter and str(folder / adapter), device="cpu", dtype="float32")
    conversation = Conversation(loaded, read_document(folder / file), max_new_tokens=12)
    return "".join("".join(conversation.ask(question)) + "\n" for question in questions)


@pytest.mark.parametrize(
    "model, adapter, file", [("base", None, "book.txt"), ("base", "adapter", "book.pdf"), ("merged", None, "book.txt")]
)
def test_questions_are_answered_in_turn(folder, model, adapter, file, capsys):
    questions = ["Where is the key?", "Why?"]
    options = ["--adapter", folder / adapter] if adapter else []
    for question in questions:
        options += ["--ask", question]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        assert chat(folder, *options, "--chunk", 50, *PASSAGES, model=model, file=file) == 0
    assert not [w for w in shown if issubclass(w.category, FutureWarning)]  # deprecations of dependencies
    out, err = capsys.readouterr()
    assert out == answers_of(folder, model, adapter, questions, file)
    window = 64 if model == "base" and not adapter else 1024
    assert f"of {window:,} tokens" in err and "KV cache: dense, " in err
    assert ("Nothing is cut" in err) == ("PAST THE WINDOW" in err) == (window == 64)
    if PASSAGES:
        assert ("  page " if file.endswith("pdf") else "  line") in err and "(holds " in err


def test_adapter_and_merged_model_say_the_same(folder):
    assert answers_of(folder, "base", "adapter", ["Why?"]) == answers_of(folder, "merged", None, ["Why?"])


def test_questions_come_from_a_pipe_until_it_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\n/forget\nWhy?\n"))
    assert chat(folder, model="merged") == 0
    out, err = capsys.readouterr()
    assert out == answers_of(folder, "merged", None, ["Why?"]) * 2 and "Forgotten" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n/quit\nWhy?\n"))
    assert chat(folder, model="merged") == 0
    assert capsys.readouterr().out == answers_of(folder, "merged", None, ["Why?"])


def test_commands_are_known_or_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/forgte\n/usr/lib is where?\n"))
    assert chat(folder, model="merged") == 0
    out, err = capsys.readouterr()
    assert (
        err.count("/forget drops the questions so far, /file PATH reads another file") == 2
        and "/forgte is no command" in err
    )
    assert out == answers_of(folder, "merged", None, ["/usr/lib is where?"])  # a path begins a question as any word


def test_another_file_begins_another_conversation(folder, capsys, monkeypatch):
    (folder / "other.txt").write_text(TEXT[::-1])
    asked = f"Why?\n/file\n/file {folder}/none.txt\n/file {folder}/other.txt\nWhy?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(asked))
    assert chat(folder, model="merged") == 0
    out, err = capsys.readouterr()
    first = answers_of(folder, "merged", None, ["Why?"])
    assert out == first + answers_of(folder, "merged", None, ["Why?"], file="other.txt") and out != first * 2
    assert "book.txt: " in err and "/file PATH reads another." in err
    assert "none.txt: no such file. The document is still book.txt." in err and "other.txt: " in err


def test_answers_are_chosen_as_the_models_makers_chose_unless_asked_otherwise(folder, tmp_path, capsys):
    """Against plain `generate` with the same generation_config."""
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_k=5, repetition_penalty=1.3)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "made")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder / "made")
    tokenizer, document = AutoTokenizer.from_pretrained(EMBEDDED), read_document(folder / "book.txt")
    ids = torch.tensor([Dialogue(tokenizer, document).ids([Turn("Why?")])])

    def plain(**options) -> str:
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).partition("\nQuestion:")[0].strip()

    for options, said, same in (
        ([], "sampled, temperature 0.7, top_p 1, repetition penalty 1.3", {}),
        (["--temperature", "0"], "the most likely token, repetition penalty 1.3", {"do_sample": False}),
        (["--repetition-penalty", "3"], "temperature 0.7, top_p 1, repetition penalty 3", {"repetition_penalty": 3.0}),
    ):
        assert chat(folder, "--ask", "Why?", *options, model="made") == 0
        out, err = capsys.readouterr()
        assert out.strip() == plain(**same) and said in err


def test_a_question_beyond_the_window_is_said_before_its_answer(folder, capsys):
    assert chat(folder, "--ask", "Why? " * 200, model="merged", file="book.txt") == 0
    err = capsys.readouterr().err
    assert err.index("warning: This question ends at token") < err.index("PAST THE WINDOW")


def test_nothing_controls_a_terminal():
    """Not through a pipe either: what reads it may show it on one."""
    hostile = "a\x1b[31mred\x07\r\x9b2J\u202eevil\tb\n"
    assert _shown(hostile) == "a\ufffd[31mred\ufffd\ufffd\ufffd2J\ufffdevil\tb\n"


def test_sampling_and_quantised_caches_are_options(folder, capsys):
    pytest.importorskip("hqq")
    options = ["--ask", "Why?", "--temperature", "3", "--top-p", "0.9", "--cache", "quantised", "--seed", "4"]
    assert [chat(folder, *options, model="merged") for _ in range(2)] == [0, 0]
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :] and "KV cache: quantised (" in err


BAD = {
    "none.txt: no such file": dict(file="none.txt"),
    "is a folder": dict(file="base"),
    ".safetensors is none of .txt, .md, .pdf": dict(file="base/model.safetensors"),
    "is not a pdf, or is broken": dict(file="broken.pdf"),
    "is a url": ["--file", "https://example.com/a.txt"],
    "none: no such folder": dict(model="none"),
    "adapter is an adapter": dict(model="adapter"),
    "no adapter_config.json": ["--adapter", "{folder}/base"],
    "sees no gpu": ["--device", "cuda"],
    "--device abacus": ["--device", "abacus"],
    "offloaded keeps keys and values of a gpu": ["--cache", "offloaded"],
    "invalid choice: 'static'": ["--cache", "static"],
    "not a number of 1 or more": ["--max-new-tokens", "0"],
    "not a number from 0 to 100": ["--temperature", "-1"],
    "not a number above 0 and up to 1": ["--top-p", "0"],
    "--ask is empty": ["--ask", " "],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_ends_with_code_2_and_one_line(folder, message, capsys):
    if message == "sees no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    options = BAD[message] if isinstance(BAD[message], list) else []
    where = BAD[message] if isinstance(BAD[message], dict) else {}
    assert chat(folder, "--ask", "Why?", *[option.format(folder=folder) for option in options], **where) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and message in lines[0].lower() and out == ""


def test_no_memory_is_said_with_what_helps(folder, capsys, monkeypatch):
    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Conversation, "read", fail)
    assert chat(folder, "--ask", "Why?") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "Tried to allocate" in line and "--cache quantised or offloaded" in line


class Terminal:
    """`longlora chat` in a process with a terminal of its own, typed at as a person does."""

    def __init__(self, folder, *options):
        self.fd, end = pty.openpty()
        command = ["chat", "--model", folder / "merged", "--file", folder / "book.txt", "--device", "cpu", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peft_longlora.cli", *map(str, command)],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
        )
        os.close(end)
        self.text = ""

    def wait_for(self, what: str, seconds: float = 120) -> str:
        """What was printed up to and with `what`."""
        deadline = time.monotonic() + seconds
        while what not in self.text:
            assert time.monotonic() < deadline, f"{what!r} never came: {self.text}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        before, found, self.text = self.text.partition(what)
        assert found, f"{what!r} never came: {before}"
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self, end: str) -> None:
        """Ctrl-C, again if need be (readline misses one that comes before it waits), or Ctrl-D."""
        for _ in range(20):
            self.interrupt() if end == "interrupt" else self.type(end)
            with contextlib.suppress(AssertionError):
                self.wait_for("Bye.", seconds=5)
                return
        pytest.fail(f"It never ended: {self.text}")


@pytest.fixture
def interruptible():
    """A shell starts a job in the background with Ctrl-C ignored, which its children inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_c_stops_an_answer_and_at_the_prompt_it_ends(folder, end, capsys, monkeypatch):
    """The signal comes while the answer does; what was said then counts."""
    lines, made, sent, read = iter(["Where is the key?"]), [], [], Conversation.read

    def type_line(prompt):
        for line in lines:
            return line
        raise end

    def read_and_arm(conversation, progress):
        read(conversation, progress)

        def interrupt(module, args, output):
            made.append(1)
            if sys.stdout.getvalue().strip() and not sent:  # a word of the answer stands there
                sent.append(len(made))
                _thread.interrupt_main()

        conversation.model.get_input_embeddings().register_forward_hook(interrupt)

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(Conversation, "read", read_and_arm)
    assert chat(folder, "--max-new-tokens", 100_000, model="merged") == 0
    out, err = capsys.readouterr()
    assert "Stopped here; the answer so far is kept." in err and "Bye." in err and out.strip()
    assert sent[0] <= len(made) < 1000


@pytest.mark.parametrize("options, code", [(["--ask", "Why?"], 130), ([], 130)])
def test_without_a_terminal_ctrl_c_ends_with_130(folder, options, code, capsys, monkeypatch):
    def fail(conversation, question):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    monkeypatch.setattr(Conversation, "ask", fail)
    assert chat(folder, *options, model="merged") == code
    assert "Stopped." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("end", ["interrupt", "\x04"])
def test_a_terminal_is_left_politely(folder, end):
    """Ctrl-C stops an answer and the conversation goes on; at the prompt Ctrl-C and Ctrl-D end it, with code 0."""
    terminal = Terminal(folder, "--max-new-tokens", "100000")
    try:
        terminal.wait_for("Ctrl-D ends.")
        terminal.wait_for("> ")
        terminal.type("Where is the key?\n")
        terminal.wait_for("key?\r\n")
        while len(terminal.text.strip()) < 20:
            terminal.text += os.read(terminal.fd, 4096).decode(errors="replace")
        terminal.interrupt()
        terminal.wait_for("Stopped here; the answer so far is kept.")
        terminal.wait_for("> ")
        terminal.leave(end)
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.fd)

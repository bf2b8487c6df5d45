"""`longlora chat`: questions about a document, from the command line or typed one by one; answers are streamed.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
from typing import TYPE_CHECKING

from .answering import add_answering_options, answering_options
from .arguments import Command, add_model_options, model_options, positive, say_options

if TYPE_CHECKING:
    from peft_longlora.chat import Document
    from peft_longlora.hub import Loaded

FORGET, FILE, HELP, QUIT = "/forget", "/file", "/help", ("/quit", "/exit")
COMMANDS = (
    f"{FORGET} drops the questions so far, {FILE} PATH reads another file, {HELP} says this, Ctrl-C stops an answer, "
    f"{QUIT[0]} or Ctrl-D ends."
)
# What moves the cursor, changes colours or reverses the order of letters on a terminal: all but tabs and line ends.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora chat`."""
    add = parser.add_argument
    add("--file", required=True, help="the document: a path to a .txt, .md or .pdf file")
    add("--ask", action="append", metavar="QUESTION", help="answer this question and end; may be given several times")
    add("--passages", type=positive, metavar="N", help="show N passages with words of the answer or the question")
    add_model_options(parser)
    add_answering_options(parser)


def run(args: argparse.Namespace) -> int:
    """Read the document and answer the questions.

    Raises:
        ValueError, ImportError, OSError: a file, model or cache cannot be used.
    """
    from peft_longlora.chat.words import import_rankers
    from peft_longlora.hub.loading import is_out_of_memory, load_model

    # A user learns nothing from pypdf's warnings that an error does not say.
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    if args.passages:
        import_rankers()  # an error before the model is loaded, and not after the first answer
    if any(not question.strip() for question in args.ask or []):
        raise ValueError("--ask is empty.")
    document = _open(args.file)  # refuses a bad file before a model is loaded
    loaded = load_model(**model_options(args), device=args.device)
    try:
        chat = Chat(args, loaded, document)
        if args.ask:
            for question in args.ask:
                _say(f"> {question}")
                chat.answer(question)
        else:
            chat.converse()
    except KeyboardInterrupt:
        _say("\nStopped.")
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"Out of memory ({' '.join(str(error).split())[:120]} ...). Try --cache quantised or offloaded, or a "
            f"smaller --chunk than {args.chunk}."
        ) from None
    return 0


class Chat:
    """A conversation on a terminal, or out of a pipe."""

    def __init__(self, args: argparse.Namespace, loaded: Loaded, document: Document) -> None:
        self.args, self.loaded = args, loaded
        for text in loaded.notes:
            self.warn(text)
        self.begin(document)
        _say(f"Answers: {self.conversation.choice}")

    def begin(self, document: Document) -> None:
        """Begin a conversation about a document, and let the model read it."""
        from peft_longlora.chat import Conversation

        self.conversation = Conversation(self.loaded, document, **answering_options(self.args))
        for text in self.conversation.warnings():
            self.warn(text)
        _say(f"{document.name}: {self.conversation.document_tokens:,} tokens; {self.conversation.usage}")
        self.conversation.read(_progress)
        kv = self.conversation.kv
        _say(f"KV cache: {kv.label}, {kv.nbytes() / 2**20:,.1f} MiB")

    def warn(self, text: str) -> None:
        """Say a warning with option names."""
        _say(f"warning: {say_options(text, self.args, COMMAND.options)}")

    def converse(self) -> None:
        """Answer questions one by one, until there are no more."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() a history
            _say(f"Ask away. {COMMANDS}")
        while True:
            try:
                text = input("> " if is_terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                _say("\nBye." if is_terminal else "")
                return
            if text in QUIT:
                return
            if not text or self.obey(text):
                continue
            try:
                self.answer(text)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print(flush=True)
                _say("Stopped here; the answer so far is kept.")

    def obey(self, text: str) -> bool:
        """Do what a command says, or refuse an unknown one. False: it is a question."""
        word, _, rest = text.partition(" ")
        if text == FORGET:
            self.conversation.forget()
            _say(f"Forgotten. {self.conversation.usage}")
        elif text == HELP:
            _say(COMMANDS)
        elif word == FILE:
            self.change(rest.strip())
        elif re.fullmatch(r"/\w+", text):
            _say(f"{text} is no command, and no question. {COMMANDS}")
        else:
            return False
        return True

    def change(self, path: str) -> None:
        """Begin a conversation about another file; the old one stays if that cannot be read."""
        if not path:
            _say(f"{self.conversation.dialogue.document.name}: {self.conversation.usage}. {FILE} PATH reads another.")
            return
        try:
            document = _open(path)
        except (ValueError, ImportError, OSError) as error:
            _say(f"{' '.join(str(error).split())} The document is still {self.conversation.dialogue.document.name}.")
            return
        except KeyboardInterrupt:
            _say(f"\nStopped. The document is still {self.conversation.dialogue.document.name}.")
            return
        self.conversation.close()  # before the next one needs the memory
        self.begin(document)

    def answer(self, question: str) -> None:
        """Print the answer while it is generated, then what it cost and its passages."""
        conversation, passages = self.conversation, self.args.passages
        for text in conversation.warnings(question):
            self.warn(text)
        for piece in conversation.ask(question):
            print(_shown(piece), end="", flush=True)
        print(flush=True)
        over = " PAST THE WINDOW" if conversation.tokens > conversation.window else ""
        _say(f"[{conversation.usage}{over}]")
        for passage in conversation.passages(passages) if passages and conversation.has_answer else []:
            _say(f"  {passage.place} ({passage.reason}): {' '.join(passage.text.split())}")


def _open(path: str) -> Document:
    """Read a file. A PDF may take long, so its pages are counted, and Ctrl-C ends it."""
    from peft_longlora.chat.document import read_document

    return read_document(
        path, is_stopped=lambda: False, on_page=lambda done, all: _count("Opening", done, all, "pages")
    )


def _progress(done: int, total: int) -> None:
    _count("Reading", done, total, "tokens")


def _count(what: str, done: int, total: int, unit: str) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{what}: {done:,} of {total:,} {unit}", end=end, file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(_shown(text), file=sys.stderr, flush=True)


def _shown(text: str) -> str:
    """The text without what could control a terminal: a pipe may end in one too."""
    return CONTROL.sub("\ufffd", text)


COMMAND = Command("chat", "ask questions of a long document", add_options, run, options={"chunk_size": "chunk"})

"""`longlora chat`: questions about a document, from the command line or typed one by one; answers are streamed.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
from typing import TextIO

from .arguments import Command, add_model_options, model_options, positive, say_options, share, temperature

CACHES = ("dense", "quantised", "offloaded")
FORGET, HELP, QUIT = "/forget", "/help", ("/quit", "/exit")
COMMANDS = f"{FORGET} drops the questions so far, Ctrl-C stops an answer, {QUIT[0]} or Ctrl-D ends."
# What moves the cursor, changes colours or reverses the order of letters on a terminal: all but tabs and line ends.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora chat`."""
    add = parser.add_argument
    add("--file", required=True, help="the document: a path to a .txt, .md or .pdf file")
    add("--ask", action="append", metavar="QUESTION", help="answer this question and end; may be given several times")
    add("--plain", action="store_true", help="use no chat template, even if the tokenizer has one")
    add_model_options(parser)
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--cache",
        default="dense",
        choices=CACHES,
        help="cache of keys and values; quantised: 4 bits, needs hqq or optimum-quanto; offloaded: in the CPU's memory",
    )
    memory.add_argument(
        "--chunk", type=positive, default=2048, help="tokens of the document in one forward (%(default)s)"
    )
    answers = parser.add_argument_group("answers")
    answers.add_argument("--max-new-tokens", type=positive, default=256)
    answers.add_argument(
        "--temperature", type=temperature, default=0.0, help="0: always the most likely token (%(default)s)"
    )
    answers.add_argument("--top-p", type=share, default=1.0, help="nucleus sampling, for a temperature above 0")
    answers.add_argument("--seed", type=int, default=0)
    answers.add_argument(
        "--passages", type=positive, metavar="N", help="show N passages that hold the words of the answer"
    )


def run(args: argparse.Namespace) -> int:
    """Read the document and answer the questions.

    Raises:
        ValueError, ImportError, OSError: a file, model or cache cannot be used.
    """
    from peft_longlora.chat.conversation import Conversation
    from peft_longlora.chat.document import read_document
    from peft_longlora.chat.words import import_bm25s
    from peft_longlora.hub.loading import is_out_of_memory, load_model

    # A user learns nothing from pypdf's warnings that an error does not say.
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    if args.passages:
        import_bm25s()  # an error before the model is loaded, and not after the first answer
    if any(not question.strip() for question in args.ask or []):
        raise ValueError("--ask is empty.")
    document = read_document(args.file)  # refuses a bad file before a model is loaded
    loaded = load_model(**model_options(args), device=args.device)
    conversation = Conversation(
        loaded,
        document,
        cache=args.cache,
        chunk_size=args.chunk,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        plain=args.plain,
    )
    for text in [*loaded.notes, *conversation.warnings()]:
        _say(f"warning: {say_options(text, args, COMMAND.options)}")
    _say(f"{document.name}: {conversation.document_tokens:,} tokens; {conversation.usage}")
    try:
        conversation.read(_progress)
        _say(f"KV cache: {conversation.kv.label}, {conversation.kv.nbytes() / 2**20:,.1f} MiB")
        if args.ask:
            for question in args.ask:
                _say(f"> {question}")
                _answer(conversation, question, args.passages)
        else:
            _converse(conversation, args.passages)
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


def _converse(conversation, passages: int | None) -> None:
    """Answer questions one by one, until there are no more."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history
        _say(f"Ask away. {COMMANDS}")
    while True:
        try:
            question = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            _say("\nBye." if is_terminal else "")
            return
        if question in QUIT:
            return
        if question == FORGET:
            conversation.forget()
            _say(f"Forgotten. {conversation.usage}")
        elif question == HELP:
            _say(COMMANDS)
        elif re.fullmatch(r"/\w+", question):
            _say(f"{question} is no command, and no question. {COMMANDS}")
        elif question:
            try:
                _answer(conversation, question, passages)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print(flush=True)
                _say("Stopped here; the answer so far is kept.")


def _answer(conversation, question: str, passages: int | None) -> None:
    for text in conversation.warnings(question):
        _say(f"warning: {text}")
    for piece in conversation.ask(question):
        print(_shown(piece, sys.stdout), end="", flush=True)
    print(flush=True)
    over = " PAST THE WINDOW" if conversation.tokens > conversation.window else ""
    _say(f"[{conversation.usage}{over}]")
    for passage in conversation.passages(passages) if passages and conversation.has_answer else []:
        _say(f"  {passage.place} ({passage.reason}): {' '.join(passage.text.split())}")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\rReading: {done:,} of {total:,} tokens", end="\n" if done >= total else "", file=sys.stderr, flush=True
        )


def _say(text: str) -> None:
    print(_shown(text, sys.stderr), file=sys.stderr, flush=True)


def _shown(text: str, stream: TextIO) -> str:
    """The text as it is, for a file or a pipe; for a terminal without what could control it."""
    return CONTROL.sub("\ufffd", text) if stream.isatty() else text


COMMAND = Command("chat", "ask questions of a long document", add_options, run, options={"chunk_size": "chunk"})

"""`longlora app`: a page in the browser, where readers drop a document and ask about it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

from .answering import add_answering_options, answering_options
from .arguments import Command, add_model_options, model_options, positive

LOCAL = ("127.0.0.1", "localhost", "::1")
AUTH = "LONGLORA_AUTH"  # for a password that no list of processes shows


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora app`."""
    add_model_options(parser)
    server = parser.add_argument_group("server").add_argument
    server("--host", default="127.0.0.1", help="0.0.0.0: for other machines too, with --auth (%(default)s)")
    server("--port", type=positive, default=7860, help="(%(default)s)")
    server("--auth", metavar="NAME:PASSWORD", help=f"what a reader must log in with (default: ${AUTH}, if it is set)")
    server("--open", action="store_true", help="let everybody in who reaches --host, without --auth")
    server("--places", type=positive, default=8, help="the most readers with a document at one time (%(default)s)")
    add_answering_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model and serve the page until Ctrl-C.

    Raises: ValueError, ImportError, OSError: an option, a model or a port cannot be used.
    """
    auth = _auth(args)
    if args.host not in LOCAL and auth is None and not args.open:
        raise ValueError(
            f"--host {args.host} lets other machines use the model. Give --auth NAME:PASSWORD, or --open to let "
            f"everybody in."
        )
    if auth is not None and args.open:
        raise ValueError(f"--open lets everybody in, and --auth (or ${AUTH}) asks for a login. Give one of them.")
    _check_address(args.host, args.port)
    try:
        from peft_longlora.app.serve import launch, make_app
    except ImportError as error:
        if error.name not in ("gradio", "starlette"):
            raise
        raise ImportError("longlora app needs gradio: pip install 'peft-longlora[app]'") from None
    from peft_longlora.app import Page
    from peft_longlora.app.reader import WAITING
    from peft_longlora.chat.kvcache import check_cache
    from peft_longlora.hub import load_model

    loaded = load_model(**model_options(args), device=args.device)
    check_cache(args.cache, loaded.model.device)  # now, and not when the first reader comes
    page = Page(loaded, args.places, **answering_options(args))
    app = make_app(page, f"Read with {Path(args.adapter or args.model).name}")
    for note in loaded.notes:
        print(f"warning: {note}", file=sys.stderr)
    # A question that waits and a file that is read hold a thread each; the others are for Stop, Forget and uploads.
    threads = args.places * (WAITING + 1) + 16
    hosts = LOCAL if args.host in LOCAL and auth is None else None
    server = dict(server_name=args.host, server_port=args.port, auth=auth, hosts=hosts)
    url = launch(app, max_threads=threads, prevent_thread_lock=True, **server)[1]
    login = f"; log in as {auth[0]}" if auth else ""
    if args.host not in LOCAL and auth is None:
        print(f"warning: --open: whoever reaches {args.host}:{args.port} can use the model.", file=sys.stderr)
    print(f"{url}{login}. Ctrl-C ends it.", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a service ends it as Ctrl-C does
    try:
        while True:
            time.sleep(3600)
    finally:
        app.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served, before a model is loaded. Raises: ValueError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port} cannot be served ({reason}). Give another one.") from error


def _auth(args: argparse.Namespace) -> tuple[str, str] | None:
    text = args.auth or os.environ.get(AUTH)
    name, _, password = (text or "").partition(":")
    if text and not (name and password):
        raise ValueError("--auth needs a name and a password, as in --auth reader:secret.")
    return (name, password) if text else None


COMMAND = Command(
    "app",
    "ask questions of a document in the browser",
    add_options,
    run,
    interrupted="Ended.",
    description="Serve a page on which readers drop a .txt, .md or .pdf file and ask about it. Readers share one model "
    "and take turns. Files are deleted once they are read; nothing is kept when a reader leaves.",
    epilog="Example: longlora app --model meta-llama/Llama-2-7b-hf --adapter my-32k-adapter. Needs gradio: pip install "
    "'peft-longlora[app]'. docs/serving.md says what a stranger may do there.",
    options={"chunk_size": "chunk"},
)

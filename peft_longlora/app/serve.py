"""The page on a web server, with gradio. Imported only by `longlora app` and by what serves a page of its own."""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from peft_longlora.app import views
from peft_longlora.app.guard import Guard
from peft_longlora.app.page import Page
from peft_longlora.app.views import View
from peft_longlora.chat.document import TEXTS

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
MOST_FILE = "100mb"
SWEEP = (60, 900)  # seconds: how often files that nobody read are looked for, and how old they may get
LOOK = 3  # seconds between two looks at whether the server still has the document that a page shows
ABOUT = "Drop a text, Markdown or PDF file and ask about it. Window: {:,} tokens."


@functools.cache
def _folder() -> Path:
    """Where uploads lie until they are read: a folder that only this user may read."""
    folder = Path(tempfile.mkdtemp(prefix="longlora-app-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_app(page: Page, title: str) -> gr.Blocks:
    """The page as a gradio app; `launch` serves it."""
    os.environ["GRADIO_TEMP_DIR"] = str(_folder())  # a part that is made before would copy each upload elsewhere
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=SWEEP) as app:
        gr.Markdown(f"# {title}\n{ABOUT.format(page.loaded.window)}", elem_id="title")
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="document-part"):
                file = gr.File(label="Document", file_types=list(TEXTS), height=130, elem_id="file")
                usage = gr.HTML(views.EMPTY, elem_id="usage", label="Tokens", show_label=False)
            with gr.Column(elem_id="talk-part"):
                # As text: what a document makes a model say is neither HTML nor an image to fetch. A label would lie
                # on the messages.
                chat = gr.Chatbot(
                    height="58vh", elem_id="chat", show_label=False, buttons=["copy"], render_markdown=False
                )
                question = gr.Textbox(
                    label="Question", placeholder="Ask about the document", submit_btn="Ask", elem_id="question"
                )
                with gr.Row(elem_id="buttons"):
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    clear = gr.Button("Forget the questions", size="sm", elem_id="forget")
            with gr.Column(elem_id="passages-part"):
                gr.Markdown("### Passages with words of the answer or the question")
                passages = gr.HTML(views.NOWHERE, elem_id="passages")
        parts = [usage, chat, question, passages]

        def read(upload: Any, request: gr.Request) -> Iterator[tuple]:
            path = _taken(upload)
            try:
                yield from map(_parts, page.read(request.session_hash, path and str(path)))
            finally:  # also if the reader has left meanwhile
                if path is not None:
                    shutil.rmtree(path.parent, ignore_errors=True)

        def ask(text: str, request: gr.Request) -> Iterator[tuple]:
            yield from map(_parts_and_file, page.ask(request.session_hash, text))

        def forget(request: gr.Request) -> tuple:
            return _parts(page.forget(request.session_hash))

        def stop_answer(request: gr.Request) -> None:
            page.stop(request.session_hash)

        def look(shown: str, request: gr.Request) -> tuple:
            # Not by the file: it is deleted, and gradio would look for it.
            return _parts_and_file(page.look(request.session_hash) if views.shows_document(shown) else View())

        def leave(request: gr.Request) -> None:
            page.leave(request.session_hash)

        # "multiple": a new document does not wait until the one before is read, nor a question for the one before.
        own: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        many: dict[str, Any] = dict(trigger_mode="multiple", concurrency_limit=None, **own)
        # Not `change`: only what a reader does to the box counts, and not that `look` empties it.
        # Without `preprocess`, which refuses a file of another kind before the page knows of it, and leaves it there.
        gr.on([file.upload, file.clear], read, file, parts, preprocess=False, **many)
        gr.Timer(LOOK).tick(look, usage, [*parts, file], queue=False, **own)
        question.submit(ask, question, [*parts, file], **many)
        stop.click(stop_answer, None, None, queue=False, **own)
        gr.on([clear.click, chat.clear], forget, None, parts, queue=False, **own)
        app.unload(leave)
    return app.queue()


def _taken(upload: Any) -> Path | None:
    """An upload in a folder of its own, because readers with the same file have it at one path; None: there is none.

    Args:
        upload: what a browser, or a stranger, says of the file: its path on this server.

    Raises: gr.Error: it is no upload, or another reader has taken it.
    """
    if upload is None:
        return None
    said = upload.get("path") if isinstance(upload, dict) else None
    path = Path(said).resolve() if isinstance(said, str) and "\0" not in said else None
    if path is None or path.parent.parent != _folder() or not path.is_file():
        raise gr.Error("There is no such file here. Drop it again.")
    return path.rename(Path(tempfile.mkdtemp(dir=_folder())) / path.name)


def _parts(view: View) -> tuple:
    return tuple(gr.skip() if part is None else part for part in (view.usage, view.chat, view.question, view.passages))


def _parts_and_file(view: View) -> tuple:
    """The parts, and the file's box: empty if the server has no document."""
    return *_parts(view), None if view.is_gone else gr.skip()


async def _no_function(request: Request, error: KeyError) -> PlainTextResponse:
    """gradio looks functions up by the number that a request names."""
    if not (error.args and isinstance(error.args[0], int)):
        raise error
    return PlainTextResponse("There is no such function.", 404)


def launch(app: gr.Blocks, hosts: tuple[str, ...] | None = None, **options: Any) -> tuple:
    """Serve the page: no history in the browser, no monitoring, no API page, nothing fetched from elsewhere.

    Args:
        app: from `make_app`.
        hosts: the names under which the page is asked for, as in `Guard`; None: any.
        options: of gradio's `launch`, such as server_name, server_port and auth.
    """
    return app.launch(
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size=MOST_FILE,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        share=False,
        quiet=True,
        ssr_mode=False,
        app_kwargs={
            "middleware": [Middleware(Guard, folder=_folder(), hosts=hosts)],
            "exception_handlers": {KeyError: _no_function},
        },
        **options,
    )

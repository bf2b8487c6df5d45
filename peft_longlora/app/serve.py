"""The page on a web server, with gradio. Imported only by `longlora app` and by what serves a page of its own."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

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


def make_app(page: Page, title: str) -> gr.Blocks:
    """The page as a gradio app; `launch` serves it."""
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

        def read(path: str | None, request: gr.Request) -> Iterator[tuple]:
            yield from map(_parts, page.read(request.session_hash, path))

        def ask(text: str, request: gr.Request) -> Iterator[tuple]:
            yield from map(_parts, page.ask(request.session_hash, text))

        def forget(request: gr.Request) -> tuple:
            return _parts(page.forget(request.session_hash))

        def stop_answer(request: gr.Request) -> None:
            page.stop(request.session_hash)

        def look(path: str | None, request: gr.Request) -> tuple:
            view = page.look(request.session_hash) if path else View()
            return *_parts(view), gr.skip() if view == View() else None

        def leave(request: gr.Request) -> None:
            page.leave(request.session_hash)

        # "multiple": a new document does not wait until the one before is read, nor a question for the one before.
        own: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        many: dict[str, Any] = dict(trigger_mode="multiple", concurrency_limit=None, **own)
        # Not `change`: only what a reader does to the box counts, and not that `look` empties it.
        gr.on([file.upload, file.clear], read, file, parts, **many)
        gr.Timer(LOOK).tick(look, file, [*parts, file], queue=False, **own)
        question.submit(ask, question, parts, **many)
        stop.click(stop_answer, None, None, queue=False, **own)
        gr.on([clear.click, chat.clear], forget, None, parts, queue=False, **own)
        app.unload(leave)
    return app.queue()


def _parts(view: View) -> tuple:
    return tuple(gr.skip() if part is None else part for part in (view.usage, view.chat, view.question, view.passages))


def launch(app: gr.Blocks, **options: Any) -> tuple:
    """Serve the page: no history in the browser, no monitoring, no API page, nothing fetched from elsewhere.

    Args:
        options: of gradio's `launch`, such as server_name, server_port and auth.
    """
    folder = Path(tempfile.mkdtemp(prefix="longlora-app-"))  # which only this user may read
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
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
        app_kwargs={"middleware": [Middleware(Guard, folder=folder)]},
        **options,
    )

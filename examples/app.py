"""Read a book with a model in the browser: drop a file, ask, and see the answer and the passages that hold its words.

    pip install "peft-longlora[app]"
    python examples/app.py --model BASE --adapter ADAPTER --cache quantised

Hardware: as for `longlora chat`: memory for the model and for the keys and values of each reader's document
(docs/serving.md). Readers share one model and take turns. Each page has its own document and conversation, which end
with the page: a file is deleted as soon as it is read, and neither the server nor the browser keeps a history.
"""

import html
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from command_line import Parser, positive
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_longlora.chat import CACHES, Conversation, Limits, read_document
from peft_longlora.hub import Loaded, load_model

EMPTY = "No document yet."
GONE = '<span class="over">There is no document here. Drop it again if you see one: the server was started anew.</span>'
NOWHERE = "<small>After an answer: passages that hold its words.</small>"
NONE_FOUND = "<small>No passage holds a word of the answer or of the question.</small>"
LIMITS = Limits(pages=3000, characters=20_000_000, seconds=120)  # of a stranger's document
# What a document or an answer names is not fetched: the reader's browser talks to this server alone.
POLICY = (
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; object-src 'none'; "
    "frame-src 'none'; form-action 'self'; base-uri 'self'"
)
LOCAL = ("127.0.0.1", "localhost", "::1")
CSS = """
.passage {border-left: 4px solid var(--primary-500); padding: 2px 0 2px 12px; margin: 0 0 14px 0}
.passage b {color: var(--primary-600)} .passage small {color: var(--body-text-color-subdued)}
.passage p {margin: 2px 0 0 0; white-space: pre-wrap; font-size: 0.9em}
.bar {height: 8px; border-radius: 4px; background: var(--border-color-primary); margin: 6px 0}
.bar div {height: 8px; border-radius: 4px; background: var(--primary-500)}
.over {color: #b91c1c} .dark .over {color: #fca5a5}
"""


class ContentPolicy:
    """Sends the content policy with every answer of the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def red(text: str) -> str:
    return f'<span class="over">{html.escape(text)}</span>'


def show_usage(conversation: Conversation, *notes: str) -> str:
    """The tokens used against the window, as a bar, and what a reader must know."""
    part = min(conversation.tokens / conversation.window, 1)
    lines = [f"<b>{html.escape(conversation.dialogue.document.name)}</b>"]
    lines += [f'<div class="bar"><div style="width: {part:.1%}"></div></div>{conversation.usage}']
    lines += [f"{conversation.kv.label} KV cache, {conversation.kv.nbytes() / 2**20:,.1f} MiB"]
    lines += map(red, (*conversation.warnings(), *notes))
    return "<br>".join(lines)


def show_reading(conversation: Conversation) -> str:
    """How much of the document is read."""
    done, total = len(conversation.kv.ids), len(conversation.dialogue.start)
    bar = f'<div class="bar"><div style="width: {min(done / total, 1):.1%}"></div></div>'
    name = html.escape(conversation.dialogue.document.name)
    return f"<b>{name}</b><br>{bar}Reading: {done:,} of {total:,} tokens. You can ask already."


def show_passages(conversation: Conversation) -> str:
    """The passages that hold the words of the last answer and its question."""
    if not conversation.has_answer:
        return NOWHERE
    try:
        passages = conversation.passages()
    except (ValueError, ImportError) as error:
        return red(str(error))
    return (
        "".join(
            f'<div class="passage"><b>{html.escape(p.place)}</b> <small>{html.escape(p.reason)}</small>'
            f"<p>{html.escape(p.text)}</p></div>"
            for p in passages
        )
        or NONE_FOUND
    )


def show_turns(conversation: Conversation) -> list[dict[str, str]]:
    """All questions that were answered, and their answers."""
    return [m for t in conversation.turns for m in (message("user", t.question), message("assistant", t.answer))]


class Page:
    """What the page does; every reader has a conversation of their own, on one model.

    Args:
        options: those of `Conversation`.
    """

    def __init__(self, loaded: Loaded, **options) -> None:
        self.loaded, self.options, self.lock = loaded, options, threading.Lock()

    def read(self, path: str | None, before: Conversation | None) -> Iterator[tuple]:
        """End the old conversation and begin one about a new document: (conversation, usage, chat, passages)."""
        if before is not None:
            before.close()
        if path is None:
            yield None, EMPTY, [], NOWHERE
            return
        try:
            conversation = Conversation(self.loaded, read_document(path, LIMITS), lock=self.lock, **self.options)
        except (ValueError, ImportError) as error:
            said = " ".join(str(error).replace(path, Path(path).name).split())  # no paths of this machine
            yield None, red(said), [], NOWHERE
            return
        finally:
            Path(path).unlink(missing_ok=True)  # nobody else can ask the server for it
        failure: list[str] = []

        def work() -> None:
            try:
                conversation.read()
            except (ValueError, torch.OutOfMemoryError) as error:
                failure.append(" ".join(str(error).split())[:300])

        reading = threading.Thread(target=work, daemon=True)
        reading.start()
        yield conversation, show_reading(conversation), [], NOWHERE  # a question can be asked from here on
        while reading.is_alive():
            reading.join(0.3)
            if not conversation.is_closed and reading.is_alive():
                yield gr.skip(), show_reading(conversation), gr.skip(), gr.skip()
        if not conversation.is_closed:  # otherwise another document is there
            yield gr.skip(), show_usage(conversation, *failure), gr.skip(), gr.skip()

    def ask(self, question: str, conversation: Conversation | None) -> Iterator[tuple]:
        """Stream an answer, then show its passages: (chat, question, usage, passages)."""
        if conversation is None:
            yield [], question, GONE, NOWHERE
            return
        if not question.strip():
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        said = [*show_turns(conversation), message("user", question)]
        warnings = conversation.warnings(question)
        yield said, "", show_usage(conversation, *warnings) if warnings else gr.skip(), NOWHERE
        text, notes = "", []
        try:
            for piece in conversation.ask(question):
                text += piece
                yield [*said, message("assistant", text)], gr.skip(), gr.skip(), gr.skip()
        except (ValueError, torch.OutOfMemoryError) as error:
            notes.append(" ".join(str(error).split())[:300])
        if conversation.is_closed:  # another document is there, and this question was about the one before
            return
        unanswered = "" if conversation.has_answer else question  # stopped before its first word: it is given back
        shown = show_passages(conversation)
        yield show_turns(conversation), unanswered or gr.skip(), show_usage(conversation, *notes), shown

    def forget(self, conversation: Conversation | None) -> tuple:
        """End the answer that is being given, and keep the document alone: (chat, usage, passages)."""
        if conversation is None:
            return [], EMPTY, NOWHERE
        conversation.forget()
        return [], show_usage(conversation), NOWHERE


def make_app(loaded: Loaded, title: str, **options) -> gr.Blocks:
    """The page. `options` are those of `Conversation`."""
    page = Page(loaded, **options)
    # Files that are left over, as those of readers who went while they sent one, go after an hour.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(f"# {title}\nDrop a text, Markdown or PDF file and ask about it. Window: {loaded.window:,} tokens.")
        conversation = gr.State(None, delete_callback=lambda held: held and held.close())
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="Document", file_types=[".txt", ".md", ".pdf"], height=150, elem_id="file")
                usage = gr.HTML(EMPTY, elem_id="usage", label="Tokens", show_label=False)
                gr.Markdown("### Passages that hold the words of the answer")
                passages = gr.HTML(NOWHERE, elem_id="passages")
            with gr.Column(scale=2, min_width=400):
                # As text: what a document makes a model say is neither HTML nor an image to fetch.
                chat = gr.Chatbot(
                    height="60vh", elem_id="chat", label="Conversation", buttons=["copy"], render_markdown=False
                )
                question = gr.Textbox(
                    label="Question", placeholder="Ask about the document", submit_btn=True, elem_id="question"
                )
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    clear = gr.Button("Forget the questions", size="sm", elem_id="forget")
        # "multiple": a new document does not wait until the one before is read.
        own = dict(api_visibility="private", show_progress="hidden")
        file.change(
            page.read, [file, conversation], [conversation, usage, chat, passages], trigger_mode="multiple", **own
        )
        question.submit(page.ask, [question, conversation], [chat, question, usage, passages], **own)
        stop.click(lambda held: held and held.stop(), conversation, queue=False, **own)
        gr.on([clear.click, chat.clear], page.forget, conversation, [chat, usage, passages], queue=False, **own)
    return app.queue(default_concurrency_limit=16)


def launch(app: gr.Blocks, **options) -> tuple:
    """Serve the page: no history in the browser, no monitoring, no API page, nothing fetched from elsewhere."""
    return app.launch(
        css=CSS,
        max_file_size="100mb",
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
        **options,
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a base, or of a merged model")
    parser.add_argument("--adapter", help="folder or Hub id of a PEFT adapter")
    parser.add_argument("--cache", default="dense", choices=CACHES)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="the GPU if there is one")
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too; give --auth with it")
    parser.add_argument("--port", type=positive, default=7860)
    parser.add_argument("--auth", metavar="NAME:PASSWORD", help="what a reader must log in with")
    args = parser.parse_args()
    name, _, password = (args.auth or "").partition(":")
    if args.auth and not (name and password):
        parser.error("--auth needs a name and a password, as in --auth reader:secret")
    if args.host not in LOCAL and not args.auth:
        print(f"warning: --host {args.host} without --auth: whoever reaches it can use the model.", file=sys.stderr)
    with parser.refusing():
        loaded = load_model(args.model, args.adapter, dtype=args.dtype, device=args.device)
    app = make_app(
        loaded,
        f"Read with {Path(args.adapter or args.model).name}",
        cache=args.cache,
        max_new_tokens=args.max_new_tokens,
    )
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    auth = (name, password) if args.auth else None
    launch(app, server_name=args.host, server_port=args.port, theme=theme, auth=auth)


if __name__ == "__main__":
    main()

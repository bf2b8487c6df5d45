"""Read a book with a model in the browser: drop a file, ask, see the answer come and the passages it looked at.

    pip install "peft-longlora[app]"
    python examples/app.py --model BASE --adapter ADAPTER --cache quantised

Hardware: what `longlora chat` needs: the model, and the keys and values of each reader's document (docs/serving.md).
Readers share one model and take turns at it; documents and conversations are their own, and go with their page.
"""

import argparse
import html
import threading
from pathlib import Path

import gradio as gr
import torch

from peft_longlora.chat import CACHES, Conversation, read_document
from peft_longlora.hub import Loaded, load_model

EMPTY = "No document yet."
NOWHERE = "<small>After an answer: where in the document it looked.</small>"
CSS = """
.passage {border-left: 4px solid var(--primary-500); padding: 2px 0 2px 12px; margin: 0 0 14px 0}
.passage b {color: var(--primary-600)} .passage small {color: var(--body-text-color-subdued)}
.passage p {margin: 2px 0 0 0; white-space: pre-wrap; font-size: 0.9em}
.bar {height: 8px; border-radius: 4px; background: var(--border-color-primary); margin: 6px 0}
.bar div {height: 8px; border-radius: 4px; background: var(--primary-500)}
.over {color: #b91c1c}
"""


def show_usage(conversation: Conversation, *notes: str) -> str:
    """The tokens used against the window, as a bar, and what a reader must know."""
    part = min(conversation.tokens / conversation.window, 1)
    lines = [f"<b>{html.escape(conversation.dialogue.document.name)}</b>"]
    lines += [f'<div class="bar"><div style="width: {part:.1%}"></div></div>{conversation.usage}']
    lines += [f"{conversation.kv.label} KV cache, {conversation.kv.nbytes() / 2**20:,.1f} MiB"]
    lines += [f'<span class="over">{html.escape(note)}</span>' for note in (*conversation.warnings(), *notes)]
    return "<br>".join(lines)


def show_passages(conversation: Conversation) -> str:
    """The passages that the last answer attended to most."""
    if not conversation.turns[-1].answer:
        return NOWHERE
    return "".join(
        f'<div class="passage"><b>{html.escape(p.place)}</b> <small>{p.share:.1%} of the attention to the document'
        f"</small><p>{html.escape(p.text)}</p></div>"
        for p in conversation.passages()
    )


def make_app(loaded: Loaded, title: str, **options) -> gr.Blocks:
    """The page. `options` are those of `Conversation`."""
    lock = threading.Lock()

    def read(path: str | None, progress=gr.Progress()):  # noqa: B008  how gradio hands it over
        """A new document, and a new conversation with it; a message where it cannot be read."""
        if path is None:
            return None, EMPTY, [], NOWHERE
        try:
            conversation = Conversation(loaded, read_document(path), lock=lock, **options)
            conversation.read(lambda done, total: progress((done, total), desc="Reading", unit="tokens"))
        except (ValueError, ImportError, torch.OutOfMemoryError) as error:
            message = " ".join(str(error).replace(path, Path(path).name).split())  # no paths of this machine
            return None, f'<span class="over">{html.escape(message)}</span>', [], NOWHERE
        return conversation, show_usage(conversation), [], NOWHERE

    def ask(question: str, conversation: Conversation | None):
        """Stream the answer; then the passages."""
        if conversation is None:
            gr.Warning("Drop a document first.")
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        if not question.strip():
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        said = [m for t in conversation.turns for m in (message("user", t.question), message("assistant", t.answer))]
        said.append(message("user", question))
        yield said, "", gr.skip(), NOWHERE
        text = ""
        try:
            for piece in conversation.ask(question):
                text += piece
                yield [*said, message("assistant", text)], gr.skip(), gr.skip(), gr.skip()
            yield gr.skip(), gr.skip(), show_usage(conversation), show_passages(conversation)
        except (ValueError, torch.OutOfMemoryError) as error:
            yield gr.skip(), gr.skip(), show_usage(conversation, f"{error}"[:300]), gr.skip()

    def forget(conversation: Conversation | None):
        """Only the document stays."""
        if conversation is None:
            return [], EMPTY, NOWHERE
        conversation.forget()
        return [], show_usage(conversation), NOWHERE

    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.Markdown(f"# {title}\nDrop a text, Markdown or PDF file and ask about it. Window: {loaded.window:,} tokens.")
        conversation = gr.State(None, delete_callback=lambda held: held and held.kv.clear())
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="Document", file_types=[".txt", ".md", ".pdf"], height=150, elem_id="file")
                usage = gr.HTML(EMPTY, elem_id="usage", label="Tokens", show_label=False)
                gr.Markdown("### Passages the answer attended to")
                passages = gr.HTML(NOWHERE, elem_id="passages")
            with gr.Column(scale=2, min_width=400):
                chat = gr.Chatbot(height="60vh", elem_id="chat", label="Conversation", buttons=["copy"])
                question = gr.Textbox(
                    placeholder="Ask about the document", submit_btn=True, show_label=False, elem_id="question"
                )
                with gr.Row():
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                    clear = gr.Button("Forget the questions", size="sm", elem_id="forget")
        file.change(read, file, [conversation, usage, chat, passages])
        question.submit(ask, [question, conversation], [chat, question, usage, passages])
        stop.click(lambda held: held and held.stop(), conversation, queue=False)
        gr.on([clear.click, chat.clear], forget, conversation, [chat, usage, passages])
    return app.queue(default_concurrency_limit=16)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a base, or of a merged model")
    parser.add_argument("--adapter", help="folder or Hub id of a PEFT adapter")
    parser.add_argument("--cache", default="dense", choices=CACHES)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", help="the GPU if there is one")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines too")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    loaded = load_model(args.model, args.adapter, dtype=args.dtype, device=args.device)
    title = f"Read with {Path(args.adapter or args.model).name}"
    app = make_app(loaded, title, cache=args.cache, max_new_tokens=args.max_new_tokens)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app.launch(server_name=args.host, server_port=args.port, theme=theme, css=CSS, max_file_size="100mb")


if __name__ == "__main__":
    main()

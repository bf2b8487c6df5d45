"""What the server answers to anybody: a content policy with every answer, no files, no API, a bound for uploads,
and on a page for this machine alone nothing to other sites.

An ASGI middleware, between the web server and gradio's own app.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What a document or an answer names is not fetched: the reader's browser talks to this server alone.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; frame-src 'none'; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
MOST_BYTES = 1_000_000_000  # of files that lie on the server and are not read yet


class Guard:
    """Wraps the server's app.

    Attributes:
        folder: where uploads lie until they are read.
        hosts: the names under which the page is asked for, such as localhost; None: any. With names, other sites may
            not send anything either: a site can give its own name this machine's address (DNS rebinding).
    """

    def __init__(
        self, app: ASGIApp, folder: Path, most_bytes: int = MOST_BYTES, hosts: tuple[str, ...] | None = None
    ) -> None:
        self.app, self.folder, self.most_bytes, self.hosts = app, folder, most_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                names = {name for name, _ in ours if name != b"cache-control" or _is_page(scope)}
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
                message["headers"] = [*kept, *((name, value) for name, value in ours if name in names)]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send_with_headers)
            return
        status, text = refusal
        await send_with_headers({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and text of a refusal; None if the request is answered."""
        if self.hosts is not None:
            headers = dict(scope["headers"])
            host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
            if _name(host) not in self.hosts:
                return 400, "This page is for its own machine alone: ask for it as localhost, or start it with --auth."
            if scope["method"] == "POST" and origin and origin.partition("://")[2].lower() != host.lower():
                return 403, "Another site may not send anything here."
        parts = scope["path"].lstrip("/").removeprefix("gradio_api/")
        if parts.startswith(("file=", "file/", "proxy=")):
            return 404, "No files are served here."
        # gradio does not list functions that are private, and still runs them by their names.
        if parts.startswith(("call/", "api/", "run/")) and parts.rstrip("/") not in ("run/predict", "api/predict"):
            return 404, "There is no API here."
        if scope["method"] == "POST" and parts.rstrip("/") == "upload" and self._bytes() >= self.most_bytes:
            return 507, "Too many files wait on this server. Try again later."
        return None

    def _bytes(self) -> int:
        total = 0
        for path in self.folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except OSError:  # read and deleted meanwhile
                continue
        return total


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_page(scope: Scope) -> bool:
    """Whether a request is for the page itself, and not for a part of it that the browser may keep."""
    return scope["path"] == "/"

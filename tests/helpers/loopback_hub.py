"""A hub on 127.0.0.1: the calls of huggingface_hub 1.33 to 2.4 that create, commit, list and download, over real HTTP.

Repositories of models and data sets, branches, regular and LFS uploads (Git LFS batch API), range requests, private
repositories and one token, and faults on demand. Kept in memory. What it is not: the Hub's own checks of a card's
metadata are only repeated as far as `validate` says, and Xet is left out (set HF_HUB_DISABLE_XET=1).

Use it by hand: `python tests/helpers/loopback_hub.py 8000`, then
HF_ENDPOINT=http://127.0.0.1:8000 HF_TOKEN=hf_loopback.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
USER, ORGANISATION = "me", "we"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".gz")


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """Answers the next requests that match with `status`, or with "drop" closes the connection amid the upload."""

    method: str
    path: str
    status: int | str
    times: int


class LoopbackHub:
    """The server and its state; a context manager. `url` is what HF_ENDPOINT wants."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int | str, times: int = 1) -> None:
        self.faults.append(Fault(method, path, status, times))

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        return self.repos[kind, repo_id].files(revision)

    def put(self, repo_id: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> None:
        """Fill a repository from behind, as somebody else would."""
        repo = self.repos.setdefault((kind, repo_id), Repo(private))
        repo.commit("main", files, "put")


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        hub = self.hub
        with hub.lock:
            hub.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
            fault = next((f for f in hub.faults if f.method == self.command and re.search(f.path, path)), None)
            if fault is not None:
                fault.times -= 1
                if fault.times <= 0:
                    hub.faults.remove(fault)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status == "drop":
            self.rfile.read(length // 2)
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault is not None:
            self._error(int(fault.status), "", "a fault the test asked for")
            return
        with hub.lock:
            for method, pattern, handle in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    handle(self, **match.groupdict())
                    return
        hub.unknown.append(f"{self.command} {path}")
        self._error(404, "", "no such route")

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # -- answers ---------------------------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self._send(
            status, json.dumps({"error": message}).encode(), {**headers, **({"X-Error-Code": code} if code else {})}
        )

    # -- who may ---------------------------------------------------------------------------------------------------

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_write(self) -> bool:
        if not self._is_known():
            self._error(401, "", "Invalid credentials in Authorization header")
        return self._is_known()

    def _repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo | None:
        repo = self.hub.repos.get(((kind or "models").rstrip("s/"), repo_id))
        if write and not self._may_write():
            return None
        if repo is None or (repo.private and not self._is_known()):
            self._error(404 if self._is_known() else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _revision(self, repo: Repo, revision: str) -> str | None:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return oid

    # -- the calls -------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self._may_write():
            orgs = [{"name": ORGANISATION}]
            self._json({"type": "user", "name": USER, "orgs": orgs, "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        if not self._may_write():
            return
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or USER}/{wish['name']}"
        kind = wish.get("type") or "model"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.hub.repos:
            self._json({**answer, "error": "You already created this model repo"}, 409)
            return
        private = wish.get("private") or wish.get("visibility") == "private"
        repo = self.hub.repos[kind, repo_id] = Repo(bool(private))
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json(answer)

    def branch(self, kind: str, repo_id: str, branch: str) -> None:
        if (repo := self._repo(kind, repo_id, write=True)) is None:
            return
        if branch in repo.branches:
            self._error(409, "", "Reference already exists")
            return
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def validate(self) -> None:
        """The part of the Hub's check that is documented: metadata is a mapping, base_model is a repository's id."""
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        data = yaml.safe_load(match.group(1)) if match else {}
        errors = [] if isinstance(data, dict) else [{"message": "metadata is not a mapping"}]
        base = data.get("base_model") if not errors else None
        if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            errors.append({"message": f'"base_model" with value "{base}" is not valid'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        if self._repo(kind, repo_id, write=True) is None:
            return
        files = json.loads(self.body)["files"]
        modes = ["lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular" for f in files]
        self._json(
            {
                "files": [
                    {"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                    for f, mode in zip(files, modes, strict=True)
                ]
            }
        )

    def lfs_batch(self, kind: str | None, repo_id: str) -> None:
        if self._repo(kind, repo_id, write=True) is None:
            return
        objects = []
        for wish in json.loads(self.body)["objects"]:
            actions = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{wish['oid']}"}}}
            objects.append({**wish, **({} if wish["oid"] in self.hub.lfs else actions)})
        self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "", "the content is not what its name says")
            return
        self.hub.lfs[oid] = self.body
        self._send(200, b"")

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        if (repo := self._repo(kind, repo_id, write=True)) is None or (old := self._revision(repo, revision)) is None:
            return
        files, message = dict(repo.commits[old]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    self._error(400, "", f"LFS object {value['oid']} was never uploaded")
                    return
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        branch = f"refs/pr/{len(repo.branches)}" if "create_pr" in self.query else revision
        oid = repo.commit(branch, files, message)
        url = f"{self.hub.url}/{repo_id}"
        pr = f"{url}/discussions/1" if branch != revision else None
        self._json({"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pr, "success": True})

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        if (repo := self._repo(kind, repo_id)) is None or (oid := self._revision(repo, revision or "main")) is None:
            return
        files = repo.commits[oid]
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        data = (yaml.safe_load(card.group(1)) if card else None) or {}
        self._json(
            {
                **{"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private},
                **{"tags": data.get("tags") or [], "cardData": data, "downloads": 0, "likes": 0, "gated": False},
                "siblings": [{"rfilename": path, "size": len(files[path])} for path in sorted(files)],
            }
        )

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None = None) -> None:
        if (repo := self._repo(kind, repo_id)) is None or (oid := self._revision(repo, revision)) is None:
            return
        prefix = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        below = {p: c for p, c in sorted(repo.commits[oid].items()) if p.startswith(prefix)}
        parents = {str(parent) for path in below for parent in PurePosixPath(path).parents} - {".", prefix.strip("/")}
        folders = [{"type": "directory", "path": p, "oid": oid} for p in sorted(parents) if p.startswith(prefix)]
        found = folders + [entry(path, content) for path, content in below.items()]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            found = [item for item in found if "/" not in item["path"][len(prefix) :]]
        self._json(found)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        if (repo := self._repo(kind, repo_id)) is None or (oid := self._revision(repo, revision)) is None:
            return
        wish = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        files = repo.commits[oid]
        found = [entry(path, files[path]) for path in wish if path in files]
        folders = [p for p in wish if p not in files and any(name.startswith(f"{p.strip('/')}/") for name in files)]
        self._json(found + [{"type": "directory", "path": path, "oid": oid} for path in folders])

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        if (repo := self._repo(kind, repo_id)) is None or (oid := self._revision(repo, revision)) is None:
            return
        content = repo.commits[oid].get(path)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            self._send(200, content, headers)
            return
        start, stop = int(match[1]), min(int(match[2] or len(content)), len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers)


def etag(path: str, content: bytes) -> str:
    """As the Hub's: the SHA-256 of an LFS file, git's own name of any other."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    answer = {"type": "file", "path": path, "size": len(content), "oid": etag(path, content)}
    if path.endswith(LFS_SUFFIXES):
        answer["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
    return answer


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", _API + r"/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", _API + r"/commit/(?P<revision>.+)", Handler.commit),
    ("POST", _API + r"/branch/(?P<branch>.+)", Handler.branch),
    ("POST", _API + r"/paths-info/(?P<revision>.+)", Handler.paths_info),
    ("GET", _API + r"/tree/(?P<revision>refs/pr/\d+|[^/]+)(?P<folder>/.*)?", Handler.tree),
    ("GET", _API + r"(?:/revision/(?P<revision>.+))?", Handler.info),
    ("POST", r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    (
        "GET HEAD",
        r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)",
        Handler.resolve,
    ),
]

if __name__ == "__main__":
    with LoopbackHub(int(sys.argv[1]) if len(sys.argv) > 1 else 8000) as hub:
        print(f"HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1")
        threading.Event().wait()

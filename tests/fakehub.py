"""A Hugging Face Hub on the loopback interface, for tests: repositories in memory, LFS, tokens.

It speaks what huggingface_hub 1.33 and 2.4 say without Xet: create, preupload, LFS batch, commit,
model info, tree, resolve with ranges.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

LFS = (".safetensors", ".bin")


@dataclass
class Repo:
    """One repository: files by path, and whether only its owner sees it."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    oid: str = hashlib.sha1(b"").hexdigest()


@dataclass
class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.url` until the block ends.

    Attributes:
        user: owner of the namespace in which repositories can be made.
        token: what must be sent to write.
        cut_after: LFS uploads that succeed before the connection is cut; None = never.
        uploads: SHA-256 of every LFS object that arrived, in order, repeats included.
        lock: held while an upload is counted; requests are served in threads.
    """

    user: str = "me"
    token: str = "hf_secret"
    cut_after: int | None = None
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # with 5, a client that opens several at once may wait for seconds


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self._body()
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, path):
                getattr(self, method)(body, *found.groups())
                return
        self._json({"error": f"unhandled {path}"}, 404)

    do_POST = do_PUT = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream"} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(json.dumps(value).encode(), status, **kind, **headers)

    def _may_write(self, repo: str) -> bool:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._json({"error": "Invalid credentials"}, 401)
        elif not repo.startswith(f"{self.hub.user}/"):
            self._json({"error": "Forbidden"}, 403)
        else:
            return True
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return repo

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        if not self._may_write(name):
            return
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", **url}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        self._json(url)

    def preupload(self, body: bytes, name: str) -> None:
        if self._may_write(name) and (repo := self._repo(name)):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": _git_oid(repo.files.get(file["path"])),
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.lfs:
                href = {"href": f"{self.hub.url}/_lfs/{item['oid']}"}
                entry["actions"] = {"upload": href}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        with self.hub.lock:  # the client sends several at once: count one after the other
            cut = self.hub.cut_after is not None and len(self.hub.uploads) >= self.hub.cut_after
            if not cut:
                self.hub.lfs[oid] = body
                self.hub.uploads.append(oid)
        if cut:
            self._json({"error": "quota"}, 413)  # not retried by the client, unlike a lost line
        else:
            self._json({})

    def commit(self, body: bytes, name: str) -> None:
        if not (self._may_write(name) and (repo := self._repo(name))):
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                repo.files.pop(value["path"], None)
        repo.oid = hashlib.sha1(repo.oid.encode() + body).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{repo.oid}"
        done = {"success": True, "commitOid": repo.oid, "commitUrl": url, "hookOutput": ""}
        self._json(done)

    def info(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            files = [{"rfilename": path} for path in sorted(repo.files)]
            self._json(
                {
                    "id": name,
                    "sha": repo.oid,
                    "private": repo.private,
                    "tags": [],
                    "siblings": files,
                }
            )

    def tree(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
                for path, data in sorted(repo.files.items())
            ]
            self._json(entries)

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if path not in repo.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.oid}
            self._json({"error": "Entry not found"}, 404, **headers)
            return
        data = repo.files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repo.oid}
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._send(data[first:], 206, **headers)
        else:
            self._send(data, 200, **headers)

    def yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})


def _git_oid(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"([^/]+/[^/]+?)"
_ROUTES = (
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "yaml"),
    (rf"/api/models/{_NAME}/preupload/.*", "preupload"),
    (rf"/api/models/{_NAME}/commit/.*", "commit"),
    (rf"/api/models/{_NAME}/tree/.*", "tree"),
    (rf"/api/models/{_NAME}(?:/revision/.*)?", "info"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"/_lfs/([0-9a-f]+)", "store"),
    (rf"/{_NAME}/resolve/[^/]+/(.+)", "resolve"),
)

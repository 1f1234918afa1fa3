"""A Hugging Face hub on this machine: as much of its HTTP API as fetching a snapshot needs, and pushes."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class FakeHub:
    """One repository at a time."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.start("org/name")

    def start(self, name: str) -> None:
        """Forget everything, for another repository."""
        self.name = name
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.requests: list[str] = []
        """Method and path of each."""
        self.refused: set[str] = set()
        """Names of files that can't be had."""
        self.private: bool | None = None

    def push(self, files: Files, *branches: str) -> str:
        """A commit that holds these files, and the branches or tags that it is from now on."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.branches |= dict.fromkeys(branches or ("main",), commit)
        return commit

    def receive(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request that makes a repository or uploads to it."""
        path = path.partition("?")[0]
        answer: Any = {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.start(f"{asked['organization']}/{asked['name']}")
            self.private = asked.get("visibility") == "private"
            answer = {"url": f"{self.endpoint}/{self.name}"}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path == f"/api/models/{self.name}/preupload/main":
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif path == f"/api/models/{self.name}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            commit = self.push(files)
            answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{self.name}/commit/{commit}"}
        else:
            return 404, {}, b""
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        path = path.partition("?")[0]
        if found := re.fullmatch(rf"/api/models/{self.name}(?:/(revision|tree)/([^/]+))?", path):
            commit = self._commit(found[2] or "main")
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.commits[commit].items()
            ]
            body: Any = tree if found[1] == "tree" else {"id": self.name, "sha": commit}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if found := re.fullmatch(rf"/{self.name}/resolve/([^/]+)/(.+)", path):
            commit = self._commit(found[1])
            if commit is None or found[2] not in self.commits[commit]:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit or ""}, b""
            if found[2] in self.refused:
                return 403, {}, b""
            content = self.commits[commit][found[2]]
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if "/org/" in self.path:  # the client asks for its own sake too
                hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, answer = hub.receive(self.path, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()

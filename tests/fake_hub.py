"""A stand-in for the Hugging Face hub that accepts uploads of models, in memory, on loopback."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_NobodyMayReadThis0123456789"


class FakeHub(ThreadingHTTPServer):
    """Answers the requests of an upload as the hub does. Tests set what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}  # by repository
        self.files: dict[str, dict[str, bytes]] = {}  # by repository
        self.commits: list[str] = []  # their summaries
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.faults: dict[str, tuple[int, Any]] = {}  # the status and the JSON by path, for what goes wrong

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON for one request with the right token."""
        if path in self.faults:
            return self.faults[path]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            return 200, {
                "objects": [{**o, "actions": {"upload": {"href": f"{self.url}/large/{o['oid']}"}}} for o in asked]
            }
        repository, _, what = path.removeprefix("/api/models/").partition("/preupload/")
        if what:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        repository, _, what = path.removeprefix("/api/models/").partition("/commit/")
        if what:
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/{repository}/commit/{'a' * 40}", "commitOid": "a" * 40}
        if repository in self.private:
            return 200, {"id": repository, "private": self.private[repository]}
        return 404, {"error": "Repository not found"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repository = f"{asked['organization']}/{asked['name']}"
        known = repository in self.private
        self.private.setdefault(repository, asked.get("visibility") == "private" or bool(asked.get("private")))
        return 409 if known else 200, {"url": f"{self.url}/{repository}", "error": "exists" if known else None}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        here = self.files.setdefault(repository, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                here[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                here[value["path"]] = self.large[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "HEAD" or self.path.startswith("/large/") or known:
            status, value = self.server.answer(self.command, self.path.partition("?")[0], body)
        else:
            status, value = 401, {"error": "Invalid user token."}
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the tests read the output."""

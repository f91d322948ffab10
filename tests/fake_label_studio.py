"""A stand-in for Label Studio's REST API, in memory: inside a test, or as a `label-studio` command; and `serving`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN, ACCESS = "0123456789abcdef0123456789abcdef01234567", "access.of.minutes"


class FakeStudio(ThreadingHTTPServer):
    """Answers our requests as Label Studio 1.23 does. Tests set what goes wrong."""

    daemon_threads = True

    def __init__(self, port: int = 0, token: str = TOKEN) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.accepted = {f"Token {token}"}
        self.projects: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.wrong: tuple[int, str] | None = None  # a status and a text for every answer
        self.asked: list[str] = []  # "METHOD /path"
        self.imports: list[int] = []  # the number of tasks in each import

    def answer(self, method: str, path: str, asked: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """The status and the JSON for one request."""
        parts = path.strip("/").split("/")
        if path == "/api/projects" and method == "POST":
            self.projects.append({"id": len(self.projects) + 1, **body})
            return 201, self.projects[-1]
        if path == "/api/projects":
            return 200, self._page("results", self.projects, asked)
        if path == "/api/tasks":
            here = [task for task in self.tasks if task["project"] == int(asked["project"][0])]
            return 200, self._page("tasks", here, asked)
        if path == "/api/current-user/whoami":
            return 200, {"id": 1, "email": "annotator@localhost"}
        if len(parts) < 3 or not 1 <= int(parts[2]) <= len(self.projects):
            return 404, {"status_code": 404, "detail": "No Project matches the given query."}
        project = self.projects[int(parts[2]) - 1]
        if parts[3:] == ["import"]:
            self.imports.append(len(body))
            first = len(self.tasks) + 1
            self.tasks += [{"id": n, "project": project["id"], **task} for n, task in enumerate(body, first)]
            return 201, {"task_count": len(body)}
        if parts[3:] == ["export"]:
            here = [task for task in self.tasks if task["project"] == project["id"]]
            return 200, [{"annotations": [], **task} for task in here]
        project.update(body or {})
        return 200, project

    @staticmethod
    def _page(name: str, rows: list[dict[str, Any]], asked: dict[str, list[str]]) -> dict[str, Any]:
        page, size = int(asked["page"][0]), int(asked["page_size"][0])
        count = "count" if name == "results" else "total"
        return {name: rows[(page - 1) * size : page * size], count: len(rows)}


class _Handler(BaseHTTPRequestHandler):
    server: FakeStudio

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.server.asked.append(f"{self.command} {parts.path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        if self.server.wrong:
            status, text = self.server.wrong
            self._send(status, text)
        elif parts.path == "/api/version":
            self._send(200, json.dumps({"release": "1.23.2", "label-studio-os-package": {}}))
        elif parts.path == "/api/token/refresh":
            self.server.accepted.add(f"Bearer {ACCESS}")
            self._send(200, json.dumps({"access": ACCESS}))
        elif self.headers.get("Authorization") not in self.server.accepted:
            self._send(401, json.dumps({"status_code": 401, "detail": "Invalid token."}))
        else:
            status, value = self.server.answer(self.command, parts.path, parse_qs(parts.query), body)
            self._send(status, json.dumps(value))

    do_GET = do_POST = do_PATCH = _handle  # noqa: N815

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the tests read the output."""


@contextmanager
def serving(folder: Path, name: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Run `labels=serve` for a run in a process of its own; yields it and what it has printed when all is ready."""
    home = folder / "runs" / ".label_studio"
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_pipeline", "stage=collect", f"name={name}", "labels=serve"], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("LABEL_STUDIO_")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as process:  # fmt: skip
        assert process.stdout is not None
        printed = ""
        while "Ctrl-C" not in printed and (line := process.stdout.readline()):
            printed += line
        server = json.loads((home / "server.json").read_text())["pid"]
        try:
            yield process, printed
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)


def main() -> None:
    """Act as `label-studio start ... --port N`. Writes its command line and environment to seen.json."""
    data = Path(os.environ["LABEL_STUDIO_BASE_DATA_DIR"])
    data.mkdir(exist_ok=True)
    (data / "label_studio.sqlite3").touch()
    (data / "seen.json").write_text(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    FakeStudio(port, os.environ["LABEL_STUDIO_USER_TOKEN"]).serve_forever()


if __name__ == "__main__":
    main()

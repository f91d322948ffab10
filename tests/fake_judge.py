"""A stand-in for a server of OpenAI's chat completions API, on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import answering

Wrong = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class FakeJudge(ThreadingHTTPServer):
    """Answers a question with `reply(question)`. The answers in `wrong` come first."""

    daemon_threads = True

    def __init__(self, reply: Callable[[str], Any] = lambda question: str(len(question))) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.reply = reply
        self.wrong: list[Wrong | None] = []  # None: the connection closes
        self.asked: list[dict[str, Any]] = []  # the requests' bodies
        self.headers: list[dict[str, str]] = []
        self.together: threading.Barrier | None = None  # waits until this many requests are there

    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]


class _Handler(BaseHTTPRequestHandler):
    server: FakeJudge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.together:
            self.server.together.wait(20)
        status, headers, content = 200, dict[str, str](), b""
        if self.path != "/v1/chat/completions":
            status, content = 404, b"no such path"
        elif self.server.wrong:
            if (wrong := self.server.wrong.pop(0)) is None:
                self.close_connection = True
                return
            status, headers, content = wrong
        else:
            content = completion(self.server.reply(body["messages"][0]["content"]))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def serving(reply: Callable[[str], Any] = lambda question: str(len(question))) -> Iterator[FakeJudge]:
    """Run the server on a thread until the block ends."""
    with answering(FakeJudge(reply)) as server:
        yield server

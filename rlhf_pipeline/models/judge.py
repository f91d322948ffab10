"""A language model as a judge, by OpenAI's chat completions API: parallel requests, and replies cached on disk."""

import hashlib
import json
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from rlhf_pipeline.errors import UserError

LARGEST = 1 << 20  # bytes of a reply, at most
PAUSE = 1.0  # seconds before the second try; each later pause is twice as long
_LONGEST_PAUSE = 60.0
_LATER = (408, 409, 425, 429)  # statuses worth another try, besides those from 500 on


@dataclass(frozen=True)
class Judge:
    """Asks the model at `url` (such as https://api.openai.com/v1). Each question is a conversation of its own.

    `options` are additional fields of the request. The key comes from the environment variable `variable`, if it is
    set; it is used in the request only and never stored. `cache` is one SQLite file that all processes share. It holds
    complete replies only, under a hash of the address, the model, the options and the question.
    """

    url: str
    model: str
    options: Mapping[str, Any]
    variable: str
    threads: int
    tries: int
    timeout: float  # seconds
    cache: Path

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.url):
            raise UserError("reward.url takes an address without a login, as in reward.url=https://api.openai.com/v1.")
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", self.variable):  # it may be the key itself, so it is not shown
            raise UserError("reward.key_variable takes the name of an environment variable, such as OPENAI_API_KEY.")

    def replies(self, questions: Sequence[str], readable: Callable[[str], bool]) -> list[str]:
        """Return the model's reply to each question, from the cache if it is there.

        Raises UserError if a reply is not `readable` or the server fails. The cache keeps the replies received so far.
        """
        bodies = {question: self._body(question) for question in questions}
        keys = {q: hashlib.sha256(f"{self.url}\n{body}".encode()).hexdigest() for q, body in bodies.items()}
        stop, fault = threading.Event(), None
        with self._opened() as base, ThreadPoolExecutor(self.threads) as pool:
            known = {q: row[0] for q in bodies if (row := base.execute(_FIND, (keys[q],)).fetchone())}
            found = {question: reply for question, reply in known.items() if readable(reply)}
            asked = {pool.submit(self._ask, body, readable, stop): q for q, body in bodies.items() if q not in found}
            try:
                for future in as_completed(asked):
                    if future.cancelled():
                        continue
                    if error := future.exception():
                        fault = fault or error
                        self._stop(stop, asked)
                        continue
                    found[asked[future]] = future.result()
                    with base:
                        base.execute(_KEEP, (keys[asked[future]], future.result()))
            finally:
                self._stop(stop, asked)
        if fault:
            raise fault
        return [found[question] for question in questions]

    @staticmethod
    def _stop(stop: threading.Event, asked: Mapping[Any, str]) -> None:
        stop.set()
        for future in asked:
            future.cancel()

    def _body(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return json.dumps({"model": self.model, "messages": messages, **self.options}, sort_keys=True)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.cache, timeout=60)) as base:
                base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
                yield base
        except (sqlite3.Error, FileExistsError) as error:
            raise UserError(
                f"the judge's cache {self.cache} cannot be used ({error}); delete it, or give reward.cache_path=."
            ) from error

    def _ask(self, body: str, readable: Callable[[str], bool], stop: threading.Event) -> str:
        """Return one reply. A busy or unreachable server is asked again, each time after a longer pause."""
        fault, pause = "was not asked", 0.0
        for attempt in range(self.tries):
            if stop.wait(min(pause, _LONGEST_PAUSE)):
                break
            pause = PAUSE * 2**attempt * random.Random().uniform(0.5, 1.0)  # threads must not retry together
            try:
                status, text, wait = self._post(body)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                fault = f"does not answer ({type(error).__name__})"  # its own text may quote the request
                continue
            if status == 200:
                return self._reply(text, readable)
            fault = f"answers {status}: {text!r:.200}"
            if status not in _LATER and status < 500:
                break
            pause = max(pause, float(wait) if wait.isdecimal() else 0.0)
        hint = "" if self._key() else f"; {self.variable} holds no key"
        raise UserError(f"reward=judge: {self.url} {fault}{hint}. Its replies so far are kept: run it again.")

    def _post(self, body: str) -> tuple[int, str, str]:
        """Send one request. Return its status, its text without the key, and the header Retry-After."""
        key = self._key()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"reward=judge: the environment variable {self.variable} holds no valid key.")

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Set the header here, because a login in ~/.netrc would replace one in `headers`."""
            request.headers.update({"Authorization": f"Bearer {key}"} if key else {})
            return request

        address, headers = f"{self.url.rstrip('/')}/chat/completions", {"Content-Type": "application/json"}
        headers |= {"Accept-Encoding": "identity"}  # a compressed reply may unpack to more than fits in memory
        with requests.Session() as session:
            session.trust_env = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost")  # no proxy
            with session.post(
                address, data=body, headers=headers, auth=authorize, timeout=(10, self.timeout), stream=True,
                allow_redirects=False,  # a redirect could send the key to another server
            ) as answer:  # fmt: skip
                found, end = b"", time.monotonic() + self.timeout
                while part := answer.raw.read1(1 << 16, decode_content=False):
                    found += part
                    if len(found) > LARGEST or time.monotonic() > end:
                        raise UserError(
                            f"reward=judge: {self.url} sends more than {LARGEST >> 20} MiB, or for longer than "
                            f"{self.timeout:g} s (reward.timeout)."
                        )
                wait = answer.headers.get("Retry-After", "")
                return answer.status_code, self._without_key(found.decode("utf-8", "replace")), wait

    def _key(self) -> str:
        return os.environ.get(self.variable, "").strip()

    def _without_key(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text

    def _reply(self, text: str, readable: Callable[[str], bool]) -> str:
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            reply = None
        if not isinstance(reply, str):
            raise UserError(f"reward=judge: {self.url} did not send a chat completion: {text!r:.200}.")
        # A lone surrogate cannot be stored. An escape in the JSON may have hidden the key until now.
        reply = self._without_key(reply.encode("utf-8", "replace").decode())
        if not readable(reply):
            raise UserError(
                f"reward=judge: {self.model} replied {reply!r:.200}, in which reward.pattern finds no score; ask for "
                "less in reward.template, or set reward.otherwise=<score>."
            )
        return reply


_FIND = "SELECT reply FROM replies WHERE key = ?"
_KEEP = "INSERT OR REPLACE INTO replies VALUES (?, ?)"

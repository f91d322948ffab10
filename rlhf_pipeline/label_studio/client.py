"""Label Studio's REST interface, as far as it takes to bring tasks in and annotations out."""

import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from rlhf_pipeline.errors import NotFinishedError, UserError

CONNECT, ANSWER, LONG = 5.0, 30.0, 600.0  # seconds: to connect, to answer, and to import or export
_PAGE, _TASKS = 100, 1000  # projects, and tasks, asked for at once; a server may give fewer
_BATCH = 500  # tasks imported at once
_START = "start one with: make label-studio NAME=<the run>"


class LabelStudio:
    """A Label Studio server at `url`. The token, of either kind that it gives out, is shown nowhere."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.strip().rstrip("/")
        try:
            parts = urlsplit(self.url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise UserError(
                "LABEL_STUDIO_URL is no plain http:// or https:// address, like https://labels.example.org."
            )
        self._token = token.strip()
        if not self._token.isascii() or not self._token.isprintable() or not self._token or " " in self._token:
            raise UserError("the Label Studio token is empty or has characters that no token has; copy it again.")
        self._access: str | None = None  # what a personal access token is exchanged for; it lasts minutes
        self._session = requests.Session()
        # A proxy has no business with this machine's own servers.
        self._session.trust_env = parts.hostname not in ("127.0.0.1", "localhost", "::1")

    def __repr__(self) -> str:
        return f"LabelStudio({self.url!r})"

    def check(self) -> dict[str, Any]:
        """See that it is there and takes the token. Gives the account that the token belongs to."""
        version = self._get("/api/version", authorized=False)
        if not isinstance(version, dict) or "label-studio-os-package" not in version:
            raise UserError(f"what answers at {self.url} is not Label Studio; {_START}.")
        account: dict[str, Any] = self._get("/api/current-user/whoami")
        return account

    # -- projects

    def project(self, title: str, mark: str, config: str, annotators: int = 1) -> int:
        """The project whose description is `mark`, made if there is none, with this labelling config.

        Each task is shown to so many annotators.
        """
        wanted = {"label_config": config, "maximum_annotations": annotators}
        found = next((project for project in self._projects() if project.get("description") == mark), None)
        if found is None:
            # An empty annotation is a page on which nothing was chosen: that is what skipping is for.
            new = {"title": title, "description": mark, "enable_empty_annotation": False, **wanted}
            found = self._send("POST", "/api/projects", new)
        # It keeps the config without its last line break.
        elif {key: str(found.get(key)).strip() for key in wanted} != {k: str(v).strip() for k, v in wanted.items()}:
            self._send("PATCH", f"/api/projects/{found['id']}", wanted)
        return int(found["id"])

    def mark(self, project: int) -> str | None:
        """The description of a project."""
        found: str | None = self._get(f"/api/projects/{project}").get("description")
        return found

    def address(self, project: int) -> str:
        """Where people label the project, one task after the other."""
        return f"{self.url}/projects/{project}/data?labeling=1"

    def _projects(self) -> Iterator[dict[str, Any]]:
        page, more = 1, True
        while more:
            found = self._get("/api/projects", {"page": page, "page_size": _PAGE})
            yield from found["results"]
            page, more = page + 1, bool(found.get("next"))

    # -- tasks and what people made of them

    def add(self, project: int, tasks: Sequence[dict[str, Any]]) -> int:
        """Import the tasks that are not there yet, by `data.task`. Gives how many that were."""
        there = {task["data"].get("task") for task in self._tasks(project)}
        new = [{"data": task["data"]} for task in tasks if task["data"]["task"] not in there]
        for start in range(0, len(new), _BATCH):
            self._send("POST", f"/api/projects/{project}/import", new[start : start + _BATCH], patience=LONG)
        return len(new)

    def _tasks(self, project: int) -> Iterator[dict[str, Any]]:
        page, seen, total = 1, 0, 1
        while seen < total:
            asked = {"project": project, "page": page, "page_size": _TASKS, "fields": "task_only"}
            found = self._get("/api/tasks", asked, patience=LONG)
            tasks, total = found["tasks"], found["total"]
            if not tasks:  # deleted while we read
                return
            yield from tasks
            page, seen = page + 1, seen + len(tasks)

    def export(self, project: int) -> list[dict[str, Any]]:
        """The tasks that someone labelled or skipped, with their annotations, in Label Studio's JSON."""
        asked = {"exportType": "JSON", "download_all_tasks": "true"}
        tasks = self._get(f"/api/projects/{project}/export", asked, patience=LONG)
        return [task for task in tasks if task.get("annotations")]

    # -- requests

    def _get(
        self, path: str, asked: dict[str, Any] | None = None, authorized: bool = True, patience: float = ANSWER
    ) -> Any:
        return self._request("GET", path, params=asked, authorized=authorized, patience=patience)

    def _send(self, method: str, path: str, value: Any, authorized: bool = True, patience: float = ANSWER) -> Any:
        return self._request(method, path, json=value, authorized=authorized, patience=patience)

    def _request(self, method: str, path: str, authorized: bool, patience: float, **content: Any) -> Any:
        answer = self._ask(method, path, authorized, patience, content)
        if answer.status_code == 401 and authorized and self._access:  # its minutes are over
            self._access = None
            answer = self._ask(method, path, authorized, patience, content)
        if not answer.ok or answer.is_redirect:
            raise self._refusal(method, path, answer)
        try:
            return answer.json()
        except requests.JSONDecodeError:
            raise UserError(f"what answers at {self.url} is not Label Studio; {_START}.") from None

    def _ask(
        self, method: str, path: str, authorized: bool, patience: float, content: dict[str, Any]
    ) -> requests.Response:
        auth = _Header(self._credentials() if authorized else None)
        try:
            return self._session.request(
                method, self.url + path, auth=auth, timeout=(CONNECT, patience), allow_redirects=False, **content
            )
        except requests.RequestException as error:
            kind = type(error).__name__
            if kind in ("ConnectionError", "ConnectTimeout"):  # and not those of proxies and certificates
                raise NotFinishedError(f"no Label Studio answers at {self.url}; {_START}.") from None
            raise UserError(f"Label Studio at {self.url} did not answer to {method} {path} ({kind}).") from None

    def _credentials(self) -> str:
        """What the header says: a legacy token as it is, a personal access token (a JWT) by what it is good for."""
        if self._token.count(".") != 2:
            return f"Token {self._token}"
        if self._access is None:
            found = self._send("POST", "/api/token/refresh", {"refresh": self._token}, authorized=False)
            self._access = str(found["access"])
        return f"Bearer {self._access}"

    def _refusal(self, method: str, path: str, answer: requests.Response) -> UserError:
        status, said = answer.status_code, self._shown(_said(answer))
        if status in (401, 403):
            return UserError(
                f"Label Studio at {self.url} refuses the token ({status}). Copy a valid one from Account & Settings "
                "there into LABEL_STUDIO_API_KEY, of an account that may change projects."
            )
        if answer.is_redirect:
            return UserError(
                f"{self.url} sends one on to {answer.headers.get('location')}; set LABEL_STUDIO_URL to what is there."
            )
        if status == 404:
            return UserError(
                f"Label Studio at {self.url} has nothing at {path} ({said}); has the project been deleted?"
            )
        return UserError(f"Label Studio at {self.url} answered {status} to {method} {path}: {said}.")

    def _shown(self, text: str) -> str:
        for secret in filter(None, (self._token, self._access)):
            text = text.replace(secret, "***")
        return text


class _Header(AuthBase):
    """Sets the header itself, or requests would take one from ~/.netrc in its place."""

    def __init__(self, value: str | None) -> None:
        self._value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value:
            request.headers["Authorization"] = self._value
        return request


def _said(answer: requests.Response) -> str:
    """The reason in an answer that is an error, in one line."""
    try:
        found = answer.json()
    except requests.JSONDecodeError:
        return answer.reason or "no reason given"
    if isinstance(found, dict):
        found = found.get("validation_errors") or found.get("detail") or found
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return " ".join(text.split())[:300].rstrip(".")

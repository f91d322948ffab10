"""Label Studio's REST interface, as far as it takes to bring tasks in and labels out."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests

from rlhf_pipeline.errors import NotFinishedError, UserError

URL, KEY = "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"
CONNECT, ANSWER, LONG = 5.0, 30.0, 600.0  # seconds: to connect, to answer, and to import or export
_PROJECTS, _TASKS, _BATCH = 100, 1000, 500  # projects and tasks read per request, tasks imported per request
_START = "start one with: make label-studio NAME=<the run>"
_HINTS = {404: " Has the project been deleted?"} | dict.fromkeys(
    (401, 403), f" Copy a valid token from Account & Settings into {KEY}, of an account that may change projects."
)


class LabelStudio:
    """A Label Studio server at `url`. The token, legacy or personal, is shown nowhere."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self._token = url.strip().rstrip("/"), token.strip()
        try:
            parts = urlsplit(self.url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise UserError(f"{URL} is not a plain http:// or https:// address, like https://labels.example.org.")
        if not re.fullmatch("[!-~]+", self._token):
            raise UserError("the Label Studio token is empty or has characters that no token has; copy it again.")
        self._session = requests.Session()
        # A proxy has no business with this machine's own servers.
        self._session.trust_env = parts.hostname not in ("127.0.0.1", "localhost", "::1")

    def check(self) -> dict[str, Any]:
        """The account that the token belongs to. `NotFinishedError` if nothing answers at the address."""
        version = self._request("GET", "/api/version", authorized=False)
        if not isinstance(version, dict) or "label-studio-os-package" not in version:
            raise UserError(f"what answers at {self.url} is not Label Studio; {_START}.")
        return dict(self._request("GET", "/api/current-user/whoami"))

    def project(self, title: str, mark: str, config: str, annotators: int = 1) -> int:
        """The project whose description is `mark`, made or updated to this labelling config.

        Each task is shown to `annotators` people.
        """
        wanted = {"label_config": config, "maximum_annotations": annotators}
        projects = self._pages("/api/projects", "results", page_size=_PROJECTS)
        found = next((project for project in projects if project.get("description") == mark), None)
        if found is None:
            # An empty annotation is a page on which nothing was chosen: that is what skipping is for.
            new = {"title": title, "description": mark, "enable_empty_annotation": False, **wanted}
            found = self._request("POST", "/api/projects", json=new)
        elif any(str(found.get(key)).strip() != str(value).strip() for key, value in wanted.items()):
            self._request("PATCH", f"/api/projects/{found['id']}", json=wanted)
        return int(found["id"])

    def mark(self, project: int) -> str | None:
        """The description of a project."""
        found: str | None = self._request("GET", f"/api/projects/{project}").get("description")
        return found

    def add(self, project: int, tasks: Sequence[dict[str, Any]]) -> int:
        """Import the tasks that are not there yet, by `data.task`, and count them."""
        there = {
            task["data"].get("task")
            for task in self._pages("/api/tasks", "tasks", page_size=_TASKS, project=project, fields="task_only")
        }
        new = [{"data": task["data"]} for task in tasks if task["data"]["task"] not in there]
        for start in range(0, len(new), _BATCH):
            self._request("POST", f"/api/projects/{project}/import", LONG, json=new[start : start + _BATCH])
        return len(new)

    def export(self, project: int) -> list[dict[str, Any]]:
        """The tasks that someone labelled or skipped, with their annotations, in Label Studio's JSON."""
        asked = {"exportType": "JSON", "download_all_tasks": "true"}
        tasks = self._request("GET", f"/api/projects/{project}/export", LONG, params=asked)
        return [task for task in tasks if task.get("annotations")]

    def _pages(self, path: str, key: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """All rows of a list; a server may give fewer per page than asked for."""
        page, seen, total = 1, 0, 1
        while seen < total:
            found = self._request("GET", path, LONG, params={"page": page, **asked})
            if not found[key]:  # deleted while we read
                return
            yield from found[key]
            page, seen, total = page + 1, seen + len(found[key]), found["total" if "total" in found else "count"]

    def _request(
        self, method: str, path: str, patience: float = ANSWER, authorized: bool = True, **content: Any
    ) -> Any:
        header = self._authorization() if authorized else ""

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Set the header; without such a function requests takes one from ~/.netrc."""
            if header:
                request.headers["Authorization"] = header
            return request

        try:
            answer = self._session.request(
                method, self.url + path, auth=authorize, timeout=(CONNECT, patience), allow_redirects=False, **content
            )
        except requests.RequestException as error:
            if type(error) in (requests.ConnectionError, requests.ConnectTimeout):  # not of a proxy or a certificate
                raise NotFinishedError(
                    f"no Label Studio answers at {self.url}. It may still be starting; if not, {_START}."
                ) from None
            raise UserError(
                f"Label Studio at {self.url} did not answer to {method} {path} ({type(error).__name__})."
            ) from None
        if answer.is_redirect:
            raise UserError(f"{self.url} redirects to {answer.headers.get('location')}; set {URL} to that address.")
        if not answer.ok:
            said = _reason(answer)
            for secret in (self._token, *header.split()[1:]):
                said = said.replace(secret, "***")
            status, hint = answer.status_code, _HINTS.get(answer.status_code, "")
            raise UserError(f"Label Studio at {self.url} answered {status} to {method} {path}: {said}.{hint}")
        try:
            return answer.json()
        except requests.JSONDecodeError:
            raise UserError(f"what answers at {self.url} is not Label Studio; {_START}.") from None

    def _authorization(self) -> str:
        """The header's value. A personal access token (a JWT) is exchanged for one that lasts minutes."""
        if self._token.count(".") != 2:
            return f"Token {self._token}"
        found = self._request("POST", "/api/token/refresh", authorized=False, json={"refresh": self._token})
        return f"Bearer {found['access']}"


def _reason(answer: requests.Response) -> str:
    """What an error answer says, in one line."""
    try:
        found = answer.json()
    except requests.JSONDecodeError:
        return answer.reason or "no reason given"
    if isinstance(found, dict):
        found = found.get("validation_errors") or found.get("detail") or found
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return " ".join(text.split())[:300].rstrip(".")

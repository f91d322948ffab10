"""Label Studio: a server on this machine, its REST interface, and the page on which people compare answers.

runs/.label_studio/   the server that `labels=serve` starts; only its owner can read this folder
  login.json          user, password and the token of the REST interface (0600)
  server.json         the process that was started last
  server.log  data/   the server's output; its database
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import requests
from filelock import FileLock
from jinja2 import Template

from rlhf_pipeline.data.sheets import label_studio_tasks
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.files import read_json, read_jsonl, write_json
from rlhf_pipeline.runs.directory import CANDIDATES, PROJECT

URL, KEY, COMMAND = "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "LABEL_STUDIO"
_START = "start one with: make label-studio NAME=<the run>"
_INSTALLED = ".venv-label-studio/bin/label-studio"  # where `make label-studio` puts it
_HOST, _PORT = "127.0.0.1", 8080
_USER = "annotator@localhost"
_PATIENCE = 600  # seconds for a start; the first start creates the database
_BATCH = 500  # tasks per import
_HINTS = {
    **dict.fromkeys((301, 302, 307, 308), f"Set {URL} to the address in this answer."),
    **dict.fromkeys((401, 403), f"Set {KEY} to the token of an account that may change projects."),
    404: "Has the project been deleted?",
}
# The server gets no other environment variables, because its own settings have names like HOST, DEBUG and CI.
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
_SETTINGS = {
    "COLLECT_ANALYTICS": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "LATEST_VERSION_CHECK": "false",
    "FEATURE_FLAGS_OFFLINE": "true", "DISABLE_SIGNUP_WITHOUT_LINK": "true", "LOG_LEVEL": "WARNING", "HOST": "",
    "ALLOWED_HOSTS": "127.0.0.1,localhost",  # against DNS rebinding
}  # fmt: skip
# The server fetches tips from an outside site, and no setting prevents that. This proxy does not exist.
_NO_NETWORK = {**dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"), "no_proxy": "127.0.0.1,localhost"}


# -- a run's tasks, to Label Studio and back


def serve(folder: Path, name: str, runs: Path, annotators: int = 1) -> None:
    """Serve the tasks of `folder` on this machine until Ctrl-C. If a server is running, add the tasks to it."""
    if os.environ.get(URL):
        raise UserError(f"{URL} names a server of your own; use labels=push to send the tasks there, or unset it.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the server as Ctrl-C does
    home, process = runs / ".label_studio", None
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    try:
        with FileLock(home / "lock"):
            try:
                studio = running(runs)
            except NotFinishedError:
                process = _start(home)
                studio = _wait_for(process, runs)
        print(
            f"Label at:          {push(studio, folder, name, annotators)}\n"
            f"Log in as:         {_USER}, with the password in {home / 'login.json'}\n"
            f"Fetch the labels:  python -m rlhf_pipeline stage=collect name={shlex.quote(name)} labels=pull"
        )
        if process is None:
            print("The server was already running; stop it in the terminal that started it.", flush=True)
            return
        print("Ctrl-C stops the server; labels are kept.", flush=True)
        raise UserError(f"Label Studio stopped by itself (status {process.wait()}); see {home / 'server.log'}.")
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            (home / "server.json").unlink(missing_ok=True)


def push(studio: "LabelStudio", folder: Path, name: str, annotators: int = 1) -> str:
    """Create the project if there is none, add the tasks of `folder` that it lacks, and return the labelling URL."""
    tasks, mark = label_studio_tasks(read_jsonl(folder / CANDIDATES)), f"Made by rlhf_pipeline for the run {name}."
    studio.check()
    page = (folder / "labeling_config.xml").read_text(encoding="utf-8")
    project = studio.project(f"run {name}"[:50], mark, page, annotators)  # longer titles are refused
    added = studio.add(project, tasks)
    known = {"url": studio.url, "project": project, "run": name, "mark": mark, "local": not os.environ.get(URL)}
    write_json(folder / PROJECT, known)
    print(f"project {project}, {name}: {added} tasks added, {len(tasks) - added} were there", flush=True)
    return f"{studio.url}/projects/{project}/data?labeling=1"


def pull(folder: Path, runs: Path) -> list[dict[str, Any]]:
    """Return the tasks of `folder` that people have labelled or skipped so far, in Label Studio's JSON."""
    known = read_json(folder / PROJECT)
    if not {"url", "project", "mark"} <= known.keys():
        raise NotFinishedError(f"{folder} has not been given to Label Studio yet; use labels=serve or labels=push.")
    if os.environ.get(URL, "").strip().rstrip("/") != ("" if known.get("local") else known["url"]):
        fix = f"unset {URL}" if known.get("local") else f"set {URL} to that, and {KEY}"
        raise UserError(f"the tasks of {folder} are at {known['url']}; {fix}.")
    studio, project = connect(runs), known["project"]
    if studio.request("GET", f"/api/projects/{project}").get("description") != known["mark"]:
        raise UserError(f"project {project} at {studio.url} is not this run's any more; use labels=push again.")
    return studio.export(project)


def connect(runs: Path) -> "LabelStudio":
    """Return the user's own server if the environment names one, else the server of `runs`."""
    url = os.environ.get(URL)
    return LabelStudio(url, os.environ.get(KEY, "")) if url else running(runs)


# -- the REST interface


class LabelStudio:
    """A Label Studio server at `url`. The token (legacy or personal) is never shown."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self._token = url.strip().rstrip("/"), token.strip()
        if not re.fullmatch(r"https?://[^\s/@\[\]]+(/[^\s@]*)?", self.url):  # a password is refused too
            raise UserError(f"{URL} is not a plain http:// or https:// address, like https://labels.example.org.")
        if not re.fullmatch("[!-~]+", self._token):
            raise UserError(f"{KEY} holds no token; copy one from Account & Settings at {self.url} into it.")
        self._session = requests.Session()
        self._session.trust_env = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost")  # here without a proxy

    def check(self) -> None:
        """Check that Label Studio answers and accepts the token."""
        version = self.request("GET", "/api/version", token=False)
        if not isinstance(version, dict) or "label-studio-os-package" not in version:
            raise UserError(f"the server at {self.url} is not Label Studio; {_START}.")
        self.request("GET", "/api/current-user/whoami")

    def project(self, title: str, mark: str, config: str, annotators: int = 1) -> int:
        """Create or update the project with the description `mark`. Each task is shown to `annotators` people."""
        wanted = {"label_config": config, "maximum_annotations": annotators}
        projects = self._pages("/api/projects", "results", page_size=100)
        found = next((project for project in projects if project.get("description") == mark), None)
        if found is None:
            # An annotator who chooses nothing must skip the task. An empty annotation is not allowed.
            new = {"title": title, "description": mark, "enable_empty_annotation": False, **wanted}
            found = self.request("POST", "/api/projects", json=new)
        elif any(str(found.get(key)).strip() != str(value).strip() for key, value in wanted.items()):
            self.request("PATCH", f"/api/projects/{found['id']}", json=wanted)
        return int(found["id"])

    def add(self, project: int, tasks: Sequence[dict[str, Any]]) -> int:
        """Import the tasks whose `data.task` is not there yet, and return their number."""
        pages = self._pages("/api/tasks", "tasks", page_size=1000, project=project, fields="task_only")
        there = {task["data"].get("task") for task in pages}
        new = [{"data": task["data"]} for task in tasks if task["data"]["task"] not in there]
        for start in range(0, len(new), _BATCH):
            self.request("POST", f"/api/projects/{project}/import", json=new[start : start + _BATCH])
        return len(new)

    def export(self, project: int) -> list[dict[str, Any]]:
        """Return the tasks that someone labelled or skipped, with their annotations."""
        asked = {"exportType": "JSON", "download_all_tasks": "true"}
        tasks = self.request("GET", f"/api/projects/{project}/export", params=asked)
        return [task for task in tasks if task.get("annotations")]

    def _pages(self, path: str, key: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """Yield all rows of a list. A server may return fewer per page than requested."""
        page, seen, total = 1, 0, 1
        while seen < total:
            found = self.request("GET", path, params={"page": page, **asked})
            if not found[key]:  # deleted while we read
                return
            yield from found[key]
            page, seen, total = page + 1, seen + len(found[key]), found["total" if "total" in found else "count"]

    def request(self, method: str, path: str, token: bool = True, **content: Any) -> Any:
        """Return the JSON of a response. Raises NotFinishedError if nothing answers, UserError for other failures."""
        header = f"Token {self._token}" if token else ""
        if token and self._token.count(".") == 2:  # exchange a personal token (a JWT) for one that lasts minutes
            found = self.request("POST", "/api/token/refresh", token=False, json={"refresh": self._token})
            header = f"Bearer {found['access']}"

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Set the header here, because a login in ~/.netrc would replace one given in `headers`."""
            request.headers.update({"Authorization": header} if header else {})
            return request

        try:
            answer = self._session.request(
                method, self.url + path, auth=authorize, timeout=(5, 600), allow_redirects=False, **content
            )
        except requests.RequestException as error:
            if type(error) in (requests.ConnectionError, requests.ConnectTimeout):  # not a proxy or certificate error
                raise NotFinishedError(
                    f"no Label Studio answers at {self.url}. It may still be starting; if not, {_START}."
                ) from None
            raise UserError(
                f"Label Studio at {self.url} did not answer to {method} {path} ({type(error).__name__})."
            ) from None
        with suppress(requests.JSONDecodeError):
            found = answer.json()
            if answer.ok:
                return found
        said = answer.headers.get("location") or answer.text
        for secret in filter(None, (self._token, header.rpartition(" ")[2])):
            said = said.replace(secret, "***")
        hint = _HINTS.get(answer.status_code, f"If it is not Label Studio, {_START}.")
        raise UserError(f"{self.url} answered {answer.status_code} to {method} {path}: {said!r:.300}. {hint}")


# -- the server on this machine


def running(runs: Path) -> LabelStudio:
    """Return the server of these runs. The token is sent only to a port of the process that we started."""
    home = runs / ".label_studio"
    with suppress(KeyError, StopIteration, psutil.Error):
        known = read_json(home / "server.json")
        process = psutil.Process(known["pid"])
        if abs(process.create_time() - known["started"]) < 60:  # else another process has this pid now
            family = (process, *process.children(recursive=True))  # the command may be a wrapper script
            sockets = [each for member in family for each in member.net_connections("tcp")]
            port = next(s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.ip == _HOST)
            return LabelStudio(f"http://{_HOST}:{port}", read_json(home / "login.json")["token"])
    raise NotFinishedError(
        f"no Label Studio of {runs} is running; start it with labels=serve (make label-studio NAME=<the run>), or "
        f"set {URL} and {KEY} to use your own server."
    )


def _start(home: Path) -> "subprocess.Popen[bytes]":
    named = os.environ.get(COMMAND) or _INSTALLED
    command = shutil.which(named)
    if command is None:
        raise UserError(
            f"there is no {named}; install Label Studio and start it with: make label-studio NAME=<the run> (or set "
            f"{COMMAND} to the command of an installed Label Studio)."
        )
    login, data = _login(home), str((home / "data").resolve())
    # Secrets are passed in the environment, because `ps` shows command lines to everyone.
    own = {"USERNAME": login["user"], "PASSWORD": login["password"], "USER_TOKEN": login["token"]}
    own |= {"BASE_DATA_DIR": data, "DATABASE_NAME": f"{data}/label_studio.sqlite3"}
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    environment |= {f"LABEL_STUDIO_{name}": value for name, value in (_SETTINGS | own).items()}
    environment |= {**_NO_NETWORK, "XDG_CONFIG_HOME": data, "XDG_DATA_HOME": data, "PYTHONUNBUFFERED": "1"}
    arguments = ["start", "--no-browser", "--enable-legacy-api-token", "--internal-host", _HOST]
    print("Label Studio is starting; the first time takes about a minute", flush=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [command, *arguments, "--port", str(_free_port())],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, env=environment, umask=0o077,
        )  # fmt: skip
    started = psutil.Process(process.pid).create_time()
    write_json(home / "server.json", {"pid": process.pid, "started": started})
    return process


def _wait_for(process: "subprocess.Popen[bytes]", runs: Path) -> LabelStudio:
    log, end = runs / ".label_studio" / "server.log", time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with suppress(NotFinishedError):
            return running(runs)
        time.sleep(0.5)
    printed = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:300]
    raise UserError(f"Label Studio did not start; the last line of {log} is {printed!r}.")


def _login(home: Path) -> dict[str, str]:
    """Return the user, password and token, which are created at the first start."""
    path = home / "login.json"
    if not path.exists():
        if (home / "data" / "label_studio.sqlite3").exists():
            raise UserError(f"{path} is gone, and the labels in {home / 'data'} need it; restore it.")
        login = {"user": _USER, "password": secrets.token_urlsafe(12), "token": secrets.token_hex(20)}
        descriptor, temporary = tempfile.mkstemp(dir=home)  # 0600, and never through a link
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(login, file)
        os.replace(temporary, path)
    return read_json(path)


def _free_port() -> int:
    for port in (_PORT, 0):
        with suppress(OSError), socket.create_server((_HOST, port)) as tried:
            return int(tried.getsockname()[1])
    raise UserError("no port of this machine is free.")


def labeling_config(answers: int, lang: str = "en") -> str:
    """Return the page for tasks of up to `answers` answers: click the better of two, or put a list in order."""
    page = Path(__file__).with_name("labeling_page.xml").read_text(encoding="utf-8")
    return Template(page).render(answers=answers, zh=lang == "zh")

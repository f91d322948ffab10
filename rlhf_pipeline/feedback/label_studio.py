"""Label Studio: a server on this machine, its REST interface, and the page on which people compare answers.

runs/.label_studio/   of the server that `labels=serve` starts; for its owner alone
  login.json          user, password and the token of the REST interface (0600)
  server.json         the process that was started last
  server.log  data/   what it prints; its database
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
_PATIENCE = 600  # seconds for a start; the first one makes the database
_BATCH = 500  # tasks of one import
_HINTS = {
    **dict.fromkeys((301, 302, 307, 308), f"Set {URL} to the address that it names."),
    **dict.fromkeys((401, 403), f"Copy a token into {KEY}, of an account that may change projects."),
    404: "Has the project been deleted?",
}
# All that the server sees of our environment: its own settings have names like HOST, DEBUG and CI.
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
_SETTINGS = {
    "COLLECT_ANALYTICS": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "LATEST_VERSION_CHECK": "false",
    "FEATURE_FLAGS_OFFLINE": "true", "DISABLE_SIGNUP_WITHOUT_LINK": "true", "LOG_LEVEL": "WARNING", "HOST": "",
    "ALLOWED_HOSTS": "127.0.0.1,localhost",  # against DNS rebinding
}  # fmt: skip
# It fetches tips for its pages from an outside site and has no setting against that; this proxy leads nowhere.
_NO_NETWORK = {**dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"), "no_proxy": "127.0.0.1,localhost"}


# -- a run's tasks, to Label Studio and back


def serve(folder: Path, name: str, runs: Path, annotators: int = 1) -> None:
    """Start a server on this machine with the tasks of `folder`, until Ctrl-C; add them to one that is running."""
    if os.environ.get(URL):
        raise UserError(f"{URL} names a server of your own; say labels=push to give it the tasks, or unset it.")
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
            print("The server was running already; end it in the terminal where it was started.", flush=True)
            return
        print("Ctrl-C ends it; labels are kept.", flush=True)
        raise UserError(f"Label Studio ended by itself (status {process.wait()}); see {home / 'server.log'}.")
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            (home / "server.json").unlink(missing_ok=True)


def push(studio: "LabelStudio", folder: Path, name: str, annotators: int = 1) -> str:
    """Make the project if there is none, and add the tasks of `folder` that it lacks. Gives the labelling page."""
    tasks, mark = label_studio_tasks(read_jsonl(folder / CANDIDATES)), f"Made by rlhf_pipeline for the run {name}."
    studio.check()
    page = (folder / "labeling_config.xml").read_text(encoding="utf-8")
    project = studio.project(f"run {name}"[:50], mark, page, annotators)  # the longest title that it takes
    added = studio.add(project, tasks)
    known = {"url": studio.url, "project": project, "run": name, "mark": mark, "local": not os.environ.get(URL)}
    write_json(folder / PROJECT, known)
    print(f"project {project}, {name}: {added} tasks added, {len(tasks) - added} were there", flush=True)
    return f"{studio.url}/projects/{project}/data?labeling=1"


def pull(folder: Path, runs: Path) -> list[dict[str, Any]]:
    """The tasks of `folder` that people have labelled or skipped so far, in Label Studio's JSON."""
    known = read_json(folder / PROJECT)
    if not {"url", "project", "mark"} <= known.keys():
        raise NotFinishedError(f"{folder} has not been given to Label Studio yet; say labels=serve, or labels=push.")
    if os.environ.get(URL, "").strip().rstrip("/") != ("" if known.get("local") else known["url"]):
        fix = f"unset {URL}" if known.get("local") else f"set {URL} to that, and {KEY}"
        raise UserError(f"the tasks of {folder} are at {known['url']}; {fix}.")
    studio, project = connect(runs), known["project"]
    if studio.request("GET", f"/api/projects/{project}").get("description") != known["mark"]:
        raise UserError(f"project {project} at {studio.url} is not this run's any more; say labels=push again.")
    return studio.export(project)


def connect(runs: Path) -> "LabelStudio":
    """The user's own server if the environment names one, else that of `runs`."""
    url = os.environ.get(URL)
    return LabelStudio(url, os.environ.get(KEY, "")) if url else running(runs)


# -- the REST interface


class LabelStudio:
    """A Label Studio server at `url`. The token, legacy or personal, is shown nowhere."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self._token = url.strip().rstrip("/"), token.strip()
        if not re.fullmatch(r"https?://[^\s/@\[\]]+(/[^\s@]*)?", self.url):  # and no password in it
            raise UserError(f"{URL} is not a plain http:// or https:// address, like https://labels.example.org.")
        if not re.fullmatch("[!-~]+", self._token):
            raise UserError(f"{KEY} holds no token; copy one from Account & Settings at {self.url} into it.")
        self._session = requests.Session()
        self._session.trust_env = urlsplit(self.url).hostname not in ("127.0.0.1", "localhost")  # no proxy in between

    def check(self) -> None:
        """See that a Label Studio answers, and takes the token."""
        version = self.request("GET", "/api/version", token=False)
        if not isinstance(version, dict) or "label-studio-os-package" not in version:
            raise UserError(f"what answers at {self.url} is not Label Studio; {_START}.")
        self.request("GET", "/api/current-user/whoami")

    def project(self, title: str, mark: str, config: str, annotators: int = 1) -> int:
        """The project whose description is `mark`, made or updated; each task is shown to `annotators` people."""
        wanted = {"label_config": config, "maximum_annotations": annotators}
        projects = self._pages("/api/projects", "results", page_size=100)
        found = next((project for project in projects if project.get("description") == mark), None)
        if found is None:
            # An empty annotation is a page on which nothing was chosen: that is what skipping is for.
            new = {"title": title, "description": mark, "enable_empty_annotation": False, **wanted}
            found = self.request("POST", "/api/projects", json=new)
        elif any(str(found.get(key)).strip() != str(value).strip() for key, value in wanted.items()):
            self.request("PATCH", f"/api/projects/{found['id']}", json=wanted)
        return int(found["id"])

    def add(self, project: int, tasks: Sequence[dict[str, Any]]) -> int:
        """Import the tasks that are not there yet, by `data.task`, and count them."""
        pages = self._pages("/api/tasks", "tasks", page_size=1000, project=project, fields="task_only")
        there = {task["data"].get("task") for task in pages}
        new = [{"data": task["data"]} for task in tasks if task["data"]["task"] not in there]
        for start in range(0, len(new), _BATCH):
            self.request("POST", f"/api/projects/{project}/import", json=new[start : start + _BATCH])
        return len(new)

    def export(self, project: int) -> list[dict[str, Any]]:
        """The tasks that someone labelled or skipped, with their annotations."""
        asked = {"exportType": "JSON", "download_all_tasks": "true"}
        tasks = self.request("GET", f"/api/projects/{project}/export", params=asked)
        return [task for task in tasks if task.get("annotations")]

    def _pages(self, path: str, key: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """All rows of a list; a server may give fewer per page than asked for."""
        page, seen, total = 1, 0, 1
        while seen < total:
            found = self.request("GET", path, params={"page": page, **asked})
            if not found[key]:  # deleted while we read
                return
            yield from found[key]
            page, seen, total = page + 1, seen + len(found[key]), found["total" if "total" in found else "count"]

    def request(self, method: str, path: str, token: bool = True, **content: Any) -> Any:
        """The JSON of an answer. Raises `NotFinishedError` if nothing answers, and `UserError` for other failures."""
        header = f"Token {self._token}" if token else ""
        if token and self._token.count(".") == 2:  # a personal access token (a JWT) brings one that lasts minutes
            found = self.request("POST", "/api/token/refresh", token=False, json={"refresh": self._token})
            header = f"Bearer {found['access']}"

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Set the header here: given as one of `headers`, a login in ~/.netrc would replace it."""
            request.headers.update({"Authorization": header} if header else {})
            return request

        try:
            answer = self._session.request(
                method, self.url + path, auth=authorize, timeout=(5, 600), allow_redirects=False, **content
            )
        except requests.RequestException as error:
            if type(error) in (requests.ConnectionError, requests.ConnectTimeout):  # not of a proxy or a certificate
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
    """The server of these runs. The token goes only to a port on which the process that we started listens."""
    home = runs / ".label_studio"
    with suppress(KeyError, StopIteration, psutil.Error):
        known = read_json(home / "server.json")
        process = psutil.Process(known["pid"])
        if abs(process.create_time() - known["started"]) < 60:  # or another process has got the number
            family = (process, *process.children(recursive=True))  # the command may be a script around it
            sockets = [each for member in family for each in member.net_connections("tcp")]
            port = next(s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.ip == _HOST)
            return LabelStudio(f"http://{_HOST}:{port}", read_json(home / "login.json")["token"])
    raise NotFinishedError(
        f"no Label Studio of {runs} is running; start it with labels=serve (make label-studio NAME=<the run>), or "
        f"name your own by {URL} and {KEY}."
    )


def _start(home: Path) -> "subprocess.Popen[bytes]":
    named = os.environ.get(COMMAND) or _INSTALLED
    command = shutil.which(named)
    if command is None:
        raise UserError(
            f"there is no {named}; install Label Studio and start it with: make label-studio NAME=<the run> (or let "
            f"{COMMAND} name the command of one that is installed)."
        )
    login, data = _login(home), str((home / "data").resolve())
    # Secrets go by the environment: `ps` shows command lines to all.
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
    """User, password and token, made at the first start."""
    path = home / "login.json"
    if not path.exists():
        if (home / "data" / "label_studio.sqlite3").exists():
            raise UserError(f"{path} is gone, and the labels in {home / 'data'} open with it alone; put it back.")
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
    """The page for tasks of up to `answers` answers: a click on the better of two, or a list to put in order."""
    page = Path(__file__).with_name("labeling_page.xml").read_text(encoding="utf-8")
    return Template(page).render(answers=answers, zh=lang == "zh")

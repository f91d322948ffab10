"""A Label Studio server of our own: on this machine's loopback alone, its labels in `runs/.label_studio/`.

runs/.label_studio/      for its owner alone (0700)
  login.json             who logs in: user, password, and the token of the REST interface (0600)
  server.json            address and process of the server that was started last
  server.log  lock       what it prints; held while a server is looked for or started
  data/                  its database: labels survive a restart
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # of accelerate's requirements
from filelock import FileLock

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.feedback.client import LabelStudio
from rlhf_pipeline.files import write_json

COMMAND = "LABEL_STUDIO"  # names its executable, which lives in an environment of its own
_INSTALLED = ".venv-label-studio/bin/label-studio"  # where `make label-studio` puts it
_HOST, _PORT = "127.0.0.1", 8080
USER = "annotator@localhost"
PATIENCE = 600.0  # seconds for a start; the first makes the database
# What the server sees of this environment. Its other settings have names like HOST, DEBUG and CI.
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
_SETTINGS = {
    "COLLECT_ANALYTICS": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "LATEST_VERSION_CHECK": "false",
    "FEATURE_FLAGS_OFFLINE": "true",
    "DISABLE_SIGNUP_WITHOUT_LINK": "true",
    "ALLOWED_HOSTS": "127.0.0.1,localhost",  # a page elsewhere cannot come in under a name of its own
    "HOST": "",
    "LOG_LEVEL": "WARNING",
}
# It fetches tips for its pages from a site outside, and has no setting against that; through this it reaches none.
_NOWHERE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1,localhost"}


def folder_of(runs: Path) -> Path:
    """Where the server of these runs keeps its things."""
    return runs / ".label_studio"


def running(runs: Path) -> LabelStudio:
    """The server of these runs. Its process must be alive, so that no stranger at its port gets the token."""
    home, alive = folder_of(runs), False
    with suppress(FileNotFoundError, KeyError, psutil.Error):
        known = json.loads((home / "server.json").read_text(encoding="utf-8"))
        process = psutil.Process(known["pid"])
        # A clock that is corrected moves this time a little.
        alive = abs(process.create_time() - known["started"]) < 60 and process.status() != psutil.STATUS_ZOMBIE
    if not alive:
        raise NotFinishedError(
            f"no Label Studio of {runs} is running; start it with labels=serve (make label-studio NAME=<the run>), or "
            "name your own by LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY."
        )
    return LabelStudio(known["url"], json.loads((home / "login.json").read_text(encoding="utf-8"))["token"])


@contextmanager
def started(runs: Path) -> Iterator[tuple[LabelStudio, subprocess.Popen[bytes] | None]]:
    """A server for these runs that answers, and its process, ended with the block; None if it was running: it stays."""
    home, process = folder_of(runs), None
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    try:
        with FileLock(home / "lock"):
            try:
                studio = running(runs)
            except NotFinishedError:
                studio, process = _start(home)
            _await(studio, process, home / "server.log")
        yield studio, process
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            (home / "server.json").unlink(missing_ok=True)


def _start(home: Path) -> tuple[LabelStudio, subprocess.Popen[bytes]]:
    named = os.environ.get(COMMAND) or _INSTALLED
    command = shutil.which(named)
    if command is None:
        raise UserError(
            f"there is no {named}; install Label Studio and start it with: make label-studio NAME=<the run> (or let "
            f"{COMMAND} name the command of one that is installed)."
        )
    login, port = _login(home), _free_port()
    arguments = ["start", "--no-browser", "--enable-legacy-api-token", "--internal-host", _HOST, "--port", str(port)]
    print("Label Studio is starting; the first time takes about a minute", flush=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home,
            env=_environment(home, login),
            umask=0o077,
        )
    begun = psutil.Process(process.pid).create_time()
    studio = LabelStudio(f"http://{_HOST}:{port}", login["token"])
    write_json(home / "server.json", {"url": studio.url, "pid": process.pid, "started": begun})
    return studio, process


def _environment(home: Path, login: dict[str, str]) -> dict[str, str]:
    """The server's environment: the secrets go this way, as `ps` shows every command line to all."""
    data = str((home / "data").resolve())
    own = {"USERNAME": login["user"], "PASSWORD": login["password"], "USER_TOKEN": login["token"]}
    settings = _SETTINGS | own | {"BASE_DATA_DIR": data, "DATABASE_NAME": f"{data}/label_studio.sqlite3"}
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    # With its prefix: a name without one is looked up last.
    named = {f"LABEL_STUDIO_{name}": value for name, value in settings.items()}
    return {**passed, **named, **_NOWHERE, "XDG_CONFIG_HOME": data, "XDG_DATA_HOME": data, "PYTHONUNBUFFERED": "1"}


def _await(studio: LabelStudio, process: subprocess.Popen[bytes] | None, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        if process is not None and process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:300]
            raise UserError(f"Label Studio ended as it started: {said or 'it printed nothing'}. See {log}.")
        try:
            studio.check()
            return
        except NotFinishedError:
            if time.monotonic() > end:
                raise UserError(f"Label Studio did not start in {PATIENCE:.0f} s; see {log}.") from None
            time.sleep(0.5)


def _login(home: Path) -> dict[str, str]:
    """The user, password and token, made at the first start and kept."""
    path = home / "login.json"
    if not path.exists():
        if (home / "data" / "label_studio.sqlite3").exists():
            raise UserError(f"{path} is gone, and the labels in {home / 'data'} open with it alone; put it back.")
        write_json(path, {"user": USER, "password": secrets.token_urlsafe(12), "token": secrets.token_hex(20)})
        path.chmod(0o600)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _free_port() -> int:
    """Label Studio's own port, or another if that is taken."""
    for port in (_PORT, 0):
        with suppress(OSError), socket.create_server((_HOST, port)) as tried:
            return int(tried.getsockname()[1])
    raise UserError("no port of this machine is free.")

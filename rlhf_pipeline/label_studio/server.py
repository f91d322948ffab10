"""A Label Studio of our own: on this machine's loopback alone, its labels in `runs/.label_studio/`.

runs/.label_studio/      for its owner alone (0700)
  login.json             who logs in: user, password, and the token of the REST interface (0600)
  server.json            the address and the process of the server that runs
  server.log  lock       what it prints; held by the server as long as it lives
  data/                  its database: labels survive a restart
"""

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.label_studio.client import LabelStudio

COMMAND = "LABEL_STUDIO"  # names its executable, which lives in an environment of its own
_INSTALLED = ".venv-label-studio/bin/label-studio"  # where `make label-studio` puts it
_HOST, _PORT = "127.0.0.1", 8080
USER = "annotator@localhost"
PATIENCE = 600.0  # seconds for a start; the first makes the database
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: which signal comes when the parent dies
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


class StartingError(NotFinishedError):
    """The server is there and does not answer yet."""


def folder_of(runs: Path) -> Path:
    """Where the server of these runs keeps its things."""
    return runs / ".label_studio"


def running(runs: Path) -> LabelStudio:
    """The server of these runs, which must be running."""
    home = folder_of(runs)
    if not _is_held(home):
        raise NotFinishedError(
            f"no Label Studio of {runs} is running; start it with labels=serve (make label-studio NAME=<the run>), or "
            "name your own by LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY."
        )
    if not (home / "server.json").exists():
        raise StartingError(f"the Label Studio of {runs} is still starting; try again in a minute.")
    return LabelStudio(_read(home / "server.json")["url"], _read(home / "login.json")["token"])


@contextmanager
def started(runs: Path) -> Iterator[subprocess.Popen[bytes] | None]:
    """A server for these runs, stopped at the end; None, and nothing to stop, where one is running already."""
    home = folder_of(runs)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    with (home / "lock").open("w") as lock:
        if not _held(lock):
            yield None
            return
        (home / "server.json").unlink(missing_ok=True)  # left by one that was killed
        with _ended_by_signals():
            process = None
            try:
                process = _start(home, lock)
                yield process
            finally:
                (home / "server.json").unlink(missing_ok=True)
                if process is not None:
                    _stop(process)


def _start(home: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start it and wait until it answers. It inherits the lock, so that the lock tells whether it lives."""
    named = os.environ.get(COMMAND) or _INSTALLED
    command = shutil.which(named)
    if command is None:
        raise UserError(
            f"there is no {named}; install Label Studio and start it with: make label-studio NAME=<the run> (or let "
            f"{COMMAND} name the command of one that is installed)."
        )
    login, port = _login(home), _free_port()
    arguments = ["start", "--no-browser", "--enable-legacy-api-token", "--internal-host", _HOST, "--port", str(port)]
    log = os.open(home / "server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        process = subprocess.Popen(
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=home,
            env=_environment(home, login),
            umask=0o077,
            preexec_fn=_tied_to_us(),
            pass_fds=[lock.fileno()],
        )
    finally:
        os.close(log)
    try:
        _await(process, LabelStudio(f"http://{_HOST}:{port}", login["token"]), home)
    except BaseException:
        _stop(process)
        raise
    write_json(home / "server.json", {"url": f"http://{_HOST}:{port}", "pid": process.pid})
    return process


def _tied_to_us() -> Callable[[], None] | None:
    """What the server's process does first: ask to be ended should we be killed, when nobody else could end it.

    Only Linux offers this; elsewhere such a server lives on.
    """
    if sys.platform != "linux":
        return None
    us, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != us:  # killed before it could ask
            os._exit(1)

    return tie


def _environment(home: Path, login: dict[str, str]) -> dict[str, str]:
    """The server's environment: the secrets go this way, as `ps` shows every command line to all."""
    data = str((home / "data").resolve())
    own = {"USERNAME": login["user"], "PASSWORD": login["password"], "USER_TOKEN": login["token"]}
    settings = _SETTINGS | own | {"BASE_DATA_DIR": data, "DATABASE_NAME": f"{data}/label_studio.sqlite3"}
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    # With its prefix: a name without one is looked up last.
    named = {f"LABEL_STUDIO_{name}": value for name, value in settings.items()}
    return {**passed, **named, **_NOWHERE, "XDG_CONFIG_HOME": data, "XDG_DATA_HOME": data, "PYTHONUNBUFFERED": "1"}


def _await(process: subprocess.Popen[bytes], studio: LabelStudio, home: Path) -> None:
    began = time.monotonic()
    first = "" if (home / "data" / "label_studio.sqlite3").exists() else "; the first time takes about a minute"
    if not sys.stdout.isatty():
        print(f"Label Studio is starting{first}", flush=True)
    with Console().status("") as shown:
        while True:
            seconds = time.monotonic() - began
            shown.update(f"Label Studio is starting{first}: {seconds:.0f} s")
            if process.poll() is not None:
                raise UserError(f"Label Studio ended as it started: {_last_words(home)}. See {home / 'server.log'}.")
            if seconds > PATIENCE:
                raise UserError(f"Label Studio did not start in {PATIENCE:.0f} s; see {home / 'server.log'}.")
            try:
                studio.check()
            except NotFinishedError:
                time.sleep(0.5)
            else:
                break
    print(f"Label Studio runs at {studio.url}, started in {time.monotonic() - began:.0f} s", flush=True)


def _last_words(home: Path) -> str:
    lines = (home / "server.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _login(home: Path) -> dict[str, str]:
    """The user, password and token, made at the first start and kept."""
    path = home / "login.json"
    if not path.exists():
        if (home / "data" / "label_studio.sqlite3").exists():
            raise UserError(f"{path} is gone, and the labels in {home / 'data'} open with it alone; put it back.")
        login = {"user": USER, "password": secrets.token_urlsafe(12), "token": secrets.token_hex(20)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps(login, indent=2) + "\n")
        os.replace(temporary, path)
    return _read(path)


def _free_port() -> int:
    """Label Studio's own port, or another if that is taken."""
    for port in (*range(_PORT, _PORT + 20), 0):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((_HOST, port))
            except OSError:
                continue
            return int(tried.getsockname()[1])
    raise UserError("no port of this machine is free.")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A closed terminal or a `kill` ends this as Ctrl-C does, so that no server is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _flock() -> Any:
    """The module of the lock. The server inherits it, so that it is free once that has ended: only POSIX has such."""
    try:
        import fcntl
    except ImportError:
        raise UserError(
            "labels=serve starts Label Studio on Linux and macOS (on Windows: in WSL). Name one that runs elsewhere by "
            "LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, with labels=push and labels=pull."
        ) from None
    return fcntl


def _held(lock: IO[str]) -> bool:
    """Take the lock, unless a server has it. One that only looks has it for a moment."""
    fcntl = _flock()
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def _is_held(home: Path) -> bool:
    """Whether a server lives. A file that it wrote would outlive it."""
    path = home / "lock"
    if not path.exists():
        return False
    fcntl = _flock()
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))

"""A run's tasks as a project of Label Studio: bringing them there, and fetching what has been labelled."""

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.label_studio import server
from rlhf_pipeline.label_studio.client import LabelStudio

URL, KEY = "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"
_TITLE = (3, 50)  # the lengths that Label Studio allows


def push(folder: Path, name: str, runs: Path, annotators: int = 1) -> str:
    """Bring the tasks of `folder` that are not there yet to the server that runs. Gives the project's address."""
    return offer(_connect(runs), folder, name, annotators)


def pull(folder: Path, runs: Path) -> list[dict[str, Any]]:
    """What people have labelled or skipped so far of the project in `folder`, in Label Studio's JSON."""
    path = folder / "project.json"
    if not path.exists():
        raise NotFinishedError(f"{folder} has not been given to Label Studio yet; say labels=serve, or labels=push.")
    known = json.loads(path.read_text(encoding="utf-8"))
    own, elsewhere = os.environ.get(URL, "").strip().rstrip("/"), not known.get("local")
    if elsewhere and own != known["url"]:
        state = "names another server" if own else "is not set"
        raise UserError(f"the tasks of {folder} are at {known['url']}, and {URL} {state}; set {URL} and {KEY}.")
    if not elsewhere and own:
        raise UserError(f"the tasks of {folder} are in the server of {runs}, and {URL} names another; unset it.")
    studio = _connect(runs)
    if studio.mark(known["project"]) != known["mark"]:
        raise UserError(f"project {known['project']} at {studio.url} is another one by now; say labels=push again.")
    return studio.export(known["project"])


def serve(folder: Path, name: str, runs: Path, annotators: int = 1) -> None:
    """A server on this machine with the tasks of `folder`, until Ctrl-C. Where one runs, it gets the tasks."""
    if os.environ.get(URL):
        raise UserError(f"{URL} names a server of your own; say labels=push to give it the tasks, or unset it.")
    _tasks(folder)  # before the minute that a start takes
    with server.started(runs) as process:
        if process is None:
            _await_other(runs)
        address = offer(server.running(runs), folder, name, annotators)
        _say(address, name, runs)
        if process is None:
            print("That server was running already; it ends where it was started.", flush=True)
            return
        print("Ctrl-C ends it; labels are kept.", flush=True)
        status = process.wait()
    raise UserError(f"Label Studio ended by itself (status {status}); see {server.folder_of(runs) / 'server.log'}.")


def _await_other(runs: Path) -> None:
    """Wait for a server that someone else is starting; where that comes to nothing, say so at once."""
    began, said = time.monotonic(), False
    while True:
        try:
            server.running(runs)
            return
        except server.StartingError:
            if time.monotonic() - began > server.PATIENCE:
                raise
            if not said:
                print("Label Studio is being started elsewhere; waiting for it", flush=True)
            said = True
            time.sleep(0.5)


def _say(address: str, name: str, runs: Path) -> None:
    login = server.folder_of(runs) / "login.json"
    print(
        f"Label at:          {address}\n"
        f"Log in as:         {server.USER}, with the password in {login}\n"
        f"Fetch the labels:  python -m rlhf_pipeline stage=collect name={shlex.quote(name)} labels=pull",
        flush=True,
    )


def offer(studio: LabelStudio, folder: Path, name: str, annotators: int = 1) -> str:
    """Make the project if there is none, bring the tasks that it lacks, and note where it is."""
    tasks = _tasks(folder)
    config = (folder / "labeling_config.xml").read_text(encoding="utf-8")
    studio.check()
    mark = f"Made by rlhf_pipeline for the run {name}."
    project = studio.project(_title(name), mark, config, annotators)
    added = studio.add(project, tasks)
    local = not os.environ.get(URL)
    write_json(
        folder / "project.json", {"url": studio.url, "project": project, "run": name, "mark": mark, "local": local}
    )
    print(f"project {project}, {name}: {added} tasks added, {len(tasks) - added} were there", flush=True)
    return studio.address(project)


def _tasks(folder: Path) -> list[dict[str, Any]]:
    path = folder / "tasks.json"
    if not path.exists():
        raise NotFinishedError(f"{folder} has no tasks.json to be labelled; run stage=collect first.")
    return list(json.loads(path.read_text(encoding="utf-8")))


def _title(name: str) -> str:
    shortest, longest = _TITLE
    name = name if len(name) >= shortest else f"run {name}"
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _connect(runs: Path) -> LabelStudio:
    """The user's own server if the environment names one, else that of `runs`."""
    url, key = os.environ.get(URL), os.environ.get(KEY)
    if not url:
        return server.running(runs)
    if not key:
        host = urlsplit(url).hostname
        raise UserError(f"{URL} is set, and {KEY} is not; copy a token from Account & Settings at {host} into it.")
    return LabelStudio(url, key)

"""A run's tasks as a project of Label Studio: bringing them there, and fetching what has been labelled."""

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.feedback import server
from rlhf_pipeline.feedback.client import KEY, URL, LabelStudio
from rlhf_pipeline.files import write_json

_TITLE = (3, 50)  # the lengths that Label Studio allows


def serve(folder: Path, name: str, runs: Path, annotators: int = 1) -> None:
    """A server on this machine with the tasks of `folder`, until Ctrl-C. If one is running, it gets the tasks."""
    if os.environ.get(URL):
        raise UserError(f"{URL} names a server of your own; say labels=push to give it the tasks, or unset it.")
    tasks_of(folder)  # before the minute that a start takes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `kill` ends the server too, as Ctrl-C does
    with server.started(runs) as (studio, process):
        address, home = push(studio, folder, name, annotators), server.folder_of(runs)
        print(
            f"Label at:          {address}\n"
            f"Log in as:         {server.USER}, with the password in {home / 'login.json'}\n"
            f"Fetch the labels:  python -m rlhf_pipeline stage=collect name={shlex.quote(name)} labels=pull",
            flush=True,
        )
        if process is None:
            pid = json.loads((home / "server.json").read_text(encoding="utf-8"))["pid"]
            print(f"It was running already; end it where it was started, or with: kill {pid}", flush=True)
            return
        print("Ctrl-C ends it; labels are kept.", flush=True)
        status = process.wait()
    raise UserError(f"Label Studio ended by itself (status {status}); see {home / 'server.log'}.")


def connect(runs: Path) -> LabelStudio:
    """The user's own server if the environment names one, else that of `runs`."""
    url, key = os.environ.get(URL), os.environ.get(KEY)
    if url and not key:
        raise UserError(f"{URL} is set, and {KEY} is not; copy a token from Account & Settings there into it.")
    return LabelStudio(url, key) if url and key else server.running(runs)


def tasks_of(folder: Path) -> list[dict[str, Any]]:
    """The tasks that stage=collect left in `folder`."""
    path = folder / "tasks.json"
    if not path.exists():
        raise NotFinishedError(f"{folder} has no tasks.json to be labelled; run stage=collect first.")
    return list(json.loads(path.read_text(encoding="utf-8")))


def push(studio: LabelStudio, folder: Path, name: str, annotators: int = 1) -> str:
    """Make the project if there is none, and add the tasks of `folder` that it lacks. Gives the labelling page."""
    tasks, mark = tasks_of(folder), f"Made by rlhf_pipeline for the run {name}."
    studio.check()
    shortest, longest = _TITLE
    title = name if len(name) >= shortest else f"run {name}"
    title = title if len(title) <= longest else title[: longest - 1] + "…"
    project = studio.project(title, mark, (folder / "labeling_config.xml").read_text(encoding="utf-8"), annotators)
    added = studio.add(project, tasks)
    known = {"url": studio.url, "project": project, "run": name, "mark": mark, "local": not os.environ.get(URL)}
    write_json(folder / "project.json", known)
    print(f"project {project}, {name}: {added} tasks added, {len(tasks) - added} were there", flush=True)
    return f"{studio.url}/projects/{project}/data?labeling=1"


def pull(folder: Path, runs: Path) -> list[dict[str, Any]]:
    """The tasks of the project of `folder` that people have labelled or skipped so far, in Label Studio's JSON."""
    path = folder / "project.json"
    if not path.exists():
        raise NotFinishedError(f"{folder} has not been given to Label Studio yet; say labels=serve, or labels=push.")
    known = json.loads(path.read_text(encoding="utf-8"))
    own = os.environ.get(URL, "").strip().rstrip("/")
    if known.get("local") and own:
        raise UserError(f"the tasks of {folder} are in the server of {runs}; unset {URL}, which names another.")
    if not known.get("local") and own != known["url"]:
        raise UserError(f"the tasks of {folder} are at {known['url']}; set {URL} to that, and {KEY}.")
    studio = connect(runs)
    if studio.mark(known["project"]) != known["mark"]:
        raise UserError(f"project {known['project']} at {studio.url} is another one by now; say labels=push again.")
    return studio.export(known["project"])

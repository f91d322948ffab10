"""Label Studio: the page, the way there and back, and our own server, with a stand-in for it on loopback."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT, CommandLine
from fake_label_studio import ACCESS, TOKEN, FakeStudio, serving
from loopback import answering

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.feedback.label_studio import LabelStudio, labeling_config, pull, push, running
from rlhf_pipeline.files import read_jsonl, write_jsonl

PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoiMSJ9.signature"
LABEL = ("stage=collect", "name=demo")


@pytest.fixture(autouse=True)
def _no_server_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LABEL_STUDIO", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStudio]:
    """A server of the user's own, named by the environment."""
    with answering(FakeStudio()) as server:
        monkeypatch.setenv("LABEL_STUDIO_URL", server.url + "/")
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
        yield server


@pytest.fixture
def studio(fake: FakeStudio) -> LabelStudio:
    return LabelStudio(fake.url + "/", TOKEN)


@pytest.fixture
def collected(workplace: Path) -> Path:
    """What stage=collect leaves: three tasks of two answers."""
    folder = workplace / "runs" / "demo" / "collect"
    folder.mkdir(parents=True)
    answers = [{"id": "answer1", "text": "a"}, {"id": "answer2", "text": "b"}]
    write_jsonl(folder / "candidates.jsonl", [{"task": f"t{n}", "prompt": "p", "answers": answers} for n in range(3)])
    (folder / "labeling_config.xml").write_text(labeling_config(2))
    (folder / "run.json").write_text(json.dumps({"stage": "collect", "name": "demo", "status": "waiting"}))
    return folder


def note(selected: str | None) -> dict[str, Any]:
    """An annotation: a click on one side, or a skip."""
    value = {"type": "pairwise", "from_name": "preference", "value": {"selected": selected}}
    result = [value] if selected else []
    return {"id": 1, "completed_by": 1, "lead_time": 9.0, "was_cancelled": not selected, "result": result}


# -- the page


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("answers", [2, 3, 9])
def test_the_page_is_xml_and_shows_the_fields_of_a_task_as_text(answers: int, lang: str) -> None:
    written = labeling_config(answers, lang)
    assert ("提交" in written) == (lang == "zh") == ("submits" not in written)
    config = ElementTree.fromstring(written)
    values = {node.get("name"): node.get("value") for node in config.iter() if node.get("value", "").startswith("$")}
    controls = {node.tag: node.get("toName") for node in config.iter() if node.get("toName")}
    if answers == 2:
        assert values == {"prompt": "$prompt", "answer1": "$answer1", "answer2": "$answer2"}
        assert controls == {"Pairwise": "answer1,answer2"}
    else:
        assert values == {"prompt": "$prompt", "items": "$items"}
        assert controls == {"Ranker": "items"}
    style = "".join(config.find("Style").itertext())  # type: ignore[union-attr]
    assert ".rlhf-prompt" in style
    assert ">" not in style  # Label Studio drops such a rule
    assert not {node.tag for node in config.iter()} & {"HyperText", "Markdown"}  # which would show texts as HTML


# -- the REST interface


@pytest.mark.parametrize("text", ["<html>", "{}"])
def test_what_is_not_label_studio_is_told_and_gets_no_token(fake: FakeStudio, studio: LabelStudio, text: str) -> None:
    fake.wrong = (200, text)
    with pytest.raises(UserError, match=r"Label Studio.* make label-studio"):
        studio.check()
    assert fake.asked == ["GET /api/version"]
    with pytest.raises(NotFinishedError, match=r"no Label Studio answers at http://127.0.0.1:9.*start one with: make"):
        LabelStudio("http://127.0.0.1:9", TOKEN).check()


@pytest.mark.parametrize(
    ("url", "token", "message"),
    [
        (url, TOKEN, "not a plain http")
        for url in ("127.0.0.1:8080", "ftp://a", "http://a:word@a", "http://[", "http://")
    ]
    + [("http://127.0.0.1", t, "LABEL_STUDIO_API_KEY holds no token") for t in ("", " ", "two words", "a\nb", "密")],
)
def test_an_address_or_a_token_that_is_none_is_refused(url: str, token: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        LabelStudio(url, token)
    assert "word" not in str(refusal.value)


def test_a_project_is_made_once_and_follows_its_config_and_no_task_is_imported_twice(
    fake: FakeStudio, studio: LabelStudio, collected: Path
) -> None:
    fake.projects += [{"id": n, "description": "somebody's", "label_config": ""} for n in range(1, 251)]
    for _ in range(2):
        assert studio.project("demo", "ours", "<View/>") == 251
    assert [asked for asked in fake.asked if not asked.startswith("GET")] == ["POST /api/projects"]
    assert studio.project("demo", "ours", "<View></View>", annotators=2) == 251
    assert fake.projects[250]["label_config"] == "<View></View>"
    assert fake.projects[250]["maximum_annotations"] == 2
    assert fake.projects[250]["enable_empty_annotation"] is False
    tasks = [{"data": {"task": f"task{number}"}} for number in range(1210)]
    assert studio.add(251, tasks[:1203]) == 1203
    assert fake.imports == [500, 500, 203]
    assert studio.add(251, tasks[:1203]) == 0
    assert studio.add(251, tasks) == 7
    assert len({task["data"]["task"] for task in fake.tasks}) == len(fake.tasks) == 1210
    push(studio, collected, "n" * 60)
    assert len(fake.projects[251]["title"]) == 50, "Label Studio takes no longer one"
    assert "n" * 60 in fake.projects[251]["description"]


def test_a_personal_access_token_is_exchanged_never_outlives_its_minutes_and_is_not_shown(
    fake: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = LabelStudio(fake.url, PERSONAL)
    studio.check()
    fake.accepted.discard(f"Bearer {ACCESS}")  # its minutes are over
    studio.check()
    monkeypatch.setattr(fake, "answer", lambda *_: (500, f"Authorization: Bearer {ACCESS}"))
    with pytest.raises(UserError, match=r"Authorization: Bearer \*\*\*"):
        studio.request("GET", "/api/projects/7")


def test_neither_netrc_nor_a_proxy_comes_between(
    studio: LabelStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    studio.check()
    studio._session.trust_env = True  # as for a server elsewhere
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    studio.check()


@pytest.mark.parametrize(
    ("status", "text", "shown"),
    [
        (401, '{"detail": "Invalid token."}', "answered 401 .*Invalid token.*LABEL_STUDIO_API_KEY"),
        (403, "", "answered 403 .*LABEL_STUDIO_API_KEY"),
        (404, '{"detail": "No Project matches"}', "404 .*/api/projects/7.*No Project matches.*deleted"),
        (400, '{"validation_errors": {"title": ["too short"]}}', r'400 .*"title": ."too short"'),
        (500, "<html>", "answered 500 to GET /api/projects/7"),
        (500, f'"it is {TOKEN}"', r"it is \*\*\*"),
        (302, "https://labels.example.org/x", "302 .*https://labels.example.org/x.*LABEL_STUDIO_URL"),
    ],
)
def test_what_goes_wrong_is_shown_without_the_token(
    fake: FakeStudio, studio: LabelStudio, status: int, text: str, shown: str
) -> None:
    fake.wrong = (status, text)
    with pytest.raises(UserError, match=shown) as refusal:
        studio.request("GET", "/api/projects/7")
    whole = "".join(traceback.format_exception(refusal.value)) + repr(studio) + str(studio)
    assert TOKEN not in whole


# -- a run's tasks, there and back


def test_tasks_go_to_label_studio_and_labels_come_back(
    fake: FakeStudio,
    collected: Path,
    command_line: CommandLine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command_line(*LABEL, "labels=pull") == 2
    assert "has not been given to Label Studio yet" in capsys.readouterr().err
    assert command_line(*LABEL, "labels=push") == command_line(*LABEL, "labels=push") == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{fake.url}/projects/1/data?labeling=1") == 2
    assert "3 tasks added, 0 were there" in printed
    assert "0 tasks added, 3 were there" in printed
    assert TOKEN not in printed + (collected / "project.json").read_text()
    assert "demo" in fake.projects[0]["title"]

    by_hand = {"task": "t1", "prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "annotator": "ann"}
    write_jsonl(collected / "labels.jsonl", [{**by_hand, "source": "sheet.csv"}])

    def pull_labels(*notes: dict[str, Any]) -> tuple[list[Any], int]:
        fake.tasks[0]["annotations"] = notes
        assert command_line(*LABEL, "labels=pull") == 0
        labels = [(row["annotator"], row["ranks"]) for row in read_jsonl(collected / "labels.jsonl")]
        return labels, len(read_jsonl(collected / "skipped.jsonl"))

    kept, left, right = ("ann", [1, 2]), ("1", [1, 2]), ("1", [2, 1])
    assert pull_labels(note("right")) == ([kept, right], 0)
    assert pull_labels(note(None)) == ([kept], 1)
    assert pull_labels(note("right")) == ([kept, right], 0)
    assert pull_labels() == ([kept], 0), "it was taken back"

    # Our own server may be at another port the next time.
    known = json.loads((collected / "project.json").read_text())
    monkeypatch.delenv("LABEL_STUDIO_URL")
    monkeypatch.setattr("rlhf_pipeline.feedback.label_studio.running", lambda runs: LabelStudio(fake.url, TOKEN))
    for port, notes, labels in ((8080, [note("left")], [left]), (8081, [note("right")], [right]), (8082, [], [])):
        own = {**known, "url": f"http://127.0.0.1:{port}", "local": True}
        (collected / "project.json").write_text(json.dumps(own))
        assert pull_labels(*notes) == ([kept, *labels], 0)


def test_labels_are_pulled_from_where_the_tasks_are_and_from_no_other_project(
    fake: FakeStudio, collected: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    assert command_line(*LABEL, "labels=push") == 0
    known = (collected / "project.json").read_text()
    for damaged, message in ((known[:-9], "project.json is damaged"), ("{}", "has not been given to Label Studio")):
        (collected / "project.json").write_text(damaged)
        with pytest.raises(UserError, match=message):
            pull(collected, Path("runs"))
    (collected / "project.json").write_text(known)
    fake.projects[0]["description"] = "somebody's"
    with pytest.raises(UserError, match="is not this run's any more"):
        pull(collected, Path("runs"))
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://user:word@elsewhere")
    with pytest.raises(UserError, match=r"are at http://127.0.0.1:\d+; set LABEL_STUDIO_URL") as refusal:
        pull(collected, Path("runs"))
    assert "word" not in str(refusal.value)
    monkeypatch.delenv("LABEL_STUDIO_URL")
    with pytest.raises(UserError, match=r"are at http://127.0.0.1:\d+; set LABEL_STUDIO_URL"):
        pull(collected, Path("runs"))


def test_fetching_labels_needs_no_torch() -> None:
    code = "import sys; import rlhf_pipeline.cli, rlhf_pipeline.feedback.labelling; "
    code += "sys.exit(', '.join({'torch', 'transformers', 'trl', 'datasets'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "\n"


# -- a server of our own


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `label-studio` that is the stand-in."""
    path = tmp_path / "label-studio"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "fake_label_studio.py"} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("LABEL_STUDIO", str(path))


def test_serve_brings_the_tasks_keeps_its_secrets_and_ends_with_us(
    command: None, collected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not for others")
    runs = collected.parents[1]
    home = runs / ".label_studio"
    with pytest.raises(NotFinishedError, match=r"no Label Studio of .*runs is running; start it with labels=serve"):
        running(runs)
    logins = []
    for end in (signal.SIGINT, signal.SIGTERM):  # the second time with the login of the first, and at another port
        with ExitStack() as taken:
            if logins:
                with suppress(OSError):  # something else has it
                    taken.enter_context(FakeStudio(8080))
            process, printed = taken.enter_context(serving(runs.parent, "demo"))
            server = json.loads((home / "server.json").read_text())["pid"]
            assert not logins or ":8080/" not in printed
            running(runs).check()
            logins.append(json.loads((home / "login.json").read_text()))
            process.send_signal(end)
            rest, error = process.communicate(timeout=120)  # on a busy machine
        assert (process.returncode, error) == (0, "")
        assert "its labels are kept" in rest
        assert "3 tasks added, 0 were there" in printed
        for part in ("/projects/1/data?labeling=1", "login.json", "stage=collect name=demo labels=pull"):
            assert part in printed
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
        assert not (home / "server.json").exists()
    assert logins[0] == logins[1]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "login.json").stat().st_mode) == 0o600
    seen = json.loads((home / "data" / "seen.json").read_text())
    asked = ["start", "--no-browser", "--enable-legacy-api-token", "--internal-host", "127.0.0.1"]
    assert seen["arguments"][:5] == asked
    assert seen["environment"]["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false"
    assert "HF_TOKEN" not in seen["environment"]
    for secret in (logins[0]["token"], logins[0]["password"]):
        assert secret in seen["environment"].values()
        assert secret not in json.dumps(seen["arguments"]) + printed + rest


def test_two_that_serve_at_once_share_one_server_which_outlives_a_kill(
    command: None, collected: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [sys.executable, "-m", "rlhf_pipeline", *LABEL, "labels=serve"]
    both = [subprocess.Popen(call, cwd=collected.parents[2], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    _await(lambda: any(process.poll() is not None for process in both))
    ended, owner = sorted(both, key=lambda process: process.poll() is None)
    assert ended.returncode == 0
    assert "already running" in ended.communicate()[0]
    assert owner.poll() is None
    owner.kill()
    assert "Ctrl-C stops the server" in owner.communicate()[0]
    assert command_line(*LABEL, "labels=pull") == 0
    os.kill(json.loads((collected.parents[1] / ".label_studio" / "server.json").read_text())["pid"], signal.SIGKILL)
    _await(lambda: command_line(*LABEL, "labels=pull") == 2)
    assert "is running; start it with labels=serve" in capsys.readouterr().err


def _await(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_token_goes_to_no_stranger_at_the_servers_port(fake: FakeStudio, collected: Path) -> None:
    home = collected.parents[1] / ".label_studio"
    home.mkdir()
    (home / "login.json").write_text(json.dumps({"token": TOKEN}))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as idle:
        alive = time.time()
        strangers = [
            {"pid": os.getpid()},  # it listens, and was not started by us
            {"pid": os.getpid(), "started": 1e9},
            {"pid": 2**22 + 1, "started": 1e9},
            {"pid": idle.pid, "started": alive},  # our process, before it listens: another may have the port
        ]
        for known in strangers:
            (home / "server.json").write_text(json.dumps({"url": fake.url, **known}))
            with pytest.raises(NotFinishedError, match="is running; start it"):
                running(collected.parents[1])
        idle.kill()
    assert fake.asked == []


def test_serve_tells_what_is_missing(
    collected: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve() -> str:
        assert command_line(*LABEL, "labels=serve") == 2
        return capsys.readouterr().err

    assert "there is no .venv-label-studio/bin/label-studio; install Label Studio" in serve()
    broken = collected / "label-studio"
    broken.write_text("#!/bin/sh\necho it is broken\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("LABEL_STUDIO", str(broken))
    assert "did not start" in (error := serve())
    assert "it is broken" in error
    home = collected.parents[1] / ".label_studio"
    (home / "data").mkdir()
    (home / "data" / "label_studio.sqlite3").touch()
    (home / "login.json").unlink()
    assert "login.json is gone" in serve()
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://127.0.0.1:9")
    assert "names a server of your own; use labels=push" in serve()

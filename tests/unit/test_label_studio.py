"""Label Studio: the labelling config, and the client and our own server with a stand-in on loopback."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT
from fake_label_studio import ACCESS, TOKEN, FakeStudio
from loopback import answering

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.feedback import labelling
from rlhf_pipeline.feedback.client import LabelStudio
from rlhf_pipeline.feedback.label_studio import connect, pull, push, serve
from rlhf_pipeline.feedback.page import labeling_config
from rlhf_pipeline.feedback.server import folder_of, running, started
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.runs.directory import RunDir

PERSONAL = "eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoiMSJ9.signature"


@pytest.fixture(autouse=True)
def _no_server_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LABEL_STUDIO", "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake() -> Iterator[FakeStudio]:
    with answering(FakeStudio()) as server:
        yield server


@pytest.fixture
def studio(fake: FakeStudio) -> LabelStudio:
    return LabelStudio(fake.url + "/", TOKEN)


def tasks(count: int) -> list[dict[str, Any]]:
    return [{"data": {"task": f"task{number}", "prompt": "p", "items": []}} for number in range(count)]


def collected(runs: Path, name: str = "demo", count: int = 3) -> Path:
    """What stage=collect leaves for Label Studio."""
    folder = runs / name / "collect"
    folder.mkdir(parents=True)
    (folder / "tasks.json").write_text(json.dumps(tasks(count)))
    (folder / "labeling_config.xml").write_text(labeling_config(4))
    return folder


# -- the labelling config


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("answers", [2, 3, 9])
def test_config_is_xml_and_has_the_fields_of_a_task(answers: int, lang: str) -> None:
    written = labeling_config(answers, lang)
    assert ("提交" in written) == (lang == "zh") == ("submits" not in written)
    config = ElementTree.fromstring(written)
    values = {node.get("name"): node.get("value") for node in config.iter() if node.get("value", "").startswith("$")}
    assert values == (
        {"prompt": "$prompt", "answer1": "$answer1", "answer2": "$answer2"}
        if answers == 2
        else {"prompt": "$prompt", "items": "$items"}
    )
    controls = {node.tag: node.get("toName") for node in config.iter() if node.get("toName")}
    assert controls == ({"Pairwise": "answer1,answer2"} if answers == 2 else {"Ranker": "items"})
    style = "".join(config.find("Style").itertext())  # type: ignore[union-attr]
    assert ">" not in style  # Label Studio drops such a rule
    assert not {node.tag for node in config.iter()} & {"HyperText", "Markdown"}  # which would show texts as HTML


# -- the client


def test_the_server_is_told_from_silence_and_from_something_else(fake: FakeStudio, studio: LabelStudio) -> None:
    assert studio.check()["email"] == "annotator@localhost"
    fake.wrong = (200, "<html>")
    with pytest.raises(UserError, match=r"what answers at http://127.0.0.1:\d+ is not Label Studio"):
        studio.check()
    fake.wrong = (200, "{}")
    with pytest.raises(UserError, match="is not Label Studio"):
        studio.check()
    with pytest.raises(NotFinishedError, match=r"no Label Studio answers at http://127.0.0.1:9.*start one with: make"):
        LabelStudio("http://127.0.0.1:9", TOKEN).check()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8080", "ftp://a", "http://user:word@a", "http://[", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="not a plain http") as refusal:
        LabelStudio(url, TOKEN)
    assert "word" not in str(refusal.value)


@pytest.mark.parametrize("token", ["", " ", "two words", "a\nb", "密"])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    with pytest.raises(UserError, match="token is empty or has characters"):
        LabelStudio("http://127.0.0.1", token)


def test_a_project_is_made_once_and_follows_its_config(fake: FakeStudio, studio: LabelStudio) -> None:
    fake.projects += [
        {"id": n, "title": "demo", "description": "somebody's", "label_config": ""} for n in range(1, 251)
    ]
    assert studio.project("demo", "ours", "<View/>") == 251
    assert studio.project("demo", "ours", "<View/>") == 251
    assert [asked for asked in fake.asked if not asked.startswith("GET")] == ["POST /api/projects"]
    assert studio.project("demo", "ours", "<View></View>") == 251
    assert fake.projects[250]["label_config"] == "<View></View>"
    assert fake.projects[250]["maximum_annotations"] == 1
    assert studio.project("demo", "ours", "<View></View>", annotators=2) == 251
    assert fake.projects[250]["maximum_annotations"] == 2
    assert fake.projects[250]["enable_empty_annotation"] is False


def test_tasks_are_never_imported_twice(fake: FakeStudio, studio: LabelStudio) -> None:
    project = studio.project("demo", "ours", "<View/>")
    assert studio.add(project, tasks(1203)) == 1203
    assert fake.imports == [500, 500, 203]
    assert studio.add(project, tasks(1203)) == 0
    assert studio.add(project, tasks(1210)) == 7
    assert len({task["data"]["task"] for task in fake.tasks}) == len(fake.tasks) == 1210


def test_export_has_what_was_labelled_and_what_was_skipped(fake: FakeStudio, studio: LabelStudio) -> None:
    project = studio.project("demo", "ours", "<View/>")
    studio.add(project, tasks(3))
    fake.tasks[0]["annotations"] = [{"result": [], "was_cancelled": True}]
    fake.tasks[2]["annotations"] = [{"result": [{"value": {"selected": "left"}}], "was_cancelled": False}]
    assert [task["data"]["task"] for task in studio.export(project)] == ["task0", "task2"]


def test_a_personal_access_token_is_exchanged_and_never_outlives_its_minutes(fake: FakeStudio) -> None:
    studio = LabelStudio(fake.url, PERSONAL)
    assert studio.check()["id"] == 1
    fake.accepted.discard(f"Bearer {ACCESS}")  # its minutes are over
    assert studio.check()["id"] == 1


def test_neither_netrc_nor_a_proxy_comes_between(
    fake: FakeStudio, studio: LabelStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert studio.check()["id"] == 1


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (401, '{"detail": "Invalid token."}', r"answered 401 .*Invalid token.*LABEL_STUDIO_API_KEY"),
        (403, "", r"answered 403 .*LABEL_STUDIO_API_KEY"),
        (404, '{"detail": "No Project matches"}', "404 .*/api/projects/7: No Project matches.*deleted"),
        (400, '{"detail": "v", "validation_errors": {"title": ["too short"]}}', r'400 .*"title": ."too short"'),
        (500, "<html>", "answered 500 to GET /api/projects/7: Internal Server Error"),
        (500, f'"it said {TOKEN}"', r"it said \*\*\*"),
        (302, "https://labels.example.org/x", "to https://labels.example.org/x; set LABEL_STUDIO_URL"),
    ],
)
def test_what_goes_wrong_is_said_without_the_token(
    fake: FakeStudio, studio: LabelStudio, status: int, text: str, said: str
) -> None:
    fake.wrong = (status, text)
    with pytest.raises(UserError, match=said) as refusal:
        studio.mark(7)
    shown = "".join(traceback.format_exception(refusal.value)) + repr(studio) + str(studio)
    assert TOKEN not in shown


# -- a run's tasks, there and back


def test_push_and_pull_with_a_server_of_ones_own(
    fake: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = collected(tmp_path)
    with pytest.raises(NotFinishedError, match="has not been given to Label Studio yet"):
        pull(folder, tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_URL", fake.url)
    with pytest.raises(UserError, match="LABEL_STUDIO_API_KEY is not"):
        push(connect(tmp_path), folder, "demo")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
    assert (
        push(connect(tmp_path), folder, "demo")
        == push(connect(tmp_path), folder, "demo")
        == f"{fake.url}/projects/1/data?labeling=1"
    )
    assert "3 tasks added, 0 were there" in (printed := capsys.readouterr().out)
    assert "0 tasks added, 3 were there" in printed
    known = json.loads((folder / "project.json").read_text())
    assert (known["url"], known["project"]) == (fake.url, 1)
    assert TOKEN not in printed + json.dumps(known)
    assert pull(folder, tmp_path) == []
    fake.tasks[1]["annotations"] = [{"result": [], "was_cancelled": True}]
    assert [task["data"]["task"] for task in pull(folder, tmp_path)] == ["task1"]

    fake.projects[0]["description"] = "somebody's"
    with pytest.raises(UserError, match="is another one by now"):
        pull(folder, tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://user:word@elsewhere")
    with pytest.raises(UserError, match=r"are at http://127.0.0.1:\d+; set LABEL_STUDIO_URL") as refusal:
        pull(folder, tmp_path)
    assert "word" not in str(refusal.value)
    monkeypatch.delenv("LABEL_STUDIO_URL")
    with pytest.raises(UserError, match=r"are at http://127.0.0.1:\d+; set LABEL_STUDIO_URL"):
        pull(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "title"), [("ab", "run ab"), ("demo/round2", "demo/round2"), ("n" * 60, "n" * 49 + "…")]
)
def test_titles_are_of_the_lengths_that_are_allowed(
    fake: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, title: str
) -> None:
    monkeypatch.setenv("LABEL_STUDIO_URL", fake.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", TOKEN)
    push(connect(tmp_path), collected(tmp_path, name), name)
    assert fake.projects[0]["title"] == title
    assert name in fake.projects[0]["description"]


def test_a_label_that_is_taken_back_is_gone_and_one_port_is_as_good_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = RunDir(tmp_path, "demo", "collect")
    out.path.mkdir(parents=True)
    answers = [{"id": "answer1", "text": "a"}, {"id": "answer2", "text": "b"}]
    out.add("candidates.jsonl", [{"task": f"task{n}", "prompt": "p", "answers": answers} for n in range(2)])
    by_hand = {"task": "task1", "prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "annotator": "ann"}
    out.add("labels.jsonl", [{**by_hand, "source": "sheet.csv"}])
    note = {"id": 1, "completed_by": 1, "lead_time": 9.0, "was_cancelled": False}
    note["result"] = [{"type": "pairwise", "from_name": "preference", "value": {"selected": "right"}}]

    def pulled(port: int, *notes: dict[str, Any]) -> list[tuple[str, list[int]]]:
        project = {"url": f"http://127.0.0.1:{port}", "project": 1, "local": True}
        (out.path / "project.json").write_text(json.dumps(project))
        data = {"task": "task0", "prompt": "p", "answer1": "a", "answer2": "b"}
        monkeypatch.setattr(labelling, "pull", lambda *_: [{"id": 7, "data": data, "annotations": [*notes]}])
        labelling.bring_pulled(out)
        return [(row["annotator"], row["ranks"]) for row in read_jsonl(out.path / "labels.jsonl")]

    by_ann = ("ann", [1, 2])
    assert pulled(8080, note) == [by_ann, ("1", [2, 1])]
    assert pulled(8081, {**note, "was_cancelled": True}) == [by_ann]
    assert len(read_jsonl(out.path / "skipped.jsonl")) == 1
    assert pulled(8081, note) == [by_ann, ("1", [2, 1])]
    assert pulled(8082) == [by_ann]
    assert read_jsonl(out.path / "skipped.jsonl") == []


def test_fetching_labels_needs_no_torch() -> None:
    code = "import sys; import rlhf_pipeline.cli, rlhf_pipeline.feedback.labelling; "
    code += "sys.exit(', '.join({'torch', 'transformers', 'trl', 'datasets'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "\n"


# -- a server of our own


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `label-studio` that is the stand-in."""
    path = tmp_path / "label-studio"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests" / "fake_label_studio.py"} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("LABEL_STUDIO", str(path))
    return path


def test_our_server_keeps_its_secrets_and_ends_with_us(
    command: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not for others")
    runs = tmp_path / "runs"
    home = folder_of(runs)
    with pytest.raises(NotFinishedError, match=r"no Label Studio of .*runs is running; start it with labels=serve"):
        running(runs)
    logins = []
    for _ in range(2):  # the second time with the login of the first
        with started(runs) as (studio, process):
            assert process is not None
            assert studio.check()["id"] == 1
            logins.append(json.loads((home / "login.json").read_text()))
            assert running(runs).check()["id"] == 1
            with started(runs) as (_, second):
                assert second is None
            assert process.poll() is None
        assert process.poll() is not None
        with pytest.raises(NotFinishedError):
            running(runs)
    assert logins[0] == logins[1]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "login.json").stat().st_mode) == 0o600
    seen = json.loads((home / "data" / "seen.json").read_text())
    assert seen["arguments"][:5] == [
        "start",
        "--no-browser",
        "--enable-legacy-api-token",
        "--internal-host",
        "127.0.0.1",
    ]
    assert seen["environment"]["LABEL_STUDIO_COLLECT_ANALYTICS"] == "false"
    assert "HF_TOKEN" not in seen["environment"]
    out, err = capfd.readouterr()
    for secret in (logins[0]["token"], logins[0]["password"]):
        assert secret in seen["environment"].values()
        assert secret not in json.dumps(seen["arguments"]) + out + err


@contextmanager
def serving(folder: Path, runs: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """`serve` in a process of its own, the number of the server's, and what it printed until all was ready."""
    code = "import sys; from pathlib import Path; from rlhf_pipeline.feedback.label_studio import serve; "
    code += "serve(Path(sys.argv[1]), 'demo', Path(sys.argv[2]))"
    call = [sys.executable, "-c", code, str(folder), str(runs)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = ""
        while "Ctrl-C" not in printed and (line := process.stdout.readline()):
            printed += line
        server = json.loads((folder_of(runs) / "server.json").read_text())["pid"]
        try:
            yield process, server, printed
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)


def test_serve_brings_the_tasks_and_says_where_to_go(command: Path, tmp_path: Path) -> None:
    with serving(collected(tmp_path, count=2), tmp_path) as (process, server, printed):
        process.send_signal(signal.SIGTERM)  # as a `kill`, or a terminal that is closed
        _, error = process.communicate(timeout=20)
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
    assert "2 tasks added, 0 were there" in printed
    assert "/projects/1/data?labeling=1" in printed
    assert "login.json" in printed
    assert "python -m rlhf_pipeline stage=collect name=demo labels=pull" in printed
    assert error.strip().endswith("KeyboardInterrupt")  # which the command line knows


def test_a_server_that_outlived_us_is_used_and_said(
    command: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = collected(tmp_path)
    with serving(folder, tmp_path) as (process, server, _):
        process.kill()
        process.wait()
        serve(folder, "demo", tmp_path)
        assert f"running already; end it where it was started, or with: kill {server}" in capsys.readouterr().out
        assert pull(folder, tmp_path) == []
        os.kill(server, signal.SIGKILL)
        _await_end(server)
        assert (folder_of(tmp_path) / "server.json").exists()
        with pytest.raises(NotFinishedError, match="is running; start it"):
            pull(folder, tmp_path)


def test_the_token_goes_to_no_stranger_at_the_servers_port(fake: FakeStudio, tmp_path: Path) -> None:
    folder, home = collected(tmp_path), folder_of(tmp_path)
    home.mkdir()
    (home / "login.json").write_text(json.dumps({"token": TOKEN}))
    project = {"url": fake.url, "project": 1, "mark": "ours", "local": True}
    (folder / "project.json").write_text(json.dumps(project))
    for known in ({"pid": os.getpid()}, {"pid": os.getpid(), "started": 1e9}, {"pid": 2**22 + 1, "started": 1e9}):
        (home / "server.json").write_text(json.dumps({"url": fake.url, **known}))
        with pytest.raises(NotFinishedError, match="is running; start it"):
            pull(folder, tmp_path)
    assert fake.asked == []


def _await_end(number: int) -> None:
    """Wait until a process has ended, reaped or not."""
    end = time.monotonic() + 20
    while (state := Path(f"/proc/{number}/stat")).exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


def test_of_two_that_serve_at_once_one_starts_and_the_other_waits_for_it(command: Path, tmp_path: Path) -> None:
    seen: list[bool] = []
    both = threading.Barrier(2, timeout=60)

    def use() -> None:
        with started(tmp_path) as (studio, process):
            seen.append(process is not None)
            studio.check()
            both.wait()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [False, True]


def test_serve_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFinishedError, match=r"has no tasks\.json"):
        serve(tmp_path, "demo", tmp_path)
    folder = collected(tmp_path)
    with pytest.raises(UserError, match=r"there is no \.venv-label-studio/bin/label-studio; install Label Studio"):
        serve(folder, "demo", tmp_path)
    broken = tmp_path / "label-studio"
    broken.write_text("#!/bin/sh\necho it is broken\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("LABEL_STUDIO", str(broken))
    with pytest.raises(UserError, match="ended as it started: it is broken"):
        serve(folder, "demo", tmp_path)
    (folder_of(tmp_path) / "data").mkdir()
    (folder_of(tmp_path) / "data" / "label_studio.sqlite3").touch()
    (folder_of(tmp_path) / "login.json").unlink()
    with pytest.raises(UserError, match=r"login\.json is gone"):
        serve(folder, "demo", tmp_path)
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="names a server of your own; say labels=push"):
        serve(folder, "demo", tmp_path)


def test_another_port_is_taken_where_the_first_is_not_free(command: Path, tmp_path: Path) -> None:
    found = []

    def start(runs: Path) -> None:
        with started(runs):
            found.append(running(runs).url)

    with started(tmp_path / "a"):
        other = threading.Thread(target=start, args=(tmp_path / "b",))
        other.start()
        other.join()
        assert found != [running(tmp_path / "a").url]

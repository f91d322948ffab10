"""Label Studio for real: the server that we start, answers compared by hand in a browser, and what comes back.

Not part of `make test`: it takes minutes and an environment of 1 GB. `make test-label-studio` makes that and runs this.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.feedback.label_studio import connect, labeling_config, pull, push

sync_api = pytest.importorskip("playwright.sync_api", reason="there is no playwright; make test-label-studio has it")

ATTACK = '<script>alert(1)</script><img src="http://192.0.2.1/x.png" onerror="alert(2)"> & <b>bold</b>'
TEXTS = ("First line.\n\n    indented()", "好的，我们明天见。\n第二行。", ATTACK, "http://192.0.2.1/x.png")
PROMPTS = ("Say something,\nin two lines", "你好，今天天气怎么样？", ATTACK, "to be put back", "to be left")
RUNS = {"ranks": 4, "pairs": 2}
sync_api.expect.set_options(timeout=60_000)  # a page takes seconds on a machine that is busy
SUBMIT, SKIP = 'button[aria-label="Submit current annotation"]', 'button[aria-label="skip-task"]'
# Without its own errands in the background, which are no requests of a page.
CHROMIUM = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync", *(["--no-sandbox"] if os.getuid() == 0 else [])]
COLLECT = [sys.executable, "-m", "rlhf_pipeline", "stage=collect"]


@dataclass
class Served:
    """A server that runs, its folder of runs, and what it has printed."""

    process: subprocess.Popen[bytes]
    runs: Path
    output: Path

    @property
    def home(self) -> Path:
        return self.runs / ".label_studio"

    @property
    def login(self) -> dict[str, str]:
        return dict(json.loads((self.home / "login.json").read_text()))


def shown(task: int, answers: int) -> list[str]:
    """The answers of a task in the order shown."""
    return [TEXTS[(task + number) % len(TEXTS)] for number in range(answers)]


def make_runs(runs: Path) -> None:
    """Runs as stage=collect leaves them, as far as Label Studio is concerned."""
    for name, answers in RUNS.items():
        tasks, rows = [], []
        for number, prompt in enumerate(PROMPTS):
            texts = {f"answer{n}": text for n, text in enumerate(shown(number, answers), 1)}
            items = [{"id": key, "title": key[6:], "body": text} for key, text in texts.items()]
            tasks.append({"data": {"task": f"{name}{number}", "prompt": prompt, "items": items, **texts}})
            said = [{"id": key, "text": text} for key, text in texts.items()]
            rows.append({"task": f"{name}{number}", "prompt": prompt, "shown_prompt": prompt, "answers": said})
        folder = runs / name / "collect"
        folder.mkdir(parents=True)
        (folder / "tasks.json").write_text(json.dumps(tasks))
        (folder / "labeling_config.xml").write_text(labeling_config(answers))
        (folder / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "run.json").write_text(json.dumps({"stage": "collect", "name": name, "status": "waiting"}))


def start(folder: Path, name: str, output: Path) -> subprocess.Popen[bytes]:
    """The server, as people start it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LABEL_STUDIO_")}
    with output.open("wb") as file:
        command = [*COLLECT, f"name={name}", "labels=serve"]
        return subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment)


def await_text(process: subprocess.Popen[bytes], output: Path, text: str, seconds: float) -> None:
    """Wait until the process has printed this."""
    end = time.monotonic() + seconds
    while text not in output.read_text():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server with the tasks of two runs, both brought there by `serve`."""
    if not shutil.which(os.environ.get("LABEL_STUDIO", "")):
        pytest.skip("LABEL_STUDIO names no label-studio command; make test-label-studio sets it")
    folder = tmp_path_factory.mktemp("served")
    make_runs(folder / "runs")
    process = start(folder, "ranks", folder / "first.txt")
    try:
        await_text(process, folder / "first.txt", "Ctrl-C stops the server", 300)
        second = start(folder, "pairs", folder / "second.txt")
        assert second.wait(120) == 0, (folder / "second.txt").read_text()
        assert "already running" in (folder / "second.txt").read_text()
        yield Served(process, folder / "runs", folder / "first.txt")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


class Annotator:
    """Somebody at the browser. Notes each request that would leave this machine, and each script that ran."""

    def __init__(self, page: Any, served: Served) -> None:
        self.page, self.served = page, served
        self.outside: list[str] = []
        self.dialogs: list[str] = []
        page.on("request", self._note)
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def _note(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            self.outside.append(request.url)

    def open(self, name: str) -> None:
        """Open a run's project where `serve` says, logging in with what it says if asked to."""
        known = json.loads((self.served.runs / name / "collect" / "project.json").read_text())
        self.page.goto(f"{known['url']}/projects/{known['project']}/data?labeling=1")
        if "/user/login" in self.page.url:
            self.page.fill("input[name=email]", self.served.login["user"])
            self.page.fill("input[name=password]", self.served.login["password"])
            self.page.click("button[type=submit]")
        self.await_task(0)

    def await_task(self, number: int) -> None:
        """Wait until a task's page is there: its prompt, with line breaks, as text."""
        sync_api.expect(self.page.locator(".rlhf-prompt")).to_have_text(PROMPTS[number], use_inner_text=True)
        time.sleep(0.5)  # the page draws itself more than once

    def order(self) -> list[int]:
        """The answers from top to bottom."""
        found = self.page.eval_on_selector_all("[data-ranker-id]", "all => all.map(one => one.dataset.rankerId)")
        return [int(key.removeprefix("answer")) for key in found]

    def drag(self, answer: int, onto: int) -> None:
        """Take an answer with the mouse and drop it where another one is."""
        taken = self.page.locator(f"[data-ranker-id=answer{answer}]").bounding_box()
        there = self.page.locator(f"[data-ranker-id=answer{onto}]").bounding_box()
        down = there["y"] > taken["y"]
        x, y = taken["x"] + 60, there["y"] + (there["height"] - 8 if down else 4)
        mouse = self.page.mouse
        mouse.move(x, taken["y"] + 15)
        mouse.down()
        mouse.move(x, taken["y"] + 25, steps=3)
        mouse.move(x, y, steps=20)
        time.sleep(0.4)
        mouse.up()
        time.sleep(0.8)  # it glides into its place

    def keys(self, answer: int, *keys: str) -> None:
        """Move an answer by keyboard."""
        self.page.locator(f"[data-ranker-id=answer{answer}]").focus()
        for key in keys:
            self.page.keyboard.press(key)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def annotator(served: Served) -> Iterator[Annotator]:
    """A browser with an empty profile."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        yield Annotator(page, served)
        browser.close()


def take_shot(annotator: Annotator, name: str) -> None:
    """A picture of the page, wide and narrow, for those who want to look: SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        for width in (1280, 600):
            annotator.page.set_viewport_size({"width": width, "height": 1000})
            time.sleep(0.5)
            annotator.page.screenshot(path=f"{folder}/{name}_{width}.png")
        annotator.page.set_viewport_size({"width": 1280, "height": 1000})
        time.sleep(0.5)


def judged(served: Served, name: str, tmp_path: Path) -> dict[str, tuple[list[str], list[float]]]:
    """By task, what the readers make of what `pull` brings."""
    tasks = pull(served.runs / name / "collect", served.runs)
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    read = read_judgements(tmp_path / "export.json")
    return {str(one.task): (list(one.answers), list(one.ranks)) for one in read.judgements}


def ranking(task: int, order: list[int]) -> dict[str, int]:
    """Answers and their places, 1 for the best, for answers in this order from the top."""
    texts = shown(task, 4)
    return {texts[answer - 1]: place for place, answer in enumerate(order, 1)}


def test_an_order_made_by_hand_comes_back_as_it_is(served: Served, annotator: Annotator, tmp_path: Path) -> None:
    annotator.open("ranks")
    take_shot(annotator, "ranker")
    submit = annotator.page.locator(SUBMIT)
    sync_api.expect(submit).to_be_disabled()  # nobody has looked at the order yet
    annotator.drag(4, onto=1)
    annotator.drag(1, onto=3)
    assert annotator.order() == [4, 2, 3, 1]
    submit.click()

    annotator.await_task(1)
    annotator.keys(2, "Space", "ArrowUp", "Space")
    assert annotator.order() == [2, 1, 3, 4]
    annotator.page.keyboard.press("Control+Enter")

    annotator.await_task(2)
    assert [t.split("\n")[0] for t in annotator.page.locator(".htx-ranker-item p:first-of-type").all_inner_texts()] == [
        text.split("\n")[0] for text in shown(2, 4)
    ]
    annotator.page.click(SKIP)

    annotator.await_task(3)
    time.sleep(4)  # the reader takes an order as it was shown for somebody's choice after 5 seconds
    annotator.drag(1, onto=2)
    annotator.drag(1, onto=2)
    assert annotator.order() == [1, 2, 3, 4]
    submit.click()
    annotator.await_task(4)

    found = judged(served, "ranks", tmp_path)
    assert {task: dict(zip(answers, ranks, strict=True)) for task, (answers, ranks) in found.items()} == {
        "ranks0": ranking(0, [4, 2, 3, 1]),
        "ranks1": ranking(1, [2, 1, 3, 4]),
        "ranks3": ranking(3, [1, 2, 3, 4]),
    }
    tasks = {task["data"]["task"]: task for task in pull(served.runs / "ranks" / "collect", served.runs)}
    assert set(tasks) == {"ranks0", "ranks1", "ranks2", "ranks3"}
    assert [note["was_cancelled"] for note in tasks["ranks2"]["annotations"]] == [True]


def test_what_was_clicked_is_what_the_reward_model_will_learn_from(served: Served) -> None:
    pulled = subprocess.run(
        [*COLLECT, "name=ranks", "labels=pull"], cwd=served.runs.parent, capture_output=True, text=True, check=False
    )
    assert pulled.returncode == 0, pulled.stderr
    assert "4 of 5 labelled (1 skipped)" in pulled.stdout
    rows = [json.loads(line) for line in (served.runs / "ranks/collect/labels.jsonl").read_text().splitlines()]
    found = {row["task"]: dict(zip(row["responses"], row["ranks"], strict=True)) for row in rows}
    assert found == {
        "ranks0": ranking(0, [4, 2, 3, 1]),
        "ranks1": ranking(1, [2, 1, 3, 4]),
        "ranks3": ranking(3, [1, 2, 3, 4]),
    }


def test_the_better_of_two_is_clicked(served: Served, annotator: Annotator, tmp_path: Path) -> None:
    annotator.open("pairs")
    for number, side in enumerate((1, 0)):
        annotator.await_task(number)
        sync_api.expect(annotator.page.locator(SUBMIT)).to_be_disabled()
        annotator.page.locator(".rlhf-answer").nth(side).click()
        if number == 0:
            take_shot(annotator, "pairwise")
        annotator.page.click(SUBMIT)
    annotator.await_task(2)
    annotator.page.keyboard.press("Control+Space")
    annotator.await_task(3)

    found = judged(served, "pairs", tmp_path)
    assert set(found) == {"pairs0", "pairs1"}
    for number, side in enumerate((1, 0)):
        answers, ranks = found[f"pairs{number}"]
        assert min(zip(ranks, answers, strict=True))[1] == shown(number, 2)[side]


def test_nothing_left_this_machine_and_no_answer_ran(annotator: Annotator) -> None:
    assert annotator.outside == []
    assert annotator.dialogs == []


def test_nothing_is_imported_twice(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    push(connect(served.runs), served.runs / "ranks" / "collect", "ranks")
    assert "0 tasks added, 5 were there" in capsys.readouterr().out


def test_only_this_machine_is_listened_to(served: Served) -> None:
    ss = shutil.which("ss")
    if ss is None:
        pytest.skip("there is no ss on this machine")
    pid = json.loads((served.home / "server.json").read_text())["pid"]
    lines = subprocess.run([ss, "-Hltnp"], capture_output=True, text=True, check=True).stdout.split("\n")
    ours = [line.split()[3] for line in lines if f"pid={pid}," in line]
    assert ours
    assert all(address.startswith("127.0.0.1:") for address in ours)


def test_token_and_password_are_in_their_file_alone(served: Served) -> None:
    secrets = [served.login["token"], served.login["password"]]
    assert stat.S_IMODE(served.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((served.home / "login.json").stat().st_mode) == 0o600
    commands = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    printed = [path.read_text() for path in (*served.runs.parent.glob("*.txt"), served.home / "server.log")]
    kept = [path.read_text() for path in served.runs.glob("*/collect/project.json")]
    for text in (commands, *printed, *kept, (served.home / "server.json").read_text()):
        assert not any(secret in text for secret in secrets)


def test_labels_and_login_survive_a_restart(served: Served, annotator: Annotator, tmp_path: Path) -> None:
    before, login = judged(served, "ranks", tmp_path), served.login
    pid = json.loads((served.home / "server.json").read_text())["pid"]
    served.process.send_signal(signal.SIGINT)
    served.process.wait(30)
    assert not Path(f"/proc/{pid}").exists()
    assert not (served.home / "server.json").exists()
    served.process = start(served.runs.parent, "ranks", served.output)
    try:
        await_text(served.process, served.output, "Ctrl-C stops the server", 300)
        assert "0 tasks added, 5 were there" in served.output.read_text()
        assert served.login == login
        assert judged(served, "ranks", tmp_path) == before
    finally:
        served.process.terminate()  # as `kill` does
        served.process.wait(30)
    assert not (served.home / "server.json").exists()

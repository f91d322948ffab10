"""Label Studio for real: the server that we start, answers compared by hand in a browser, and what comes back.

Not part of `make test`: it takes minutes and an environment of 1 GB. `make test-label-studio` makes that and runs this.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from fake_label_studio import serving

from rlhf_pipeline.feedback.label_studio import labeling_config
from rlhf_pipeline.files import read_jsonl, write_jsonl

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
    """A server that runs, its folder of runs, and what was printed of it."""

    process: "subprocess.Popen[str]"
    runs: Path
    printed: str

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
        rows = [
            {"task": f"{name}{number}", "prompt": prompt, "shown_prompt": prompt,
             "answers": [{"id": f"answer{n}", "text": text} for n, text in enumerate(shown(number, answers), 1)]}
            for number, prompt in enumerate(PROMPTS)
        ]  # fmt: skip
        folder = runs / name / "collect"
        folder.mkdir(parents=True)
        write_jsonl(folder / "candidates.jsonl", rows)
        (folder / "labeling_config.xml").write_text(labeling_config(answers))
        (folder / "run.json").write_text(json.dumps({"stage": "collect", "name": name, "status": "waiting"}))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server with the tasks of two runs, both brought there by `serve`."""
    if not shutil.which(os.environ.get("LABEL_STUDIO", "")):
        pytest.skip("LABEL_STUDIO names no label-studio command; make test-label-studio sets it")
    folder = tmp_path_factory.mktemp("served")
    make_runs(folder / "runs")
    with serving(folder, "ranks") as (process, first):
        command = [*COLLECT, "name=pairs", "labels=serve"]
        second = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
        assert second.returncode == 0, second.stderr
        assert "already running" in second.stdout
        yield Served(process, folder / "runs", first + second.stdout + second.stderr)


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


def labels(served: Served, name: str) -> dict[str, dict[str, float]]:
    """By task, the place of each answer, 1 for the best, in the labels that `labels=pull` brings."""
    command = [*COLLECT, f"name={name}", "labels=pull"]
    pulled = subprocess.run(command, cwd=served.runs.parent, capture_output=True, text=True, check=False)
    assert pulled.returncode == 0, pulled.stderr
    rows = read_jsonl(served.runs / name / "collect" / "labels.jsonl")
    return {row["task"]: dict(zip(row["responses"], row["ranks"], strict=True)) for row in rows}


def ranking(task: int, order: list[int]) -> dict[str, int]:
    """Answers and their places, 1 for the best, for answers in this order from the top."""
    texts = shown(task, 4)
    return {texts[answer - 1]: place for place, answer in enumerate(order, 1)}


def test_an_order_made_by_hand_is_what_the_reward_model_will_learn_from(served: Served, annotator: Annotator) -> None:
    annotator.open("ranks")
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

    assert labels(served, "ranks") == {
        "ranks0": ranking(0, [4, 2, 3, 1]),
        "ranks1": ranking(1, [2, 1, 3, 4]),
        "ranks3": ranking(3, [1, 2, 3, 4]),
    }
    assert [row["task"] for row in read_jsonl(served.runs / "ranks" / "collect" / "skipped.jsonl")] == ["ranks2"]


def test_the_better_of_two_is_clicked(served: Served, annotator: Annotator) -> None:
    annotator.open("pairs")
    for number, side in enumerate((1, 0)):
        annotator.await_task(number)
        sync_api.expect(annotator.page.locator(SUBMIT)).to_be_disabled()
        annotator.page.locator(".rlhf-answer").nth(side).click()
        annotator.page.click(SUBMIT)
    annotator.await_task(2)
    annotator.page.keyboard.press("Control+Space")
    annotator.await_task(3)

    better = {task: min(places, key=places.__getitem__) for task, places in labels(served, "pairs").items()}
    assert better == {"pairs0": shown(0, 2)[1], "pairs1": shown(1, 2)[0]}


def test_nothing_left_this_machine_and_no_answer_ran(annotator: Annotator) -> None:
    assert annotator.outside == []
    assert annotator.dialogs == []


def test_only_this_machine_is_listened_to(served: Served) -> None:
    server = psutil.Process(json.loads((served.home / "server.json").read_text())["pid"])
    sockets = [each for one in (server, *server.children(recursive=True)) for each in one.net_connections()]
    assert {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_token_and_password_are_in_their_file_alone(served: Served) -> None:
    commands = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    kept = [path.read_text() for path in (*served.runs.glob("*/collect/project.json"), *served.home.glob("server.*"))]
    for text in (commands, served.printed, *kept):
        assert not any(served.login[secret] in text for secret in ("token", "password"))


def test_labels_and_login_survive_a_restart(served: Served, annotator: Annotator) -> None:
    before, login = labels(served, "ranks"), served.login
    pid = json.loads((served.home / "server.json").read_text())["pid"]
    served.process.send_signal(signal.SIGINT)
    served.process.communicate(timeout=30)
    assert not Path(f"/proc/{pid}").exists()
    assert not (served.home / "server.json").exists()
    with serving(served.runs.parent, "ranks") as (process, printed):
        assert "0 tasks added, 5 were there" in printed
        assert served.login == login
        assert labels(served, "ranks") == before
        process.terminate()  # as `kill` does
        process.communicate(timeout=30)
    assert not (served.home / "server.json").exists()

"""Trackers: what is refused, what is told of a run, and that none of them can end it."""

import html
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Refused

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report import trackers
from rlhf_pipeline.report.observers import Observers
from rlhf_pipeline.texts import printable

REFUSED = {
    "stage=sft trainer.report_to=tensorbord": ["report_to=tensorbord", "Did you mean 'tensorboard'", "none, tens"],
    "stage=pipeline trainer.report_to=all": ["report_to=all is not a supported tracker", "none, tensorboard"],
    "stage=ppo trainer.report_to=[none,mlflow]": ["report_to=mlflow is not a supported tracker", "none, tensorboard"],
    "stage=evaluate trainer.report_to=[wandbb]": ["Did you mean 'wandb'"],
    "stage=evaluate trainer.report_to=[3]": ["trainer.report_to is [3]"],
    "stage=evaluate trainer.report_to=3": ["trainer.report_to is 3"],
    "stage=chat trainer.report_to=none": ["stage=chat has no trainer"],
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_no_tracker_is_refused(asked: str, refused: Refused) -> None:
    error = refused(asked)
    assert all(part in error for part in REFUSED[asked]), error


@pytest.mark.parametrize("stage", ["sft", "evaluate", "pipeline"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_way_to_it(
    stage: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SimpleNamespace(origin=None, submodule_search_locations=[])  # what a folder wandb/ looks like
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "wandb" else real(name))
    error = refused(f"stage={stage} trainer.report_to=wandb")
    for said in ("trainer.report_to=wandb", "pip install 'rlhf_pipeline[wandb]'", "none, tensorboard, trackio"):
        assert said in error
    assert not Path("runs").exists()


def test_none_in_all_its_spellings() -> None:
    for nothing in (None, "none", [], ["none"], [None]):
        assert trackers.chosen_trackers(nothing) == []
        trackers.check_trackers(nothing)
    assert trackers.chosen_trackers(["wandb", "none", "wandb", "trackio"]) == ["wandb", "trackio"]


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
@pytest.mark.parametrize(("mode", "key"), [("online", None), ("online", "k"), ("offline", None)])
def test_a_tracker_is_asked_for_its_key_before_anything_else(
    tracker: str, mode: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(prompt: bool, verify: bool) -> bool:
        assert not prompt, "a script would hang"
        return key is not None

    settings = SimpleNamespace(mode=mode, api_key=key)
    wandb = SimpleNamespace(setup=lambda: SimpleNamespace(settings=settings), login=login)
    own = wandb if tracker == "wandb" else SimpleNamespace(Settings=lambda: settings)
    monkeypatch.setitem(sys.modules, tracker, own)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    if mode == "offline" or key:
        return trackers.check_logins(["tensorboard", tracker])
    with pytest.raises(UserError, match=rf"{tracker} login.*{tracker.upper()}_MODE=offline"):
        trackers.check_logins(["tensorboard", tracker])


def test_a_run_is_named_after_its_stage_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"name": "demo/round2", "stage": "ppo", "trainer": {}}
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    assert trackers.naming(config) == {"run_name": "demo/round2/ppo", "project": "rlhf_pipeline"}
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    assert trackers.naming(config, "wandb")["project"] == "ours"
    assert trackers.naming(config, "trackio")["project"] == "rlhf_pipeline"
    config["trainer"] = {"run_name": "x", "project": "mine"}
    assert trackers.naming(config, "wandb") == {"run_name": "x", "project": "mine"}


SAID = [
    "a | b `c` ``d``\n# head\n    code\t<script>alert(1)</script>",
    "```\nfence\n```\n| --- |",
    "**b** __init__ ![i](http://x/y.png) [l](j) &lt; \\| <!-- -->",
    "\u202etxt \x02\x03 1. - + > 日本 é \U0001f600",
]


@pytest.mark.parametrize("text", SAID)
def test_what_a_model_wrote_marks_up_nothing(text: str) -> None:
    cell = trackers.markdown_cell(text)
    assert not set(cell.replace("<br>", "")) & set("<>|`*_[]()!\n\\\u202e\x02")
    util = pytest.importorskip("tensorboard.plugin_util", reason="tensorboard is not installed")
    page = util.markdown_to_safe_html(f"| p |\n| --- |\n| {cell} |")
    inside = page.partition("<td>")[2].partition("</td>")[0]
    read = html.unescape(inside.replace("<br>", "\n")).replace("\xa0", " ")
    assert read == printable(text)
    assert page.count("<tr>") == 2
    assert not {"<script", "<img", "<a ", "<code", "<strong", "<h1"} & set(page.split())


class Fake:
    """A tracker that remembers, and breaks where it is told to."""

    def __init__(self, breaks: str = "") -> None:
        self.breaks, self.did = breaks, list[Any]()

    def __call__(self, *opened: Any) -> trackers.Run:
        self._did("open", opened[0])
        return trackers.Run(*(partial(self._did, what) for what in ("log", "table", "close")))

    def _did(self, what: str, *values: Any) -> None:
        if what == self.breaks:
            raise OSError("no\nroute")
        self.did.append((what, *values))


CONFIG = {"name": "demo", "stage": "ppo", "trainer": {"report_to": "wandb"}, "defaults": [], "hydra": {}}


def go(monkeypatch: pytest.MonkeyPatch, folder: Path, fake: Fake, steps: int, dies: bool = False) -> None:
    """Log as stages do."""
    monkeypatch.setitem(trackers.KINDS, "wandb", fake)
    with Observers(folder) as opened:
        opened.started(CONFIG, 0)
        for step in range(1, steps + 1):
            opened.logged(step, {"loss": 2.0, "eval_loss": 3.0, "note": "x"})
            opened.sampled(step, [{"prompt": "p", "response": "r", "reward": 1.0, "more": 2}])
        if dies:
            raise KeyboardInterrupt


def test_a_tracker_gets_figures_and_samples_and_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go(monkeypatch, tmp_path, fake := Fake(), 1)
    table = ("table", "samples", ["prompt", "response", "reward"], [["p", "r", 1.0]], 1)
    opened = ("open", {key: CONFIG[key] for key in ("name", "stage", "trainer")})
    assert fake.did == [opened, ("log", {"train/loss": 2.0, "eval/loss": 3.0}, 1), table, ("close", False)]
    with pytest.raises(KeyboardInterrupt):
        go(monkeypatch, tmp_path, fake, 5, dies=True)
    assert fake.did[-1] == ("close", True)


def test_a_resumed_stage_continues_its_run_of_wandb_and_a_new_one_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[dict[str, Any]] = []
    wandb = SimpleNamespace(
        init=lambda **asked: opened.append(asked), finish=lambda exit_code: None, define_metric=lambda *_, **__: None
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for variable in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(variable, raising=False)

    def opens(started: str, step: int) -> str:
        (tmp_path / "run.json").write_text(json.dumps({"started": started}))
        with Observers(tmp_path) as watching:
            watching.started(CONFIG, step)
        assert opened[-1] | {"id": ""} == {
            "project": "rlhf_pipeline", "name": "demo/ppo", "id": "", "resume": "allow", "group": "demo",
            "dir": str(tmp_path), "config": {"settings": {key: CONFIG[key] for key in ("name", "stage", "trainer")}},
        }  # fmt: skip
        return str(opened[-1]["id"])

    first = opens("2026-01-01T10:00:00+00:00", 0)
    assert opens("2026-01-01T10:00:00+00:00", 3) == first
    assert opens("2026-01-01T11:00:00+00:00", 0) != first


@pytest.mark.parametrize("where", ["open", "log", "table", "close"])
def test_a_tracker_that_fails_is_warned_of_once_and_left_out(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(monkeypatch, tmp_path, fake := Fake(where), 3)
    assert capsys.readouterr().out == "warning: wandb failed (OSError: no) and is left out; the run goes on\n"
    done = ["open", "log", "table"]
    assert [entry[0] for entry in fake.did][:3] == (done[: done.index(where)] if where in done else done)

"""Bars: what they show at a terminal and in a log file, and that they are in nobody's way."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from terminal import at_a_terminal, left_standing

from rlhf_pipeline import progress
from rlhf_pipeline.training.setup import Bar


def trained(bar: Any, first: int, last: int, meanwhile: Any = lambda: None, **logs: float) -> None:
    """What a trainer tells a bar from one step to another, with one log at the first; at the last it saves."""
    state, control = SimpleNamespace(global_step=first, max_steps=last), SimpleNamespace(should_save=True)
    bar.on_train_begin(None, state, control)
    for step in range(first + 1, last + 1):
        state.global_step = step
        bar.on_step_end(None, state, control)
        if step == first + 1 and logs:
            bar.on_log(None, state, control, logs)
    bar.on_save(None, state, control)
    meanwhile()
    bar.on_train_end(None, state, control)


def test_a_log_file_gets_lines_without_carriage_returns(capsys: pytest.CaptureFixture[str]) -> None:
    trained(Bar("ppo", "update"), 0, 500, **{"objective/kl": 1.25, "objective/scores": 0.5, "eval_reward": 0.75})
    said = capsys.readouterr().err
    assert "\r" not in said
    first, last = said.splitlines()
    assert first == "ppo:   0% 0/500 [00:00<?, ?update/s]"
    assert last.startswith("ppo: 100% 500/500 [00:0")
    assert "<00:00, " in last
    assert last.endswith("update/s, reward=0.500, kl=1.250, held-out=0.750]")


def test_a_bar_within_a_bar_moves_no_cursor_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> None:
        with progress.progress(4, "held-out", "batch", leave=False) as inner:
            inner.update(4)

    trained(Bar("sft", "step"), 0, 2, measure)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" [")[0] for line in lines] == ["sft:   0% 0/2", "held-out:   0% 0/4", "sft: 100% 2/2"]


def test_a_bar_of_what_is_measured_is_gone_after_the_last_batch() -> None:
    """Also where nobody says that it was an evaluation, as when PPO's result is measured at its end."""
    bar = Bar("ppo", "update")
    for _ in range(2):
        for _ in range(3):
            assert bar.measured is None or bar.measured.n < 3
            bar.on_prediction_step(None, None, None, eval_dataloader=range(3))  # type: ignore[arg-type]
        assert bar.measured is None


def test_a_resumed_bar_begins_at_its_step_and_counts_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("sft", "step")
    bar.on_train_begin(None, SimpleNamespace(global_step=40, max_steps=80), None)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "sft:  50% 40/80 [00:00<?, ?step/s]\n"
    shown = bar.bar.format_meter(**{**bar.bar.format_dict, "n": 50, "elapsed": 20.0, "rate": None, "postfix": ""})
    assert shown == "sft:  62% 50/80 [00:20<01:00,  2.00s/step]"  # 10 steps in 20 s, and 30 are left
    bar.bar.close()


def test_what_is_over_at_once_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*progress.parts([1, 2, 3, 4, 5], 2, "tokenize", "text")] == [[1, 2], [3, 4], [5]]
    assert not capsys.readouterr().err


def test_of_several_processes_the_first_shows_its_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    trained(Bar("ppo", "update"), 0, 4, **{"objective/kl": 1.25})
    assert not capsys.readouterr().err


CUT_OFF = """
from rlhf_pipeline.progress import progress, screen
try:
    with screen():
        outer = progress(4, "outer", "step")
        outer.update()
        inner = progress(3, "inner", "batch")
        print("said above the bars")
        inner.update()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print("interrupted")
"""


def test_what_is_printed_and_an_interrupt_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    status, shown = at_a_terminal(["-c", CUT_OFF], tmp_path)
    assert status == 0
    said = left_standing(shown)
    assert "said above the bars" in said
    assert "interrupted" in said
    assert any(line.startswith("outer:  25%|") and "1/4 [00:00<" in line for line in said)

"""Trackers by the real command: TensorBoard's files say what metrics.jsonl says, and nothing of the work changes."""

import json
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import MINIATURE, CommandLine

from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.report.trackers import markdown_cell
from rlhf_pipeline.runs.lineage import content_hash

NOT_A_TOKEN = "hf_" + "NotARealToken" * 2


def without_time(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_jsonl(path)]


def cut_off(folder: Path) -> None:
    """As a kill would leave it: the newest checkpoint half-written, rows beyond the one before it logged."""
    shutil.rmtree(folder / "model")
    newest = max(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "complete").unlink()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))


@pytest.fixture(scope="module")
def tracked(miniature: Path, tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """The miniature run, some stages of it made again by a pipeline with TensorBoard, the others done already."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = tmp_path_factory.mktemp("tracked")
    run = folder / "runs" / "demo"
    shutil.copytree(miniature, run, ignore=shutil.ignore_patterns("sft", "ppo", "evaluate"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", NOT_A_TOKEN)
        assert command_line("stage=pipeline", *MINIATURE, "trainer.report_to=tensorboard") == 0
    return run


def events(stage: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(stage / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def text(found: Any, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found.Tensors(f"{tag}/text_summary")}


def check_figures(stage: Path) -> None:
    """Every number of metrics.jsonl stands in the event files, at its step, and no more often."""
    rows, found = without_time(stage / "metrics.jsonl"), events(stage)
    for key in {key for row in rows for key in row} - {"step", "epoch"}:  # which the summary at the end repeats
        tag = key.replace("eval_", "eval/", 1) if key.startswith("eval_") else f"train/{key}"
        logged = [(event.step, event.value) for event in found.Scalars(tag)]
        assert logged == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row], tag


def test_the_work_is_the_same_with_a_tracker(tracked: Path, miniature: Path) -> None:
    for stage in ("sft", "ppo"):
        assert without_time(tracked / stage / "metrics.jsonl") == without_time(miniature / stage / "metrics.jsonl")
        assert content_hash(tracked / stage / "model") == content_hash(miniature / stage / "model")
    assert read_jsonl(tracked / "ppo" / "samples.jsonl") == read_jsonl(miniature / "ppo" / "samples.jsonl")
    for stage in ("pretrain", "reward"):
        assert not (tracked / stage / "tensorboard").exists(), "it was done already"


def test_tensorboard_has_the_figures_and_the_samples(tracked: Path) -> None:
    for stage in ("sft", "ppo"):
        check_figures(tracked / stage)
    shown = text(events(tracked / "ppo"), "samples")
    rows = read_jsonl(tracked / "ppo" / "samples.jsonl")
    assert Counter(row["step"] for row in rows) == {step: table.count("\n") - 1 for step, table in shown.items()}
    for row in rows:
        assert f"| {markdown_cell(row['prompt'])} | {markdown_cell(row['response'])} | " in shown[row["step"]]


def test_tensorboard_has_the_table_of_before_and_after(tracked: Path) -> None:
    evaluation, found = json.loads((tracked / "evaluate" / "evaluation.json").read_text()), events(tracked / "evaluate")
    table = text(found, "evaluate/Before and after")[0]
    for policy, row in evaluation["metrics"].items():
        assert found.Scalars(f"evaluate/{policy}/reward_mean")[0].value == pytest.approx(row["reward_mean"])
        assert f"| {policy} | {markdown_cell(row['reward_mean'])} | {markdown_cell(row['reward_stderr'])} |" in table
    gains = text(found, "evaluate/Paired gain")[0]
    for pair, gain in evaluation["paired_gain"].items():
        assert f"| {markdown_cell(pair)} | {markdown_cell(gain['mean'])} |" in gains


def test_the_settings_are_shown_and_no_token_is(tracked: Path) -> None:
    for stage in ("sft", "ppo", "evaluate"):
        settings = json.loads(text(events(tracked / stage), "settings")[0])
        assert settings["stage"] == stage
        assert settings["data"]["name"] == "toy_reviews"
        kept = [path.read_bytes() for path in (tracked / stage).rglob("*") if path.is_file()]
        assert NOT_A_TOKEN.encode() not in b"".join(kept)


def test_another_tracker_is_no_other_work(
    tracked: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tracked, workplace / "runs" / "demo")
    before = content_hash(workplace / "runs")
    assert command_line("stage=pipeline", *MINIATURE, "trainer.report_to=none", "trainer.run_name=other") == 0
    assert capsys.readouterr().out.count("is done already") == 5
    assert content_hash(workplace / "runs") == before


def test_a_resumed_run_shows_no_step_twice(tracked: Path, workplace: Path, command_line: CommandLine) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    run = workplace / "runs" / "demo"
    shutil.copytree(tracked, run)
    expected = without_time(run / "ppo" / "metrics.jsonl")
    cut_off(run / "ppo")
    assert command_line("stage=ppo", *MINIATURE, "trainer.report_to=tensorboard") == 0
    assert without_time(run / "ppo" / "metrics.jsonl") == expected
    check_figures(run / "ppo")
    # As TensorBoard's page takes them; the reader of `events` hides no texts that were logged twice.
    page = EventAccumulator(str(run / "ppo" / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    steps = [event.step for event in page.Tensors("samples/text_summary")]
    assert steps == [row["step"] for row in read_jsonl(run / "ppo" / "samples.jsonl")][::4]


def tables_of(tracker: str, run: Path) -> list[dict[str, Any]]:
    """The rows of all tables that a tracker has of a run."""
    if tracker == "trackio":
        with sqlite3.connect(run.parents[1] / "trackio" / "rlhf_pipeline.db") as database:
            found = [json.loads(values) for (values,) in database.execute("SELECT metrics FROM metrics")]
        tables = [value["_value"] for row in found for value in row.values() if isinstance(value, dict)]
        return [row for table in tables for row in table]
    files = {"swanlab": "media/echarts/*.json", "wandb": "*.table.json"}[tracker]
    read = [json.loads(path.read_text()) for path in run.rglob(files)]
    if tracker == "swanlab":
        return [row for table in read for row in table["rowData"]]
    return [dict(zip(table["columns"], row, strict=True)) for table in read for row in table["data"]]


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "swanlab"])
def test_the_others_for_real(
    tracker: str, miniature: Path, workplace: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO that is cut off, resumed, then evaluated; on this machine alone."""
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "offline")
    if tracker == "trackio":
        import trackio.sqlite_storage

        monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", workplace / "trackio")
    run = workplace / "runs" / "demo"
    shutil.copytree(miniature, run, ignore=shutil.ignore_patterns("ppo", "evaluate"))
    args = [*MINIATURE, f"trainer.report_to={tracker}"]
    assert command_line("stage=ppo", *args) == 0
    cut_off(run / "ppo")
    assert command_line("stage=ppo", *args) == 0
    assert command_line("stage=evaluate", *args) == 0
    assert without_time(run / "ppo" / "metrics.jsonl") == without_time(miniature / "ppo" / "metrics.jsonl")
    tables = tables_of(tracker, run)
    shown = {(row["prompt"], row["response"], row["reward"]) for row in tables if "response" in row}
    samples = read_jsonl(run / "ppo" / "samples.jsonl")
    assert shown == {(row["prompt"], row["response"], row["reward"]) for row in samples}
    compared = {row["Policy"]: row["reward_mean"] for row in tables if "reward_mean" in row}
    metrics = json.loads((run / "evaluate" / "evaluation.json").read_text())["metrics"]
    assert compared == {name: row["reward_mean"] for name, row in metrics.items()}
    if tracker == "trackio":
        with sqlite3.connect(workplace / "trackio" / "rlhf_pipeline.db") as database:
            found = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
        assert {name for name, _ in found} == {"demo/ppo", "demo/evaluate"}
        rows = [json.loads(values) for _, values in found]
        steps = {row["train/global_step"] for row in rows if "train/objective/scores" in row}
        assert steps == {1, 2, 3, 4, 5, 6}  # those after the checkpoint are there twice
    else:
        ids = {path.name.rpartition("-")[2] for path in (run / "ppo" / tracker).glob("*run-*")}
        assert len(ids) == 1  # that of both sessions

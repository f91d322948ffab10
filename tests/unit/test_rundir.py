"""Run directories: other work is not overwritten, upstreams are found, logs survive a kill."""

import dataclasses
import errno
import importlib.metadata
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, CommandLine, change

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import lock_folder, read_jsonl
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.report.observers import Observers
from rlhf_pipeline.runs.checkpoints import seal
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.lineage import content_hash
from rlhf_pipeline.runs.models import recover, run_of
from rlhf_pipeline.settings import Report, Settings


def settings(stage: str = "sft", name: str = "demo", seed: int = 0, overwrite: bool = False) -> Settings:
    return Settings(
        stage, name, "demo", seed, overwrite=overwrite, policy={"name": "gpt2_scratch"}, reward={"name": "classifier"},
        data={"name": "toy_reviews"}, trainer={"learning_rate": 1e-4},
    )  # fmt: skip


def begin(asked: Settings, parents: dict[str, str] | None = None, checkpoints: tuple[int, ...] = ()) -> RunDir:
    """A stage that has begun, with whole checkpoints."""
    out = RunDir.of(asked)
    assert not out.finished(asked)
    out.begin(asked, parents or {}, None)
    for step in checkpoints:
        (out.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        seal(out.checkpoints / f"checkpoint-{step}")
    return out


def finish(asked: Settings, parents: dict[str, str] | None = None) -> RunDir:
    """A finished stage with a model of one file."""
    out = begin(asked, parents)
    out.save_model(lambda folder: (folder / "config.json").write_text("{}") and None)
    out.finish({"loss": 1.0}, objective=-1.0)
    return out


def test_a_record_tells_what_the_work_was_made_from(workplace: Path) -> None:
    parent = finish(settings("pretrain"))
    out = begin(settings(), {"policy": str(parent.model), "reward": "some/hub-id"})
    record = out.record
    assert record["parents"]["policy"]["sha256"] == content_hash(parent.model)
    assert record["parents"]["reward"] == {"path": "some/hub-id", "sha256": None}
    assert record["versions"]["trl"] == importlib.metadata.version("trl")
    assert record["hardware"]["cores"] >= 1
    assert record["status"] == "running"
    assert str(workplace) not in (out.path / "run.json").read_text()
    if (ROOT / ".git").exists():  # a checkout
        asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        assert record["git"]["commit"] == commit


def test_a_finished_stage_is_done_and_other_work_is_refused(workplace: Path) -> None:
    out = finish(settings())
    out.failed(BrokenPipeError("whoever read the table has left"))  # what is done stays done
    assert out.finished(settings())
    chinese = dataclasses.replace(settings(), report=Report("zh"))
    assert RunDir.of(chinese).finished(chinese), "the language of the page is no work"
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here.*overwrite=true"):
        RunDir.of(settings(seed=1)).finished(settings(seed=1))
    assert out.model.exists()
    assert not RunDir.of(settings(seed=1)).finished(settings(seed=1, overwrite=True))
    assert not out.path.exists()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def overwrite(asked: Settings, mistake: BaseException, steps: int | None = None) -> None:
    """Work that ends by a mistake: before it has begun, or after it has logged `steps`."""
    out = RunDir.of(asked)
    with out.locked():
        assert not out.finished(asked)
        assert (out.path.parent / ".sft.old" / "model").exists()
        if steps is not None:
            out.begin(asked, {}, None)
            out.log(steps, {"loss": 7.0})
            out.failed(mistake)
        raise mistake


def test_what_is_overwritten_stays_until_the_new_work_has_begun(workplace: Path) -> None:
    before = files(finish(settings()).path)
    asked = settings(seed=1, overwrite=True)
    out = RunDir.of(asked)
    for steps in (None, 0):  # 0: measured before the first step
        for mistake in (UserError("line 3: no label"), KeyboardInterrupt(), RuntimeError("a bug")):
            with pytest.raises(type(mistake)):
                overwrite(asked, mistake, steps)
            assert files(out.path) == before
    with pytest.raises(UserError, match="diverged"):
        overwrite(asked, UserError("diverged"), steps=1)
    assert out.config()["seed"] == 1
    assert sorted(path.name for path in out.path.parent.iterdir()) == [".sft.lock", "sft"]


@pytest.mark.parametrize("begun", [False, True])
def test_what_a_killed_process_had_moved_aside_is_found_by_the_next_command(
    begun: bool, workplace: Path, command_line: CommandLine
) -> None:
    before = files(finish(settings(name="demo/round1")).path)
    asked = settings(seed=1, overwrite=True, name="demo/round1")
    killed = RunDir.of(asked)
    assert not killed.finished(asked)
    if begun:
        killed.begin(asked, {}, None)
    with killed.locked():
        pass
    assert files(killed.path) == before
    assert not killed.finished(asked)
    with lock_folder(killed.path.parent / ".sft.lock", killed.path):
        recover(Path("runs"))
        assert not killed.path.exists(), "it is another process's, which is at it"
    assert command_line("stage=evaluate", "name=other", "compare=[demo,demo]") == 2
    assert files(killed.path) == before


def test_a_changed_parent_is_noticed_and_another_card_is_no_change(workplace: Path) -> None:
    """When the work is done, and when it was cut off, which also does not go on from other data."""
    parent = finish(settings("pretrain"))
    parents, whole, cut = {"policy": str(parent.model)}, settings(name="whole"), settings(name="cut")
    done, begun = finish(whole, parents), begin(cut, parents, checkpoints=(1,))
    (parent.model / "README.md").write_text("words of my own")
    assert done.finished(whole)
    assert not begun.finished(cut)
    with pytest.raises(UserError, match="was started with other data or models"):
        begun.begin(cut, parents, {"sha256": "y"})
    begun.begin(cut, parents, None)
    (parent.model / "config.json").write_text('{"other": 1}')
    for out, asked in ((done, whole), (begun, cut)):
        with pytest.raises(UserError, match="its policy runs/demo/pretrain/model has changed since"):
            out.finished(asked)


def test_a_stage_that_came_to_nothing_is_in_nobodys_way(workplace: Path) -> None:
    out = begin(settings())
    out.failed(RuntimeError("no"))
    assert out.record["status"] == "failed"
    assert not RunDir.of(settings(seed=1)).finished(settings(seed=1))


def test_the_time_of_sessions_that_were_killed_is_kept(workplace: Path) -> None:
    out = begin(settings(), checkpoints=(1,))
    out.path.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "seconds": 100.0}\n')
    RunDir.of(settings()).begin(settings(), {}, None)  # killed before it logs anything
    out.path.joinpath("metrics.jsonl").write_text("")
    third = RunDir.of(settings())
    third.begin(settings(), {}, None)
    third.finish({})
    assert 100 <= third.record["seconds"] < 150


def test_only_whole_checkpoints_count(workplace: Path) -> None:
    out = begin(settings(), checkpoints=(2, 10))
    (out.checkpoints / "checkpoint-12").mkdir()
    assert out.last_checkpoint() == out.checkpoints / "checkpoint-10"


def test_logs_are_rewound_and_a_torn_line_is_dropped(workplace: Path) -> None:
    out = begin(settings())
    out.observer = Observers(out.path)
    for step in (1, 2, 3):
        out.log(step, {"loss": 1 / step})
        out.log_samples(step, [{"prompt": "电影", "response": "好", "reward": 1.0}])
        out.warn(step, f"update {step}: answers shrank")
    with (out.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    out.rewind(2)
    assert [row["step"] for row in read_jsonl(out.path / "metrics.jsonl")] == [1, 2]
    assert [row["prompt"] for row in read_jsonl(out.path / "samples.jsonl")] == ["电影", "电影"]
    assert [row["step"] for row in read_jsonl(out.path / "warnings.jsonl")] == [1, 2]
    out.finish({})
    page = (out.path / "report.html").read_text(encoding="utf-8")
    assert "update 2: answers shrank" in page
    assert "update 3: answers shrank" not in page


def test_a_job_of_a_sweep_takes_from_the_sweep_then_from_the_experiment(workplace: Path) -> None:
    job = RunDir(Path("runs"), "sweep/kl=1", "ppo", "demo")
    assert job.upstream("sft", "pretrain") is None
    demo = finish(settings("sft"))
    assert job.upstream("sft", "pretrain") == demo.model
    own = finish(settings("pretrain", "sweep"))
    assert job.upstream("sft", "pretrain") == own.model
    assert job.upstream("sft", policy={"name": "gpt2"}) is None
    assert job.upstream("sft", policy={"name": "gpt2_scratch"}) == demo.model
    with pytest.raises(UserError, match=r"has policy\.size=None, but here it is small"):
        job.upstream("sft", policy={"name": "gpt2_scratch", "size": "small"})
    assert RunDir(Path("runs"), "other", "ppo", "demo").upstream("sft") is None
    (demo.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"runs/demo/sft/config\.yaml is gone; restore it"):
        job.upstream("sft", policy={"name": "gpt2_scratch"})


def test_a_model_folder_may_be_named_by_its_stage(workplace: Path) -> None:
    out = finish(settings())
    assert model_folder("runs/demo/sft") == str(out.model)
    (out.path / "run.json").write_text('{"status": "done", "stage": "sft"}')
    assert run_of(out.model).path == out.path, "without its name, by where it lies"
    assert model_folder("lvwerra/gpt2-imdb") == "lvwerra/gpt2-imdb"
    with pytest.raises(UserError, match=r"there is no folder \./nothing"):
        model_folder("./nothing")
    with pytest.raises(UserError, match=r"config\.json is a file; give its folder, runs/demo/sft/model, or"):
        model_folder("runs/demo/sft/model/config.json")


def test_content_hash_sees_names_and_bytes_but_no_card(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    found = []
    for name, text in (("a", "1"), ("b", "1"), ("b", "2"), ("readme.md", "a file"), ("deeper/README.md", "a card")):
        (tmp_path / "a").unlink(missing_ok=True)
        (tmp_path / name).write_text(text)
        found.append(content_hash(tmp_path))
    assert len(set(found)) == 5
    (tmp_path / "README.md").write_text("a card")
    assert content_hash(tmp_path) == found[-1]


def test_a_stage_is_stale_once_something_newer_could_be_taken(workplace: Path) -> None:
    """Whatever a clock says that was set back."""
    pretrained = finish(settings("pretrain"))
    change(pretrained.path / "run.json", finished="2999-01-01T00:00:00+00:00")
    done = {asked.stage: (asked, finish(asked)) for asked in (settings("sft"), settings("evaluate"))}
    assert all(out.finished(asked) for asked, out in done.values())
    finish(settings("ppo"))
    change(pretrained.path / "run.json", finished="2000-01-01T00:00:00+00:00")
    for stage, newer in (("sft", "pretrain"), ("evaluate", "ppo")):
        asked, out = done[stage]
        with pytest.raises(UserError, match=f"runs/demo/{newer} has been made since"):
            out.finished(asked)


def test_a_recorded_configuration_runs_again_whatever_signs_its_paths_hold(
    workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    name = '情感 (1) a=b,{x} [y] it\'s #$% \\ "q" ${seed}'
    asked = dataclasses.replace(settings("sft", name, seed=3), data={"name": "text", "path": f"{name}/${{stage}}.txt"})
    out = finish(asked)
    assert out.config()["data"]["path"] == asked.data["path"]
    assert command_line("--config-path", str(out.path), "--config-name", "config") == 0
    assert f"runs/{name}/sft is done already" in capsys.readouterr().out
    assert shlex.split(out.record["command"])[4] == str(out.path)


def test_the_page_shows_a_stage_while_it_goes_and_after_it_failed(workplace: Path) -> None:
    out, asked = RunDir.of(settings()), dataclasses.replace(settings(), report=Report("zh"))
    out.observer = Observers(out.path)
    out.begin(asked, {}, None)
    out.log(1, {"loss": 3.5})
    page = out.path / "report.html"
    assert "运行中" in page.read_text(encoding="utf-8")
    out.log(2, {"loss": 2.625})
    assert "2.625" not in page.read_text(encoding="utf-8"), "it is drawn too often"
    out.failed(RuntimeError("the disk is full"))
    shown = page.read_text(encoding="utf-8")
    for said in ("失败", "the disk is full", "2.625"):
        assert said in shown


def test_a_page_that_cannot_be_written_leaves_the_stage_done(workplace: Path) -> None:
    out = begin(settings())
    out.observer = Observers(out.path)
    (out.path / "report.html").mkdir()
    out.log(1, {"loss": 1.0})
    out.finish({"loss": 1.0})
    assert out.record["status"] == "done"


def test_finished_work_can_be_looked_at_where_nothing_can_be_written(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(lock: Path, work: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(lock))

    out = finish(settings())
    monkeypatch.setattr("rlhf_pipeline.files.lock_folder", refused)
    with out.locked():
        assert out.finished(settings())
    with pytest.raises(PermissionError), RunDir.of(settings(name="new")).locked():
        pass


@pytest.mark.parametrize(
    "damage", ["[]", "{", '{"status": 3}', '{"status": "done", "parents": []}', "\ud83d", "9" * 5000]
)
def test_a_damaged_record_is_named(workplace: Path, damage: str) -> None:
    out = finish(settings())
    (out.path / "run.json").write_text(damage, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError, match=r"runs/demo/sft/run\.json is damaged"):
        out.finished(settings())

"""The search by Optuna: what it asks for, and how it goes on from where it was cut off."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import lock_folder

optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")
from hydra_plugins.rlhf_pipeline_sweepers import Optuna  # noqa: E402

SPACE = ["trainer.kl_coef=tag(log,interval(0.01,0.5))", "trainer.num_mini_batches=int(interval(1,4))", "data=a,b"]
Jobs = list[dict[str, str]]


def search(
    folder: Path, said: Sequence[str], judge: Callable[[dict[str, str]], float | None], trials: int, beside: int = 1
) -> list[Jobs]:
    """What a session launches, launch by launch; an error that `judge` raises ends it."""
    launches: list[Jobs] = []

    class Session(Optuna):
        def launch(self, fixed: list[str], varied: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
            launches.append([dict(setting.split("=", 1) for setting in own) for own in varied])
            return [{"objective": judge(job), "over_budget": 0.0} for job in launches[-1]]

    session = Session(trials, beside)
    session.folder, session.cfg = folder, OmegaConf.create({"seed": 0})
    parsed = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(list(said))}
    try:
        session.search(["stage=ppo"], {key: o for key, o in parsed.items() if o.is_sweep_override()})
    except KeyboardInterrupt:
        launches[-1].append({"cut": "off"})
    return launches


def worth(job: dict[str, str]) -> float:
    """The less KL the better."""
    return -float(job["trainer.kl_coef"])


def test_trials_are_drawn_from_what_is_said(tmp_path: Path) -> None:
    jobs = [job for (job,) in search(tmp_path, SPACE, worth, 12)]
    assert len(jobs) == 12
    assert all(0.01 <= float(job["trainer.kl_coef"]) <= 0.5 and len(job["trainer.kl_coef"]) < 10 for job in jobs)
    assert {job["trainer.num_mini_batches"] for job in jobs} <= {"1", "2", "3", "4"}
    assert {job["data"] for job in jobs} == {"a", "b"}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/optuna.db")
    assert study.best_value == pytest.approx(max(map(worth, jobs)))  # it maximises
    assert len({job["trainer.kl_coef"] for job in jobs}) == 12


def test_a_trial_is_run_with_every_seed_and_worth_their_mean(tmp_path: Path) -> None:
    launches = search(tmp_path, [*SPACE[:1], "seed=1,2"], lambda job: float(job["seed"]), 2, 2)
    assert [[job["seed"] for job in jobs] for jobs in launches] == [["1", "2", "1", "2"]]
    (jobs,) = launches
    assert jobs[0]["trainer.kl_coef"] == jobs[1]["trainer.kl_coef"] != jobs[2]["trainer.kl_coef"]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/optuna.db")
    assert [trial.value for trial in study.trials] == [1.5, 1.5]


def test_a_search_that_was_cut_off_goes_on_and_ends_where_one_in_a_piece_would(tmp_path: Path) -> None:
    asked = 0

    def cut(job: dict[str, str]) -> float:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return worth(job)

    first = search(tmp_path, SPACE, cut, 5)
    assert len(first) == 3
    second = search(tmp_path, SPACE, worth, 5)
    assert len(second) == 3
    assert second[0][0] == first[2][0]  # the job that was cut off goes on
    assert search(tmp_path, SPACE, worth, 5) == [[jobs[0] for jobs in (*first[:2], *second)]]  # for the table
    (more,) = search(tmp_path, SPACE, worth, 6)
    assert more[0] not in [jobs[0] for jobs in (*first, *second)]


def test_what_failed_is_tried_again_and_another_search_in_the_same_place_is_another(tmp_path: Path) -> None:
    folder = tmp_path / "what? 100%"  # a database's address would take it otherwise
    first = search(folder, SPACE, lambda job: None, 2)
    assert len(first) == 2
    assert search(folder, SPACE, worth, 2) == first
    assert len(search(folder, SPACE[:1], worth, 2)) == 2
    assert (folder / "optuna.db").is_file()


@pytest.mark.parametrize(
    ("said", "trials", "error"),
    [(["seed=1,2"], 2, "has nothing to search"), (SPACE, 0, "n_trials is 0; it takes a whole number from 1"),
     (SPACE, "many", "n_trials is 'many'"),
     (["++trainer.kl_coef=interval(0.5,0.1)"], 2, r"trainer\.kl_coef=interval\(.* is not a valid interval"),
     (["++trainer.kl_coef=tag(log,interval(0,0.1))"], 2, r"trainer\.kl_coef=interval\(.* is not a valid interval")],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(said: list[str], trials: int, error: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=error):
        search(tmp_path, said, worth, trials)


def test_two_processes_do_not_search_in_one_place(tmp_path: Path) -> None:
    with lock_folder(tmp_path / ".optuna.lock", tmp_path), pytest.raises(UserError, match="in use by another process"):
        search(tmp_path, SPACE, worth, 1)

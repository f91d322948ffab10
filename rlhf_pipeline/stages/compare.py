"""Compare algorithms: each with several seeds, from one SFT policy, with one reward, on the same held-out prompts.

python -m rlhf_pipeline stage=pipeline experiment=compare
"""

import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rlhf_pipeline.composition import settings_of
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation.algorithms import means_over_seeds
from rlhf_pipeline.evaluation.frontier import Point, policies_by_step, start_key
from rlhf_pipeline.files import read_json, read_jsonl, read_log, write_json
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.report.tables import comparison_table
from rlhf_pipeline.runs.directory import CANDIDATES, COMPARISON, RunDir
from rlhf_pipeline.runs.lineage import parent
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.evaluate import asked_sampling, load_rewards, measure_points
from rlhf_pipeline.sweeps.jobs import job_name, read_job, run_job
from rlhf_pipeline.training.setup import print_input, quiet
from rlhf_pipeline.words import read_command_line, setting_word


class Trial(NamedTuple):
    """One algorithm with one seed: a run of its own, made by one or more commands."""

    algorithm: str
    name: str  # of the run
    commands: list[list[str]]
    stages: list[Settings]

    @property
    def folders(self) -> list[RunDir]:
        """The run directory of each command's stage."""
        return [RunDir.of(stage) for stage in self.stages]

    @property
    def run(self) -> str:
        """The name of its folder inside the comparison's."""
        return self.name.rpartition("/")[2]

    @property
    def done(self) -> bool:
        """Whether all its stages are done."""
        return all(out.record.get("status") == "done" for out in self.folders)

    @property
    def cost(self) -> dict[str, float]:
        """The tokens that it sampled to learn from, and its time in seconds."""
        seconds = sum(out.record["seconds"] for out in self.folders)
        return {"sampled_tokens": sum(map(sampled_tokens, self.folders)), "seconds": seconds}


def run(settings: Settings, out: RunDir) -> None:
    """Run the trials that are not done, measure every policy, then compute each algorithm's means and gain over SFT."""
    quiet()
    upstream = out.upstream("sft", "pretrain", policy=settings.policy)
    if not (found := settings.policy.get("path") or upstream):
        raise NotFinishedError("there is no policy to start from yet; run stage=sft first, or give policy.path=.")
    start = model_folder(str(found))
    trials = plan_trials(settings, start)
    print_input("policy", start)
    rewards, judged_by = load_rewards(settings, out)
    run_trials(trials, settings)
    sampling = next((stage.trainer for trial in trials for stage in trial.stages if stage.stage == "ppo"), {})
    key = start_key(parent(start), settings.seed, sampling, asked_sampling(settings))
    done = [trial for trial in trials if trial.done]
    points = [
        Point(trial.run, step, job.record["started"], key, place, job)
        for trial, job in ((trial, trial.folders[-1]) for trial in done)
        for step, place in policies_by_step(job).items()
    ]
    failed = [trial.name for trial in trials if not trial.done]
    errors = "; ".join(f"{name}: {read_job(out.runs / name).get('error')}" for name in failed)
    if not points:
        raise UserError(f"no run of the comparison has finished: {errors}")
    parents = {"policy": start, **judged_by}
    whole, news = measure_points(settings, out, points, rewards, parents, out.path.parent)
    names = dict.fromkeys(trial.algorithm for trial in done)
    costs = {name: {trial.run: trial.cost for trial in done if trial.algorithm == name} for name in names}
    means = means_over_seeds(whole["starts"][0], whole["points"], costs, settings.evaluate.bootstrap, settings.seed)
    comparison = {"reward": whole["reward"], "failed": failed, **means}
    if news or comparison != read_json(out.path / COMPARISON):
        if not news:
            out.reopen(settings)
        write_json(out.path / COMPARISON, comparison)
        own, coef = means["algorithms"], sampling.get("selection_kl_coef", PPOConfig.selection_kl_coef)
        best = max(names, key=lambda name: own[name]["reward_mean"] - coef * own[name]["kl"])
        figures = {key: own[best][key] for key in ("reward_mean", "kl")}
        out.finish({"policies": len(points), "runs": len(done), "best": best, "kl_coef": coef, **figures})
    comparison_table(comparison)
    if failed:
        raise UserError(f"{len(failed)} of {len(trials)} runs failed; run the same command to retry them. {errors}")


def plan_trials(settings: Settings, start: str) -> list[Trial]:
    """Return the trials of all algorithms and seeds, from one policy. Raises UserError if one of them cannot be run."""
    asked, found = settings.comparison, list[Trial]()
    algorithms = {name: said for name, said in asked.algorithms.items() if said}
    if not algorithms or not asked.seeds:
        raise UserError(
            "comparison.algorithms or comparison.seeds is empty, so there is nothing to compare; use "
            "experiment=compare, or comparison.algorithms.<name>='stage=ppo trainer.advantage=rloo'."
        )
    for seed in dict.fromkeys(asked.seeds):
        for algorithm, said in algorithms.items():
            name = f"{settings.name}/{job_name([algorithm, f'seed={seed}'])}"
            about = [setting_word("name", name), setting_word("runs", settings.runs), f"seed={seed}"]
            about += [f"experiment={settings.experiment or 'null'}", setting_word("policy.path", start)]
            about += ["overwrite=true"] * settings.overwrite
            every = [said] if isinstance(said, str) else said
            try:
                commands = [_overrides(command, about, asked.typed) for command in every]
                stages = [settings_of(read_command_line(command)[0]) for command in commands]
                for stage in stages:
                    RunDir.of(stage).finished(stage, look=True)  # refuses a folder with different work
            except UserError as error:
                raise type(error)(f"comparison.algorithms.{algorithm}: {error}") from error
            found.append(Trial(algorithm, name, commands, stages))
    return found


def _overrides(command: str, about: Sequence[str], rest: Sequence[str]) -> list[str]:
    """Join the overrides of an algorithm, of its run and of the user, except the user's for the algorithm's groups."""
    own = [*shlex.split(command), *about]
    keys = {word.lstrip("+~").partition("=")[0] for word in own}
    said = {word: word.lstrip("+~").partition("=")[0] for word in rest}
    return [*own, *(word for word, key in said.items() if not {key, key.partition(".")[0]} & keys)]


def run_trials(trials: Sequence[Trial], settings: Settings) -> None:
    """Run the commands that are not done, each in a process of its own. If one fails, the other runs continue."""
    count = settings.comparison.at_once
    if count > 1:  # otherwise the threads of several runs wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))

    def work(trial: Trial) -> None:
        for command, stage, folder in zip(trial.commands, trial.stages, trial.folders, strict=True):
            if not folder.finished(stage, look=True):
                run_job(Path(settings.runs), trial.name, stage.stage, command)
            if folder.record.get("status") != "done":
                return

    with ThreadPoolExecutor(count) as pool:
        try:
            list(pool.map(work, trials))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def sampled_tokens(out: RunDir) -> int:
    """Return how many tokens a stage has sampled to learn from."""
    rows = [row for row in read_log(out.path / "metrics.jsonl") if "val/response_length" in row]
    before = [0, *(row["episode"] for row in rows)]
    learnt = sum(row["val/response_length"] * (row["episode"] - n) for n, row in zip(before, rows, strict=False))
    return round(learnt) + sum(row.get("sampled_tokens", 0) for row in read_jsonl(out.path / CANDIDATES))

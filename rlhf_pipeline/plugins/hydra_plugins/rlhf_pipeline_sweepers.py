"""Hydra's sweepers for -m: a grid, or a search by Optuna. Hydra looks for plugins in this package.

If a job fails or is killed, the others continue. Its folder records how it ended.
"""

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import lock_folder
from rlhf_pipeline.stages import TRAINED
from rlhf_pipeline.sweeps.jobs import job_name, read_job, result_settings, update_job
from rlhf_pipeline.words import as_user_types, quoted

_OVER_BUDGET = 1e9


class Grid(Sweeper):
    """Run each combination of the values as a job; at the end write a table, a page and an exit status."""

    searches = False  # whether objectives choose the next jobs

    def __init__(self, max_batch_size: int | None, kl_budget: float | None = None) -> None:
        self.max_batch_size, self.kl_budget = max_batch_size, kl_budget
        self.jobs: dict[str, str] = {}  # of this command: name to stage

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Create the launcher."""
        self.cfg, self.loader = config, hydra_context.config_loader
        self.name = str(config.name or config.experiment or "default")
        self.folder = Path(str(config.runs)) / self.name
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = str(self.folder)  # where submitit keeps its files
        self.jobs_launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs and show their results. If a job failed, exit with its status."""
        from rlhf_pipeline.sweeps.results import report_sweep  # only a sweep needs it

        said = {o.get_key_element(): o for o in OverridesParser.create(self.loader).parse_overrides(arguments)}
        swept = {key: o for key, o in said.items() if o.is_sweep_override()}
        for key in swept.keys() & {"stage", "name", "runs"}:
            raise UserError(f"{key}= applies to the whole sweep; give it one value.")
        self.search([o.input_line or "" for key, o in said.items() if key not in {"name", *swept}], swept)
        report_sweep(self.folder, next(iter(self.jobs.values())), self.jobs, self.kl_budget)
        ended = [read_job(self.folder / name) for name in self.jobs]
        if not all(job.get("status") == "done" for job in ended):
            sys.exit(max(1, *(job.get("exit", 1) for job in ended)))

    def search(self, fixed: list[str], swept: Mapping[str, Override]) -> None:
        """Launch all combinations, `max_batch_size` at once. All jobs have the settings `fixed`."""
        jobs = list(itertools.product(*(_choices(key, override) for key, override in swept.items())))
        size = len(jobs) if self.max_batch_size is None else _count("max_batch_size", self.max_batch_size)
        for first in range(0, len(jobs), size):
            self.launch(fixed, jobs[first : first + size])

    def launch(self, fixed: list[str], varied: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
        """Run the jobs that are not done; return each job's entry of sweep.json. `varied` is per job."""
        from rlhf_pipeline.sweeps.results import job_result

        jobs = [self.job(fixed, own) for own in varied]  # checks all before the first one starts
        left = {folder: command for folder, command, about in jobs if about["status"] != "done"}
        first = len(self.jobs)
        for folder, _, about in jobs:
            update_job(folder, **about)
            self.jobs[folder.name] = about["stage"]
        if left:
            with _waiting_for_all(self.cfg.hydra.launcher._target_, len(left), self.folder):
                self.jobs_launcher.launch(list(left.values()), initial_job_idx=first)
        for folder in left:
            if read_job(folder).get("status") == "waiting":
                lost = "never started, or was killed from outside (time limit, memory, cancelled)"
                update_job(
                    folder, status="failed", exit=1, error=f"{lost}; its output is in {self.folder / '.submitit'}"
                )
        return [job_result(folder, self.kl_budget) for folder, _, _ in jobs]

    def job(self, fixed: list[str], own: Sequence[str]) -> tuple[Path, list[str], dict[str, Any]]:
        """Return a job's folder, its command and its first job.json. Raises UserError if the job cannot run."""
        from rlhf_pipeline.cli import check_job

        name = job_name([as_user_types(setting) for setting in own])
        command = [*fixed, *own, f"name={quoted(f'{self.name}/{name}')}"]
        stage, seed, done = check_job(command)
        if self.kl_budget is not None and stage != "ppo":
            raise UserError(f"sweep.kl_budget= needs jobs of stage=ppo; these have the objective of stage={stage}.")
        if self.searches and stage not in TRAINED:  # evaluate's prompts never choose a run
            raise UserError(f"stage={stage} has no objective to search by; Optuna takes one of: {', '.join(TRAINED)}.")
        about = {"stage": stage, "settings": result_settings(command), "seed": seed}
        return self.folder / name, command, {**about, "status": "done" if done else "waiting", "exit": 0, "error": None}


class Optuna(Grid):
    """A search for the highest objective by Optuna's TPE, kept in optuna.db. The same command continues it.

    Each trial runs with every seed that is given. Its value is the mean over them.
    """

    searches = True

    def __init__(self, n_trials: int, n_jobs: int, kl_budget: float | None = None) -> None:
        super().__init__(None, kl_budget)
        self.n_trials, self.n_jobs = n_trials, n_jobs

    def search(self, fixed: list[str], swept: Mapping[str, Override]) -> None:
        """Run the trials that earlier sessions left unfinished, then those that Optuna asks for."""
        if importlib.util.find_spec("optuna") is None:
            raise UserError("a search needs Optuna: pip install 'rlhf_pipeline[optuna]'.")
        seeds = _choices("seed", swept["seed"]) if "seed" in swept else []
        space = {key: _distribution(key, override) for key, override in swept.items() if key != "seed"}
        if not space:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search; give a setting an interval, as in "
                "'trainer.kl_coef=interval(0.01,0.5)', or several values."
            )
        at_once, left = _count("n_jobs", self.n_jobs), _count("n_trials", self.n_trials)
        judged = "by score" if self.kl_budget is None else f"kl_budget={self.kl_budget:g}"
        said = [*fixed, *(swept[key].input_line or "" for key in space), judged]
        with lock_folder(self.folder / ".optuna.lock", self.folder):  # two sessions would run each other's trials
            study, done = self.study(" ".join(sorted(said)))
            left -= len(done)
            if left <= 0:  # the table is shown anyway
                self.launch(fixed, [own for params in done for own in _with_seeds(params, seeds)])
            while left > 0:
                trials = [study.ask(space) for _ in range(min(at_once, left))]
                left -= len(trials)
                jobs = [_with_seeds(trial.params, seeds) for trial in trials]
                results = iter(self.launch(fixed, itertools.chain(*jobs)))
                for trial, own in zip(trials, jobs, strict=True):
                    ended = list(itertools.islice(results, len(own)))
                    if all(job["objective"] is not None for job in ended):  # else it stays unfinished
                        # Jobs over the KL budget rank after all others, the nearest to the budget first.
                        study.tell(trial, fmean(-_OVER_BUDGET - job["over_budget"] if job["over_budget"]
                                                else job["objective"] for job in ended))  # fmt: skip

    def study(self, name: str) -> tuple[Any, list[dict[str, Any]]]:
        """Return this search and the settings that have results. Unfinished trials of earlier sessions come first."""
        import optuna
        from sqlalchemy import URL

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # If the URL were written by hand, a '?' in the path would begin its options.
        storage = URL.create("sqlite", database=str(self.folder.absolute() / "optuna.db")).render_as_string()
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        # The seed grows with the search, or each session would draw the same trials.
        seed = self.cfg.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.n_jobs > 1)
        done = [trial.params for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
        for params in {str(trial.params): trial.params for trial in study.trials}.values():
            if params and params not in done:
                study.enqueue_trial(params)
        return study, done


def _with_seeds(params: Mapping[str, Any], seeds: Sequence[str]) -> list[list[str]]:
    """Return the settings of a trial's jobs. Numbers have four digits, so that they are easy to read."""
    own = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]
    return [[*own, seed] for seed in seeds] if seeds else [own]


def _count(key: str, value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"hydra.sweeper.{key} is {value!r}; it takes a whole number from 1.")
    return value


def _choices(key: str, override: Override) -> list[str]:
    """Return the settings that a sweep of one key runs."""
    if isinstance(override.value(), IntervalSweep):
        raise UserError(
            f"{key.lstrip('+')}=interval(...) has infinitely many values; add hydra/sweeper=optuna, or list some."
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _distribution(key: str, override: Override) -> Any:
    """Return the distribution from which Optuna draws the value of a setting."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution([choice.partition("=")[2] for choice in _choices(key, override)])
    low, high = value.start, value.end
    kind: Any = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    try:
        return kind(low, high, log="log" in value.tags)
    except ValueError as error:
        raise UserError(f"{as_user_types(key)}=interval({low},{high}) is not a valid interval: {error}") from None


@contextlib.contextmanager
def _waiting_for_all(launcher: str, jobs: int, folder: Path) -> Iterator[None]:
    """Wait for every job of submitit. Its own launcher would give up all jobs if one was killed."""
    if "submitit" not in launcher:
        yield
        return
    from submitit.core.core import Job as Submitted

    results = Submitted.results

    def patient(job: Any) -> list[Any]:
        with contextlib.suppress(Exception):  # the job's folder records it
            return results(job)
        return [JobReturn(status=JobStatus.COMPLETED)]

    note = " Ctrl-C leaves them running: see squeue --me, scancel." if "Slurm" in launcher else ""
    print(f"{jobs} jobs were submitted by submitit; their output is below {folder / '.submitit'}.{note}", flush=True)
    try:
        with mock.patch.object(Submitted, "results", patient):
            yield
    except (RuntimeError, ValueError) as error:  # no SLURM here, or it refuses the request
        raise UserError(f"submitit could not submit the jobs: {error}") from error

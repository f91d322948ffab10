"""What a multirun goes through: a grid, or what Optuna searches; by any launcher. Hydra looks for plugins here.

A job that fails or is killed neither stops nor hides the others: what became of each is in its folder.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import held
from rlhf_pipeline.words import as_typed, quoted

# What stands for the whole sweep.
_OF_ALL = ("stage", "name", "runs")
_OVER_BUDGET = 1e9


class Job(NamedTuple):
    """One run of a sweep."""

    folder: Path
    command: list[str]  # its settings, as Hydra takes them
    about: dict[str, Any]  # the stage whose result it is known by, what it was told, and its seed
    done: bool


class JobsSweeper(Sweeper):
    """What grid and search share: jobs are checked before any is launched, and all are accounted for at the end."""

    kl_budget: float | None = None  # sweep.kl_budget=: the best reward within it wins

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Open the launcher."""
        from rlhf_pipeline.settings import check_name

        for key in ("name", "runs"):
            if not isinstance(config[key] or "", str):
                raise UserError(f"{key} is {config[key]!r}; it takes text.")
        check_name(config.name or "default", config.runs)
        self.cfg, self.loader = config, hydra_context.config_loader
        self.folder = Path(config.runs) / (config.name or config.experiment or "default")
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = str(self.folder)  # where submitit keeps its own
        self.jobs_launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.jobs: list[Job] = []

    def sweep(self, arguments: list[str]) -> None:
        """Run all jobs, show what came of them, and leave with the exit status of one that failed."""
        from rlhf_pipeline.sweeps.jobs import read_job
        from rlhf_pipeline.sweeps.results import report_sweep

        said = {o.get_key_element(): o for o in OverridesParser.create(self.loader).parse_overrides(arguments)}
        for key in _OF_ALL:
            if key in said and said[key].is_sweep_override():
                raise UserError(f"{key}= is the whole sweep's, and takes one value.")
        fixed = [o.input_line for key, o in said.items() if not o.is_sweep_override() and key != "name"]
        self.run([line for line in fixed if line], {key: o for key, o in said.items() if o.is_sweep_override()})
        report_sweep(self.folder, self.jobs[0].about["stage"], [job.folder.name for job in self.jobs], self.kl_budget)
        ended = [read_job(job.folder) for job in self.jobs]
        if not all(job.get("status") == "done" for job in ended):
            sys.exit(max(1, *(job.get("exit", 1) for job in ended)))

    def run(self, fixed: list[str], swept: Mapping[str, Override]) -> None:
        """Launch what there is to be launched; `fixed` are the settings of all jobs."""
        raise NotImplementedError

    def launch(self, fixed: list[str], varied: Iterable[Sequence[str]], first: int = 0) -> list[float | None]:
        """Run jobs, each with settings of its own; give what each is worth, None for one that failed."""
        from rlhf_pipeline.runs.directory import RunDir
        from rlhf_pipeline.sweeps.jobs import at_work, note, note_lost, read_job
        from rlhf_pipeline.sweeps.results import judge

        # A mistake in any of them is told before any begins.
        jobs = [self._job(fixed, own) for own in varied]
        here = {job.folder: job for job in jobs if not at_work(job.folder)}  # the others are run by another sweep
        for job in here.values():
            note(job.folder, **job.about, exit=0, error=None, status="done" if job.done else "waiting")
        left = [job for job in here.values() if not job.done]
        self.jobs += [job for job in jobs if job not in self.jobs]
        if left:
            with _patience(self.cfg.hydra.launcher._target_, len(left), self.folder):
                self.jobs_launcher.launch([job.command for job in left], initial_job_idx=first)
        for job in left:
            note_lost(job.folder)
        runs = [RunDir(self.folder, job.folder.name, job.about["stage"]).newest_round() for job in jobs]
        whole = [read_job(job.folder).get("status") == "done" for job in jobs]
        worth = [
            judge(out.record, self.kl_budget) if done else (None, 0.0) for out, done in zip(runs, whole, strict=True)
        ]
        # To Optuna's TPE only the order matters: whatever is over the budget is behind the rest, the nearest first.
        return [-_OVER_BUDGET - over if over else value for value, over in worth]

    def _job(self, fixed: list[str], own: Sequence[str]) -> Job:
        from rlhf_pipeline.cli import check_job
        from rlhf_pipeline.sweeps.jobs import job_name, settings_of

        folder = self.folder / job_name([as_typed(setting) for setting in own])
        command = [*fixed, *own, f"name={quoted(str(folder.relative_to(self.cfg.runs)))}"]
        stage, seed, done = check_job(command)
        if self.kl_budget is not None and stage != "ppo":
            raise UserError(f"sweep.kl_budget= goes with stage=ppo; the jobs here are known by their stage={stage}.")
        return Job(folder, command, {"stage": stage, "settings": settings_of(command), "seed": seed}, done)


class Grid(JobsSweeper):
    """Every combination of what is given several values."""

    def __init__(self, max_batch_size: int | None, kl_budget: float | None = None) -> None:
        self.max_batch_size, self.kl_budget = max_batch_size, kl_budget

    def run(self, fixed: list[str], swept: Mapping[str, Override]) -> None:
        """Launch them all, or so many at once."""
        if self.max_batch_size is not None:
            _check_count("max_batch_size", self.max_batch_size)
        jobs = list(itertools.product(*(_choices(key, override) for key, override in swept.items())))
        size = self.max_batch_size or len(jobs)
        for first in range(0, len(jobs), size):
            self.launch(fixed, jobs[first : first + size], first)


class Optuna(JobsSweeper):
    """A search for the highest objective, kept in the sweep's folder: the same command goes on with it.

    Each trial is run with every seed that is given, and is worth their mean.
    """

    def __init__(self, n_trials: int, n_jobs: int, kl_budget: float | None = None) -> None:
        self.n_trials, self.n_jobs, self.kl_budget = n_trials, n_jobs, kl_budget

    def run(self, fixed: list[str], swept: Mapping[str, Override]) -> None:
        """Search alone: two sessions would take each other's trials for ones that were cut off."""
        space = {key: override for key, override in swept.items() if key != "seed"}
        seeds = _choices("seed", swept["seed"]) if "seed" in swept else []
        if not space:
            raise UserError(
                "hydra/sweeper=optuna has nothing to search; give a setting an interval, as in "
                "'trainer.kl_coef=interval(0.01,0.5)', or several values."
            )
        _check_count("n_trials", self.n_trials)
        _check_count("n_jobs", self.n_jobs)
        with held(self.folder / ".optuna.lock", self.folder):
            self._search(fixed, space, seeds)

    def _search(self, fixed: list[str], space: Mapping[str, Override], seeds: list[str]) -> None:
        """Go through what an earlier session has left undone, then through what Optuna asks for."""
        # Trials that were judged otherwise are another study's.
        judged = "by score" if self.kl_budget is None else f"kl_budget={self.kl_budget:g}"
        study, optuna = self._study([*fixed, *(o.input_line or "" for o in space.values()), judged])
        asked = {key: _distribution(optuna, key, override) for key, override in space.items()}
        state = optuna.trial.TrialState
        before = study.get_trials(deepcopy=False)
        cut = [trial for trial in before if trial.state == state.RUNNING]  # with their session: their jobs go on
        settled = [trial.params for trial in before if trial.state in (state.COMPLETE, state.RUNNING, state.WAITING)]
        for trial in before:
            if trial.state == state.FAIL and trial.params not in settled:
                settled.append(trial.params)
                study.enqueue_trial(trial.params)
        left = self.n_trials - sum(trial.state == state.COMPLETE for trial in before)
        if left <= 0:
            trials = [trial for trial in before if trial.state == state.COMPLETE]
            self.launch(fixed, [own for trial in trials for own in _with_seeds(trial.params, seeds)])
        while left > 0:
            trials = [cut.pop(0) if cut else study.ask(asked) for _ in range(min(self.n_jobs, left))]
            each = [_with_seeds(trial.params, seeds) for trial in trials]
            values = iter(self.launch(fixed, itertools.chain(*each), trials[0].number * len(each[0])))
            for trial, own in zip(trials, each, strict=True):
                found = [value for value in itertools.islice(values, len(own)) if value is not None]
                whole = len(found) == len(own) and math.isfinite(sum(found))
                study.tell(trial.number, sum(found) / len(found) if whole else None, None if whole else state.FAIL)
            left -= len(trials)

    def _job(self, fixed: list[str], own: Sequence[str]) -> Job:
        from rlhf_pipeline.sweeps.results import OBJECTIVES

        job = super()._job(fixed, own)
        fitting = [stage for stage in OBJECTIVES if stage != "evaluate"]  # whose prompts no choice is made on
        if (stage := job.about["stage"]) not in fitting:
            raise UserError(f"stage={stage} has no objective to search by; Optuna takes one of: {', '.join(fitting)}.")
        return job

    def _study(self, asked: Sequence[str]) -> tuple[Any, Any]:
        """What is known of just this search, and the library."""
        try:
            import optuna
            from sqlalchemy import URL
        except ImportError:
            raise UserError("a search needs Optuna: pip install 'rlhf_pipeline[optuna]'.") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            # Of a path that holds a '?', this makes no options.
            storage=URL.create("sqlite", database=str(self.folder.absolute() / "optuna.db")).render_as_string(),
            study_name=" ".join(sorted(asked)),
            direction="maximize",
            load_if_exists=True,
        )
        # The seed moves on with the search, or a session would draw again what the one before drew.
        seed = self.cfg.seed + len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.n_jobs > 1)
        return study, optuna


def _choices(key: str, override: Override) -> list[str]:
    """The settings that a sweep of one key comes to."""
    if isinstance(override.value(), IntervalSweep):
        raise UserError(
            f"{key.lstrip('+')}=interval(...) has no end of values; search it with hydra/sweeper=optuna, or list some."
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _distribution(optuna: Any, key: str, override: Override) -> Any:
    """Where Optuna may look for the value of a setting."""
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return optuna.distributions.CategoricalDistribution([s.split("=", 1)[1] for s in _choices(key, override)])
    low, high, log = value.start, value.end, "log" in value.tags
    assert low is not None
    assert high is not None
    if not -math.inf < low < high < math.inf or (log and low <= 0):
        above = ", of a logarithm from above 0" if log else ""
        raise UserError(
            f"{as_typed(key)}=interval({low},{high}) holds nothing; it goes from a smaller number to a greater{above}."
        )
    whole = isinstance(low, int) and isinstance(high, int)
    kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
    return kind(low, high, log=log)


def _check_count(key: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"hydra.sweeper.{key} is {value!r}; it takes a whole number from 1.")


def _with_seeds(params: Mapping[str, Any], seeds: Sequence[str]) -> list[list[str]]:
    """A trial's jobs; four digits of a number are enough, and can be read."""
    own = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]
    return [[*own, seed] for seed in seeds] if seeds else [own]


@contextlib.contextmanager
def _patience(launcher: str, jobs: int, folder: Path) -> Iterator[None]:
    """Wait for every job that submitit runs, where its launcher gives all up for one that was killed."""
    if "submitit" not in launcher:
        yield
        return
    from submitit.core.core import Job as Submitted

    whole = Submitted.results

    def results(job: Any) -> list[Any]:
        try:
            return whole(job)
        except Exception:  # of which the job's own folder tells
            return [JobReturn(status=JobStatus.COMPLETED)]

    print(f"{jobs} jobs are with submitit; what they print is below {folder / '.submitit'}", flush=True)
    try:
        with mock.patch.object(Submitted, "results", results):
            yield
    except KeyboardInterrupt:
        if "Slurm" in launcher:
            print("\nthe jobs go on; 'squeue --me' lists them, 'scancel' stops them.", file=sys.stderr)
        raise
    except (RuntimeError, ValueError) as error:  # no SLURM here, or it does not take what is asked
        raise UserError(f"submitit could not submit the jobs: {error}") from error

"""The command line. It runs one stage, a pipeline of stages or the jobs of a sweep."""

import contextlib
import dataclasses
import importlib
import logging
import math
import os
import re
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_pipeline import files, processes
from rlhf_pipeline.composition import check_functions, compose, expand, explain_hydra_error, settings_of, to_settings
from rlhf_pipeline.errors import UserError, WaitingError
from rlhf_pipeline.inputs import check_files, check_inputs
from rlhf_pipeline.models import rewards
from rlhf_pipeline.progress import print_above_bars, print_loading
from rlhf_pipeline.report import trackers
from rlhf_pipeline.report.compare import write_comparison
from rlhf_pipeline.report.observers import Observers
from rlhf_pipeline.report.publish import last_model, publish
from rlhf_pipeline.report.summary import (
    labelling_progress,
    next_command,
    print_all_done,
    print_done,
    print_done_before,
    print_line,
)
from rlhf_pipeline.runs.directory import LABELS, SHEET, Observer, RunDir
from rlhf_pipeline.runs.models import folder_of, recover
from rlhf_pipeline.settings import Hub, Settings
from rlhf_pipeline.stages import TRAINED
from rlhf_pipeline.sweeps.jobs import is_number, record_error, run_job
from rlhf_pipeline.terminal import one_line, safe_output
from rlhf_pipeline.usage import CONF
from rlhf_pipeline.words import as_words, read_command_line

sys.path.append(str(Path(__file__).parent / "plugins"))  # Hydra finds plugins in the package hydra_plugins
_LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets")  # their ValueErrors are shown in one line
_TRACEBACK = "RLHF_PIPELINE_TRACEBACK"
NO_STAGES = "stage=pipeline runs an experiment's stages; choose an experiment, as in experiment=demo."


def main() -> None:
    """Run the command line. Exit status: 0 done, 2 an error that the user can fix, 130 interrupted."""
    with safe_output(), processes.rank_output():
        _be_quiet()
        try:
            with _errors_in_one_line():
                words, options = read_command_line(sys.argv[1:])
                # A sweep, a recorded configuration, or a request to print the configuration.
                if as_words(options) or any(re.match(r"[+~]*hydra\b", word) for word in words):
                    _by_hydra(words, options)
                else:
                    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                        _run(compose(words), words)
        except KeyboardInterrupt:
            print("\ninterrupted; run the same command again to resume from the last checkpoint.", file=sys.stderr)
            sys.exit(130)


def _by_hydra(words: list[str], options: Namespace) -> None:
    recorded = bool(options.config_name)
    composed = words if recorded or options.multirun else expand(words, options.config_dir)
    options.resolve |= options.cfg == "job"  # print the values that the run will use
    sys.argv[1:] = [*composed, *as_words(options)]

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def run(cfg: DictConfig) -> float | None:
        with _errors_in_one_line():  # here too, because Hydra prints exceptions in its own way
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                return _run_job(cfg)
            if recorded:
                check_functions(cfg, words)
            return _run(cfg, None if recorded else words)

    run()


def _run(cfg: DictConfig, words: Sequence[str] | None) -> float | None:
    """Run a composed configuration. `words` is the command line; None for a recorded configuration."""
    recover(Path(str(cfg.runs)))
    order = in_order(cfg.stages) if OmegaConf.is_dict(cfg.stages) else []
    settings = to_settings(cfg)
    if settings.stage == "pipeline":
        return _pipeline(settings, words or [])
    objective = run_stage(settings)
    _show_next(settings, order, words)
    return objective


def _show_next(settings: Settings, order: Sequence[str], words: Sequence[str] | None) -> None:
    """After a finished stage, write the page of its rounds and print the next command."""
    out = RunDir.of(settings)
    if processes.rank() or out.record.get("status") != "done":
        return
    if out.stage == "evaluate" and out.rounds():
        from rlhf_pipeline.report.rounds import write_rounds

        write_rounds(out.runs, out.name, settings.report.lang)  # this evaluation scored all rounds by the same reward
    print_line("next", next_command(settings, order, words))


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Exit with a one-line message if the user can fix the error."""
    try:
        yield
    except UserError as error:
        _leave(error)
    except (HydraException, OmegaConfBaseException) as error:
        _leave(UserError(explain_hydra_error(error)))
    except Exception as error:
        if (fault := files.disk_error(error) or _fixable(error)) is None:
            raise
        _leave(fault)


def _fixable(error: Exception) -> UserError | None:
    """Return a `UserError` if the user can fix the error, or None."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in text:
        return UserError("out of memory; lower trainer.per_device_train_batch_size or choose a smaller policy.")
    if isinstance(error, yaml.YAMLError):
        return UserError(f"the configuration cannot be read: {text}")
    if isinstance(error, RecursionError):
        return UserError("the configuration or a file is nested too deeply.")
    if isinstance(error, OSError) and error.filename:
        return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}.")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"a file is not UTF-8 text: {text}")
    if isinstance(error, ImportError) and "install" in text:  # a setting needs an extra package
        return UserError(text)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    library = next((name for name in _LIBRARIES if name in raised_in), None)
    if isinstance(error, ValueError | NotImplementedError) and library and not os.environ.get(_TRACEBACK):
        return UserError(f"{library}: {text} ({_TRACEBACK}=1 in the environment shows where.)")
    return None


def _leave(error: UserError) -> NoReturn:
    record_error(str(error))
    processes.exit_with(one_line(f"{error.kind}{error}"), 2, error.shared)


# -- one stage


def run_stage(settings: Settings) -> float | None:
    """Run one stage in its directory and return its objective. A finished stage is not run again."""
    if settings.hub.push and settings.stage not in TRAINED:
        raise UserError(f"stage={settings.stage} makes no model for hub.push=; choose one of: {', '.join(TRAINED)}.")
    processes.check_launch(_launch_words(settings))
    out = RunDir.of(settings)
    if settings.compare:  # it only compares finished runs
        runs = Path(settings.runs)
        folders = [folder_of(runs, name) for name in settings.compare]
        page = write_comparison(folders, runs / settings.name / "compare.html", settings.report.lang)
        print(f"{page} shows the runs")
    elif settings.stage in ("chat", "plan"):  # they write nothing, so they need no lock
        run_module(settings, out)
    elif settings.labels:
        _take_labels(settings, out.newest_round())
    else:
        if processes.processes() > 1:
            print_loading()
        may_grow = bool(settings.sweep) or settings.stage == "compare"
        with processes.ending_together(), out.locked():
            done = processes.agree(lambda: out.finished(settings)) and not may_grow
            with processes.rank_output(out.path):
                _run_held(settings, out, done)
        return out.objective()
    return None


def run_module(settings: Settings, out: RunDir) -> None:
    """Run the stage's module, which loads torch and trl."""
    check_inputs(settings, out)
    print_loading()
    trackers.check_logins(settings.trainer.get("report_to"))
    with Observers(out.path) if out.leads else contextlib.nullcontext(Observer()) as out.observer:
        importlib.import_module(f"rlhf_pipeline.stages.{settings.stage}").run(settings, out)


def _launch_words(settings: Settings) -> str:
    """Return the stage and the settings that restrict its launch, as words of the command line."""
    more = [f"{name}=" for name in ("compare", "labels", "sweep") if getattr(settings, name)]
    more += ["policy.lora="] if settings.policy.get("lora") else []
    return " ".join([f"stage={settings.stage}", *more])


def _take_labels(settings: Settings, out: RunDir) -> None:
    """Serve, push or read labels of the newest collection, whatever its settings. An error leaves it unchanged."""
    from rlhf_pipeline.feedback.labelling import handle_labels  # without torch: users run this often

    served = settings.labels in ("serve", "push")
    out.observer = Observers(out.path)
    with contextlib.nullcontext() if served else out.locked():
        handle_labels(settings, out)
    if not served:
        print_done(out)


def _run_held(settings: Settings, out: RunDir, done: bool) -> None:
    if done:
        if settings.stage == "evaluate" and not (out.path / "evaluation.json").exists():
            raise UserError(f"{out.path} is done, but its evaluation.json is missing; overwrite=true makes it again.")
        print_done_before(out)
        if settings.stage == "evaluate":
            from rlhf_pipeline.report.tables import evaluation_table

            evaluation_table(files.read_json(out.path / "evaluation.json"))
    else:
        try:
            with print_above_bars():
                run_module(settings, out)
        except BaseException as error:
            fault = files.disk_error(error, out.path)
            out.failed(fault or error)
            if fault:
                raise fault from None
            raise
        if out.leads:
            print_done(out)
    if settings.hub.push and out.leads:
        publish(out, settings.hub)


# -- a pipeline


def _pipeline(whole: Settings, words: Sequence[str]) -> float | None:
    """Run an experiment's stages in order, in one process, because importing torch for each would cost a minute."""
    order = in_order(whole.stages)
    if not order:
        raise UserError(NO_STAGES)
    chosen = rewards.trained_part(whole.reward)["name"]
    if "reward" in order and chosen not in rewards.TRAINABLE:
        print(f"reward={chosen} needs no training, so stage=reward is skipped.", flush=True)
        order.remove("reward")
    rest = [word for word in words if not word.startswith(("stage=", "rounds="))]
    each = {stage: settings_of([*rest, f"stage={stage}"]) for stage in order}  # the same in every round
    for stage, settings in each.items():  # check all stages before the first one starts
        processes.check_launch(_launch_words(settings))
        if RunDir.of(settings).record.get("status") != "done":
            check_files(settings)
        if settings.hub == whole.hub:  # push once, at the end, unless the stage has its own repository
            each[stage] = dataclasses.replace(settings, hub=Hub())
    every = [
        dataclasses.replace(each[stage], name=name) for stage, name in pipeline_runs(order, whole.name, whole.rounds)
    ]
    last = last_model(every) if whole.hub.push else None
    started, result = time.monotonic(), None
    for number, settings in enumerate(every, 1):
        within = settings.name.removeprefix(whole.name).lstrip("/")  # as in round2
        print(f"\n[{number}/{len(every)}] {f'{within}: ' if within else ''}{settings.stage}", flush=True)
        out = RunDir.of(settings)
        before, result = out.record, run_stage(settings)
        if settings.stage == "collect":
            _wait_for_people(out)
        if settings.stage == order[-1] and within and processes.rank() == 0:
            from rlhf_pipeline.report.rounds import write_rounds

            news = out.record != before or number == len(every)  # earlier rounds have been printed
            write_rounds(Path(whole.runs), whole.name, whole.report.lang, news)
    if processes.rank():
        return result
    folders = [RunDir.of(settings) for settings in every]
    print_all_done(folders, Path(whole.runs) / whole.name, time.monotonic() - started)
    if last:  # at the end, so that the model card has the results
        publish(RunDir.of(last), whole.hub)
    print_line("next", next_command(dataclasses.replace(every[-1], name=whole.name), [], rest))
    return result


def in_order(stages: Iterable[str]) -> list[str]:
    """Return the stages of a pipeline. Sections after compare are not stages: they configure the compared runs."""
    order = list(map(str, stages))
    return order[: order.index("compare") + 1] if "compare" in order else order


def pipeline_runs(order: Sequence[str], name: str, rounds: int | None) -> list[tuple[str, str]]:
    """Return a pipeline's stages and run names. Each round repeats collect and the later stages in its own folder."""
    if rounds is None:
        return [(stage, name) for stage in order]
    if "collect" not in order:
        raise UserError(
            f"rounds={rounds} repeats stage=collect and the later stages, but this experiment has no collect "
            f"({', '.join(order)}); take experiment=human_feedback, or drop rounds=."
        )
    first = order.index("collect")
    again = [(stage, f"{name}/round{number}") for number in range(1, rounds + 1) for stage in order[first:]]
    return [*((stage, name) for stage in order[:first]), *again]


def _wait_for_people(collect: RunDir) -> None:
    if collect.record.get("status") == "waiting":
        results = collect.record["results"]
        if results["skipped"] == results["prompts"]:
            raise UserError(
                f"people skipped all {results['prompts']} prompts of {collect.path}: there is nothing to learn from."
            )
        sheet, labels = collect.path / SHEET, collect.path / LABELS
        if collect.filled_in and not (labels.exists() and labels.stat().st_mtime >= sheet.stat().st_mtime):
            print(f"note: {sheet} has been filled in but not read yet; read it with labels={sheet}")
        so_far = math.floor(1000 * results["labelled"] / results["prompts"]) / 1000
        early = f", or add collect.enough={so_far:g} to continue with these" if so_far else ""
        raise WaitingError(f"{labelling_progress(results)}; run again when done{early}.")


# -- a job of a sweep


def _run_job(cfg: DictConfig) -> float | None:
    if not HydraConfig.get().sweeper._target_.startswith("hydra_plugins.rlhf_pipeline"):
        raise UserError("-m takes hydra/sweeper=grid or optuna, and no recorded configuration.")
    words = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as typed: interpolations are not resolved
    assert isinstance(words, list)
    return run_job(Path(cfg.runs), str(cfg.name), _last_stage(str(cfg.stage), cfg.stages), words)


def check_job(words: Sequence[str]) -> tuple[str, int, bool]:
    """Return a job's stage (see `_last_stage`), its seed and whether it is done. Refuse what cannot be a job.

    This deletes nothing. With overwrite=true, the job's own process deletes the old run.
    """
    if processes.processes() > 1:
        raise UserError("a sweep starts one process per job; start it without torchrun or accelerate launch.")
    said = {*words, *(word.partition("=")[0] + "=" for word in words if not word.endswith("=null"))}
    if alone := next((word for word in processes.ONE_PROCESS_ONLY if word in said), None):
        raise UserError(f"{alone} is for one run and has no result that a sweep could compare; drop -m.")
    settings = settings_of(words)
    if settings.hub.push:
        raise UserError("the jobs of a sweep would push to one place; drop hub.push=, and push one when all are done.")
    last = _last_stage(settings.stage, settings.stages)
    out = RunDir.of(settings)
    done = settings.stage != "pipeline" and out.finished(settings, look=True) and is_number(out.objective())
    return last, settings.seed, done


def _last_stage(stage: str, stages: Iterable[str]) -> str:
    """Return the stage whose objective ranks a run: the last that trains. Evaluate's prompts never choose a run."""
    if stage != "pipeline":
        return stage
    if not stages:
        raise UserError(NO_STAGES)
    return ([name for name in in_order(stages) if name in TRAINED] or in_order(stages))[-1]


def _be_quiet() -> None:
    """Silence the dependencies, unless the user asked for their output. Call it before they are imported."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach main(), which prints one line
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if processes.processes() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # every process would repeat it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("rlhf_pipeline").setLevel(logging.INFO)

"""The command line: Hydra's entry, one stage, a pipeline of them, or a job of a sweep."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_pipeline import data, files
from rlhf_pipeline.arguments import CONF, complete
from rlhf_pipeline.errors import UserError, WaitingError
from rlhf_pipeline.models import policies, rewards
from rlhf_pipeline.plain_words import plain
from rlhf_pipeline.processes import agree, check_launch, ending_together, leave, processes, rank, rank_output
from rlhf_pipeline.progress import say_loading, screen
from rlhf_pipeline.registry import Registry, shown
from rlhf_pipeline.report import compare
from rlhf_pipeline.report.publish import last_model, publish
from rlhf_pipeline.report.summary import how_far, say_all_done, say_done, say_done_before, say_next
from rlhf_pipeline.runs import directory as rundir
from rlhf_pipeline.runs import lineage
from rlhf_pipeline.runs import models as made
from rlhf_pipeline.settings import SAMPLING, SECTIONS, TRAINED, Hub, Settings, check_sections
from rlhf_pipeline.sweeps.jobs import is_number, note_error, run_job

sys.path.append(str(Path(__file__).parent / "plugins"))  # Hydra knows a plugin by its package: hydra_plugins
NO_STAGES = "stage=pipeline runs an experiment's stages; choose one, as in experiment=demo."
_MAKES_NOTHING = ("chat", "plan")
# What is chosen by name.
_CHOICES: dict[str, Registry[Any]] = {
    "policy": policies.registry,
    "reward": rewards.registry,
    "data": data.registry,
}


def main() -> None:
    """Run the command line and leave with its exit status: 0 done, 2 the user can mend it, 130 interrupted."""
    with rank_output():
        _be_quiet()
        try:
            with _refusals():
                sys.argv[1:] = complete(sys.argv[1:])
                if "--cfg=job" in sys.argv or {("--cfg", "job"), ("-c", "job")} & {*itertools.pairwise(sys.argv)}:
                    sys.argv.append("--resolve")  # shown as it will run
                _hydra_main()
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
            sys.exit(130)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> float | None:
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as typed: interpolations stay such
    with _refusals():  # here too: Hydra tells of an exception in its own words
        return _dispatch(cfg, overrides)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Leave with one line where the user can mend what went wrong."""
    try:
        yield
    except UserError as error:
        _leave(error)
    except (HydraException, OmegaConfBaseException) as error:
        _leave(UserError(plain(error)))
    except Exception as error:
        if fault := files.disk_error(error):
            _leave(fault)
        if isinstance(error, ImportError) and "install" in str(error):  # what a setting needs beside
            _leave(UserError(" ".join(str(error).split())))
        raise


def _leave(error: UserError) -> NoReturn:
    note_error(str(error))
    leave(f"{error.kind}{error}", 2, error.shared)


def _dispatch(cfg: DictConfig, overrides: list[str]) -> float | None:
    made.recover(Path(str(cfg.runs)))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if not HydraConfig.get().sweeper._target_.startswith("hydra_plugins.rlhf_pipeline"):
            raise UserError("-m goes with hydra/sweeper=grid or optuna, and with no recorded configuration.")
        return run_job(Path(cfg.runs), str(cfg.name), _last_stage(cfg), overrides)
    if cfg.stage == "pipeline":
        return _pipeline(cfg, overrides)
    settings = resolve(cfg.copy(), overrides)
    order = list(cfg.stages)
    objective = run_stage(settings)
    out = rundir.RunDir.of(settings)
    if rank() == 0 and out.record.get("status") == "done":
        if out.stage == "evaluate" and out.rounds():
            from rlhf_pipeline.report.rounds import write_rounds

            write_rounds(out.runs, out.name, settings.report.lang)  # which shows the rounds by one judge
        say_next(settings, order, None if _recorded() else overrides)
    return objective


def _recorded() -> bool:
    """Whether a recorded configuration is run again: it says all there is to say."""
    return any(arg.startswith(("--config-name", "-cn")) for arg in sys.argv)


def resolve(cfg: DictConfig, overrides: Sequence[str]) -> Settings:
    """Settle what applies to this stage.

    From weakest to strongest: the stage's and groups' files, the experiment, its section for the stage, what the
    command line says in general, what it says of this stage (`stages.ppo.trainer.kl_coef=0.1`).
    """
    if cfg.stage == "plan":  # in the words of the stage that is planned
        of_ppo = [o for o in overrides if not o.startswith("stage=")]
        return dataclasses.replace(resolve(hydra.compose("config", [*of_ppo, "stage=ppo"]), overrides), stage="plan")
    OmegaConf.set_struct(cfg, False)
    for key in ("policy", "reward", "data", "trainer", "ptx", "stages", *SECTIONS):
        if key in cfg and not OmegaConf.is_dict(cfg[key]):
            raise UserError(f"{key}={shown(cfg[key])} is no section of settings; say {key}.<setting>=...")
    check_sections(str(name) for name in cfg.stages)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    said = {o.key_or_group: o for o in parsed if not o.is_delete() and o.package is None}
    section = f"stages.{cfg.stage}."
    if cfg.stage == "collect":
        ppo = (cfg.stages.get("ppo") or {}).get("trainer") or {}
        cfg.collect = {**{key: value for key, value in ppo.items() if key in SAMPLING}, **cfg.collect}
    others = _merge_section(cfg, said)
    if cfg.stage == "chat" or (cfg.stage == "evaluate" and cfg.get("sweep") and not _recorded()):
        _as_its_run(cfg, said)
    if cfg.stage == "reward" and cfg.reward.get("name") == "sum":
        said_parts = said.pop("reward.parts", None)  # of a sum, the part that has no model yet is trained
        every = {"name": "sum", "parts": said_parts.value() if said_parts else cfg.reward.parts}
        part = rewards.trained_part(OmegaConf.to_container(OmegaConf.create(every), resolve=True))  # type: ignore[arg-type]
        cfg.reward = {key: value for key, value in part.items() if key != "weight"}
    for prefix in ("", section):
        for key, override in said.items():
            kind, _, field = key.partition(".")
            group = key in ("stage", *_CHOICES, "experiment") and isinstance(override.value(), str)
            elsewhere = kind in others and field not in _CHOICES[kind].common  # said of the general choice alone
            general = not group and not elsewhere and not key.startswith(("hydra", "stages"))
            if general if not prefix else key.startswith(prefix):
                OmegaConf.update(cfg, key.removeprefix(prefix), override.value(), force_add=True)
    for kind, registry in _CHOICES.items():
        if kind in said and cfg.get("experiment"):  # what the experiment says of its own choice does not fit another
            own = {key.split(".")[-1] for key in said if f"{kind}." in key}
            for key in set(cfg[kind]) - own - {"name"} - registry.fields(cfg[kind].name):
                del cfg[kind][key]
    for key in sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith("stages.")):
        where = section if key.partition(".")[0] in others else ""
        raise UserError(f"{where}{key} is not set; say {where}{key}=...")
    if cfg.stage != "pipeline":
        cfg.stages = {}
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    values["name"] = values.get("name") or values.get("experiment") or "default"
    return Settings.of({str(key): value for key, value in values.items()})


def _merge_section(cfg: DictConfig, said: dict[str, Override]) -> set[str]:
    """Lay an experiment's section for the stage over the rest; give the kinds of which it names another choice.

    Such a choice stands alone, as the fields of the general one are not its own. The user's choice goes over both.
    """
    section = OmegaConf.create(cfg.stages.get(cfg.stage) or {})
    others = set()
    for kind in set(_CHOICES) & set(section):
        if section[kind].get("name") in (None, cfg[kind].get("name")):
            continue
        if kind in said:
            del section[kind]
        else:
            others.add(kind)
            cfg[kind] = {}
    cfg.merge_with(section)
    return others


def _as_its_run(cfg: DictConfig, said: dict[str, Override]) -> None:
    """Of a chat, or of the policies of a sweep, what is not said is as the run that is opened was made."""
    if cfg.get("sweep"):
        said.pop("sweep", None)
        cfg.name, cfg.sweep, found = made.sweep(Path(cfg.runs), cfg.sweep, cfg.name, cfg.overwrite)
    else:
        run = rundir.RunDir(Path(cfg.runs), cfg.name or cfg.experiment or "default", "chat", cfg.experiment)
        asked = {key.removeprefix("policy."): o.value() for key, o in said.items() if key.startswith("policy.")}
        found = made.choices(run, asked)
    for kind, choice in found.items():
        if (kind not in said and kind != "labeler") or not cfg[kind] or cfg[kind].name == choice["name"]:
            cfg[kind] = choice
    if any(key.partition(".")[0] == "reward" for key in said):
        cfg.chat = {"reward": True, **cfg.chat}


def run_stage(settings: Settings) -> float | None:
    """Run one stage in its directory; give its objective, for a sweep. A finished stage is left as it is."""
    if settings.hub.push and settings.stage not in TRAINED:
        raise UserError(f"stage={settings.stage} makes no model, so hub.push= goes with one of: {', '.join(TRAINED)}.")
    check_launch(_said(settings))
    out = rundir.RunDir.of(settings)
    if processes() > 1:
        say_loading()
        with ending_together(), out.held():
            done = agree(lambda: out.finished(settings))
            with rank_output(out.path):
                _run_held(settings, out, done)
        return out.objective()
    if settings.compare:  # it shows what has been made, and makes nothing itself
        _compare(settings)
        return None
    if settings.stage in _MAKES_NOTHING:  # so it may go on beside whatever does
        return _run_held(settings, out, done=False)
    if settings.labels:  # given to what was collected last, however that was set up
        out = out.newest_round()
        alone = out.held() if settings.labels not in ("serve", "push") else contextlib.nullcontext()
        with alone:
            from rlhf_pipeline.feedback.labelling import take  # without torch: this is waited for again and again

            take(settings, out)  # what goes wrong here leaves the collection as it was
        if settings.labels not in ("serve", "push"):
            say_done(out)
        return None
    with out.held():
        done = out.finished(settings) and not settings.sweep  # of which there may be more by now
        return _run_held(settings, out, done)


def _said(settings: Settings) -> str:
    """What is asked for, as it was said."""
    more = [f"{name}=" for name in ("compare", "labels", "sweep") if getattr(settings, name)]
    more += ["policy.lora="] if settings.policy.get("lora") else []
    return " ".join([f"stage={settings.stage}", *more])


def _compare(settings: Settings) -> None:
    """One page of several runs, each a name below `runs/` or a folder."""
    runs = Path(settings.runs)
    folders = [made.folder_of(runs, name) for name in settings.compare]
    print(f"{compare(folders, runs / settings.name / 'compare.html', settings.report.lang)} shows the runs", flush=True)


def _run_held(settings: Settings, out: rundir.RunDir, done: bool) -> float | None:
    if done:
        if settings.stage == "evaluate" and not (out.path / "evaluation.json").exists():
            raise UserError(f"{out.path} is done, but its evaluation.json is gone; overwrite=true makes it anew.")
        say_done_before(out)
        if settings.stage == "evaluate":
            from rlhf_pipeline.report.tables import evaluation_table

            evaluation_table(json.loads((out.path / "evaluation.json").read_text(encoding="utf-8")))
    else:
        say_loading()
        from rlhf_pipeline import stages  # loads torch and trl, so only now

        if settings.stage in _MAKES_NOTHING:  # and has the screen to itself
            stages.run(settings, out)
            return None
        try:
            with screen():
                stages.run(settings, out)
        except BaseException as error:
            fault = files.disk_error(error, out.path)
            out.failed(fault or error)
            if fault:
                raise fault from None
            raise
        if out.leads:
            say_done(out)
    if settings.hub.push and out.leads:
        publish(out, settings.hub)
    return out.objective()


def _pipeline(cfg: DictConfig, overrides: list[str]) -> float | None:
    """Run an experiment's stages in order, in this process: importing torch anew for each would cost a minute."""
    order = list(resolve(cfg, overrides).stages)
    if not order:
        raise UserError(NO_STAGES)
    rest = [o for o in overrides if not o.startswith("stage=")]
    chosen = rewards.trained_part(resolve(cfg, overrides).reward)["name"]
    if "reward" in order and chosen not in rewards.TRAINABLE:
        print(f"reward={chosen} needs no training, so stage=reward is left out.", flush=True)
        order.remove("reward")
    whole = resolve(cfg, overrides)
    each = {stage: _of_pipeline(rest, stage, whole.hub) for stage in order}  # the same in every round
    for settings in each.values():  # before the first begins
        check_launch(_said(settings))
    every = [dataclasses.replace(each[stage], name=name) for stage, name in plan(order, whole.name, whole.rounds)]
    last = last_model(every) if whole.hub.push else None
    started, result = time.monotonic(), None
    for number, settings in enumerate(every, 1):
        within = settings.name.removeprefix(whole.name).lstrip("/")  # round2, where there are rounds
        print(f"\n[{number}/{len(every)}] {f'{within}: ' if within else ''}{settings.stage}", flush=True)
        out = rundir.RunDir.of(settings)
        before, result = out.record, run_stage(settings)
        if settings.stage == "collect":
            _wait_for_people(out)
        if settings.stage == order[-1] and within and rank() == 0:
            from rlhf_pipeline.report.rounds import report_rounds

            news = out.record != before or number == len(every)  # the rounds of before have been shown
            report_rounds(Path(whole.runs), whole.name, whole.report.lang, news)
    if rank():
        return result
    folders = [rundir.RunDir.of(settings) for settings in every]
    say_all_done(folders, Path(whole.runs) / whole.name, time.monotonic() - started)
    if last:  # at the end, for then the card says how it did
        publish(rundir.RunDir.of(last), whole.hub)
    say_next(dataclasses.replace(every[-1], name=whole.name), [], rest)
    return result


def plan(order: Sequence[str], name: str, rounds: int | None) -> list[tuple[str, str]]:
    """The stages of a pipeline with their runs' names: collect and what follows it once a round, in its folder."""
    if rounds is None:
        return [(stage, name) for stage in order]
    if "collect" not in order:
        raise UserError(
            f"rounds={rounds} repeats stage=collect and what follows it, which this experiment lacks "
            f"({', '.join(order)}); take experiment=human_feedback, or drop rounds=."
        )
    first = order.index("collect")
    again = [(stage, f"{name}/round{number}") for number in range(1, rounds + 1) for stage in order[first:]]
    return [*((stage, name) for stage in order[:first]), *again]


def _of_pipeline(overrides: Sequence[str], stage: str, to: Hub) -> Settings:
    settings = resolve(hydra.compose("config", [*overrides, f"stage={stage}"]), overrides)
    # What is said of the pipeline is done at its end; a stage may have a repository of its own.
    return dataclasses.replace(settings, hub=Hub() if settings.hub == to else settings.hub)


def _wait_for_people(collect: rundir.RunDir) -> None:
    if collect.record.get("status") == "waiting":
        results = collect.record["results"]
        if results["skipped"] == results["prompts"]:
            raise UserError(
                f"people skipped all {results['prompts']} prompts of {collect.path}: nothing can be learnt."
            )
        if _filled_in_since(collect):
            print(f"note: {collect.path / rundir.SHEET} has been filled in; it counts once labels= brings it in")
        so_far = math.floor(1000 * results["labelled"] / results["prompts"]) / 1000
        early = f", or with collect.enough={so_far:g} to go on with these" if so_far else ""
        raise WaitingError(f"{how_far(results)}; run again when done{early}.")


def _filled_in_since(collect: rundir.RunDir) -> bool:
    """Whether people filled in the sheet where it lies, and nothing has been brought in since."""
    sheet, labels = collect.path / rundir.SHEET, collect.path / rundir.LABELS
    if not sheet.exists() or lineage.file_hash(sheet) == collect.record.get("sheet_sha256"):
        return False
    return not labels.exists() or labels.stat().st_mtime < sheet.stat().st_mtime


def check_job(cfg: DictConfig, overrides: Sequence[str]) -> tuple[str, int, bool]:
    """Refuse what cannot be a job of a sweep; give the stage it is known by, its seed, and whether it is done already.

    This looks only: what is to be overwritten is deleted by the job's own process.
    """
    if processes() > 1:
        raise UserError("a sweep starts a process a job; start it without torchrun or accelerate launch.")
    if cfg.stage == "chat":
        raise UserError("stage=chat holds one conversation; drop -m, and compare two policies by against=.")
    if cfg.stage == "plan":
        raise UserError("stage=plan leaves nothing that a sweep could compare; drop -m.")
    for key in ("compare", "labels", "sweep"):
        if cfg.get(key):
            raise UserError(f"{key}= goes with one run, and leaves nothing that a sweep could compare; drop -m.")
    if (cfg.get("hub") or {}).get("push"):
        raise UserError("the jobs of a sweep would push to one place; push the one that you choose when it is done.")
    last = _last_stage(cfg)
    settings = resolve(cfg, overrides)
    out = rundir.RunDir.of(settings)
    done = settings.stage != "pipeline" and out.finished(settings, look=True) and is_number(out.objective())
    return last, settings.seed, done


def _last_stage(cfg: DictConfig) -> str:
    """The stage whose result a run is known by: the last that trains, for on evaluate's prompts no choice is made."""
    if cfg.stage != "pipeline":
        return str(cfg.stage)
    if not cfg.stages:
        raise UserError(NO_STAGES)
    stages = list(map(str, cfg.stages))
    return ([stage for stage in stages if stage in TRAINED] or stages)[-1]


def _be_quiet() -> None:
    """Keep the dependencies' chatter away, unless the user asked for it. Set before they are imported."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to main(), which says them plainly
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if processes() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each process would say all of it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("rlhf_pipeline").setLevel(logging.INFO)

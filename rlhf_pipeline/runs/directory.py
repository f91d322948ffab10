"""Run directories, the only state between stages: lineage, atomic files, resuming, logs of metrics and samples."""

import contextlib
import errno
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_pipeline import files
from rlhf_pipeline.errors import DiskError, UserError
from rlhf_pipeline.processes import by_rank_0, checkpoints_of, processes, rank, rows_per_step
from rlhf_pipeline.runs import same_work
from rlhf_pipeline.runs.checkpoints import SEAL, newest_whole, replacing
from rlhf_pipeline.runs.lineage import file_hash, git, hardware, parent, versions
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages import FOLDERS

CANDIDATES, CANDIDATES_SO_FAR, LABELS = "candidates.jsonl", "candidates.part.jsonl", "labels.jsonl"
PROJECT, SHEET = "project.json", "sheet.csv"
FRONTIER, COMPARISON = "frontier.json", "comparison.json"
_RECORD = {"stage": str, "name": str, "status": str, "started": str, "parents": dict, "results": dict, "resumed": list}
_ROUND = re.compile(r"round([1-9][0-9]*)")


class Observer:
    """The default observer of a stage, which ignores all events.

    started(config, step): training starts or resumes. logged(step, values), sampled(step, samples): rows were logged.
    evaluated(config, evaluation): policies were compared. added(): a file has grown. ended(): run.json has the status.
    """

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *values: None


class RunDir:
    """`runs/<name>/<stage>/`. A name with a slash is a sweep's job or a round; it can use models of its parent runs."""

    def __init__(self, runs: Path, name: str, stage: str, experiment: str | None = None) -> None:
        self.runs, self.name, self.stage, self.experiment = runs, name, stage, experiment
        self.leads = rank() == 0  # rank 0 writes the files
        self.path = runs / name / stage
        self.checkpoints, self.model = self.path / "checkpoints", self.path / "model"
        self._started, self._before = time.monotonic(), 0.0  # _before: seconds of earlier sessions
        self._record: dict[str, Any] = {}
        self.observer: Any = Observer()
        self.steps: int | None = None  # of the training, once it has ended
        self._old = runs / name / f".{stage}.old"  # the work that is being overwritten, kept until there is new work

    @classmethod
    def of(cls, settings: Settings) -> "RunDir":
        """Return the directory of a stage of a run. The evaluation of a sweep has the directory frontier/."""
        stage = "frontier" if settings.sweep else settings.stage
        return cls(Path(settings.runs), settings.name, stage, settings.experiment)

    # -- existing work

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`; empty if there is no such file."""
        found = files.read_json(self.path / "run.json")
        for key, kind in _RECORD.items():
            if not isinstance(found.get(key, kind()), kind):
                raise UserError(f"{self.path / 'run.json'} is damaged ({key}); restore it, or move {self.path} away.")
        return found

    def finished(self, settings: Settings, look: bool = False) -> bool:
        """Return whether this same work is done. Raises UserError for other work, unless it may be overwritten.

        Work that left nothing to resume, or that is overwritten, is moved aside, unless `look` is True.
        """
        record = self.record
        if not record:
            return False
        done = record.get("status") == "done"
        if done and not settings.overwrite:
            self._check_model()
        if done or self._begun or self.model.exists():
            differences = same_work.differences(self, settings)
            if not differences and not (settings.overwrite and done):
                return done
            if not settings.overwrite:
                raise UserError(
                    f"{self.path} holds other work ({'; '.join(differences[:4])}). "
                    "Choose another name=, or run this stage with overwrite=true."
                )
            if why := self._peoples_work():
                if not differences:
                    return True
                raise UserError(f"{why}, so overwrite=true does not delete it; move {self.path} away by hand.")
        if not look:
            os.replace(self.path, self._old)
        return False

    def _peoples_work(self) -> str | None:
        """Return a description of work by people, which no run can reproduce; None if there is none."""
        if any(row.get("source") for row in files.read_jsonl(self.path / LABELS)):
            return f"{self.path / LABELS} holds labels by people"
        if (self.path / PROJECT).exists():
            return f"the tasks of {self.path} are in Label Studio"
        return f"{self.path / SHEET} has been filled in" if self.filled_in else None

    @property
    def filled_in(self) -> bool:
        """Whether people have filled in the sheet in this directory."""
        sheet, offered = self.path / SHEET, self.record.get("sheet_sha256")
        return bool(offered) and sheet.exists() and file_hash(sheet) != offered

    @property
    def _begun(self) -> bool:
        """Whether there is anything, apart from a model, from which a run of this stage can resume."""
        made = any((self.path / name).exists() for name in (CANDIDATES, CANDIDATES_SO_FAR, FRONTIER))
        return made or self.last_checkpoint() is not None

    def _check_model(self) -> None:
        """Raise UserError if the stage is done but its model was deleted: an older model would be used instead."""
        if FOLDERS[self.stage].makes and not self.model.is_dir():
            raise UserError(
                f"{self.path} is done, but its model/ is gone. Make it again: stage={self.stage} name={self.name} "
                "overwrite=true, with the settings it was made with."
            )

    def objective(self) -> float | None:
        """Return the number that a sweep compares."""
        return self.record.get("objective")

    def upstream(
        self, *stages: str, policy: dict[str, Any] | None = None, reward: dict[str, Any] | None = None
    ) -> Path | None:
        """Return the model of the first of these stages that is finished in this run or in a parent run.

        With a `policy` or `reward`, models of other registry entries are skipped. Raises UserError if a model has the
        same entry but other settings (for example, another size).
        """
        names = [self.name, *(str(p) for p in Path(self.name).parents if str(p) != ".")]
        if len(names) > 1 and self.experiment and not self.round:
            names.append(self.experiment)
        for name in names:
            for stage in stages:
                other = RunDir(self.runs, name, stage)
                if other.record.get("status") != "done":
                    continue
                other._check_model()
                made = other.made_with()
                meant = [(made[kind], choice) for kind, choice in (("reward", reward), ("policy", policy)) if choice]
                if any(own.get("name") != choice["name"] for own, choice in meant):
                    continue
                own, choice = made["policy"], policy or {}
                for key in sorted({*own, *choice} - {"path", "lora", "quantize"}) if choice else ():
                    if own.get(key) != choice.get(key):
                        there, here = own.get(key), choice.get(key)
                        raise UserError(f"{other.path} has policy.{key}={there}, but here it is {here}; use one value.")
                return other.model
        return None

    # -- rounds of human feedback: runs/<name>/round1, round2, ...

    @property
    def round(self) -> int | None:
        """The number of the round that this directory belongs to, from its name; None if it belongs to no round."""
        path = Path(self.name)
        found = _ROUND.fullmatch(path.name) if path.parent.name else None
        return int(found[1]) if found else None

    def in_round(self, number: int) -> "RunDir":
        """Return the same stage in another round."""
        return RunDir(self.runs, str(Path(self.name).parent / f"round{number}"), self.stage, self.experiment)

    def newest_round(self) -> "RunDir":
        """Return the same stage in this run if it ran here, else in the newest round where it ran."""
        return next((out for out in (self, *self.rounds()) if out.record), self)

    def rounds(self) -> list["RunDir"]:
        """Return the same stage in each round of this run, the newest first."""
        names = [path.name for path in (self.runs / self.name).glob("*") if _ROUND.fullmatch(path.name)]
        newest_first = sorted(names, key=lambda name: int(name.removeprefix("round")), reverse=True)
        return [RunDir(self.runs, f"{self.name}/{name}", self.stage, self.experiment) for name in newest_first]

    def labels(self) -> list[Path]:
        """Return the label files of stage=collect, for every round up to this one; the newest last."""
        own = self.sibling("collect")
        rounds = [own.in_round(number) for number in range(1, self.round + 1)] if self.round else [own]
        return [path for collect in rounds if (path := collect.path / LABELS).exists()]

    def config(self) -> dict[str, Any]:
        """Return the content of `config.yaml`; empty if there is no such file."""
        found = files.read_yaml(self.path / "config.yaml")
        for key in ("policy", "reward", "data", "trainer") if found else ():
            if not isinstance(found.setdefault(key, {}), dict):
                raise UserError(f"{self.path / 'config.yaml'} is damaged ({key} is no section); restore it.")
        return found

    def made_with(self) -> dict[str, Any]:
        """Return the content of `config.yaml` of a stage that has run. Raises UserError if the file is missing."""
        if found := self.config():
            return found
        raise UserError(f"{self.path / 'config.yaml'} is gone; restore it, or move {self.path} away.")

    def sibling(self, stage: str) -> "RunDir":
        """Return another stage of the same run."""
        return RunDir(self.runs, self.name, stage, self.experiment)

    # -- one run of the stage

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock this directory against other launches until the block ends. A killed process also frees the lock.

        Work that was moved aside is put back if the new work was refused or ended without a result. Rank 0 holds the
        lock for all ranks.
        """
        if not self.leads:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.lock_folder(self.path.parent / f".{self.stage}.lock", self.path))
            except OSError as error:  # a finished stage can be looked at on a read-only disk
                if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM) or self.record.get("status") != "done":
                    raise
            self._settle()
            try:
                yield
            finally:
                self._settle()

    def _settle(self) -> None:
        """Delete the old work if there is new work, else put it back. After a kill, the next call completes either."""
        if not self.leads or not self._old.exists():
            return
        trained = any(row.get("step", 0) > 0 for row in files.read_log(self.path / "metrics.jsonl"))
        if trained or self._begun or self.model.exists() or self.record.get("status") == "done":
            shutil.rmtree(self._old)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.replace(self._old, self.path)
        print(f"{self.path}: the earlier work is restored", flush=True)

    @by_rank_0
    def begin(self, settings: Settings, parents: dict[str, str], fingerprint: dict[str, Any] | None) -> None:
        """Write config.yaml and run.json before the work starts. `parents` maps a role to a folder or a hub id."""
        before = self.record if self._begun else {}
        found = {role: parent(where) for role, where in parents.items()}
        if before:
            same_work.check_resumed(self, before, found, fingerprint)
        meant_for = processes()  # the process count that fits the settings; a resumed run keeps its rows per step
        if before and settings.trainer:
            rows = rows_per_step(self.config()["trainer"], before.get("processes", 1))
            meant_for = rows // rows_per_step(settings.trainer, 1)
        logging = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}, "_self_"]
        config = {"defaults": logging, "hydra": {"run": {"dir": "."}, "output_subdir": None}, **settings.to_dict()}
        once = {"overwrite": False, "hub": {}}  # for this launch only, not for a repeated run
        files.write_yaml(self.path / "config.yaml", config | once)
        # A killed session did not record its time in run.json, but its log has it.
        logged = files.read_log(self.path / "metrics.jsonl")[-1:] if before else []
        self._before = max([before.get("seconds", 0.0), *(row.get("seconds", 0.0) for row in logged)])
        again = f"python -m rlhf_pipeline --config-path {shlex.quote(str(self.path))} --config-name config"
        there = {str(other.path): str(other.record.get("finished")) for other, _ in same_work.could_take(self)}
        self._record = {
            "stage": self.stage, "name": self.name, "experiment": self.experiment, "status": "running",
            "seed": settings.seed, "command": again, "started": self.record.get("started") or _now(),
            "seconds": round(self._before, 1),
            "resumed": [*self.record.get("resumed", []), _now()] if self.record else [],
            "parents": found, "there": there, "data": fingerprint, "versions": versions(), "hardware": hardware(),
            "processes": meant_for, "sharded": checkpoints_of(self.stage), "git": git(),
        }  # fmt: skip
        files.write_json(self.path / "run.json", self._record)

    def reopen(self, settings: Settings) -> None:
        """Continue a recorded stage. Only settings that do not affect its work are taken from `settings`."""
        self._record = self.record
        self._before = self._record.get("seconds", 0.0)
        config = self.config()
        for section, _, key in (name.partition(".") for name in same_work.MAY_DIFFER):
            if config.get(section, {}).get(key) is not None:
                config[section][key] = getattr(getattr(settings, section), key)
        if config:
            files.write_yaml(self.path / "config.yaml", config)

    def offer_sheet(self, content: str) -> None:
        """Write the sheet that people fill in, and record its hash, to detect later whether they did."""
        files.write_atomic(self.path / SHEET, content)
        self._record["sheet_sha256"] = file_hash(self.path / SHEET)
        files.write_json(self.path / "run.json", self._record)

    @by_rank_0
    def finish(self, results: dict[str, Any], objective: float | None = None, status: str = "done") -> None:
        """Record the results and the status: done, or waiting for people."""
        self._record |= {"status": status, "finished": _now(), "seconds": round(self._seconds, 1)}
        self._record |= {"results": results, "objective": objective, **({"steps": self.steps} if self.steps else {})}
        files.write_json(self.path / "run.json", self._record)
        self.observer.ended()

    @by_rank_0
    def failed(self, error: BaseException) -> None:
        """Record that an error ended the stage, which can be resumed. The record of a finished stage stays."""
        if self._record and self._record["status"] == "running":
            kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._record |= {"status": kind, "error": f"{type(error).__name__}: {error}"[:500]}
            self._record["seconds"] = round(self._seconds, 1)
            if isinstance(error, DiskError):  # delete incomplete files to make room for the record
                for folder in (*self.path.glob(".model.new"), *self.path.glob("checkpoints/*checkpoint-*")):
                    if not (folder / SEAL).exists():
                        shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # the disk may be full; the original error matters more
                files.write_json(self.path / "run.json", self._record)
            self.observer.ended()

    @property
    def _seconds(self) -> float:
        """Seconds that the stage has taken so far, over all sessions."""
        return time.monotonic() - self._started + self._before

    def save_model(self, save: Callable[[Path], None]) -> None:
        """Call `save` with a temporary folder, then replace `model/` by it atomically."""
        if not self.leads:  # all ranks take part in saving
            return save(self.model)
        with replacing(self.model) as new:
            save(new)

    # -- checkpoints and logs

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return newest_whole(self.checkpoints)

    @by_rank_0
    def rewind(self, step: int) -> None:
        """Delete log rows after `step`, because a resumed run repeats those steps."""
        for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
            if (path := self.path / name).exists():
                files.write_jsonl(path, [row for row in files.read_log(path) if row["step"] <= step])

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Add one row to `metrics.jsonl`. Only `seconds` depends on the clock."""
        self.add("metrics.jsonl", [{"step": step, **values, "seconds": round(self._seconds, 2)}])
        self.observer.logged(step, values)
        if step > 0:
            self._settle()

    def warn(self, step: int, warning: str) -> None:
        """Add a warning to `warnings.jsonl`, for the page."""
        self.add("warnings.jsonl", [{"step": step, "warning": warning}])

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Add rows (prompt, response, reward) to `samples.jsonl`."""
        self.add("samples.jsonl", [{"step": step, **sample} for sample in samples])
        self.observer.sampled(step, samples)

    @by_rank_0
    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a file of the directory."""
        files.append_jsonl(self.path / name, rows)
        self.observer.added()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

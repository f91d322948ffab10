"""Decide whether a run directory holds the requested work. No other module decides this."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.processes import BATCH_FIELDS, checkpoints_of, processes, rows_per_step, same_step
from rlhf_pipeline.report.files import flatten
from rlhf_pipeline.report.trackers import FIELDS
from rlhf_pipeline.runs.lineage import parent
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages import FOLDERS

if TYPE_CHECKING:
    from rlhf_pipeline.runs.directory import RunDir

# Settings that may change between sessions, because they do not affect the result.
MAY_DIFFER = ("collect.enough", "collect.annotators", "collect.batch_size")
_FREE = {*MAY_DIFFER, *(f"trainer.{name}" for name in (*FIELDS, *BATCH_FIELDS))}


def differences(out: "RunDir", settings: Settings) -> list[str]:
    """Return the differences between the requested work and the directory's: settings, parents, earlier stages."""
    record, stage = out.record, FOLDERS[out.stage]
    before, after = dict(flatten(out.config())), dict(flatten(settings.to_dict()))
    changed = [
        f"{key} is {before.get(key)!r} there and {after.get(key)!r} here"
        for key in sorted({*before, *after} - _FREE)
        if key.split(".")[0] in stage.work and before.get(key) != after.get(key)
    ]
    if "trainer" in stage.work and batch_of(out, settings) is None:
        rows = rows_per_step(out.config()["trainer"], record.get("processes", 1))
        asked = rows_per_step(settings.trainer, processes())
        sizes = " x ".join(f"trainer.{name}" for name in BATCH_FIELDS)
        changed.append(f"a step takes {rows} rows there and {asked} here ({sizes} x processes)")
    parents = record.get("parents", {})
    for role, before_it in parents.items():
        if (now := parent(before_it["path"])["sha256"]) and now != before_it["sha256"]:
            changed.append(f"its {role} {before_it['path']} has changed since")
    taken = {str(Path(other["path"])) for other in parents.values()}
    for other, of in could_take(out):  # finished after this work, and would be used now
        by_hand = (settings.reward if of == "reward" else settings.policy).get("path")
        if by_hand or (out.stage == "evaluate" and of != "reward" and settings.evaluate.policies):
            continue
        finished, there = str(other.record.get("finished")), record.get("there")
        # Records of older versions have no `there`; compare with their start time instead.
        old = finished <= record.get("started", "") if there is None else there.get(str(other.path)) == finished
        if not old and str(other.model) not in taken:
            changed.append(f"{other.path} has been made since")
    return changed


def could_take(out: "RunDir") -> Iterator[tuple["RunDir", str]]:
    """Yield the finished stages whose models this stage could use, with stage names. evaluate uses all rounds."""
    for stage in FOLDERS[out.stage].takes:
        own = out.sibling(stage)
        for other in (own, *(own.rounds() if out.stage == "evaluate" else [])):
            if other.record.get("status") == "done":
                yield other, stage


def batch_of(out: "RunDir", settings: Settings) -> dict[str, int] | None:
    """Return batch settings that keep the existing run's rows per step, or those requested; None if impossible."""
    record = out.record
    before = out.config().get("trainer") if record else None
    if before is None:
        return {name: settings.trainer[name] for name in BATCH_FIELDS if name in settings.trainer}
    return same_step(before, record.get("processes", 1), settings.trainer)


def check_resumed(
    out: "RunDir", before: dict[str, Any], parents: dict[str, Any], fingerprint: dict[str, Any] | None
) -> None:
    """Refuse to resume work that began with other models or data, or whose checkpoints this launch cannot read."""
    if before["parents"] != parents or before["data"] != fingerprint:
        raise UserError(
            f"{out.path} was started with other data or models, so it cannot be resumed with these. "
            "Add overwrite=true to start over, or choose another name=."
        )
    if (then := before.get("sharded")) != (now := checkpoints_of(out.stage)):
        raise UserError(
            f"{out.path} was checkpointed under {then or 'no sharding'} and cannot resume under {now or 'none'}. Use "
            "the same launcher, or overwrite=true to start over."
        )

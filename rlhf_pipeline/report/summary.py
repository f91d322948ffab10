"""How a stage ended, in a few lines: its result, its time, where its files are, what to run next."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.files import read_jsonl, read_log
from rlhf_pipeline.report.files import only
from rlhf_pipeline.report.page import lasted
from rlhf_pipeline.runs.directory import CANDIDATES, COMPARISON, FRONTIER, LABELS, SHEET, RunDir
from rlhf_pipeline.runs.models import newest_policy
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages import FOLDERS, STAGES
from rlhf_pipeline.texts import shown
from rlhf_pipeline.words import as_typed, typed

_MADE = ("model", CANDIDATES, LABELS, "quality.json", "evaluation.json", FRONTIER, COMPARISON, "report.html")
_RUN = "python -m rlhf_pipeline"


def say(label: str, text: str | None) -> None:
    """One line of a summary, if there is something to say."""
    if text:
        print(f"{label:<9}{shown(text)}", flush=True)


def say_done(out: RunDir) -> None:
    """A stage's result, time and place, all from its files; where it waits for people, how they label."""
    say(out.stage, outcome(out))
    say("time", ", ".join([_time(out.record), *_rates(out)]))
    made = [f"{name}/" if (out.path / name).is_dir() else name for name in _MADE if (out.path / name).exists()]
    say("made", f"{out.path}: {', '.join(made)}")
    if out.record.get("status") == "waiting":
        again = f"{command('collect', str(out.runs), name=out.name)} labels="
        sheet = shlex.quote(str(out.path / SHEET))
        say("next", f"in the browser: make label-studio NAME={shlex.quote(out.name)}, then: {again}pull")
        say("or", f"in a spreadsheet: fill in {sheet}, then: {again}{sheet}")


def say_done_before(out: RunDir) -> None:
    """One line of a stage that was done already."""
    when = f"{out.record.get('finished')}, in {_time(out.record)}"
    print(f"{out.path} is done already: {shown(f'{outcome(out)} ({when})')}", flush=True)


def say_all_done(every: Sequence[RunDir], folder: Path, seconds: float) -> None:
    """A pipeline's time, of all its stages, and its pages."""
    whole = sum(out.record.get("seconds", 0.0) for out in every)
    now = f", {lasted(seconds)} of it now" if seconds < 0.9 * whole else ""
    print()
    say("pipeline", f"all {len(every)} stages are done")
    say("time", f"{lasted(max(whole, seconds))}{now}")
    pages = [folder / "report.html", *(out.path / "report.html" for out in every[-2:])]
    say("made", f"{folder}: {', '.join(str(page.relative_to(folder)) for page in pages if page.exists())}")


def next_command(settings: Settings, order: Sequence[str], overrides: Sequence[str] | None) -> str | None:
    """The command that goes on after a stage: the next of the experiment's `order`, with what the user said for all.

    Where the order ends: PPO after a reward, the evaluation after PPO, else a chat. `overrides` are the user's own;
    None where a recorded configuration was run again, which says nothing of the other stages.
    """
    stage = settings.stage
    after = dict(itertools.pairwise(order)).get(stage) or STAGES[stage].then
    if after and overrides is not None:
        return shlex.join([*_RUN.split(), f"stage={after}", *_for_others(settings, overrides)])
    run = RunDir(Path(settings.runs), settings.name, "chat", settings.experiment)
    if stage == "collect" or newest_policy(run) is None:
        return None
    return command("chat", settings.runs, name=settings.name)


def command(stage: str, runs: str, **said: str | None) -> str:
    """A stage's command line with settings that are paths or names; those that are None are left out."""
    said |= {"runs": runs} if runs != "runs" else {}
    words = (typed(key, value) for key, value in said.items() if value)
    return shlex.join([*_RUN.split(), f"stage={stage}", *words])


def _for_others(settings: Settings, overrides: Sequence[str]) -> list[str]:
    """Of what the user said to one stage, what goes for the others; what it started from gives way to what it made."""
    stage = settings.stage
    own = ("stage=", "labels=", "overwrite=", "hub.", "trainer.", f"stages.{stage}.", "policy.lora", "policy.quantize")
    made = {"sft": "policy.path", "reward": "reward.path"}.get(stage, "")
    said = [word for o in overrides if not (word := as_typed(o)).startswith(own)]
    if "~experiment" in said:  # added to a choice of the user's own, or said as such
        chosen = any(o.startswith(("policy=", "reward=", "data=")) for o in said)
        said = [o for o in said if o != "~experiment"] + ([] if chosen else ["experiment=null"])
    place = RunDir.of(settings).path
    return [f"{made}={place}" if made and o.startswith(f"{made}=") else o for o in said]


def outcome(out: RunDir) -> str:
    """A stage's result in a few words, from its files."""
    results = out.record.get("results", {})
    try:
        if out.stage in _OUTCOMES:
            return _OUTCOMES[out.stage](out, results)
        if line := FOLDERS[out.stage].outcome:
            return line.format_map({"pairs": results.get("rows"), **results})
    except (KeyError, TypeError, ValueError, IndexError):  # of another version, or by another hand
        pass
    return ", ".join(f"{k} {v:.4g}" for k, v in [*results.items()][:3] if isinstance(v, int | float))


def _collected(out: RunDir, results: dict[str, Any]) -> str:
    figures = [how_far(results)]
    if results.get("agreement") is not None:
        figures.append(f"{results['annotators']} annotators agree on {results['agreement']:.1%} of pairs")
    if results["rejected"]:
        figures.append(f"{results['rejected']} labels set aside, see {out.path / 'rejected.jsonl'}")
    return ", ".join(figures)


def _improved(out: RunDir, results: dict[str, Any]) -> str:
    rewards = [row["objective/scores"] for row in read_jsonl(out.path / "metrics.jsonl") if "objective/scores" in row]
    first, last = f", from {rewards[0]:.3f}" if rewards else "", min(10, len(rewards))
    return f"reward {results['scores']:.3f} at KL {results['kl']:.2f}{first} (last {last} logged updates)"


def _evaluated(out: RunDir, results: dict[str, Any]) -> str:
    evaluation = only(out.path / "evaluation.json")
    names = [name for name in evaluation["metrics"] if not name.startswith("best of ")]
    kl = "" if results["kl"] is None else f" at KL {results['kl']:.2f}"
    gain = ", {gain:+.3f} [{gain_low:+.3f}, {gain_high:+.3f}] over {}" if "gain" in results else ""
    reward = f"{names[-1]} has reward {results['reward_mean']:.3f}{kl}{gain.format(names[0], **results)}"
    return f"{reward}; {evaluation['prompts']} held-out prompts"


_OUTCOMES = {"collect": _collected, "ppo": _improved, "evaluate": _evaluated}


def how_far(results: dict[str, Any]) -> str:
    """How many tasks people are through with."""
    skipped = f" ({results['skipped']} skipped)" if results["skipped"] else ""
    return f"{results['labelled'] + results['skipped']} of {results['prompts']} labelled{skipped}"


def _time(record: dict[str, Any]) -> str:
    sessions = 1 + len(record.get("resumed", []))
    return f"{lasted(record.get('seconds', 0.0))}{f' in {sessions} sessions' if sessions > 1 else ''}"


def _rates(out: RunDir) -> list[str]:
    """How fast it was: updates, steps or tokens in the stage's whole time."""
    record = out.record
    if speed := record.get("results", {}).get("speed"):
        return ["{tokens_per_second:.0f} tokens/s, {prompts_per_second:.1f} prompts/s".format(**speed)]
    steps = max((row["step"] for row in read_log(out.path / "metrics.jsonl")), default=0)
    unit = "updates" if out.stage == "ppo" else "steps"
    return [f"{steps} {unit}, {60 * steps / max(record['seconds'], 0.1):.0f}/min"] if steps else []

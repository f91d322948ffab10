"""The printed summary of a stage: its result, its time, where its files are, what to run next."""

import contextlib
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import NotFinishedError
from rlhf_pipeline.files import read_jsonl, read_log
from rlhf_pipeline.models.rewards import check_has_model, trained_part
from rlhf_pipeline.report.files import read_object
from rlhf_pipeline.report.page import lasted
from rlhf_pipeline.runs.directory import CANDIDATES, COMPARISON, FRONTIER, LABELS, SHEET, RunDir
from rlhf_pipeline.runs.models import newest_policy
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages import FOLDERS, STAGES
from rlhf_pipeline.texts import printable
from rlhf_pipeline.words import as_user_types, setting_word

_MADE = ("model", CANDIDATES, LABELS, "quality.json", "evaluation.json", FRONTIER, COMPARISON, "report.html")
_RUN = "python -m rlhf_pipeline"


def print_line(label: str, text: str | None) -> None:
    """Print one line of a summary, unless the text is empty."""
    if text:
        print(f"{label:<9}{printable(text)}", flush=True)


def print_done(out: RunDir) -> None:
    """Print a stage's result, time and files. If the stage waits for labels, also print how to label."""
    print_line(out.stage, outcome(out))
    print_line("time", ", ".join([_time(out.record), *_rates(out)]))
    made = [f"{name}/" if (out.path / name).is_dir() else name for name in _MADE if (out.path / name).exists()]
    print_line("made", f"{out.path}: {', '.join(made)}")
    if out.record.get("status") == "waiting":
        again = f"{command('collect', str(out.runs), name=out.name)} labels="
        sheet = shlex.quote(str(out.path / SHEET))
        print_line("next", f"in the browser: make label-studio NAME={shlex.quote(out.name)}, then: {again}pull")
        print_line("or", f"in a spreadsheet: fill in {sheet}, then: {again}{sheet}")


def print_done_before(out: RunDir) -> None:
    """Print one line for a stage that was finished before."""
    when = f"{out.record.get('finished')}, in {_time(out.record)}"
    print(f"{out.path} is done already: {printable(f'{outcome(out)} ({when})')}", flush=True)


def print_all_done(every: Sequence[RunDir], folder: Path, seconds: float) -> None:
    """Print the total time of a pipeline and its pages."""
    whole = sum(out.record.get("seconds", 0.0) for out in every)
    now = f", {lasted(seconds)} of it now" if seconds < 0.9 * whole else ""
    print()
    print_line("pipeline", f"all {len(every)} stages are done")
    print_line("time", f"{lasted(max(whole, seconds))}{now}")
    pages = [folder / "report.html", *(out.path / "report.html" for out in every[-2:])]
    print_line("made", f"{folder}: {', '.join(str(page.relative_to(folder)) for page in pages if page.exists())}")


def next_command(settings: Settings, order: Sequence[str], overrides: Sequence[str] | None) -> str | None:
    """Return the command of the next stage in the experiment's `order`, with the user's settings that apply to it.

    At the end of the order: PPO after a reward model, the evaluation after PPO, else a chat. `overrides` are those of
    the command line; None if a recorded configuration was run again, which has no settings for other stages.
    """
    stage = settings.stage
    after = dict(itertools.pairwise(order)).get(stage) or STAGES[stage].then
    if stage == "dpo" and after == "evaluate" and not _has_reward(settings):
        after = None  # DPO learns without a reward
    if after and overrides is not None:
        return shlex.join([*_RUN.split(), f"stage={after}", *_for_others(settings, overrides)])
    run = RunDir(Path(settings.runs), settings.name, "chat", settings.experiment)
    if stage == "collect" or newest_policy(run) is None:
        return None
    return command("chat", settings.runs, name=settings.name)


def _has_reward(settings: Settings) -> bool:
    made = RunDir.of(settings).upstream("reward", reward=trained_part(settings.reward))
    with contextlib.suppress(NotFinishedError):
        check_has_model(settings.reward, made)
        return True
    return False


def command(stage: str, runs: str, **said: str | None) -> str:
    """Return a stage's command line with settings that are paths or names. Values of None are left out."""
    said |= {"runs": runs} if runs != "runs" else {}
    words = (setting_word(key, value) for key, value in said.items() if value)
    return shlex.join([*_RUN.split(), f"stage={stage}", *words])


def _for_others(settings: Settings, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that also apply to later stages. The path a stage started from becomes the path it made."""
    stage = settings.stage
    own = ("stage=", "labels=", "overwrite=", "hub.", "trainer.", f"stages.{stage}.", "policy.lora", "policy.quantize")
    made = {"sft": "policy.path", "reward": "reward.path"}.get(stage, "")
    said = [word for o in overrides if not (word := as_user_types(o)).startswith(own)]
    if "~experiment" in said:  # it was added for the user's own policy, reward or data, or typed by the user
        chosen = any(o.startswith(("policy=", "reward=", "data=")) for o in said)
        said = [o for o in said if o != "~experiment"] + ([] if chosen else ["experiment=null"])
    place = RunDir.of(settings).path
    return [f"{made}={place}" if made and o.startswith(f"{made}=") else o for o in said]


def outcome(out: RunDir) -> str:
    """Return a stage's result in a few words, from its files."""
    results = out.record.get("results", {})
    try:
        if out.stage in _OUTCOMES:
            return _OUTCOMES[out.stage](out, results)
        if line := FOLDERS[out.stage].outcome:
            return line.format_map({"pairs": results.get("rows"), **results})
    except (KeyError, TypeError, ValueError, IndexError):  # files of another version, or edited by hand
        pass
    return ", ".join(f"{k} {v:.4g}" for k, v in [*results.items()][:3] if isinstance(v, int | float))


def _collected(out: RunDir, results: dict[str, Any]) -> str:
    figures = [labelling_progress(results)]
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
    evaluation = read_object(out.path / "evaluation.json")
    names = [name for name in evaluation["metrics"] if not name.startswith("best of ")]
    kl = "" if results["kl"] is None else f" at KL {results['kl']:.2f}"
    gain = ", {gain:+.3f} [{gain_low:+.3f}, {gain_high:+.3f}] over {}" if "gain" in results else ""
    reward = f"{names[-1]} has reward {results['reward_mean']:.3f}{kl}{gain.format(names[0], **results)}"
    return f"{reward}; {evaluation['prompts']} held-out prompts"


_OUTCOMES = {"collect": _collected, "ppo": _improved, "evaluate": _evaluated}


def labelling_progress(results: dict[str, Any]) -> str:
    """Return how many tasks people have finished."""
    skipped = f" ({results['skipped']} skipped)" if results["skipped"] else ""
    return f"{results['labelled'] + results['skipped']} of {results['prompts']} labelled{skipped}"


def _time(record: dict[str, Any]) -> str:
    sessions = 1 + len(record.get("resumed", []))
    return f"{lasted(record.get('seconds', 0.0))}{f' in {sessions} sessions' if sessions > 1 else ''}"


def _rates(out: RunDir) -> list[str]:
    """Return the speed over the stage's whole time: updates, steps or tokens."""
    record = out.record
    if speed := record.get("results", {}).get("speed"):
        return ["{tokens_per_second:.0f} tokens/s, {prompts_per_second:.1f} prompts/s".format(**speed)]
    steps = record.get("steps") or max((row["step"] for row in read_log(out.path / "metrics.jsonl")), default=0)
    unit = "updates" if out.stage == "ppo" else "steps"
    return [f"{steps} {unit}, {60 * steps / max(record['seconds'], 0.1):.0f}/min"] if steps else []

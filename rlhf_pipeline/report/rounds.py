"""Rounds of human feedback side by side: the labels of each, its reward model and its policy."""

from pathlib import Path
from typing import Any

from rlhf_pipeline.files import write_json
from rlhf_pipeline.report import Block, Line, Words, assemble, by_row, chart, members, note, read, write_page
from rlhf_pipeline.report.summary import command
from rlhf_pipeline.report.tables import rounds_table
from rlhf_pipeline.runs.directory import RunDir

# Titles of what is drawn by round.
_CHARTS = {
    "reward_accuracy": "reward model: held-out accuracy",
    "reward_mean": "policy: reward on held-out prompts",
    "kl": "policy: KL to the reference",
}
_STAGES = ("collect", "reward", "ppo", "evaluate")
_COLUMNS = ("labelled", "pairs", "agreement", "reward_accuracy", "reward_pairs", "own_reward", "reward_mean",
            "reward_stderr", "one_judge", "gain", "kl", "distinct_2")  # fmt: skip


def by_round(runs: Path, name: str) -> list[dict[str, Any]]:
    """One row per round; round 0 is the policy before any, on the same held-out prompts. Missing figures are None."""
    rows: list[dict[str, Any]] = []
    together = _evaluation(RunDir(runs, name, "evaluate"))  # of all rounds, by the newest's reward model
    alike = members(together.get("metrics"))
    for collect in _rounds(runs, name):
        found = [RunDir(runs, collect.name, stage).record.get("results") for stage in ("collect", "reward", "ppo")]
        labels, reward, ppo = map(members, found)
        evaluation = _evaluation(RunDir(runs, collect.name, "evaluate"))
        policies, gains = members(evaluation.get("metrics")), members(evaluation.get("paired_gain"))
        before = evaluation.get("reference")
        if not rows and before in policies:
            one_judge = members(alike.get(str(together.get("reference")))).get("reward_mean")
            rows.append({"round": 0, **_policy(policies[before]), "one_judge": one_judge})
        rows.append(
            {
                "round": collect.round,
                **{key: labels.get(key) for key in ("labelled", "pairs", "agreement")},
                "reward_accuracy": reward.get("accuracy"),
                "reward_pairs": reward.get("pairs"),
                "own_reward": ppo.get("scores"),
                **_policy(members(policies.get("ppo"))),
                "gain": members(gains.get(f"ppo - {before}")).get("mean"),
                "judge": evaluation.get("reward"),
                "one_judge": members(alike.get(f"round{collect.round}")).get("reward_mean"),
            }
        )
    return rows


def _evaluation(out: RunDir) -> dict[str, Any]:
    """The evaluation of a run or round; empty where none can be read."""
    return next(iter(read(out.path / "evaluation.json", [])), {})


def _rounds(runs: Path, name: str) -> list[RunDir]:
    """stage=collect of each round in which anything has run, in order; a deleted round leaves a gap."""
    every = reversed(RunDir(runs, name, "collect").rounds())
    return [out for out in every if any((out.path.parent / stage / "run.json").is_file() for stage in _STAGES)]


def _policy(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics.get(key) for key in ("reward_mean", "reward_stderr", "kl", "distinct_2")}


def _links(rounds: list[RunDir]) -> list[Block]:
    """To the pages of the rounds' stages."""
    folders = [(f"round{out.round}/{stage}", out.path.parent / stage) for out in rounds for stage in _STAGES]
    pages = [(f"{name}/report.html", name) for name, folder in folders if (folder / "report.html").exists()]
    return [{"kind": "links", "rows": pages}]


def _columns(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rounds as rows of a table, with the columns that any of them fills."""
    filled = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    return {str(row["round"]): {key: row.get(key) for key in filled} for row in rows}


def _judges(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(row["judge"]) for row in rows if row.get("judge")))


def report_rounds(runs: Path, name: str, lang: str | None = None, show: bool = True) -> None:
    """Write `runs/<name>/rounds.json` and `report.html`, and print the table where it is to be shown."""
    rows = by_round(runs, name)
    write_json(runs / name / "rounds.json", rows)
    page = write_rounds(runs, name, lang)
    if show:
        rounds_table(_columns(rows), _judges(rows))
        print(f"{page} shows the rounds", flush=True)


def write_rounds(runs: Path, name: str, lang: str | None = None) -> Path:
    """Write `runs/<name>/report.html` from what the rounds have left; by default in the first one's language."""
    rows, folder, rounds = by_round(runs, name), runs / name, _rounds(runs, name)
    first = rounds[0] if rounds else RunDir(runs, f"{name}/round1", "collect")
    title = str(Path(first.record.get("name") or first.name).parent)
    words = Words(lang or members(first.config().get("report")).get("lang") or "en")
    judges, charts, drawn = _judges(rows), dict(_CHARTS), []
    if len(judges) > 1:  # where people label, nothing but each round's own reward model knows what is good
        charts["one_judge"] = charts.pop("reward_mean")
    for key, about in charts.items():
        points = [(float(row["round"]), float(row[key])) for row in rows if row.get(key) is not None]
        drawn += [chart(words(about), [Line("", "eval", points)], words, unit="Round")] if points else []
    judged = any(row.get("one_judge") is not None for row in rows)
    one = str(_evaluation(RunDir(runs, name, "evaluate")).get("reward")) if judged else ""
    experiment = first.record.get("experiment")
    again = command("evaluate", str(runs), **({"experiment": experiment} if experiment else {}), name=name)
    said = _judged_by(judges, one, again, words)
    curves: Block = {"kind": "charts", "label": "", "folded": False, "charts": drawn}
    parts = {
        "By round": note(said) + by_row("Rounds", "Round", _columns(rows), words=words) + _links(rounds),
        "Curves": [curves] if drawn else [],
    }
    return write_page(folder / "report.html", assemble(title, "", parts, words=words))


def _judged_by(judges: list[str], one: str, evaluate: str, words: Words) -> str:
    """Which reward judged: each round's own, and the `one` that judged all rounds, or the command for that."""
    if not judges:
        return ""
    said = [words("Reward: {}, on the same held-out prompts.", ", ".join(judges))]
    if len(judges) > 1:
        said.append(words("Each round has its own reward model for a judge: rewards compare within a round only."))
    if one:
        said.append(words("One judge: {}.", one))
    elif len(judges) > 1:
        said.append(words("To have the newest judge all rounds: {}", evaluate))
    return " ".join(said)

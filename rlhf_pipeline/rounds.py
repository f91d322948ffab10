"""Rounds of human feedback side by side: what each was labelled with, what its reward model and its policy came to."""

import itertools
import json
from pathlib import Path
from typing import Any

from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.report import Line, Words, assemble, by_row, chart, text, write_page
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.tables import rounds_table

# Titles of what is drawn by round.
_CHARTS = {
    "reward_accuracy": "reward model: held-out accuracy",
    "reward_mean": "policy: reward on held-out prompts",
    "kl": "policy: KL to the reference",
}
_STAGES = ("collect", "reward", "ppo", "evaluate")
_COLUMNS = {
    "labelled": "labelled",
    "pairs": "pairs",
    "agreement": "agreement",
    "reward_accuracy": "RM accuracy",
    "own_reward": "RM score",
    "reward_mean": "reward",
    "reward_stderr": "± s.e.",
    "gain": "gain over the reference",
    "kl": "KL",
    "distinct_2": "distinct-2",
}


def by_round(runs: Path, name: str) -> list[dict[str, Any]]:
    """A row a round; round 0 is the policy before any, on the same held-out prompts. What is not there yet is None."""
    rows: list[dict[str, Any]] = []
    for number in itertools.count(1):
        folders = {stage: RunDir(runs, f"{name}/round{number}", stage) for stage in _STAGES}
        results = {stage: folder.record.get("results") or {} for stage, folder in folders.items()}
        if not any(folder.record for folder in folders.values()):
            return rows
        path = folders["evaluate"].path / "evaluation.json"
        evaluation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        policies, gains = evaluation.get("metrics") or {}, evaluation.get("paired_gain") or {}
        if number == 1 and (before := policies.get(evaluation.get("reference"))):
            rows.append({"round": 0, **_policy(before)})
        rows.append(
            {
                "round": number,
                "labelled": results["collect"].get("labelled"),
                "pairs": results["collect"].get("pairs"),
                "agreement": results["collect"].get("agreement"),
                "reward_accuracy": results["reward"].get("accuracy"),
                "own_reward": results["ppo"].get("scores"),
                **_policy(policies.get("ppo") or {}),
                "gain": (gains.get(f"ppo - {evaluation.get('reference')}") or {}).get("mean"),
                "judge": evaluation.get("reward"),
            }
        )
    return rows


def _policy(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics.get(key) for key in ("reward_mean", "reward_stderr", "kl", "distinct_2")}


def _links(folder: Path) -> str:
    """To the pages of the rounds' stages."""
    rounds = itertools.takewhile(Path.is_dir, (folder / f"round{number}" for number in itertools.count(1)))
    pages = [f"{path.name}/{stage}" for path in rounds for stage in _STAGES if (path / stage / "report.html").exists()]
    return "<nav>" + "".join(f'<a href="{page}/report.html">{page}</a>' for page in pages) + "</nav>\n"


def report_rounds(runs: Path, name: str, lang: str | None = None) -> None:
    """Write `runs/<name>/rounds.json` and `report.html`, and print the table."""
    rows = by_round(runs, name)
    write_json(runs / name / "rounds.json", rows)
    page = write_rounds(runs, name, lang)
    rounds_table(rows)
    print(f"{page} shows the rounds", flush=True)


def write_rounds(runs: Path, name: str, lang: str | None = None) -> Path:
    """Write `runs/<name>/report.html` from what the rounds have left; by default in the first one's language."""
    rows, folder = by_round(runs, name), runs / name
    first = RunDir(runs, f"{name}/round1", "collect")
    made = (first.config().get("report") or {}).get("lang")
    title = str(Path(first.record.get("name") or f"{name}/round1").parent)
    words = Words(lang or made or "en")
    judges = list(dict.fromkeys(str(row["judge"]) for row in rows if row.get("judge")))
    charts, shared = dict(_CHARTS), "on the same held-out prompts"
    if len(judges) > 1:  # where people label, nothing but each round's own reward model knows what is good
        charts.pop("reward_mean")
        shared += "; each round has its own reward model for a judge, so rewards compare within a round only"
    shown = {str(row["round"]): {title: row.get(key) for key, title in _COLUMNS.items()} for row in rows}
    lines = {
        title: [(float(row["round"]), float(row[key])) for row in rows if row.get(key) is not None]
        for key, title in charts.items()
    }
    drawn = "".join(
        chart(words(k), [Line("", "eval", points)], words, unit="Round") for k, points in lines.items() if points
    )
    about = f'<p class="soft">Reward: {text(", ".join(judges))}, {shared}.</p>\n' if judges else ""
    parts = {
        "By round": about + by_row("Rounds", "Round", shown, words=words) + _links(folder),
        "Curves": f'<div class="grid">\n{drawn}</div>\n',
    }
    return write_page(folder / "report.html", assemble(text(title), "", parts, words=words))

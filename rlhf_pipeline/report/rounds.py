"""The page of rounds of human feedback: each round's labels, reward model and policy, side by side."""

from pathlib import Path
from typing import Any

from rlhf_pipeline.files import write_json
from rlhf_pipeline.report.charts import Line, small_chart
from rlhf_pipeline.report.files import as_dict, read_config, read_object
from rlhf_pipeline.report.page import write_page
from rlhf_pipeline.report.summary import command
from rlhf_pipeline.report.tables import rounds_table
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.runs.directory import RunDir

# Charts by round, with their titles. Rewards of different judges are not comparable, so then `one_judge` is drawn.
_CHARTS = {
    "reward_accuracy": "reward model: held-out accuracy",
    "reward_mean": "policy: reward on held-out prompts",
    "one_judge": "policy: reward on held-out prompts",
    "kl": "policy: KL to the reference",
}
Row = dict[str, Any]


def by_round(runs: Path, name: str) -> list[Row]:
    """Return a row per round. Round 0 is the initial policy on the same held-out prompts. Missing figures are None."""
    rows: list[Row] = []
    of_all = read_object(runs / name / "evaluate" / "evaluation.json")  # all rounds, judged by the newest reward model
    one_judge = {policy: as_dict(row).get("reward_mean") for policy, row in as_dict(of_all.get("metrics")).items()}
    for number, folder in _rounds(runs, name).items():
        records = [read_object(folder / stage / "run.json").get("results") for stage in ("collect", "reward", "ppo")]
        labels, reward, ppo = map(as_dict, records)
        evaluation = read_object(folder / "evaluate" / "evaluation.json")
        policies, before = as_dict(evaluation.get("metrics")), evaluation.get("reference")
        if not rows and before in policies:
            judged = one_judge.get(str(of_all.get("reference")))
            rows.append({"round": 0, **_figures({}, {}, {}, policies[before]), "one_judge": judged})
        rows.append({
            "round": number, **_figures(labels, reward, ppo, as_dict(policies.get("ppo"))),
            "gain": as_dict(as_dict(evaluation.get("paired_gain")).get(f"ppo - {before}")).get("mean"),
            "one_judge": one_judge.get(f"round{number}"), "judge": evaluation.get("reward"),
        })  # fmt: skip
    return rows


def _figures(labels: Row, reward: Row, ppo: Row, policy: Row) -> Row:
    return {
        **{key: labels.get(key) for key in ("labelled", "pairs", "agreement")},
        "reward_accuracy": reward.get("accuracy"), "reward_pairs": reward.get("pairs"),
        "own_reward": ppo.get("scores"),
        **{key: policy.get(key) for key in ("reward_mean", "reward_stderr", "kl", "distinct_2")},
    }  # fmt: skip


def _rounds(runs: Path, name: str) -> dict[int, Path]:
    """Return the folders of the rounds in which any stage has run, in order. A deleted round leaves a gap."""
    found = {out.round or 0: out.path.parent for out in reversed(RunDir(runs, name, "collect").rounds())}
    return {number: path for number, path in found.items() if any(path.glob("*/run.json"))}


def write_rounds(runs: Path, name: str, lang: str | None = None, show: bool = False) -> Path:
    """Write a run's `rounds.json` and `report.html` from the files of its rounds. `show` prints the table, too.

    The default language is that of the first round.
    """
    folder, rows, rounds = runs / name, by_round(runs, name), _rounds(runs, name)
    write_json(folder / "rounds.json", rows)
    table = {str(row["round"]): {key: row[key] for key in row if key not in ("round", "judge")} for row in rows}
    judges = list(dict.fromkeys(str(row["judge"]) for row in rows if row.get("judge")))
    first = next(iter(rounds.values()), folder) / "collect"
    words, charts = Words(lang or as_dict(read_config(first).get("report")).get("lang")), []
    for key, about in _CHARTS.items():
        points = [(float(row["round"]), float(row[key])) for row in rows if row.get(key) is not None]
        if points and key != ("reward_mean" if len(judges) > 1 else "one_judge"):
            charts.append(small_chart(words(about), [Line("", "eval", points)], words, unit="Round"))
    pages = [path.parent.relative_to(folder) for at in rounds.values() for path in sorted(at.glob("*/report.html"))]
    judged = any(row.get("one_judge") is not None for row in rows)
    page = write_page(
        folder / "report.html", "rounds", words, title=name,
        judges=judges, rows=table, charts=charts, links={f"{page}/report.html": str(page) for page in pages},
        one_judge=read_object(folder / "evaluate" / "evaluation.json").get("reward") if judged else None,
        again=command("evaluate", str(runs), experiment=read_object(first / "run.json").get("experiment"), name=name),
    )  # fmt: skip
    if show:
        rounds_table(table, judges)
        print(f"{page} shows the rounds", flush=True)
    return page

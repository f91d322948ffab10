"""Writes the tables of results in the READMEs from the figures of runs, so that no figure is typed by hand.

    python tests/benchmarks/tables.py                         write the tables of every README from results/*.json
    python tests/benchmarks/tables.py runs/demo               print the tables of a finished run
    python tests/benchmarks/tables.py runs/demo --keep demo   keep its figures as results/demo.json, then write them all

In a README, a line `<!-- table: KIND NAME ... -->` begins a table and `<!-- end -->` ends it. KIND is one of KINDS
below. NAME is a file of results/ without .json, or a pattern of such files (`ppo-*`: one for each machine and
commit). The curves of PPO in results/NAME.jsonl become the picture .github/NAME.svg.
"""

import argparse
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kept import ROOT, rows_of

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import read_json, read_jsonl, write_atomic, write_json, write_jsonl
from rlhf_pipeline.report.cards import as_markdown, markdown_table
from rlhf_pipeline.report.charts import curves
from rlhf_pipeline.report.figures import Table, comparison_tables, evaluation_tables, frontier_tables, name_of
from rlhf_pipeline.report.files import columns
from rlhf_pipeline.report.page import lasted, picture
from rlhf_pipeline.report.tables import figure
from rlhf_pipeline.report.words import Words

RESULTS, PICTURES = Path("tests", "benchmarks", "results"), Path(".github")
DRAWN = {"objective/scores": "reward", "objective/kl": "kl"}  # columns of PPO's log to keep; names in measures.yaml
# Stages and their files of results. The first stage that a run has counts.
MEASURED = {"compare": "comparison", "frontier": "frontier", "evaluate": "evaluation", "reward": "quality"}
ANSWERS = ("samples", "examples", "extremes", "shown", "starts", "points", "calibration")  # not kept
OF_ANSWERS = ("answers", "values")  # not kept of a frontier's policies
WIDTH = 120  # columns of a line of English text
MARKED = re.compile(r"^(<!-- table: (\w+) (.+?) -->\n)(?:.*?\n)??(<!-- end -->)$", re.DOTALL | re.MULTILINE)
# Chinese for the sentences and heads below the names of zh.yaml.
CHINESE = {
    "{} held-out prompts.": "{} 条留出提示词。",
    "{} of them begin training texts.": "其中 {} 条同时是训练文本的开头。",
    "Paired gain of {} over {}: {}, 95 % interval [{}, {}].": "{} 相对 {} 的配对提升：{}，95 % 区间 [{}, {}]。",
    "Commit {}, {}, seed {}, {} (cores: {}, threads: {}).": "commit {}，{}，随机种子 {}，{}（{} 核，{} 线程）。",
    "All stages took {}.": "全部阶段用时 {}。",
    "unknown": "未知",
    "policy": "策略模型",
    "reward (logit)": "奖励（logit）",
    "judge, P(positive)": "另一分类器 P(正面)",
    "perplexity": "困惑度",
    "length": "长度",
}
Kept = Mapping[str, Any]


def evaluation(kept: Kept, words: Words) -> str:
    """The policies of an evaluation before and after training, the gain of the last one, and how it was measured."""
    first, *_ = evaluation_tables(kept["evaluation"])
    return f"{_figures(first, words)}\n\n{_prose(kept, words)}"


def whole_evaluation(kept: Kept, words: Words) -> str:
    """All tables of an evaluation, as the terminal and its page show them, and how it was measured."""
    _, *rest = evaluation_tables(kept["evaluation"])
    return "\n\n".join([evaluation(kept, words), *_titled(rest, words)])


def comparison(kept: Kept, words: Words) -> str:
    """All tables of `stage=compare`, and how it was measured."""
    return "\n\n".join([*_titled(comparison_tables(kept["comparison"]), words), _wrapped(words, measured(kept, words))])


def frontier(kept: Kept, words: Words) -> str:
    """The last policy of each run of a sweep, next to the best of n, and how it was measured."""
    policies, *rest = frontier_tables(kept["frontier"])
    points = sorted(kept["frontier"]["points"], key=lambda point: point["step"] or math.inf)  # None: the result
    last = {point["run"]: policies.rows[name_of(point)] for point in points}
    found = [policies._replace(rows=dict(sorted(last.items()))), *rest]
    return "\n\n".join([*_titled(found, words), _wrapped(words, measured(kept, words))])


def real(kept: Kept, words: Words) -> str:
    """Each judge's scores of real.py's policies, and how they were measured."""
    from real import table as policies  # it imports this file

    header, rest = policies(kept["evaluation"]).split("\n", 1)
    header = re.sub(r"(?<=\| )[^|]+(?= \|)", lambda head: _said(head[0], words), header)
    return f"{header}\n{rest}\n\n{_wrapped(words, measured(kept, words), _took(kept, words))}"


def quality(every: Sequence[Kept], words: Words) -> str:
    """Reward models by their training data, and how each was measured."""
    keys = ("accuracy", "rows", "pairs", "length_correlation")
    rows = {one["data"]: {key: one["quality"].get(key) for key in keys} for one in every}
    about = dict.fromkeys(measured(one, words) for one in every)
    return f"{_figures(Table('', '', rows), words)}\n\n{_wrapped(words, *about)}"


def speed(every: Sequence[Kept], words: Words) -> str:
    """PPO, RLOO and GRPO against TRL's, and the time of each part of our update."""
    from ppo_speed import parts_table, ppo_table  # it takes seconds to import

    rows = [row for row in rows_of(every) if "TRL" in row["sides"]]
    return f"{ppo_table(rows)}\n\n{parts_table(rows)}"


def stages(every: Sequence[Kept], words: Words) -> str:
    """SFT, pretraining and the reward stage against TRL's."""
    from stages_speed import stages_table

    return stages_table(rows_of(every))


def busy(every: Sequence[Kept], words: Words) -> str:
    """The demo's stages alone and next to a busy process."""
    from busy import busy_table

    return busy_table(rows_of(every))


def _each(made: Callable[[Kept, Words], str]) -> Callable[[Sequence[Kept], Words], str]:
    return lambda every, words: "\n\n".join(made(one, words) for one in every)


# The kinds of tables in READMEs: functions that make Markdown from the kept results, in the README's language.
KINDS: dict[str, Callable[[Sequence[Kept], Words], str]] = {
    **{made.__name__: _each(made) for made in (evaluation, whole_evaluation, comparison, frontier, real)},
    **{made.__name__: made for made in (quality, speed, stages, busy)},
}


def measured(kept: Kept, words: Words) -> str:
    """A sentence with the commit, date and machine of a measurement, from `measured` in a file of results/."""
    about = kept["measured"]
    keys = ("commit", "date", "seed", "machine", "cores", "threads")
    values = (_said("unknown", words) if about.get(key) is None else as_markdown(about[key]) for key in keys)
    return _said("Commit {}, {}, seed {}, {} (cores: {}, threads: {}).", words, *values)


def _said(phrase: str, words: Words, *values: object) -> str:
    return str(CHINESE.get(phrase, phrase) if words.lang == "zh" else phrase).format(*values)


def _figures(found: Table, words: Words) -> str:
    keys = columns(found.rows.values())
    rows = [[name, *(figure(key, row.get(key)) for key in keys)] for name, row in found.rows.items()]
    return str(markdown_table(["", *map(words.name, keys)], rows))


def _titled(every: Sequence[Table], words: Words) -> list[str]:
    return [f"{words(found.title)}:\n\n{_figures(found, words)}" for found in every]


def _prose(kept: Kept, words: Words) -> str:
    found = kept["evaluation"]
    last, reference = list(found["metrics"])[-1], found["reference"]
    parts = []
    if gain := found["paired_gain"].get(f"{last} - {reference}"):
        values = (as_markdown(last), as_markdown(reference), *(f"{gain[key]:+.3f}" for key in ("mean", "low", "high")))
        parts.append(_said("Paired gain of {} over {}: {}, 95 % interval [{}, {}].", words, *values))
    parts.append(_said("{} held-out prompts.", words, found["prompts"]))
    if found.get("prompts_in_training") is not None:
        parts.append(_said("{} of them begin training texts.", words, found["prompts_in_training"]))
    return _wrapped(words, *parts, measured(kept, words), _took(kept, words))


def _took(kept: Kept, words: Words) -> str:
    return _said("All stages took {}.", words, lasted(kept["seconds"]))


def _wrapped(words: Words, *sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), WIDTH) if words.lang == "en" else "".join(sentences)


def gather(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a finished run's figures, without the answers, how they were measured, and PPO's curves."""
    stage = next((stage for stage in MEASURED if (run / stage).is_dir()), "evaluate")
    what = MEASURED[stage]
    found, record = read_json(run / stage / f"{what}.json"), read_json(run / stage / "run.json")
    if not found or record.get("status") != "done":
        raise UserError(f"{run} has no finished evaluation; run stage=evaluate on it first, or name a folder such as "
                        "runs/demo.")  # fmt: skip
    hardware, versions, git = record["hardware"], record["versions"], record.get("git") or {}
    own = f"{git['commit'][:7]}{' with changes' if git['dirty'] else ''}" if git else None
    stages = [read_json(path) for path in sorted(run.glob("*/run.json"))]
    kept = {
        "measured": {
            "date": record["finished"][:10], "commit": own, "seed": record["seed"],
            "machine": hardware["gpu"] or hardware["cpu"], "cores": hardware["cores"], "threads": hardware["threads"],
            **{key: versions[key] for key in ("python", "torch", "trl")},
        },
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        **({"data": Path(record["data"]["path"] or record["data"]["name"]).name} if stage == "reward" else {}),
        what: _without_answers(found, stage),
    }  # fmt: skip
    log = read_jsonl(run / "ppo" / "metrics.jsonl")
    return kept, [{key: round(row[key], 4) for key in ("step", *DRAWN) if key in row} for row in log]


def _without_answers(found: Kept, stage: str) -> Kept:
    if stage != "frontier":
        return {key: value for key, value in found.items() if key not in ANSWERS}
    own = {
        key: [{name: figure for name, figure in row.items() if name not in OF_ANSWERS} for row in found[key]]
        for key in ("starts", "points")
    }
    return {**found, **own}


def drawn(log: Sequence[Mapping[str, Any]]) -> str:
    """The curves of PPO's reward and KL as the report draws them, as one SVG."""
    words = Words()
    charts = itertools.chain.from_iterable(curves({"": log}, words)["groups"].values())
    return picture([chart for chart in charts if chart["title"] in map(words.measure, DRAWN.values())])


def written(text: str, lang: str, root: Path = ROOT) -> str:
    """Return a README's text with its tables made again from the results below `root`."""

    def made(found: re.Match[str]) -> str:
        begin, kind, names, end = found.groups()
        if kind not in KINDS:
            raise UserError(f"no kind of table is called '{kind}'; choose one of: {', '.join(KINDS)}.")
        return f"{begin}{KINDS[kind](list(_kept(names.split(), root)), Words(lang))}\n{end}"

    return MARKED.sub(made, text)


def _kept(names: Sequence[str], root: Path) -> Iterator[Kept]:
    for name in names:
        paths = sorted((root / RESULTS).glob(f"{name}.json"))
        if not paths:
            known = ", ".join(sorted(path.stem for path in (root / RESULTS).glob("*.json"))) or "none"
            raise UserError(f"no results are called '{name}' in {RESULTS}; there are: {known}.")
        yield from map(read_json, paths)


def readmes(root: Path = ROOT) -> dict[Path, str]:
    """Find all READMEs with tables of this script, and their languages."""
    tops = (root.glob("README*.md"), *((root / top).rglob("README.md") for top in ("conf", "rlhf_pipeline", "tests")))
    found = [path for top in tops for path in sorted(top) if MARKED.search(path.read_text(encoding="utf-8"))]
    return {path: "zh" if path.name == "README.zh-CN.md" else "en" for path in found}


def pictures(root: Path = ROOT) -> dict[Path, str]:
    """Draw the picture of every run whose curves are kept; returns them by path."""
    return {root / PICTURES / f"{log.stem}.svg": drawn(read_jsonl(log)) for log in (root / RESULTS).glob("*.jsonl")}


def write_readmes(root: Path = ROOT) -> None:
    """Write the tables and pictures whose results have changed."""
    texts = {path: written(path.read_text(encoding="utf-8"), lang, root) for path, lang in readmes(root).items()}
    for path, text in {**texts, **pictures(root)}.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)
            print(path.relative_to(root))


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Return the exit status: 0 if done, 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, such as runs/demo")
    parser.add_argument("--keep", metavar="NAME", help="keep the run's figures as results/NAME.json")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the printed tables")
    args = parser.parse_args(arguments)
    try:
        found = [gather(run) for run in args.runs]
        if args.keep and len(found) != 1:
            raise UserError("--keep takes one run: tables.py runs/demo --keep demo.")
        for kept, log in found:
            if args.keep:
                write_json(root / RESULTS / f"{args.keep}.json", kept)
                if log:
                    write_jsonl(root / RESULTS / f"{args.keep}.jsonl", log)
            else:
                (what,) = set(MEASURED.values()) & kept.keys()
                print(KINDS["whole_evaluation" if what == "evaluation" else what]([kept], Words(args.lang)))
        if args.keep or not found:
            write_readmes(root)
    except UserError as error:
        print(f"{error.kind}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

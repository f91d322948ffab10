"""Tables on the terminal."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.report import Words, evaluation_tables, short
from rlhf_pipeline.texts import shown

_ABREAST = 4  # policies whose answers can be read side by side
_HEAD = 10  # characters of a column's head that stay on one line
_MANY = 30  # policies of a sweep that a table shows
_BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128)  # the n of best-of-n that are told
_FORMS = {"positive": ".1%", "win_rate": ".1%", "kl": ".2f", "perplexity": ".2f", "held_out_perplexity": ".2f",
          "length": ".1f", "moved": ".2f", "seconds": ".0f", "gain": "+.3f", "95 % from": "+.3f",
          "95 % to": "+.3f"}  # fmt: skip


def number(value: Any, digits: int = 3) -> str:
    """A number for people; a dash for none."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _console() -> Console:
    """The terminal; where there is none, as in a log file, wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def evaluation_table(evaluation: dict[str, Any]) -> None:
    """The tables of an evaluation that its page shows too, what it warns of, and some answers."""
    known, count = evaluation.get("prompts_in_training"), evaluation["prompts"]
    about = f"{count} held-out prompts"
    about += f" ({known} of {count} also begin training texts)" if known is not None else ""
    console = _console()
    console.print(Text(shown(f"{about}; reward: {evaluation['reward']}; KL to {evaluation['reference']}")))
    for title, _, rows in evaluation_tables(evaluation):
        console.print(_figures(title, [*rows.items()]))
    for line in evaluation.get("warnings", []):
        console.print(Text(shown(f"warning: {line}"), style="yellow"))
    names = list(evaluation["metrics"])
    extremes = [{**rows[0], "prompt": f"{kind}: {rows[0]['prompt']}"}
                for kind, rows in evaluation.get("extremes", {}).items() if rows]  # fmt: skip
    # Of many policies those that matter, or no column could be read; the file has them all.
    few = names if len(names) <= _ABREAST else list(dict.fromkeys((names[0], evaluation["reference"], names[-1])))
    for title, answers, who in (
        ("Typical answers", evaluation["examples"], few),
        (f"Best and worst of {names[-1]}, and most changed from {names[0]}", extremes, few),
        ("Answers to your own", evaluation.get("shown"), names),
    ):
        if answers:
            console.print(_answers(title, answers, who))


def _figures(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Names by row, and a column for every key that any row fills; a long name is folded, a figure is not."""
    keys = [key for key in dict.fromkeys(key for _, row in rows for key in row)
            if any(row.get(key) is not None for _, row in rows)]  # fmt: skip
    table = Table(title=Text(shown(title)), title_justify="left")
    table.add_column("", overflow="fold")
    for key in keys:
        head = Words().name(key)
        table.add_column(head.replace(" ", "\n") if len(head) > _HEAD else head, justify="right", no_wrap=True)
    for name, row in rows:
        table.add_row(Text(shown(name)), *(Text(_figure(key, row.get(key))) for key in keys))
    return table


def _figure(key: str, value: Any) -> str:
    """A figure with as many digits as its column takes; a dash for none."""
    return f"{value:{_FORMS.get(key, '.3f')}}" if isinstance(value, float) else "-" if value is None else str(value)


def frontier_table(frontier: dict[str, Any]) -> None:
    """The policies of a sweep by row, those that none beats marked; of many only these and the results."""
    points = frontier["points"]
    results = {row["run"]: row for row in points}.values()
    shown_rows = points if len(points) <= _MANY else [row for row in points if row["frontier"] or row in results]
    most = min(len(start["best_of"]) for start in frontier["starts"])
    rows = []
    for row in shown_rows:
        low, high = row["gain"]["low"], row["gain"]["high"]
        figures = {"step": row["step"] or "result", **{key: row[key] for key in ("reward_mean", "reward_stderr", "kl")}}
        figures["gain, 95 % interval"] = f"{row['gain']['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
        figures |= {"= best of": row["best_of"] or f"> {most}", "distinct_2": row["distinct_2"]}
        rows.append((f"{'* ' if row['frontier'] else '  '}{_short(row['run'])}", figures))
    console = _console()
    title = f"{frontier['sweep']}; reward: {frontier['reward']}; *: none has more reward at no more KL"
    console.print(_figures(title, rows))
    if len(shown_rows) < len(points):
        console.print(f"{len(points) - len(shown_rows)} more checkpoints are in frontier.json")
    for start in frontier["starts"]:
        few = [row for row in start["best_of"] if row["n"] in _BEST_OF]
        told = "; ".join(f"{row['n']}: {number(row['reward_mean'])} at {number(row['kl'], 2)}" for row in few)
        console.print(Text(f"best of n of {shown(start['path'])}: {told}"))


def _short(job: str) -> str:
    """A job of a sweep by the last word of each setting: kl_coef=0.05."""
    return re.sub(r"[\w.]+\.(\w+=)", r"\1", job)


def _answers(title: str, rows: list[dict[str, Any]], policies: Sequence[str]) -> Table:
    """Prompts by row, those of the policies that have answered by column."""
    names = [name for name in policies if name in rows[0]["responses"]]
    table = Table(title=Text(shown(title)), title_justify="left", show_lines=True)
    for name in ("prompt", *names):
        table.add_column(Text(shown(name)), overflow="fold")
    for row in rows:
        # Text, not markup, and escapes that do nothing: what a model wrote is data.
        cells = [f"{shown(row['responses'][name]).rstrip()} ({row['rewards'][name]:.2f})" for name in names]
        table.add_row(Text(shown(row["prompt"])), *map(Text, cells))
    return table


def side_by_side(answers: Sequence[tuple[str, str, float | None]]) -> None:
    """Names, answers and rewards by column, which share the terminal's width."""
    table = Table(show_edge=False, expand=True)
    for name, _, _ in answers:
        table.add_column(Text(shown(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(shown(answer).strip()) for _, answer, _ in answers))
    if any(reward is not None for _, _, reward in answers):
        table.add_row(*(Text(f"reward {number(reward)}", style="dim") for _, _, reward in answers))
    _console().print(table)


def sweep_table(found: dict[str, Any], own: Collection[str]) -> None:
    """The settings of a sweep by row, the best objective first; then which of a command's own jobs failed."""
    rows, jobs = found["rows"], [job for job in found["jobs"] if job["job"] in own]
    failed = [job for job in jobs if job["status"] == "failed"]
    cells = []
    for row in rows:
        results = row["results"]  # on validation prompts; in training, where there are none
        kl = results.get("validation_kl", results.get("kl"))
        over = " (over)" if row["over_budget"] else ""
        figures = {"objective": row["objective"], "± s.e.": row["stderr"]}
        figures |= {"reward": results.get("validation_reward", results.get("scores"))} if kl is not None else {}
        figures |= {"kl": number(kl, 2) + over if kl is not None else None, "seeds": row["seeds"]}
        figures |= {"failed": row["failed"] or None, "left": row["left"] or None, "seconds": row["seconds"]}
        cells.append((short(row), figures))
    console = _console()
    about = f"; objective: {found['objective']}" if found["objective"] else ""
    about += f" (KL <= {found['kl_budget']:g})" if found["kl_budget"] is not None else ""
    console.print(_figures(f"{found['sweep']} ({found['stage']}){about}", cells))
    if rows and rows[0]["over_budget"]:
        nearest = f"nearest: {short(rows[0])}"
        console.print(Text(shown(f"no settings keep within sweep.kl_budget={found['kl_budget']:g}; {nearest}")))
    for job in failed:
        console.print(Text(shown(f"failed: {job['job']}: {job['error']}"), style="red"))
    if failed:
        console.print(f"{len(failed)} of {len(jobs)} jobs failed; the same command tries them again")


def rounds_table(rows: Mapping[str, Mapping[str, Any]], judges: Sequence[str]) -> None:
    """Rounds of human feedback by row: labels, reward model, policy; an accuracy with the number of its pairs."""
    of = judges[0] if len(judges) == 1 else "each round's own reward model, so compare within a round"
    cells = []
    for name, row in rows.items():
        pairs, accuracy = row.get("reward_pairs"), row.get("reward_accuracy")
        of_pairs = {"reward_accuracy": f"{accuracy:.3f} of {pairs}"} if accuracy is not None and pairs else {}
        told = {key: value for key, value in row.items() if key not in ("reward_pairs", "one_judge", "distinct_2")}
        cells.append((name, {**told, **of_pairs}))
    _console().print(_figures(f"by round; reward: {of}", cells))


_PARTS = ("process", "weights", "gradients", "Adam", "master", "reference", "critic", "reward", "activations",
          "bf16 copies", "KV cache", "logits", "buckets", "gathered", "allocator")  # fmt: skip


def plan_table(plan: dict[str, Any]) -> None:
    """What a launch needs, a column each; before it what was counted, after it which fits. All of it is computed."""
    console, rows = _console(), plan["launches"]
    for label, text in _counted(plan).items():
        console.print(Text(f"{label:<11}{shown(text)}"))
    machine = f"{plan['gpus']} x {plan['gpu']} of {plan['memory'] / 2**30:.0f} GiB, MFU {plan['mfu']:.0%}"
    console.print(Text(f"{'computed':<11}not measured: what each process takes on {machine}"))
    table = Table()
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["launch"], justify="right", no_wrap=True)

    def line(name: str, cells: Sequence[str]) -> None:
        if any(cell != "-" for cell in cells):
            table.add_row(Text(name), *cells)

    line("GiB", [f"{row['bytes'] / 2**30:.2f}" for row in rows])
    for part in _PARTS:
        line(f"  {part}", [f"{row['parts'][part] / 2**30:.2f}" if part in row["parts"] else "-" for row in rows])
    line("fullest at", [row["moment"] for row in rows])
    line("fits", ["yes" if row["fits"] else "no" for row in rows])
    table.add_section()
    line("TFLOPs/update", [f"{row['update_flops'] / 1e12:.3g}" for row in rows])
    line("seconds/update", [f"{row['update_seconds']:.3g}" for row in rows])
    for part in dict.fromkeys(part for row in rows for part in row["seconds"]):
        line(f"  {part}", [f"{row['seconds'][part]:.3g}" if part in row["seconds"] else "-" for row in rows])
    line("updates", [str(row["updates"] or "-") for row in rows])
    line("minutes, whole run", [f"{row['run_seconds'] / 60:,.1f}" if row["run_seconds"] else "-" for row in rows])
    console.print(table)
    if plan["chosen"]:
        least = plan["fewest"]
        less = f"; {least['launch']} on {least['gpus']} of them fits too" if least["gpus"] < plan["gpus"] else ""
        console.print(Text(f"{'fits':<11}{plan['chosen']} is the simplest that does{less}"))
        return
    console.print(Text(f"{'fits':<11}none; what would need less:"))
    for name, found in plan["helps"].items():
        verdict = "fits" if found["fits"] else "does not fit"
        console.print(Text(f"{'':<11}{name}: {found['bytes'] / 2**30:.2f} GiB ({found['launch']}), {verdict}"))


def _counted(plan: dict[str, Any]) -> dict[str, str]:
    """Parameters by role, and the work of an update."""
    count, work = plan["parameters"], plan["work"]
    critic = f"a critic of {count['critic']:,}" if count["critic"] else f"a value head of {count['value_head']:,}"
    own = "the policy, its adapter off"
    reference = f"{count['reference']:,}, {plan['reference_bytes'] / 2**30:.2f} GiB" if count["reference"] else own
    return {
        "policy": f"{count['policy']:,} parameters and {critic}; {count['trained']:,} are trained: {plan['policy']}",
        "reference": f"{reference}; reward: {count['reward']:,} ({plan['reward']})",
        "update": f"{work['rows']} responses a process, up to {work['prompt']} + {work['response']} tokens, "
        f"{work['epochs']} epochs of {work['minibatches']} steps, {work['micro']} rows at a time, "
        f"{'bf16 with fp32 master weights' if work['bf16'] else 'fp32'}"
        + (", checkpointed" if work["checkpointing"] else ""),
    }  # fmt: skip

"""Tables on the terminal. Text by models and people is shown literally, never as markup."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_pipeline.report.charts import settings_text
from rlhf_pipeline.report.figures import (
    OVER_BUDGET,
    Rows,
    comparison_tables,
    evaluation_tables,
    frontier_tables,
    sweep_figures,
)
from rlhf_pipeline.report.files import columns
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.texts import printable

_ABREAST = 4  # the most policies whose answers are shown side by side
_FORMS = {"positive": ".1%", "win_rate": ".1%", "kl": ".2f", "perplexity": ".2f", "held_out_perplexity": ".2f",
          "length": ".1f", "moved": ".2f", "validation_kl": ".2f", "gain": "+.3f", "95 % from": "+.3f",
          "95 % to": "+.3f", "sampled_tokens": ",.0f"}  # fmt: skip

_AGAINST_KL = ("reward_mean", "reward_stderr", "kl", "gain", "95 % from", "95 % to", "as good as best of", "frontier")


def _console() -> Console:
    """Return the console. Without a terminal (in a log file), it is 100 columns wide, enough for the tables."""
    # Without colours and bold: their codes would be escaped, as those in the texts of models are.
    plain: Any = {"highlight": False, "color_system": None}
    return console if (console := Console(**plain)).is_terminal else Console(**plain, width=100)


def _say(text: str, style: str = "") -> None:
    _console().print(Text(printable(text), style=style))


def _figures(title: str, rows: Rows) -> None:
    """Print a row per name and a column per key that any row has; turned by 90 degrees if only that fits."""
    console, keys = _console(), columns(rows.values())
    cells = {name: [figure(key, row.get(key)) for key in keys] for name, row in rows.items()}
    heads = [Words().name(key) for key in keys]
    heads_in_lines = [head.replace(" ", "\n") if len(head) > 10 else head for head in heads]
    table = _grid(title, heads_in_lines, cells)
    figures = _grid("", heads_in_lines, {f"{at:4}": own for at, own in enumerate(cells.values())})  # names are wrapped
    wide = console.measure(figures, options=console.options.update(max_width=10_000)).maximum > console.width
    if wide and len(rows) < len(keys):
        turned = {head: [own[at] for own in cells.values()] for at, head in enumerate(heads)}
        table = _grid(title, list(map(printable, cells)), turned)
    console.print(table)


def _grid(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """Return a table of figures. Long names are wrapped, figures are not."""
    table = Table(title=Text(printable(title)), title_justify="left")
    table.add_column("", overflow="fold")
    for head in heads:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(Text(printable(name)), *map(Text, row))
    return table


def figure(key: str, value: Any) -> str:
    """Format a figure as its column shows it; a dash for None."""
    return f"{value:{_FORMS.get(key, '.3f')}}" if isinstance(value, float) else "-" if value is None else str(value)


def evaluation_table(evaluation: dict[str, Any]) -> None:
    """Print the tables of an evaluation, as on its page, its warnings and some answers."""
    known, count = evaluation.get("prompts_in_training"), evaluation["prompts"]
    about = f" ({known} of {count} also begin training texts)" if known is not None else ""
    _say(f"{count} held-out prompts{about}; reward: {evaluation['reward']}; KL to {evaluation['reference']}")
    for title, _, rows in evaluation_tables(evaluation):
        _figures(title, rows)
    for line in evaluation.get("warnings", []):
        _say(f"warning: {line}", "yellow")
    names = list(evaluation["metrics"])
    extremes = [{**rows[0], "prompt": f"{kind}: {rows[0]['prompt']}"}
                for kind, rows in evaluation.get("extremes", {}).items() if rows]  # fmt: skip
    # With many policies the columns get too narrow, so show three; evaluation.json has all.
    few = names if len(names) <= _ABREAST else list(dict.fromkeys((names[0], evaluation["reference"], names[-1])))
    _answers("Typical answers", evaluation["examples"], few)
    _answers(f"Best and worst of {names[-1]}, and most changed from {names[0]}", extremes, few)
    _answers("Answers to your own prompts", evaluation.get("shown"), names)


def _answers(title: str, rows: Sequence[dict[str, Any]] | None, policies: Sequence[str]) -> None:
    """Print a row per prompt, and a column per policy that has answers."""
    if rows:
        names = [name for name in policies if name in rows[0]["responses"]]
        cells = [[row["prompt"], *(f"{row['responses'][name].rstrip()} ({row['rewards'][name]:.2f})" for name in names)]
                 for row in rows]  # fmt: skip
        _texts(["prompt", *names], cells, title=Text(printable(title)), title_justify="left", show_lines=True)


def side_by_side(answers: Sequence[tuple[str, str, float | None]]) -> None:
    """Print names, answers and rewards in columns, which share the terminal's width."""
    texts = [text.strip() for _, text, _ in answers]
    rewards = [f"reward {reward:.3f}" for _, _, reward in answers if reward is not None]
    _texts([name for name, _, _ in answers], list(filter(None, (texts, rewards))), show_edge=False, expand=True)


def _texts(heads: Sequence[str], rows: Sequence[Sequence[str]], **style: Any) -> None:
    """Print texts literally: no markup, and escape sequences have no effect."""
    table = Table(**style)
    for head in heads:
        table.add_column(Text(printable(head)), ratio=1 if style.get("expand") else None, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(table)


def frontier_table(frontier: dict[str, Any]) -> None:
    """Print the tables of a sweep's policies, as on its page but with fewer columns."""
    _say(f"{frontier['sweep']}; reward: {frontier['reward']}")
    policies, *others = frontier_tables(frontier)
    few = {name: {key: row.get(key) for key in _AGAINST_KL} for name, row in policies.rows.items()}
    for title, _, rows in (policies._replace(rows=few), *others):
        _figures(title, rows)


def comparison_table(comparison: dict[str, Any]) -> None:
    """Print the tables of a comparison, as on its page."""
    start = comparison["starts"][0]
    _say(f"{start['prompts']} held-out prompts ({start['prompts_in_training']} also begin training texts); "
         f"reward: {comparison['reward']}; KL to SFT")  # fmt: skip
    for title, _, rows in comparison_tables(comparison):
        _figures(title, rows)


def sweep_table(found: dict[str, Any], own: Collection[str]) -> None:
    """Print a sweep's settings by row, the best objective first; then the failed jobs among `own`, this command's."""
    rows = {settings_text(row): sweep_figures(row) for row in found["rows"]}
    validated = any("validation_kl" in row for row in rows.values())  # else the figures of training
    judged = ("validation_reward", "validation_kl") if validated else ("scores", "kl")
    keys = ("objective", "± s.e.", *judged, OVER_BUDGET, "seeds", "failed", "left", "time")
    about = f"; objective: {found['objective']}" if found["objective"] else ""
    about += f" (KL <= {found['kl_budget']:g})" if found["kl_budget"] is not None else ""
    title = f"{found['sweep']} ({found['stage']}){about}"
    _figures(title, {name: {key: row.get(key) for key in keys} for name, row in rows.items()})
    if found["rows"] and found["rows"][0]["over_budget"]:
        _say(f"no settings keep within sweep.kl_budget={found['kl_budget']:g}; nearest: {next(iter(rows))}")
    jobs = [job for job in found["jobs"] if job["job"] in own]
    failed = [job for job in jobs if job["status"] == "failed"]
    for job in failed:
        _say(f"failed: {job['job']}: {job['error']}", "red")
    if failed:
        _say(f"{len(failed)} of {len(jobs)} jobs failed; the same command tries them again")


def rounds_table(rows: Rows, judges: Sequence[str]) -> None:
    """Print a row per round of human feedback: labels, reward model, policy."""
    of = judges[0] if len(judges) == 1 else "each round's own reward model, so compare within a round"
    _figures(f"by round; reward: {of}", rows)


def plan_table(plan: dict[str, Any]) -> None:
    """Print the computed sizes, then a column of needs per launch, then the simplest launch that fits."""
    count, work = plan["parameters"], plan["work"]
    critic = f"a critic of {count['critic']:,}" if count["critic"] else f"a value head of {count['value_head']:,}"
    own = "the policy with its adapter off"
    reference = f"{count['reference']:,}, {plan['reference_bytes'] / 2**30:.2f} GiB" if count["reference"] else own
    bf16 = "bf16 with fp32 master weights" if work["bf16"] else "fp32"
    machine = f"{plan['gpus']} x {plan['gpu']} of {plan['memory'] / 2**30:.0f} GiB, MFU {plan['mfu']:.0%}"
    for line in (
        f"policy     {count['policy']:,} parameters and {critic}; {count['trained']:,} are trained: {plan['policy']}",
        f"reference  {reference}; reward: {count['reward']:,} ({plan['reward']})",
        f"update     {work['rows']} responses a process, up to {work['prompt']} + {work['response']} tokens, "
        f"{work['epochs']} epochs of {work['minibatches']} steps, {work['micro']} rows at a time, "
        f"{bf16}{', checkpointed' if work['checkpointing'] else ''}",
        f"computed   not measured: the needs of each process on {machine}",
    ):
        _say(line)
    parts = [columns(launch[key] for launch in plan["launches"]) for key in ("parts", "seconds")]
    launches = {launch["launch"]: _launch(launch, *parts) for launch in plan["launches"]}
    _figures("", {name: {key: row[name] for key, row in launches.items()} for name in columns(launches.values())})
    less = "trainer.gradient_checkpointing=true, trainer.local_rollout_forward_batch_size=8 or policy.lora.r=8"
    _say(f"fits       {plan['chosen']} is the simplest that does" if plan["chosen"] else f"fits       none; try {less}")


def _launch(launch: dict[str, Any], parts: list[str], times: list[str]) -> dict[str, str | None]:
    """Return one column: memory by part, then time by part; None for a part that the launch does not have."""

    def told(value: float | None, form: str, unit: float = 1) -> str | None:
        return None if value is None else format(value / unit, form)

    return {
        "GiB": told(launch["bytes"], ".2f", 2**30),
        **{f"  {part}": told(launch["parts"].get(part), ".2f", 2**30) for part in parts},
        "fullest at": launch["moment"], "fits": "yes" if launch["fits"] else "no",
        "TFLOPs/update": told(launch["update_flops"], ".3g", 1e12),
        "seconds/update": told(launch["update_seconds"], ".3g"),
        **{f"  {part}": told(launch["seconds"].get(part), ".3g") for part in times},
        "updates": told(launch["updates"], ".0f"), "minutes, whole run": told(launch["run_seconds"], ",.1f", 60),
    }  # fmt: skip

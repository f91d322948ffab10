"""The sections of a card, in the order in which one asks: what, from what, how, how well, and what it cannot do."""

from rlhf_pipeline.cards.loading import loading
from rlhf_pipeline.cards.made import Made, json_object
from rlhf_pipeline.cards.markdown import as_yaml, block, homeless, said, table
from rlhf_pipeline.data import hub_set
from rlhf_pipeline.report import items, members, number, read

_WHAT = {
    "pretrain": "A language model trained from scratch",
    "sft": "A language model after supervised fine-tuning",
    "ppo": "A language model after PPO, which moved it towards what a reward calls good",
}
_SHAPE = {
    "layers": ("n_layer", "num_hidden_layers", "n_layers"),
    "width": ("n_embd", "hidden_size", "dim"),
    "heads": ("n_head", "num_attention_heads", "n_heads"),
    "positions": ("n_positions", "max_position_embeddings"),
}
# Of config.yaml, what makes a stage's work.
_WORK = ("defaults", "hydra", "stage", "name", "experiment", "seed", "runs", "overwrite", "policy", "reward", "data",
         "trainer", "ptx", "stages")  # fmt: skip
_SIGNS = {
    "distinct": "the share of distinct bigrams fell by more than half",
    "repeated": "most answers were given to more than one prompt",
    "length": "answers shrank to less than a quarter of their length",
    "kl": "the KL to where it began ran away",
}
_SMALL = 50e6  # parameters up to which a language model has form and little else
_FOLLOWS_LENGTH = 0.3  # a correlation that is worth a warning
_LICENCE = (
    "The code that made this model, rlhf_pipeline, is Apache-2.0. That says nothing of the model: the data's licence "
    "is yours to check, and so is that of a model that it began from."
)


def sections(made: Made) -> dict[str, str]:
    """Title to text; an empty text has nothing to say."""
    return {
        "What it is": _what(made),
        "Data": _data(made),
        "Training": _training(made),
        "Results": _results(made),
        "Evaluation": _evaluation(made),
        "Limits": "\n".join(f"- {line}" for line in _limits(made)),
        "To load it": loading(made),
        "To repeat it": _repeating(made),
        "Licence": _LICENCE,
    }


def _what(made: Made) -> str:
    reward = "A reward model: a score for an answer" if made.scalar else "A classifier of texts, to be a reward"
    found = {
        name: next((made.config[key] for key in keys if key in made.config), None) for name, keys in _SHAPE.items()
    }
    architecture = [
        said(made.config.get("architectures")),
        *(f"{name} {said(value)}" for name, value in found.items() if value is not None),
        *(f"{key} {said(made.config.get(key))}" for key in ("head", "pooling") if made.own_class),
    ]
    kind = members(json_object(made.model / "tokenizer.json").get("model")).get("type")
    tokenizer = json_object(made.model / "tokenizer_config.json").get("tokenizer_class")
    facts = {
        "Stage": said(made.stage),
        "Experiment": said(made.run.get("experiment")),
        "Architecture": ", ".join(architecture),
        "Parameters": f"{made.parameters:,}",
        "Tokenizer": f"{said(tokenizer)}, {said(kind)}, {said(made.config.get('vocab_size'))} tokens",
    }
    return f"{_WHAT.get(made.stage, reward)}, made by rlhf_pipeline.\n\n{table(['', ''], facts.items())}"


def _data(made: Made) -> str:
    data = made.data
    if not data:
        return ""
    head = ["Name", "From", "Rows to learn from", "Rows held out", "SHA-256 of the rows"]
    where = hub_set(data) or data.get("path")
    return table(
        head, [[said(data.get("name")), said(where), *(said(data.get(k)) for k in ("train", "test", "sha256"))]]
    )


def _training(made: Made) -> str:
    run, hardware = made.run, members(made.run.get("hardware"))
    steps = [number(row.get("step")) or 0 for row in read(made.folder / "metrics.jsonl", [])]
    commit, seconds = members(run.get("git")).get("commit"), number(run.get("seconds"))
    facts = {
        "Settings": ", ".join(said(f"{k}={v}") for k, v in members(made.settings.get("trainer")).items()),
        "Updates" if made.stage == "ppo" else "Steps": said(max(steps, default=None)),
        "Time": f"{said(seconds)} s" + (f" ({seconds / 60:.1f} min)" if seconds and seconds >= 120 else ""),
        "Seed": said(run.get("seed")),
        "Hardware": f"{said(hardware.get('gpu') or hardware.get('cpu'))}, {said(hardware.get('cores'))} cores",
        "Versions": said(run.get("versions")) + (f" · commit {said(commit)}" if commit else ""),
    }
    parents = {role: members(parent) for role, parent in members(run.get("parents")).items()}
    rows = [[said(role), said(parent.get("path")), said(parent.get("sha256"))] for role, parent in parents.items()]
    origin = "\n\nMade from:\n\n" + table(["Role", "Where", "SHA-256 of its files"], rows) if rows else ""
    return table(["", ""], facts.items()) + origin


def _results(made: Made) -> str:
    figures = {name: value for name, value in made.results.items() if number(value) is not None}
    if not figures:
        return ""
    note = "Means over the last updates, on prompts that it learnt from.\n\n" if made.stage == "ppo" else ""
    text = note + table(["Figure", "Value"], [[said(k.replace("_", " ")), said(v)] for k, v in figures.items()])
    keys = ("predicted", "observed", "count")
    bins = [[said(row.get(key)) for key in keys] for row in items(made.quality.get("calibration"))]
    return text + ("\n\nCalibration, by bin:\n\n" + table(["Predicted", "Observed", "Rows"], bins) if bins else "")


def _evaluation(made: Made) -> str:
    found = made.evaluation
    if not found:
        return ""
    about = (
        f"{said(found.get('prompts'))} held-out prompts of {said(members(made.judged.get('data')).get('name'))}; "
        f"reward: {said(found.get('reward'))}; KL to {said(found.get('reference'))}. This model is {said(made.row)}."
    )
    head = ["", "reward", "± s.e.", "median", "positive", "KL", "perplexity", "distinct-2", "length"]
    keys = ("reward_mean", "reward_stderr", "reward_median", "positive", "kl", "perplexity", "distinct_2", "length")
    policies = {name: members(row) for name, row in members(found.get("metrics")).items()}
    parts = [about, table(head, [[said(n), *(said(row.get(key)) for key in keys)] for n, row in policies.items()])]
    gains = {pair: members(gain) for pair, gain in members(found.get("paired_gain")).items()}
    if gains:
        measures = ("mean", "low", "high", "win_rate")
        rows = [[said(pair), *(said(gain.get(key)) for key in measures)] for pair, gain in gains.items()]
        parts.append(table(["Paired gain", "mean", "95 % from", "to", "wins"], rows))
    if examples := items(found.get("examples")):
        answers = [members(row.get("responses")) for row in examples]
        rows = [[said(row.get("prompt")), *(said(said_by.get(name)) for name in policies)]
                for row, said_by in zip(examples, answers, strict=True)]  # fmt: skip
        parts.append("Typical answers:\n\n" + table(["Prompt", *map(said, policies)], rows))
    return "\n\n".join(parts)


def _limits(made: Made) -> list[str]:
    """What is known to be weak or was not looked at."""
    lines, size, data = [], made.parameters, made.data
    if made.causal and size < _SMALL:
        lines.append(f"With {size / 1e6:.1f} M parameters it writes the form of its texts, and little sense.")
    grammar = ", sentences of a grammar that no person wrote" if data.get("name") == "toy_reviews" else ""
    lines.append(
        f"It has learnt here from {said(data.get('train'))} rows of {said(data.get('name'))}{grammar}; "
        "how it does on other texts was not measured."
    )
    if made.stage == "reward":
        lines += _limits_of_a_reward(made)
    if made.stage == "ppo":
        judge = members(members(made.run.get("parents")).get("reward")).get("path")
        reward = f"{said(members(made.settings.get('reward')).get('name'))} ({said(judge)})"
        lines.append(f"Its reward was {reward}; what that does not measure may have been given up for it.")
        signs = made.results.get("collapse_watch")
        lines += [
            f"While it was trained, {_SIGNS[s]}." for s in (signs if isinstance(signs, list) else []) if s in _SIGNS
        ]
    if made.causal and not made.evaluation:
        lines.append("It was not compared with the other policies of its run; stage=evaluate does that.")
    return [*lines, "Nobody has checked it for truth, harm or bias, nor for what it repeats of its data word by word."]


def _limits_of_a_reward(made: Made) -> list[str]:
    lines = ["It knows the taste of its data's labels; a policy that is trained on it finds where it errs."]
    right, length = (number(made.results.get(key)) for key in ("accuracy", "length_correlation"))
    if right is not None:
        lines.append(f"It is wrong on {100 * (1 - right):.1f} % of what was held out.")
    if length is not None and abs(length) >= _FOLLOWS_LENGTH:
        which = "Longer" if length > 0 else "Shorter"
        lines.append(f"{which} texts score higher (the correlation of score and length is {length:.2f}).")
    return lines


def _repeating(made: Made) -> str:
    values = {key: homeless(made.settings[key]) for key in _WORK if key in made.settings}
    if not values:
        return ""
    command = block("bash", "python -m rlhf_pipeline --config-path . --config-name config")
    what = "This as `config.yaml` in a folder that has what the model was made from, and there:"
    return f"{what}\n\n{command}\n\n{block('yaml', as_yaml(values))}"

"""The registry of rewards: text in, floats out. The same object serves PPO and evaluation.

A reward is tried once when it is loaded, on its probes: texts to which it should give different scores.
"""

import functools
import math
import os
import re
import reprlib
import statistics
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from rlhf_pipeline.data.python_code import goes_on
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.models.user_function import accepted_arguments, load_function
from rlhf_pipeline.registry import Range, Registry, has_type, prefix_errors
from rlhf_pipeline.texts import mismatch, script_of, words_of

if TYPE_CHECKING:
    from rlhf_pipeline.models.classifiers import Scorer

T = TypeVar("T")
Count = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Combine = Callable[[Sequence[float]], float]
Function = Callable[..., Sequence[float]]  # takes prompts, completions, and the columns that it names

# For rewards without probes of their own: varied texts, so that most rewards give them different scores.
PROBES = (
    "Could you please help me? Thank you very much.",
    "Shut up, you stupid fool!",
    "",
    "A wonderful film with great actors: I loved every minute of it.",
    "Terrible and boring, the worst waste of my time.",
    "菜很好吃，服务热情，环境也不错，非常满意，下次还来。",
    "又贵又难吃，服务态度太差了，再也不来了！",
    "def add(a, b):\n    return a + b\n",
    "In 1969 it cost $3.50; today it is 42 %.",
    "no no no no no no no no",
    "It was a quiet morning by the river. " * 8,
)
_PROMPT = "So "  # short, because a reward that reads few tokens must reach the probe


@dataclass(frozen=True)
class Reward:
    """Scores texts: higher is better, and `neutral` is neither good nor bad.

    `unfit(texts)` returns a short reason why it cannot judge such texts, or None. `probes` have different scores.
    """

    function: Function
    name: str
    neutral: float = 0.0
    unfit: Callable[[Sequence[str]], str | None] = lambda texts: None
    probes: Sequence[str] = PROBES
    parts: Sequence[str] = ()  # of a sum or an ensemble: where each part came from
    scorer: "Scorer | None" = None  # the classifier that computes the score, if one does
    readout: Sequence[float] = ()  # the score's weight for each logit; empty if the score is not linear in them
    needs: Sequence[str] = ()  # columns of the data that it requires

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], /, **columns: Any) -> list[float]:
        """Return one finite number per completion. Raises UserError for any other result.

        `columns` are the data's columns, each as long as `completions`. The function gets those that it names.
        """
        self.check_columns(columns)
        given: Any = self.function(list(prompts), list(completions), **accepted_arguments(self.function, columns))
        try:
            scores = [float(score) for score in given]
        except (TypeError, ValueError, RuntimeError) as error:  # torch raises the last for a matrix
            got = " ".join(repr(given).split())
            raise UserError(f"reward={self.name} must give a list of numbers: it gave {got:.200}.") from error
        if len(scores) != len(completions):
            raise UserError(f"reward={self.name} gave {len(scores)} numbers for {len(completions)} completions.")
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if not math.isfinite(score):
                text = prompt + completion
                raise UserError(f"reward={self.name} gave {score} for {text!r:.200}; it must be finite.")
        return scores

    def check_columns(self, known: Collection[str], of: str = "the data") -> None:
        """Refuse data without a column that the reward needs; `known` are the names of the data's columns."""
        if missing := [name for name in self.needs if name not in known]:
            raise UserError(
                f"reward={self.name} needs the column {', '.join(missing)}; besides prompts and completions {of} has "
                f"{', '.join(known) or 'none'}."
            )


registry: Registry[Reward] = Registry("reward")

# The rewards that stage=reward can train. The first two have no model on the hub.
TRAINABLE = ("classifier", "preference_model", "imdb_sentiment", "dianping_sentiment")

Scale = Literal["logit", "probability", "log_odds"]
TextRead = Literal["response", "prompt_response"]
Side = Literal["left", "right"]


@registry.register
def classifier(
    where: str | None,
    *,
    path: str | None = None,
    label: str = "positive",
    scale: Scale = "logit",
    text: TextRead = "prompt_response",
    batch_size: Count = 64,
    max_length: Count | None = None,
    truncation_side: Side | None = None,
    base: Literal["policy", "encoder"] = "policy",
    size: Literal["tiny", "mini", "small"] = "tiny",
    lm_coef: NotNegative = 0.0,
    examples: list[str] = [],  # noqa: B006 (never changed)
) -> Reward:
    """A text classifier's score for the class named `label`, whatever its index; case is ignored.

    A text longer than `max_length` tokens is cut on its `truncation_side`. The default length is the one of training,
    or 512. The default side is the left; for a response alone, the right. Without a `path`, stage=reward trains this
    run's language model with a head (as in GPT-1; `lm_coef` weighs its language-model loss), or an encoder of this
    `size` from scratch. At its end it scores `examples`.
    """
    side = truncation_side or ("right" if text == "response" else None)
    scorer = _scorer("classifier", path or where, batch_size, max_length, side)
    index = class_named(scorer.model.config.id2label, label, scorer.where)
    if scorer.labels == 1 and scale != "logit":
        raise UserError(f"{scorer.where} has one class, so reward.scale={scale} means nothing; use reward.scale=logit.")

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        logits = scorer.logits(answers) if text == "response" else scorer.pairs(prompts, answers)
        if scale == "probability":
            logits = logits.softmax(-1)
        chosen = logits[:, index].clone()
        if scale == "log_odds":
            logits[:, index] = -math.inf
            chosen -= logits.logsumexp(-1)
        return chosen.tolist()

    linear = scale == "logit" or (scale == "log_odds" and scorer.labels == 2)
    others = -1.0 if scale == "log_odds" else 0.0
    readout = [1.0 if number == index else others for number in range(scorer.labels)] if linear else []
    unfit = functools.partial(mismatch, scorer.tokenizer)
    return Reward(score, scorer.where, 0.5 if scale == "probability" else 0.0, unfit, scorer=scorer, readout=readout)


def _scorer(name: str, where: str | None, *options: Any, **more: Any) -> "Scorer":
    if where is None:
        raise _without_model(name)
    from rlhf_pipeline.models.classifiers import Scorer

    return Scorer.open(where, *options, **more)


def class_named(labels: dict[int, str], wanted: str, where: str) -> int:
    """Return the index of the class with this name. Case is ignored; pos is positive, neg is negative."""

    def plain(name: str) -> str:
        return {"pos": "positive", "neg": "negative"}.get(name.lower(), name.lower())

    found = [int(index) for index, name in labels.items() if plain(str(name)) == plain(wanted)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(map(str, labels.values()))
    raise UserError(f"{where} has no class named '{wanted}'; reward.label= takes one of: {known}.")


def _on_the_hub(hub_id: str, seen: TextRead) -> Callable[..., Reward]:
    @functools.wraps(classifier)
    def entry(where: str | None, **options: Any) -> Reward:
        return classifier(where or hub_id, **{"text": seen, **options})

    return entry


ON_THE_HUB: dict[str, tuple[str, TextRead]] = {
    # The DistilBERT of TRL's classic demo: the raw logit of POSITIVE for query and response.
    "imdb_sentiment": ("lvwerra/distilbert-imdb", "prompt_response"),
    # A Chinese RoBERTa trained on Dianping reviews. It scores the response alone.
    "dianping_sentiment": ("liam168/c2-roberta-base-finetuned-dianping-chinese", "response"),
}
registry.entries |= {name: _on_the_hub(*entry) for name, entry in ON_THE_HUB.items()}


@registry.register
def preference_model(
    where: str | None,
    *,
    path: str | None = None,
    batch_size: Count = 64,
    max_length: Count | None = None,
    truncation_side: Side | None = None,
    head: Literal["linear", "mlp"] = "linear",
    pooling: Literal["last", "mean"] = "last",
    margin: NotNegative = 0.0,
    demonstrations: dict[str, Any] | None = None,
    examples: list[str] = [],  # noqa: B006 (never changed)
) -> Reward:
    """A reward model trained on preferences by stage=reward. Its score is the scalar of its head.

    A text longer than `max_length` tokens is cut on its `truncation_side`. By default it is cut as in training, else to
    its last 512 tokens, because the answer is at the end. `head`, `pooling` (the last token, or the mean weighted by
    position) and `margin` (per rank) are used in training. `demonstrations` (name and path, as for data) score 0 on
    average; null: the best answers of the training data.
    """
    scorer = _scorer("preference_model", path or where, batch_size, max_length, truncation_side, append_eos=True)
    if scorer.labels != 1:
        raise UserError(f"{scorer.where} is a classifier of {scorer.labels} classes; a preference model has one score.")

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return scorer.pairs(prompts, answers)[:, 0].tolist()

    unfit = functools.partial(mismatch, scorer.tokenizer)
    return Reward(score, scorer.where, unfit=unfit, scorer=scorer, readout=(1.0,))


@registry.register
def python(where: str | None, *, path: str, probes: list[str] | None = None) -> Reward:
    """A function of your own, `f(prompts, completions) -> list[float]`, or one written for TRL's GRPO and RLOO.

    `path` is `my_rewards.py:enthusiasm` or `my_package.my_module:enthusiasm`.
    """
    function, needs = load_function(path)
    return Reward(function, path, probes=probes or PROBES, needs=needs)


def _rule(name: str, score: Callable[[str, str], float], neutral: float, probes: Sequence[str], **more: Any) -> Reward:
    """A reward that scores each response, with its prompt, on its own."""
    return Reward(
        lambda prompts, answers: [score(p, a) for p, a in zip(prompts, answers, strict=True)],
        name, neutral, probes=probes, **more,
    )  # fmt: skip


@registry.register
def regex(where: str | None, *, pattern: str, probes: list[str] | None = None) -> Reward:
    """How many times a response matches a regular expression; `(?i)` at its start ignores case."""
    sought = _compiled(pattern)
    return _rule("regex", lambda _, answer: float(len([*sought.finditer(answer)])), 0.5, probes or PROBES)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"reward.pattern={pattern!r} is no regular expression: {error}.") from error


def _last_match(pattern: str) -> Callable[[str], str | None]:
    """Return a function that finds a pattern's last match (its first group, if it has one) in a text, or None."""
    sought = _compiled(pattern)
    group = min(1, sought.groups)

    def found(text: str) -> str | None:
        every = [match[group].strip() for match in sought.finditer(text) if match[group]]
        return every[-1] if every else None

    return found


@registry.register
def length(where: str | None, *, target: Count = 20) -> Reward:
    """Closeness of a response's length to `target` words: 0 at the target, -1 at a distance of `target` words."""
    return _rule("length", lambda _, a: -abs(len(words_of(a)) - target) / target, -0.5, ["", "word " * target])


@registry.register
def keywords(where: str | None, *, words: list[str]) -> Reward:
    """How many of `words` a response contains; case is ignored."""
    if not all(words) or not words:
        raise UserError(f"reward.words is {words}; it takes one word or more, none of them empty.")
    sought = {word.lower() for word in words}
    own = script_of(words, least=1)

    def held(_: str, answer: str) -> float:
        text = answer.lower()
        return float(len([word for word in sought if word in text]))

    def unfit(texts: Sequence[str]) -> str | None:
        theirs = script_of(texts)
        return f"its words are {own} and the texts {theirs}" if own and theirs and own != theirs else None

    return _rule("keywords", held, 0.5, ["", " ".join(words)], unfit=unfit)


@registry.register
def repetition(where: str | None, *, n: Count = 3) -> Reward:
    """Minus the share of a response's word n-grams that repeat an earlier one."""

    def repeated(_: str, answer: str) -> float:
        said = words_of(answer)
        grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return _rule("repetition", repeated, -0.5, ["", "no " * (n + 1)])


@registry.register
def exact(where: str | None, *, column: str = "answer", pattern: str | None = None) -> Reward:
    """1 if a response equals its row's `column`, else 0; spaces around either are ignored.

    With a `pattern`, the answer is the first group of its last match, as with '#### (.+)' for GSM8K. If the column has
    no match, the whole column is the answer.
    """
    answer_in = _last_match(pattern or "(?s).+")

    def score(prompts: Sequence[str], answers: Sequence[str], /, **columns: Any) -> list[float]:
        wanted = ["" if cell is None else str(cell).strip() for cell in columns[column]]
        if not all(wanted):
            raise UserError(f"reward=exact: a row has nothing in its column {column}; give it an answer, or drop it.")
        pairs = zip(answers, wanted, strict=True)
        return [float(answer_in(answer) == (answer_in(want) or want)) for answer, want in pairs]

    return Reward(score, "exact", 0.5, needs=[column])


@registry.register
def toy_sentiment(where: str | None) -> Reward:
    """The true sentiment of a toy review, by the rules of its grammar. A trained reward only estimates it."""
    from rlhf_pipeline.data.toy_reviews import toy_reviews, true_sentiment

    probes = [row.text for row in toy_reviews(8, seed=0)]
    return _rule("toy_sentiment", lambda prompt, answer: true_sentiment(prompt + answer), 0.5, probes)


@registry.register
def python_syntax(where: str | None) -> Reward:
    """1 if a response continues the prompt as valid Python (a function's body, or more lines), else 0."""
    return _rule("python_syntax", lambda prompt, answer: float(goes_on(prompt, answer)), 0.5, ["= 1\n", "= =\n"])


RATE = """Rate the response to the prompt from 1 (bad) to 10 (excellent). Reply with the number alone.

Prompt: {prompt}

Response: {response}"""
_NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?"  # finds 7 in 7/10
_GAP = re.compile(r"\{(\w+)\}")


@registry.register
def judge(
    where: str | None,
    *,
    url: str,
    model: str,
    template: str = RATE,
    pattern: str | None = None,
    scores: dict[str, float] | None = None,
    otherwise: float | None = None,
    options: dict[str, Any] | None = None,
    key_variable: str = "OPENAI_API_KEY",
    threads: Annotated[int, Range(1, 256)] = 8,
    tries: Count = 5,
    timeout: Annotated[float, Range(above=0)] = 60.0,
    cache_path: str | None = None,
    probes: list[str] | None = None,
) -> Reward:
    """A language model that judges each response, through OpenAI's chat completions API at `url`.

    `template` is the question, with {prompt}, {response} and columns of the data. The score is the last match of
    `pattern` (its first group, if it has one) in the reply: a number, or a key of `scores`, such as {A: 1, B: 0}. A
    reply without a match scores `otherwise`; null: it is an error. `options` are additional fields of the request.
    `timeout` is in seconds. The environment variable `key_variable` holds the key. `cache_path` is a file; null: one in
    the user's cache folder.
    """
    from rlhf_pipeline.models.judge import Judge

    gaps = _GAP.findall(template)
    if "response" not in gaps:
        raise UserError("reward.template has no {response}, so all responses would get the same score; add it.")
    values = {str(key): value for key, value in (scores or {}).items()}
    if not all(has_type(value, float) and math.isfinite(value) for value in values.values()):
        raise UserError(f"reward.scores is {scores}; it takes a number for each choice, as in {{A: 1, B: 0}}.")
    choices = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
    last = _last_match(pattern or (rf"(?<!\w)(?:{choices})(?!\w)" if values else _NUMBER))
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_pipeline" / "judge.sqlite"
    cache = Path(cache_path).expanduser() if cache_path else home
    asks = Judge(url, model, options or {}, key_variable, threads, tries, timeout, cache)

    def value_of(reply: str) -> float | None:
        found = last(reply) or ""
        try:
            value = values[found] if values else float(found)
        except (KeyError, ValueError):
            return otherwise
        return value if math.isfinite(value) else otherwise

    def score(prompts: Sequence[str], answers: Sequence[str], /, **columns: Any) -> list[Any]:
        given = {**columns, "prompt": prompts, "response": answers}
        rows = [{name: str(given[name][row]) for name in gaps} for row in range(len(answers))]
        asked = [_GAP.sub(lambda gap: row[gap[1]], template) for row in rows]  # noqa: B023 (called at once)
        return [value_of(reply) for reply in asks.replies(asked, lambda reply: value_of(reply) is not None)]

    needs = [name for name in dict.fromkeys(gaps) if name not in ("prompt", "response")]
    return Reward(score, f"{model} at {url}", probes=probes or PROBES, needs=needs)


@registry.register
def sum(where: str | None, *, parts: list[dict[str, Any]]) -> Reward:
    """A weighted sum of rewards. Each of `parts` is a name with its fields and a `weight` (default 1)."""
    return _combined(where, parts, math.fsum, " + ", "{}")


@registry.register
def ensemble(
    where: str | None,
    *,
    parts: list[dict[str, Any]],
    mode: Literal["mean", "min", "mean_minus_std"] = "mean_minus_std",
    coef: NotNegative = 1.0,
) -> Reward:
    """Several rewards as one (Coste et al. 2023, arXiv 2310.02743): each alone is over-optimised (Gao et al. 2022).

    The score is the mean of the parts' scores, their minimum, or their mean minus `coef` x their standard deviation.
    `parts` are as in `sum`: a part's scores are first multiplied by its `weight`.
    """

    def cautious(scores: Sequence[float]) -> float:
        return statistics.fmean(scores) - coef * statistics.pstdev(scores)

    modes: dict[str, Combine] = {"mean": statistics.fmean, "min": min, "mean_minus_std": cautious}
    return _combined(where, parts, modes[mode], ", ", f"{mode} of {{}}")


def _combined(where: str | None, parts: list[dict[str, Any]], combine: Combine, joint: str, title: str) -> Reward:
    """Return a reward that combines its parts' weighted scores. Its name is `title` with the parts' names."""
    trained = trained_part({"parts": parts})

    def made(part: dict[str, Any], weight: float) -> tuple[float, Reward]:
        return weight, _tested(part, where if "parts" in part or part["name"] == trained["name"] else None)

    every = _each_part(parts, made)
    names, probes = [part.name for _, part in every], [text for _, part in every for text in part.probes]

    def score(prompts: Sequence[str], answers: Sequence[str], /, **columns: Any) -> list[float]:
        scores = [[weight * value for value in part(prompts, answers, **columns)] for weight, part in every]
        return [combine(list(row)) for row in zip(*scores, strict=True)]

    def unfit(texts: Sequence[str]) -> str | None:
        return "; ".join(f"{part.name}: {why}" for _, part in every if (why := part.unfit(texts))) or None

    name = textwrap.shorten(title.format(joint.join(f"{weight:g} x {part.name}" for weight, part in every)), 200)
    neutral = combine([weight * part.neutral for weight, part in every])
    probes.append(" ".join(probes))  # in this probe, all parts find something
    needs = [column for _, part in every for column in part.needs]
    return Reward(score, name, neutral, unfit, probes, names, needs=needs)


def _each_part(parts: Sequence[Mapping[str, Any]], work: Callable[[dict[str, Any], Any], T]) -> list[T]:
    """Return `work(part without its weight, weight)` for each part. An error names the part."""
    found = []
    for number, part in enumerate(parts):
        own = dict(part)
        weight = own.pop("weight", 1.0)
        with prefix_errors(f"reward.parts[{number}]"):
            found.append(work(own, weight))
    return found


def check_choice(choice: Mapping[str, Any]) -> None:
    """Refuse a choice from which no reward can be made, before anything heavy is loaded."""
    registry.check(choice)

    def check_part(part: dict[str, Any], weight: Any) -> None:
        if not has_type(weight, float) or not math.isfinite(weight):
            raise UserError(f"weight is {weight!r}; it takes a number.")
        check_choice(part)

    if "parts" in choice:
        if not choice["parts"]:
            raise UserError("reward.parts is empty; it takes rewards, as in [{name: length, target: 12, weight: 0.5}].")
        _each_part(choice["parts"], check_part)
    elif choice["name"] in ("keywords", "regex", "exact", "judge"):
        registry.build(choice, None)  # these are cheap to build, and check their fields


def trained_part(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the reward that stage=reward trains: the choice, or its first part in TRAINABLE's order without a path."""
    if "parts" not in choice:
        return choice
    parts = [trained_part(part) for part in choice["parts"]]
    rank = {name: number for number, name in enumerate(TRAINABLE)}
    return min(parts, key=lambda part: len(rank) if part.get("path") else rank.get(part["name"], len(rank)))


def check_has_model(choice: Mapping[str, Any], upstream: Path | None) -> None:
    """Refuse a reward without a model: it has no path, the run has none (`upstream`), and the hub has none."""
    for part in choice.get("parts") or [choice]:
        if "parts" in part:
            check_has_model(part, upstream)
        elif part["name"] in TRAINABLE and part["name"] not in ON_THE_HUB and not (part.get("path") or upstream):
            raise _without_model(part["name"])


def _without_model(name: str) -> NotFinishedError:
    return NotFinishedError(f"reward={name} has no model yet; run stage=reward first, or give reward.path=.")


def load_reward(choice: dict[str, Any], upstream: Path | None) -> tuple[Reward, str]:
    """Load the reward at its path, else the one of stage=reward, else the entry's own. Return it with its origin."""
    check_choice(choice)
    reward = _tested(choice, str(upstream) if upstream else None)
    return reward, reward.name


def _tested(choice: Mapping[str, Any], where: str | None) -> Reward:
    """Make a reward, and check that its probes get finite numbers, one per text, which are not all the same.

    A reward that needs columns of the data is not tried, because the probes have none.
    """
    reward = registry.build(choice, where)
    if reward.needs:
        return reward
    tried = reprlib.repr(list(reward.probes))
    try:
        scores = reward([_PROMPT] * len(reward.probes), reward.probes)
    except UserError as error:
        raise UserError(f"{error} It was tried on: {tried}.") from error
    if len(set(scores)) == 1:
        own = "probes" in registry.fields(choice["name"])
        fix = "list texts with different scores: reward.probes=['...', '...']" if own else "choose another"
        raise UserError(
            f"reward={reward.name} gave {scores[0]:g} for all of {len(scores)} texts ({tried}), so nothing can be "
            f"learned from it; {fix}."
        )
    return reward

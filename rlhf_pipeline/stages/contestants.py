"""Who stage=evaluate compares: what a run has made, or what is named by hand; and how each is asked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, encode
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.made import locate, run_of
from rlhf_pipeline.policies import Policy, load_policy
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.sampling import Sampling
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.common import sampling_as

_BEFORE_PPO = {"base": "pretrain", "sft": "sft"}  # the stages before PPO by the names of what they make
_RESERVED = ("reward",)  # what the lineage calls something else
# What of a sampling distribution is said in tokens, which mean nothing in another vocabulary.
_IN_TOKENS = ("stop_token", "stop_token_id", "stop_tokens", "suppress_tokens")


@dataclass(frozen=True)
class Contestant:
    """A policy that is compared, and the distribution that its answers are drawn from."""

    name: str
    policy: Policy
    sampling: Sampling
    taught: int | None = None  # tokens of the texts that it was pretrained on; None where no run of ours did that


def same_vocabulary(first: Policy, second: Policy) -> bool:
    """Whether a token id means the same to both."""
    return first is second or first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def asked_of(policy: Policy, first: Policy, questions: Sequence[Question]) -> list[list[int]]:
    """The token ids that a policy is asked with; the questions were written in those of the first one."""
    if same_vocabulary(policy, first):
        return [question.ids for question in questions]
    return encode(policy.tokenizer, [written(policy.tokenizer, question.prompt) for question in questions])


def lineup(out: RunDir, settings: Settings) -> tuple[dict[str, str], str]:
    """Where the policies lie by their names, from first to last, and the name of PPO's reference."""
    if not settings.evaluate.policies:
        return _whole_run(out, settings.policy)
    paths = _by_hand(settings.evaluate.policies, out)
    starts = {name: start for name, path in paths.items() if (start := _started_from(path))}
    for name, path in paths.items():
        learners = [other for other, start in starts.items() if same_place(start, path)]
        if learners:  # where it began stands before what was trained
            order = [other for other in paths if other != name]
            order.insert(min(*map(order.index, learners), [*paths].index(name)), name)
            return {other: paths[other] for other in order}, name
    return paths, next(iter(paths))


def open_all(paths: dict[str, str], out: RunDir, settings: Settings) -> tuple[list[Contestant], int, int]:
    """The policies with how they sample, and the longest and the shortest limit of a response.

    They sample as the run's PPO did, but for what `evaluate.*` sets.
    """
    trained = _ppo_settings(out, paths)
    asked = {key: getattr(settings.evaluate, key) for key in ("response_length", "temperature")}
    found: list[Contestant] = []
    longest = shortest = 0
    for name, path in paths.items():
        policy, own = _open(path, settings), trained
        if found and not same_vocabulary(policy, found[0].policy):
            home = run_of(path)
            theirs = home.config().get("trainer", {}) if home and home.stage == "ppo" else {}
            own = {key: value for key, value in trained.items() if key not in _IN_TOKENS}
            own |= {key: value for key, value in theirs.items() if key in _IN_TOKENS}
        sampling, longest, shortest = sampling_as(own, policy, **asked)
        found.append(Contestant(name, policy, sampling, taught_length(path)))
    return found, longest, shortest


def taught_length(path: str) -> int | None:
    """How many tokens the texts of a policy's pretraining had at most; None where no run of ours pretrained it."""
    home = run_of(path)
    while home and home.stage != "pretrain":
        home = run_of(home.record["parents"].get("policy", {}).get("path", ""))
    return home.config()["trainer"].get("max_length") if home else None


def ppo_models(out: RunDir, policy: dict[str, Any] | None = None) -> dict[str, str]:
    """What PPO has made in this run by name, the newest last; where the run has rounds, that of each round."""
    found = {"ppo": out.upstream("ppo", policy=policy)}
    for each in reversed(out.rounds()):
        model = each.upstream("ppo", policy=policy)
        if model and model.parents[1] == each.path.parent:  # of this very round
            found[f"round{each.round}"] = model
    return {name: str(model) for name, model in found.items() if model}


def _whole_run(out: RunDir, policy: dict[str, Any]) -> tuple[dict[str, str], str]:
    trained = ppo_models(out, policy)
    if policy.get("path"):  # chosen by hand: it stands for what came before PPO
        before = {"base": model_folder(policy["path"])}
    else:
        made = {name: out.upstream(stage, policy=policy) for name, stage in _BEFORE_PPO.items()}
        before = {name: str(path) for name, path in made.items() if path}
    paths = before | trained
    if not paths:
        raise NotFinishedError(
            f"{out.runs / out.name} has no policy to evaluate; 'make ppo NAME={out.name}' makes one."
        )
    start = _started_from(list(trained.values())[-1]) if trained else None
    if start and not start.endswith(", untrained") and not any(same_place(start, path) for path in paths.values()):
        paths = {"base": start, **trained}
    found = (name for name, path in paths.items() if start and same_place(start, path))
    return paths, next(found, list(paths)[-1 if not trained else 0])


def same_place(one: str, other: str) -> bool:
    """Whether two paths, or hub ids, name the same model."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def _by_hand(names: Sequence[str], out: RunDir) -> dict[str, str]:
    """Where each of `evaluate.policies` lies, by a name that is short and no other's."""
    made = {name: out.upstream(stage) for name, stage in _BEFORE_PPO.items()}
    own = {**{name: str(model) for name, model in made.items() if model}, **ppo_models(out)}
    found: dict[str, list[str]] = {}  # by path: what it may be called, the shortest first
    for name in names:
        word = "base" if name == "pretrain" else name
        if word not in own and re.fullmatch(r"base|sft|ppo|reward|collect|round\d+", word):
            raise NotFinishedError(
                f"evaluate.policies: {out.runs / out.name} has made no policy {name}. It has: "
                f"{', '.join(own) or 'none'}; or give a run's folder, a path or a hub id."
            )
        try:
            run = out.runs / name  # by its name, as elsewhere
            path = own[word] if word in own else locate(str(run) if run.is_dir() else name)
        except UserError as error:
            raise type(error)(f"evaluate.policies: {error}") from error
        if path in found:
            raise UserError(f"evaluate.policies names {path} twice; name it once.")
        found[path] = [word, f"{out.name}/{word}", path] if word in own else _names(path, out)
    return dict(zip(_different(list(found.values())), found, strict=True))


def _names(path: str, out: RunDir) -> list[str]:
    """What a policy of no stage of this run may be called, the shortest first."""
    home = run_of(path)
    if home is None:
        place = Path(path)
        return [place.parent.name if place.name == "model" else place.name, path]
    if home.name == out.name:
        return ["base" if home.stage == "pretrain" else home.stage, f"{home.name}/{home.stage}", path]
    return [home.name, f"{home.name}/{home.stage}", path]


def _different(choices: list[list[str]]) -> list[str]:
    """Of each the first name that none of the others could be given as well."""
    found = []
    for place, names in enumerate(choices):
        others = {name for other in choices[:place] + choices[place + 1 :] for name in other} | {*_RESERVED}
        found.append(next((name for name in names if name not in others), names[-1]))
    return found


def _started_from(model: str) -> str | None:
    """The policy that PPO made a model from; None where no PPO of ours made it."""
    home = run_of(model)
    return home.record["parents"]["policy"]["path"] if home and home.stage == "ppo" else None


def _ppo_settings(out: RunDir, paths: dict[str, str]) -> dict[str, Any]:
    """How the run's newest PPO was set, else the first that is compared; nothing where there is none."""
    own = list(ppo_models(out).values())[-1:]
    homes = [home for path in (*own, *paths.values()) if (home := run_of(path)) and home.stage == "ppo"]
    return dict(homes[0].config()["trainer"]) if homes else {}


def _open(path: str, settings: Settings) -> Policy:
    try:
        return load_policy({**settings.policy, "path": path}, None, [], settings.seed)[0]
    except UserError as error:
        if not settings.evaluate.policies:
            raise
        hint = "" if "/" in path else suggest(path, ("pretrain", "sft", "ppo"))  # a word may be a hub id, too
        raise type(error)(f"{error} {hint}".replace("policy.path", "evaluate.policies").rstrip()) from error

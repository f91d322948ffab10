"""Which policies stage=evaluate compares, how each is asked, and how it samples: as PPO did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, encode
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.sampling import Sampling
from rlhf_pipeline.ppo.config import PPOConfig, make_sampling
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import find, models, ppo_settings, run_of
from rlhf_pipeline.settings import SAMPLING, TOKENS

PPO_SAMPLING = (*SAMPLING, "min_response_length", "temperature")  # PPO's settings that decide how it samples


class Drawing(NamedTuple):
    """How answers are drawn: from which distribution, and the longest and shortest limit in tokens."""

    sampling: Sampling
    longest: int
    shortest: int


@dataclass(frozen=True)
class Contestant:
    """A policy that is compared, and the distribution that its answers are drawn from."""

    name: str
    policy: Policy
    sampling: Sampling
    taught: int | None = None  # longest text of its pretraining in tokens; None where no run of ours pretrained it


def sampling_as(
    trained: dict[str, Any], policy: Policy, tokens_of: dict[str, Any] | None = None, **asked: Any
) -> Drawing:
    """How a policy samples: as PPO with the settings `trained` did, except for what is `asked` and not None.

    A policy with another vocabulary than that PPO's takes the settings that name tokens from `tokens_of`.
    """
    if tokens_of is not None:
        own = {key: value for key, value in tokens_of.items() if key in TOKENS}
        trained = {key: value for key, value in trained.items() if key not in TOKENS} | own
    values = {key: value for key, value in trained.items() if key in PPO_SAMPLING}
    values |= {key: value for key, value in asked.items() if value is not None}
    args = PPOConfig(output_dir="unused", bf16=False, **{"temperature": 1.0, "stop_token": "eos", **values})
    shortest = min(args.min_response_length or args.response_length, args.response_length)
    embeddings = policy.model.get_input_embeddings().num_embeddings
    return Drawing(make_sampling(args, policy.tokenizer, embeddings), args.response_length, shortest)


def same_vocabulary(first: Policy, second: Policy) -> bool:
    """Whether a token id means the same to both."""
    return first is second or first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def asked_of(policy: Policy, first: Policy, questions: Sequence[Question]) -> list[list[int]]:
    """The token ids that a policy is asked with; the questions hold those of the first policy."""
    if same_vocabulary(policy, first):
        return [question.ids for question in questions]
    return encode(policy.tokenizer, [written(policy.tokenizer, question.prompt) for question in questions])


def lineup(run: RunDir, names: Sequence[str], policy: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Where the policies lie by name, from first to last, and the name of PPO's reference.

    Without `names` they are all that the run has made from `policy`.
    """
    if names:
        return _with_reference(_named(names, run))
    made = models(run, policy)
    before = {"base" if name == "pretrain" else name: made.pop(name) for name in ("pretrain", "sft") if name in made}
    if policy.get("path"):  # chosen by hand: it stands for what came before PPO
        before = {"base": model_folder(policy["path"])}
    if not before | made:
        raise NotFinishedError(
            f"{run.runs / run.name} has no policy to evaluate; 'make ppo NAME={run.name}' makes one."
        )
    paths = before | made
    start = _started_from([*made.values()][-1]) if made else None
    if start and not start.endswith(", untrained") and not any(same_place(start, path) for path in paths.values()):
        paths = {"base": start, **made}
    paths, reference = _with_reference(paths)
    return paths, reference if made else [*paths][-1]


def _named(names: Sequence[str], run: RunDir) -> dict[str, str]:
    """Where each of `evaluate.policies` lies, by the word that names it."""
    found: dict[str, str] = {}
    for name in names:
        try:
            path = find("pretrain" if name == "base" else name, run)
        except UserError as error:
            raise type(error)(f"evaluate.policies: {error}") from error
        if path in found.values():
            raise UserError(f"evaluate.policies names {path} twice; name it once.")
        found["base" if name == "pretrain" else name] = path
    return found


def _with_reference(paths: dict[str, str]) -> tuple[dict[str, str], str]:
    """The policies and the one among them that PPO started from, which stands before what was trained from it.

    Where there is none, the first is the reference.
    """
    starts = {name: start for name, path in paths.items() if (start := _started_from(path))}
    for name, path in paths.items():
        if learners := [other for other, start in starts.items() if same_place(start, path)]:
            order = [other for other in paths if other != name]
            order.insert(min(*map(order.index, learners), [*paths].index(name)), name)
            return {other: paths[other] for other in order}, name
    return paths, next(iter(paths))


def open_all(
    paths: dict[str, str], run: RunDir, opened: Callable[[str], Policy], **asked: Any
) -> tuple[list[Contestant], int, int]:
    """The policies with how they sample, and the longest and the shortest limit of a response.

    They sample as the run's newest PPO did, else as that of the first policy that has one, except for what is `asked`.
    """
    homes = (run, *map(run_of, paths.values()))
    trained = next((own for home in homes if (own := ppo_settings(home))), {})
    found: list[Contestant] = []
    longest = shortest = 0
    for name, path in paths.items():
        policy = opened(path)
        foreign = found and not same_vocabulary(policy, found[0].policy)
        tokens_of = ppo_settings(run_of(path)) if foreign else None
        sampling, longest, shortest = sampling_as(trained, policy, tokens_of, **asked)
        found.append(Contestant(name, policy, sampling, taught_length(path)))
    return found, longest, shortest


def taught_length(path: str) -> int | None:
    """How many tokens the texts of a policy's pretraining had at most; None where no run of ours pretrained it."""
    home = run_of(path)
    while home and home.stage != "pretrain":
        home = run_of(home.record["parents"].get("policy", {}).get("path", ""))
    return home.config()["trainer"].get("max_length") if home else None


def same_place(one: str, other: str) -> bool:
    """Whether two paths, or hub ids, name the same model."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def _started_from(model: str) -> str | None:
    """The policy that PPO made a model from; None where no PPO of ours made it."""
    home = run_of(model)
    return home.record["parents"]["policy"]["path"] if home and home.stage == "ppo" else None

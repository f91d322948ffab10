"""Choose the policies to compare, tokenize their prompts, and set their sampling as in PPO."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.data.templates import format_prompt
from rlhf_pipeline.data.tokenization import Question, encode
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.models.networks import positions
from rlhf_pipeline.models.policies import Policy, load_policy
from rlhf_pipeline.models.sampling import Sampling, room_for_prompts
from rlhf_pipeline.ppo.config import PPOConfig, make_sampling
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import find_policy, policies_of, ppo_settings, run_of
from rlhf_pipeline.settings import SAMPLING, TOKENS

PPO_SAMPLING = (*SAMPLING, "min_response_length", "temperature")  # PPO's settings that decide how it samples


@dataclass(frozen=True)
class Sampler:
    """A named policy, how it samples, and the range of its response lengths in tokens."""

    name: str
    policy: Policy
    sampling: Sampling
    longest: int = 0
    shortest: int = 0


def make_sampler(name: str, policy: Policy, trained: dict[str, Any], **asked: Any) -> Sampler:
    """Return a policy that samples as PPO with the settings `trained` did. Values of `asked` that are not None win.

    Without a response length, an answer takes at most half of the policy's positions.
    """
    half = min(PPOConfig.response_length, positions(policy.model) // 2)
    values: dict[str, Any] = {"temperature": 1.0, "stop_token": "eos", "response_length": half}
    values |= {key: trained[key] for key in PPO_SAMPLING if key in trained}
    values |= {key: value for key, value in asked.items() if value is not None}
    args = PPOConfig(output_dir="unused", bf16=False, **values)
    shortest = min(args.min_response_length or args.response_length, args.response_length)
    sampling = make_sampling(args, policy.tokenizer, policy.model.get_input_embeddings().num_embeddings)
    return Sampler(name, policy, sampling, args.response_length, shortest)


def same_vocabulary(first: Policy, second: Policy) -> bool:
    """Return whether each token id means the same to both policies."""
    return first is second or first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def prompt_ids_for(policy: Policy, first: Policy, questions: Sequence[Question]) -> list[list[int]]:
    """Return the prompts' token ids for a policy. The questions hold those of the first policy."""
    if same_vocabulary(policy, first):
        return [question.ids for question in questions]
    return encode(policy.tokenizer, [format_prompt(policy.tokenizer, question.prompt) for question in questions])


def with_room(questions: Sequence[Question], policies: Sequence[Policy], longest: int) -> list[Question]:
    """Return the questions that leave every policy room for an answer of `longest` tokens.

    Raises UserError if there is none. Prints how many are left out.
    """
    room = min(room_for_prompts(policy.model, longest) for policy in policies)
    asked = zip(*(prompt_ids_for(policy, policies[0], questions) for policy in policies), strict=True)
    kept = [each for each, ids in zip(questions, asked, strict=True) if all(1 <= len(own) <= room for own in ids)]
    why = f"longer than {room} tokens (the limit for all policies), or empty for one of the policies"
    if not kept:
        raise UserError(
            f"no prompt leaves room for an answer of {longest} tokens: all {len(questions)} are {why}; lower "
            "response_length or data.prompt_tokens."
        )
    if left_out := len(questions) - len(kept):
        print(f"warning: {left_out} of {len(questions)} prompts are {why}; they are left out", flush=True)
    return kept


def lineup(run: RunDir, names: Sequence[str], policy: dict[str, Any]) -> tuple[dict[str, str], str]:
    """Return the paths of the compared policies by name, and the reference's name: the policy PPO or DPO started from.

    Without `names`, all policies that the run made from `policy` are compared; `base` is then the policy that PPO
    started from, if it is outside the run. If no policy started from another, the first is the reference.
    """
    paths = {name: find_policy(name, run) for name in names} or policies_of(run, policy)
    if not names:
        after = {name: path for name, path in paths.items() if name not in ("pretrain", "sft")}
        start = started_from([*after.values()][-1]) if after else policy.get("path")
        if start and not any(same_place(model_folder(start), path) for path in paths.values()):
            paths = {"base": model_folder(start), **after}
        paths = {"base" if name == "pretrain" else name: path for name, path in paths.items()}
    if not paths:
        raise NotFinishedError(
            f"{run.runs / run.name} has no policy to evaluate; 'make ppo NAME={run.name}' makes one."
        )
    starts = [start for path in paths.values() if (start := started_from(path))]
    begun = (name for name, path in paths.items() if any(same_place(start, path) for start in starts))
    return paths, next(begun, next(iter(paths)))


def policy_at(choice: dict[str, Any], path: str) -> Policy:
    """Open the model at `path` with the settings `choice`, on the GPU if there is one."""
    policy, _ = load_policy({**choice, "path": path}, None, [], 0)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return policy


def open_all(paths: Sequence[tuple[str, str]], run: RunDir, choice: dict[str, Any], **asked: Any) -> list[Sampler]:
    """Open the policies in `paths`, pairs of name and path, with the settings `choice`.

    They sample as the run's newest PPO did, else as the first policy's PPO that is found. `asked` overrides this. If a
    policy's vocabulary differs from the first one's, its own PPO's settings give the token settings.
    """
    homes = (run, *(run_of(path) for _, path in paths))
    trained = next((own for home in homes if (own := ppo_settings(home))), {})
    found: list[Sampler] = []
    for name, path in paths:
        policy, how = policy_at(choice, path), trained
        if found and not same_vocabulary(policy, found[0].policy):
            own = ppo_settings(run_of(path))
            how = {key: value for key, value in trained.items() if key not in TOKENS}
            how |= {key: own[key] for key in TOKENS if key in own}
        found.append(make_sampler(name, policy, how, **asked))
    return found


def same_place(one: str, other: str) -> bool:
    """Return whether two paths, or hub ids, name the same model."""
    return Path(one).resolve() == Path(other).resolve()


def started_from(model: str) -> str | None:
    """Return the policy that PPO or DPO started from; None if neither made the model, or it started untrained."""
    home = run_of(model)
    start = str(home.record["parents"]["policy"]["path"]) if home and home.stage in ("dpo", "ppo") else None
    return None if start and start.endswith(", untrained") else start

"""Before and after: every policy of the run on the same held-out prompts, by the same reward.

python -m rlhf_pipeline stage=evaluate
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from rlhf_pipeline import metrics
from rlhf_pipeline.data import fingerprint, load_data, prompts, texts
from rlhf_pipeline.errors import NotFinishedError
from rlhf_pipeline.likelihood import log_probs
from rlhf_pipeline.policies import Policy, load_policy
from rlhf_pipeline.rewards import Reward, load_reward
from rlhf_pipeline.rundir import RunDir, write_json
from rlhf_pipeline.sampling import Batch, Sampling, check_positions, sample, uniform_draws
from rlhf_pipeline.settings import Evaluation, Settings
from rlhf_pipeline.stages.common import Clock, progress, quiet, say_done, say_taken
from rlhf_pipeline.tables import evaluation_table

# The fields of PPO's configuration that say how its policy samples.
_SAMPLING = ("response_length", "min_response_length", "temperature", "stop_token", "stop_token_id", "min_new_tokens",
             "suppress_tokens")  # fmt: skip


class Answers(NamedTuple):
    """What one policy said to all prompts, and what that was worth."""

    responses: list[str]
    rewards: list[float]
    metrics: dict[str, float]


def run(settings: Settings, out: RunDir) -> None:
    """Sample from each policy, then reward, KL to the reference, perplexity under the base model, diversity."""
    quiet()
    clock = Clock()
    paths, reference = policies_of(out, settings.policy)
    reward, judge = load_reward(settings.reward, out.upstream("reward", reward=settings.reward))
    rows = load_data(settings.data, settings.seed)
    opened = {name: load_policy({**settings.policy, "path": path}, None, texts(rows.train), settings.seed)[0]
              for name, path in paths.items()}  # fmt: skip
    for name, path in paths.items():
        say_taken(name, path)
    say_taken("reward", judge)
    out.begin(settings, {**paths, "reward": judge}, fingerprint(settings.data, rows))

    base = opened[next(iter(opened))]
    asked = prompts(rows.test, base.tokenizer, settings.data, settings.seed)[: settings.evaluate.prompts]
    seen = base.tokenizer.batch_decode(asked, skip_special_tokens=True)
    sampling, limits = sampling_of(out, settings.evaluate, base, len(asked), settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for policy in opened.values():
        check_positions(policy.model, asked, int(limits.max()))
        policy.model.to(device)
    answers: dict[str, Answers] = {}
    with progress(len(opened) * len(asked), "evaluate") as bar:
        for name, policy in opened.items():
            answers[name] = measure(
                policy, opened[reference], base, reward, asked, limits, sampling, settings, bar.update
            )
    names = list(answers)
    # From the first policy to the last, and from PPO's reference to PPO, where they are two.
    pairs = {f"{names[-1]} - {name}": name for name in (names[0], reference) if name != names[-1]}
    gains = {
        pair: metrics.paired_gain(
            answers[before].rewards, answers[names[-1]].rewards, settings.evaluate.bootstrap, settings.seed
        )
        for pair, before in pairs.items()
    }
    examples = typical(seen, answers, settings.evaluate.examples)
    evaluation = {
        "prompts": len(asked),
        "reward": judge,
        "reference": reference,
        "sampling": dataclasses.asdict(sampling),
        "metrics": {name: answer.metrics for name, answer in answers.items()},
        "paired_gain": gains,
        "samples": [sample_row(seen, answers, index) for index in range(len(asked))],
        "examples": examples,
    }
    write_json(out.path / "evaluation.json", evaluation)
    after = answers[names[-1]].metrics
    results = {"reward_mean": after["reward_mean"], "kl": after["kl"]}
    if gains:
        gain = next(iter(gains.values()))
        results |= {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
    out.finish(results, objective=after["reward_mean"])
    evaluation_table(evaluation)
    say_done(out, f"{len(names)} policies on {len(asked)} held-out prompts", clock)


def policies_of(out: RunDir, policy: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The run's policies from first to last by name, and the name of PPO's reference."""
    trained = {"base": "pretrain", "sft": "sft", "ppo": "ppo"}
    paths = {name: str(found) for name, stage in trained.items() if (found := out.upstream(stage, policy=policy))}
    if not paths:
        raise NotFinishedError(
            f"{out.runs / out.name} has no policy to evaluate; 'make ppo NAME={out.name}' makes one."
        )
    ppo = out.upstream("ppo", policy=policy)
    record = json.loads((ppo.parent / "run.json").read_text(encoding="utf-8")) if ppo else {}
    parent = record["parents"]["policy"]["path"] if record else None
    if parent and parent not in paths.values() and not parent.endswith(", untrained"):
        paths = {"base": parent, **{name: path for name, path in paths.items() if name == "ppo"}}
    reference = next((name for name, path in paths.items() if path == parent), list(paths)[-1 if not ppo else 0])
    return paths, reference


def sampling_of(out: RunDir, asked: Evaluation, policy: Policy, count: int, seed: int) -> tuple[Sampling, torch.Tensor]:
    """How to sample: as the run's PPO did, but for what `evaluate.*` sets; and each response's limit (count,)."""
    from rlhf_pipeline.ppo.config import PPOConfig, make_sampling

    ppo = out.upstream("ppo")
    config = yaml.safe_load((ppo.parent / "config.yaml").read_text(encoding="utf-8"))["trainer"] if ppo else {}
    values = {key: value for key, value in config.items() if key in _SAMPLING}
    for key in ("response_length", "temperature"):
        if getattr(asked, key) is not None:
            values[key] = getattr(asked, key)
    args = PPOConfig(output_dir=str(out.checkpoints), **{"temperature": 1.0, "stop_token": "eos", **values})
    shortest = min(args.min_response_length or args.response_length, args.response_length)
    limits = torch.randint(shortest, args.response_length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return make_sampling(args, policy.tokenizer), limits


@torch.no_grad()
def measure(
    policy: Policy,
    reference: Policy,
    base: Policy,
    reward: Reward,
    asked: Sequence[Sequence[int]],
    limits: torch.Tensor,
    sampling: Sampling,
    settings: Settings,
    tick: Any,
) -> Answers:
    """One policy's answers to all prompts. Every policy draws with the same random numbers."""
    for each in (policy, reference, base):
        each.model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    responses: list[str] = []
    rewards: list[float] = []
    kl = surprise = length = 0.0
    for start in range(0, len(asked), settings.evaluate.batch_size):
        part = slice(start, start + settings.evaluate.batch_size)
        batch = sample(policy.model, asked[part], limits[part], sampling, uniform_draws(limits[part], generator))
        said, answered = batch.texts(policy.tokenizer)
        rewards += reward(said, answered)
        responses += answered
        mine = log_probs(policy.model, batch, sampling)
        kl += float((mine - log_probs(reference.model, batch, sampling)).sum())
        surprise -= float(_plain_log_probs(base, batch).sum())
        length += float(batch.response_lengths.sum())
        tick(len(answered))
    values = np.array(rewards)
    found = metrics.Distinct().compute(predictions=responses, references=responses, n=2)
    return Answers(
        responses,
        rewards,
        {
            "reward_mean": float(values.mean()),
            "reward_median": float(np.median(values)),
            "reward_stderr": float(values.std(ddof=1) / math.sqrt(len(values))),
            "positive": float((values > reward.neutral).mean()),
            "kl": kl / len(values),
            "perplexity": math.exp(surprise / length),
            "distinct_2": found["distinct_2"],
            "length": length / len(values),
        },
    )


def _plain_log_probs(base: Policy, batch: Batch) -> torch.Tensor:
    """The base model's own surprise at the answers, whatever distribution they were drawn from."""
    return log_probs(base.model, batch, Sampling())


def sample_row(seen: Sequence[str], answers: dict[str, Answers], index: int) -> dict[str, Any]:
    """One prompt with every policy's answer and reward."""
    return {
        "prompt": seen[index],
        "responses": {name: answer.responses[index] for name, answer in answers.items()},
        "rewards": {name: answer.rewards[index] for name, answer in answers.items()},
    }


def typical(seen: Sequence[str], answers: dict[str, Answers], count: int) -> list[dict[str, Any]]:
    """Prompts whose reward changed as the median did: typical, not the best."""
    first, *_, last = answers
    gain = np.array(answers[last].rewards) - np.array(answers[first].rewards)
    near = np.argsort(np.abs(gain - np.median(gain)), kind="stable")[:count]
    return [sample_row(seen, answers, int(index)) for index in near]

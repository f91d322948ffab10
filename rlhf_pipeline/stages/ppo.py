"""Step 3: PPO. The policy samples answers, the reward judges them, a KL penalty keeps it near where it began.

python -m rlhf_pipeline stage=ppo
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline.atomic import read_jsonl
from rlhf_pipeline.data import fingerprint, load_data, texts
from rlhf_pipeline.encoding import documents, fitting, prompts
from rlhf_pipeline.policies import load_policy, lora_config
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer
from rlhf_pipeline.ppo.config import check_config
from rlhf_pipeline.records import Row
from rlhf_pipeline.rewards import load_reward, trained_part
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.sampling import room_for_prompts
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.common import check_languages, judges, say_taken, take_data, trainer_args, watch


def run(settings: Settings, out: RunDir) -> None:
    """Start from the SFT policy, keep it as the reference, and learn from the reward."""
    args = trainer_args(PPOConfig, settings, out)
    check_config(args, script=False)
    adapter = lora_config(settings.policy)
    reward, judge = load_reward(settings.reward, out.upstream("reward", reward=trained_part(settings.reward)))
    rows = take_data(settings.data, settings.seed)
    policy, where = load_policy(
        settings.policy,
        out.upstream("sft", "pretrain", policy=settings.policy),
        texts(rows.train),
        settings.seed,
    )
    say_taken("policy", where)
    if where.endswith(", untrained"):
        print("warning: the policy has learnt nothing yet; run stage=pretrain or stage=sft first, or give policy.path=")
    say_taken("reward", judge)
    check_languages(reward, policy.tokenizer, texts(rows.test))
    print(f"computing in {args.precision_choice}", flush=True)
    known = fingerprint(settings.data, rows)
    parents = {"policy": where, **judges(reward, judge)}
    pretraining = rows
    if args.ptx_coef and settings.ptx:
        pretraining = load_data(settings.ptx, settings.seed)
        known["ptx"] = fingerprint(settings.ptx, pretraining)
        parents |= {"ptx": path} if isinstance(path := settings.ptx.get("path"), str) else {}
    out.begin(settings, parents, known)
    room = room_for_prompts(policy.model, args.response_length)

    def asked(split: Sequence[Row], seed: int) -> list[list[int]]:
        return fitting(prompts(split, policy.tokenizer, settings.data, seed), room)

    trainer = PPOTrainer(
        args,
        policy.tokenizer,
        policy.model,
        None,  # the reference is the policy as it is now
        reward,
        asked(rows.train, settings.seed),
        eval_dataset=asked(rows.test, settings.seed + 1),
        peft_config=adapter,
        ptx_dataset=documents(pretraining.train, policy.tokenizer) if args.ptx_coef else None,
    )
    trainer.add_callback(SampleLog(trainer, out))
    trainer.on_warning = out.warn
    trainer.train(watch(trainer, out))
    out.save_model(functools.partial(_save, trainer))  # first: what may yet go wrong takes no training with it
    held_out = trainer.measure() if trainer.eval_prompts and trainer.eval_prompts.ids else None
    last = [row for row in read_jsonl(out.path / "metrics.jsonl") if "objective/scores" in row][-10:]
    results = {name: sum(row[f"objective/{name}"] for row in last) / len(last) for name in ("scores", "kl")}
    if trainer.state.best_metric is not None:
        results["best_eval_reward"] = trainer.state.best_metric
    if held_out:
        results["held_out_reward"] = held_out["reward"]
    signs = {"collapse_watch": sorted(trainer.watch.warned)} if trainer.watch.warned else {}
    out.finish({**results, **signs}, objective=results.get("held_out_reward", results["scores"]))


def _save(trainer: PPOTrainer, folder: Path) -> None:
    trainer.save_model(str(folder), merge=True)


class SampleLog(TrainerCallback):
    """Keeps some of what the policy said, with its reward, whenever metrics are logged."""

    def __init__(self, trainer: PPOTrainer, out: RunDir) -> None:
        self.trainer, self.out = trainer, out

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """The first rows of the batch: it is in random order."""
        rollout = self.trainer.last_rollout
        if rollout is None or not isinstance(args, PPOConfig) or "objective/scores" not in (logs or {}):
            return
        scores: torch.Tensor = rollout.scores
        rows = zip(rollout.prompts, rollout.responses, scores.tolist(), strict=True)
        samples = [{"prompt": p, "response": r, "reward": s} for p, r, s in list(rows)[: args.log_samples]]
        self.out.log_samples(state.global_step, samples)
        self.out.trackers.samples(state.global_step, samples)

"""Step 3: PPO. The policy samples responses, the reward scores them, a KL penalty keeps the policy near its start.

python -m rlhf_pipeline stage=ppo
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_pipeline.data import fingerprint, load_data, texts
from rlhf_pipeline.data.tokenization import Question, columns_of, documents, questions
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.lineup import with_room
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.models.policies import load_policy, lora_config
from rlhf_pipeline.models.rewards import load_reward, trained_part
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer
from rlhf_pipeline.ppo.config import check_config
from rlhf_pipeline.processes import processes
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.setup import (
    attach_log,
    building,
    check_languages,
    print_input,
    read_data,
    reward_origins,
    trainer_args,
)


def run(settings: Settings, out: RunDir) -> None:
    """Start from the SFT policy, keep it as the reference, and learn from the reward."""
    args = trainer_args(PPOConfig, settings, out)
    batch = check_config(args, script=False) * processes() // args.group_size
    adapter = lora_config(settings.policy)
    if adapter is not None and str(start := adapter.init_lora_weights).startswith(("pissa", "olora", "loftq", "corda")):
        raise UserError(
            f"policy.lora.init_lora_weights={start} changes the base model, which without the adapter is PPO's "
            "reference; leave it at its default."
        )
    reward, judge = load_reward(settings.reward, out.upstream("reward", reward=trained_part(settings.reward)))
    rows = read_data(settings.data, settings.seed)
    policy, where = load_policy(
        settings.policy,
        out.upstream("sft", "pretrain", policy=settings.policy),
        texts(rows.train),
        settings.seed,
    )
    print_input("policy", where)
    if where.endswith(", untrained"):
        print("warning: the policy is untrained; run stage=pretrain or stage=sft first, or give policy.path=")
    print_input("reward", judge)
    check_languages(reward, policy.tokenizer, texts(rows.train))
    print(f"computing in {args.precision_choice}", flush=True)
    asked = questions(rows.train, policy.tokenizer, settings.data, settings.seed)
    asked = with_room(asked, [policy], args.response_length)
    reward.check_columns(columns_of(asked))
    asked, validation = hold_back(asked, args.eval_samples, len(asked) - batch, settings.seed)
    if not validation:
        why = f"a batch of {batch} takes all {len(asked)} prompts, so none are held back as validation prompts"
        if args.eval_strategy != "no":
            raise UserError(f"trainer.eval_strategy needs some: {why}; lower trainer.per_device_train_batch_size.")
        print(f"warning: {why}; the run's result is its reward in training", flush=True)
    known = fingerprint(settings.data, rows)
    parents = {"policy": where, **reward_origins(reward, judge)}
    pretraining = rows
    if args.ptx_coef and settings.ptx:
        pretraining = load_data(settings.ptx, settings.seed)
        known["ptx"] = fingerprint(settings.ptx, pretraining)
        parents |= {"ptx": path} if isinstance(path := settings.ptx.get("path"), str) else {}
    out.begin(settings, parents, known)
    with building():
        trainer = PPOTrainer(
            args,
            policy.tokenizer,
            policy.model,
            None,  # the reference is the policy as it is now
            reward,
            _prompts(asked),
            eval_dataset=_prompts(validation) or None,
            peft_config=adapter,
            ptx_dataset=documents(pretraining.train, policy.tokenizer) if args.ptx_coef else None,
        )
    trainer.add_callback(SampleLog(trainer, out))
    trainer.on_warning = out.warn
    trainer.train(attach_log(trainer, out))
    # Save first, so that a later error does not lose the training.
    out.save_model(lambda folder: trainer.save_model(str(folder), merge=True))
    last = [row for row in read_jsonl(out.path / "metrics.jsonl") if "objective/scores" in row][-10:]
    results = {name: sum(row[f"objective/{name}"] for row in last) / len(last) for name in ("scores", "kl")}
    if trainer.state.best_metric is not None:
        results[f"best_{args.metric_for_best_model}"] = trainer.state.best_metric
    objective = results["scores"] - args.selection_kl_coef * results["kl"]
    if validation:
        measured = trainer.measure()
        results |= {f"validation_{name}": measured[name] for name in ("score", "reward", "kl")}
        objective = measured["score"]
    signs = {"collapse_watch": sorted(trainer.watch.warned)} if trainer.watch.warned else {}
    out.finish({**results, **signs}, objective=objective)


def hold_back(
    asked: Sequence[Question], most: int | None, spare: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Split training prompts into those that PPO learns from, and validation prompts, which serve to choose policies.

    About `most` prompts are held back, at most about a tenth, and never more than `spare`. Prompts with the same tokens
    stay together. Only stage=evaluate uses the test split, so that no policy is chosen by the prompts that it reports.
    """
    count = min(most or len(asked), -(-len(asked) // 10))
    repeats = Counter(tuple(question.ids) for question in asked)
    order = sorted(repeats)
    random.Random(f"validation {seed}").shuffle(order)
    held: set[tuple[int, ...]] = set()
    rows = 0
    for prompt in order:
        if rows < count and rows + repeats[prompt] <= spare:
            held.add(prompt)
            rows += repeats[prompt]
    return [q for q in asked if tuple(q.ids) not in held], [q for q in asked if tuple(q.ids) in held]


def _prompts(asked: Sequence[Question]) -> list[Any]:
    """Return prompts as the trainer takes them: token ids, or rows if they have other columns."""
    if not any(question.columns for question in asked):
        return [question.ids for question in asked]
    return [{**q.columns, "input_ids": q.ids, "attention_mask": [1] * len(q.ids)} for q in asked]


class SampleLog(TrainerCallback):
    """Logs some of the policy's responses with their rewards, whenever metrics are logged."""

    def __init__(self, trainer: PPOTrainer, out: RunDir) -> None:
        self.trainer, self.out = trainer, out

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Log the first rows of the batch, which is in random order."""
        rollout = self.trainer.last_rollout
        if rollout is None or not isinstance(args, PPOConfig) or "objective/scores" not in (logs or {}):
            return
        scores: torch.Tensor = rollout.scores
        rows = zip(rollout.prompts, rollout.responses, scores.tolist(), strict=True)
        samples = [{"prompt": p, "response": r, "reward": s} for p, r, s in list(rows)[: args.log_samples]]
        self.out.log_samples(state.global_step, samples)

"""The PPO trainer: roll out, score, estimate advantages, optimise, log."""

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import TrainerState
from trl.experimental.ppo import PPOTrainer as TRLPPOTrainer

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.objective import gae, kl_estimate, masked_mean, next_kl_coef, policy_loss, token_rewards, whiten
from rlhf_pipeline.ppo.objective import value_loss as clipped_value_loss
from rlhf_pipeline.ppo.rollout import PolicyWithValueHead, Rollout, TextReward, roll_out
from rlhf_pipeline.sampling import Batch, Sampling, check_positions

# TRL's fields that this loop does not carry out. Set, they would do nothing, so they are refused.
_NOT_CARRIED_OUT = ("bf16", "fp16", "gradient_checkpointing", "model_adapter_name", "ref_adapter_name", "push_to_hub")

_STRATEGIES = {"logging_strategy": ("steps",), "save_strategy": ("steps", "no"), "eval_strategy": ("no",)}


class PPOTrainer(TRLPPOTrainer):
    """TRL's PPOTrainer under its own name, with the loop replaced.

    `reward` takes prompts and responses as text. `prompts` are lists of token ids. Every random draw is
    derived from (seed, update), so a resumed run repeats what an unbroken one would have done.
    """

    # Narrower than Trainer's own declarations: these are never None here.
    args: PPOConfig
    model: PolicyWithValueHead
    processing_class: PreTrainedTokenizerBase
    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel,
        reward: TextReward,
        prompts: Sequence[Sequence[int]],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        rows = check_config(args)
        if len(prompts) < rows:
            raise UserError(
                f"{len(prompts)} prompts do not fill one batch of {rows}; lower trainer.per_device_train_batch_size."
            )
        check_positions(model, prompts, args.response_length)
        for part in (model, ref_model):
            for module in part.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0  # a ratio of probabilities means something only if both are of one function
        self.reward, self.prompts, self.batch_rows = reward, prompts, rows
        self.sampling = make_sampling(args, processing_class)
        # Trainer's own constructor: TRL's builds a second backbone for the critic and an optimizer over it.
        Trainer.__init__(self, PolicyWithValueHead(model), args, processing_class=processing_class, callbacks=callbacks)
        self.ref_model = ref_model.to(self.accelerator.device).eval().requires_grad_(False)
        self.kl_coef = args.kl_coef
        self.last_rollout: Rollout | None = None

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run PPO until `total_episodes`, from a checkpoint where one is given."""
        args = self.args
        episodes = args.total_episodes or int(args.num_train_epochs * len(self.prompts))
        updates = math.ceil(episodes / self.batch_rows)
        self.create_optimizer_and_scheduler(num_training_steps=updates)
        self.state = TrainerState(max_steps=updates, is_world_process_zero=self.is_world_process_zero())
        for name in ("logging_steps", "save_steps"):  # below 1 they are shares of the whole
            asked = getattr(args, name)
            setattr(self.state, name, max(1, math.ceil(asked * updates) if asked < 1 else int(asked)))
        self.state.num_train_epochs = math.ceil(episodes / len(self.prompts))
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        if resume_from_checkpoint:
            self._load_checkpoint(Path(resume_from_checkpoint))
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        self.model.train()
        for update in range(self.state.global_step, updates):
            rollout = self._roll_out(update)
            stats = self._learn(rollout, update)
            self._end_update(rollout, stats)
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)

    def _roll_out(self, update: int) -> Rollout:
        args = self.args
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "rollout", update))
        shortest = args.min_response_length or args.response_length
        limits = torch.randint(shortest, args.response_length + 1, (self.batch_rows,), generator=generator)
        chosen = prompts_of_update(len(self.prompts), self.batch_rows, update, args.seed)
        return roll_out(
            self.model, self.ref_model, self.reward, self.processing_class, [self.prompts[i] for i in chosen],
            limits, self.sampling, generator, args.local_rollout_forward_batch_size,
        )  # fmt: skip

    def _learn(self, rollout: Rollout, update: int) -> dict[str, float]:
        """Some epochs of minibatches on one batch of experience."""
        args, mask, lengths = self.args, rollout.batch.response_mask, rollout.batch.response_lengths
        kl = kl_estimate(rollout.log_probs, rollout.ref_log_probs, args.kl_estimator) * mask
        scores = rollout.scores if args.score_clip is None else rollout.scores.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None:
            last = rollout.batch.responses.gather(1, (lengths - 1)[:, None])
            scores = (
                scores - args.missing_eos_penalty * ~torch.isin(last, last.new_tensor(self.sampling.stop_ids))[:, 0]
            )
        rewards = token_rewards(scores, kl, lengths, self.kl_coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages = gae(rewards, rollout.values, mask, args.gamma, args.lam)
        returns = advantages + rollout.values
        advantages = whiten(advantages, mask)

        stats: list[Tensor] = []
        order = torch.Generator().manual_seed(derive_seed(args.seed, "minibatches", update))
        rows = self.batch_rows // args.num_mini_batches
        for _ in range(args.num_ppo_epochs):
            for minibatch in torch.split(torch.randperm(self.batch_rows, generator=order), rows):
                stats.append(self._step(rollout, advantages, returns, minibatch.to(mask.device)))
        names = (
            "loss/policy_avg",
            "val/ratio",
            "policy/approxkl_avg",
            "policy/clipfrac_avg",
            "loss/value_avg",
            "grad_norm",
        )
        means = dict(zip(names, torch.stack(stats).mean(0).tolist(), strict=True))
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(
                f"PPO diverged at update {update + 1}: {means}. Lower trainer.learning_rate or raise trainer.kl_coef."
            )
        sequence_kl = float(kl.sum(1).mean())
        first_entropy = -masked_mean(rollout.log_probs, mask)
        stats_of_update = {
            "objective/kl": sequence_kl,
            "objective/scores": float(rollout.scores.mean()),
            "objective/scores_std": float(rollout.scores.std()),
            "objective/rlhf_reward": float(scores.mean()) - self.kl_coef * sequence_kl,
            "objective/kl_coef": self.kl_coef,
            "policy/entropy_avg": float(first_entropy),
            "val/response_length": float(lengths.float().mean()),
            **means,
        }
        if args.kl_target is not None:
            self.kl_coef = next_kl_coef(self.kl_coef, sequence_kl, args.kl_target, self.batch_rows, args.kl_horizon)
        return stats_of_update

    def _step(self, rollout: Rollout, advantages: Tensor, returns: Tensor, minibatch: Tensor) -> Tensor:
        """One optimizer step on a minibatch, its gradient added up over micro-batches."""
        args, lengths = self.args, rollout.batch.response_lengths
        count = lengths[minibatch].sum()
        total = torch.zeros(5, device=lengths.device)
        # Rows of like length together: a micro-batch is as wide as its longest row.
        by_length = minibatch[lengths[minibatch].argsort(stable=True)]
        for index in torch.split(by_length, args.per_device_train_batch_size):
            part: Batch = rollout.batch.rows(index)
            mask, width = part.response_mask, part.responses.shape[1]
            old, old_values = rollout.log_probs[index, :width], rollout.values[index, :width]
            new, values = self.model(part, self.sampling)
            loss = policy_loss(new, old, advantages[index, :width], mask, args.cliprange, count)
            error = clipped_value_loss(values, old_values, returns[index, :width], mask, args.cliprange_value, count)
            self.accelerator.backward(loss.loss + args.vf_coef * error)
            total += torch.stack([loss.loss, loss.ratio, loss.approx_kl, loss.clipped, error]).detach()
        limit = args.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat([total, norm.detach()[None]])

    def _end_update(self, rollout: Rollout, stats: dict[str, float]) -> None:
        args = self.args
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        self.state.global_step += 1
        episode = self.state.global_step * self.batch_rows
        self.state.epoch = episode / len(self.prompts)
        self.last_rollout = rollout
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if self.control.should_log or self.state.global_step == self.state.max_steps:
            self.log({**stats, "lr": learning_rate, "episode": episode})
            self.control.should_log = False
        if self.control.should_save:
            self._save_checkpoint()
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    # -- checkpoints: whole or not there

    def _save_checkpoint(self) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        temporary = folder / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        save_file({k: v.clone() for k, v in weights.items()}, temporary / "model.safetensors")
        torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), temporary / "scheduler.pt")
        state = {"global_step": self.state.global_step, "kl_coef": self.kl_coef}
        (temporary / "state.json").write_text(json.dumps(state))
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(temporary, folder / name)
        kept = self.args.save_total_limit
        if kept:
            there = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
            for old in there[:-kept]:
                shutil.rmtree(old)

    def _load_checkpoint(self, folder: Path) -> None:
        device = self.accelerator.device
        self.model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        state = json.loads((folder / "state.json").read_text())
        self.state.global_step, self.kl_coef = state["global_step"], state["kl_coef"]
        self.state.epoch = self.state.global_step * self.batch_rows / len(self.prompts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy alone, as AutoModelForCausalLM opens it; the value head beside it."""
        folder = output_dir or self.args.output_dir
        self.model.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        save_file(self.model.value_head.state_dict(), os.path.join(folder, "value_head.safetensors"))


def check_config(args: PPOConfig) -> int:
    """Refuse settings that do not go together; give the number of rows of a batch."""
    for name in _NOT_CARRIED_OUT:
        if getattr(args, name):
            raise UserError(f"trainer.{name}={getattr(args, name)} is not carried out by stage=ppo yet; leave it out.")
    for name in (
        "num_mini_batches",
        "num_ppo_epochs",
        "response_length",
        "local_rollout_forward_batch_size",
        "kl_horizon",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"trainer.{name} is {getattr(args, name)}; it takes at least 1.")
    for name, taken in _STRATEGIES.items():
        if str(getattr(args, name).value) not in taken:
            raise UserError(f"trainer.{name}={getattr(args, name).value}: stage=ppo takes {' or '.join(taken)}.")
    if args.kl_target is not None and args.kl_target <= 0:
        raise UserError(
            f"trainer.kl_target is {args.kl_target}; it takes a number above 0, or null for a fixed kl_coef."
        )
    if args.stop_token is not None and args.stop_token_id is not None:
        raise UserError("trainer.stop_token and trainer.stop_token_id exclude each other; say trainer.stop_token=null.")
    if args.missing_eos_penalty is not None and args.stop_token is None and args.stop_token_id is None:
        raise UserError("trainer.missing_eos_penalty needs a trainer.stop_token to miss.")
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if rows % args.num_mini_batches:
        raise UserError(
            f"a batch of {rows} rows does not divide into trainer.num_mini_batches={args.num_mini_batches}."
        )
    if args.min_response_length is not None and not 1 <= args.min_response_length <= args.response_length:
        raise UserError(
            f"trainer.min_response_length is {args.min_response_length}; it takes 1 to {args.response_length}, "
            "the response_length."
        )
    return rows


def make_sampling(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """The sampling distribution that a configuration asks for."""
    stops: tuple[int, ...] = () if args.stop_token_id is None else (args.stop_token_id,)
    if args.stop_token == "eos":
        stops = (int(tokenizer.eos_token_id),)
    vocabulary = tokenizer.get_vocab()
    if args.stop_token_id is not None and not 0 <= args.stop_token_id < len(tokenizer):
        raise UserError(f"trainer.stop_token_id is {args.stop_token_id}; the policy's ids go to {len(tokenizer) - 1}.")
    for token in args.suppress_tokens:
        if token not in vocabulary:
            raise UserError(f"trainer.suppress_tokens has '{token}', which is no token of the policy's vocabulary.")
    suppressed = [vocabulary[token] for token in args.suppress_tokens]
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        suppressed.append(int(tokenizer.pad_token_id))  # a pad is never something to say
    if args.temperature <= 0:
        raise UserError(f"trainer.temperature is {args.temperature}; it takes a number above 0.")
    return Sampling(args.temperature, stops, args.min_new_tokens, tuple(sorted(set(suppressed))))


def derive_seed(seed: int, what: str, update: int) -> int:
    """A seed of its own for each use and update."""
    return random.Random(f"{seed} {what} {update}").getrandbits(63)


def prompts_of_update(count: int, rows: int, update: int, seed: int) -> list[int]:
    """Which prompts an update uses: pass after pass over all of them, each in an order of its own."""
    chosen: list[int] = []
    position = update * rows
    while len(chosen) < rows:
        turn, offset = divmod(position + len(chosen), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "prompts", turn)))
        chosen += order[offset : offset + rows - len(chosen)].tolist()
    return chosen

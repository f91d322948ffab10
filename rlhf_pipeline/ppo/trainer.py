"""The PPO trainer: sample, score, estimate advantages, optimise, log."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import set_seed

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import language_model
from rlhf_pipeline.models.precision import autocast
from rlhf_pipeline.models.sampling import Batch, Sampling, check_positions, make_batch, sample
from rlhf_pipeline.ppo.checks import check_drawable, check_health, diagnose, rms, tolerance
from rlhf_pipeline.ppo.config import change_sampling
from rlhf_pipeline.ppo.lifecycle import Lifecycle
from rlhf_pipeline.ppo.objective import (
    add_moments,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    loss_shares,
    masked_mean,
    next_kl_coef,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from rlhf_pipeline.ppo.prompts import derive_seed, prompts_of_update
from rlhf_pipeline.ppo.rollout import Rollout


class Experience(NamedTuple):
    """A rollout, and what policy and critic learn from it. `time` is the length of the longest response."""

    rollout: Rollout
    kl: Tensor  # (batch, time), estimates of KL(policy || reference)
    scores: Tensor  # (batch,), what PPO maximises: scaled, clipped, minus the penalty for a missing EOS
    advantages: Tensor  # (batch, time), whitened if a critic estimates them
    returns: Tensor  # (batch, time), the critic's targets
    rewards_to_go: Tensor  # (batch, time), sums of the rewards from each token on, without the critic's estimates


class PPOTrainer(Lifecycle):
    """PPO of a language model, with the name and constructor of TRL's PPOTrainer.

    `reward_model` is a function of texts, `(prompts, completions) -> floats`, or TRL's reward model over the policy's
    vocabulary. `train_dataset` has `input_ids`, or is a list of lists of token ids. So are `eval_dataset` and
    `ptx_dataset`, the pretraining texts of PPO-ptx. A `value_model` is a separate critic. With a `peft_config` the
    reference is the policy with its adapter off. All random numbers depend only on (seed, update), so a resumed run
    gives the same result as an unbroken one, and so does any number of processes.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Run PPO until `total_episodes`, from a checkpoint if one is given; `True` takes the newest."""
        if self.train_dataset is None or self.batch_reward is None:
            raise UserError("train() needs a reward_model and a train_dataset; without them call step().")
        self.begin(resume_from_checkpoint)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            start = time.monotonic()
            # 1. Sample responses to a batch of prompts; 2. score them, and run policy, reference and critic on them.
            rollout = self._roll_out(self.state.global_step)
            self._learn(rollout, start)
        self.end()

    def _learn(self, rollout: Rollout, start: float) -> dict[str, float]:
        """Do the rest of an update. Its rollout began at `start`, in seconds of the monotonic clock."""
        # 3. Rewards at each token, advantages and returns.
        experience = self._estimate(rollout)
        # 4. Epochs of clipped optimizer steps on policy and critic.
        stats = self._optimise(experience, self.state.global_step)
        # 5. Statistics, and the next update's KL coefficient if it is adaptive.
        stats = {**self._describe(experience), **stats, "eps": self.batch_rows / (time.monotonic() - start)}
        if self.args.kl_target is not None:
            self.kl_coef = next_kl_coef(
                self.kl_coef, stats["objective/kl"], self.args.kl_target, self.batch_rows, self.args.kl_horizon
            )
        self.end_update(rollout, stats)
        return stats

    def step(self, queries: Sequence[Any], responses: Sequence[Any], scores: Sequence[Any]) -> dict[str, float]:
        """Do one PPO update on responses that you sampled and scored, as in TRL 0.7 to 0.11; returns its statistics.

        `queries` and `responses` are rows of token ids without padding, tensors or lists; `scores` has one number per
        row. Each process passes its own rows: per_device_train_batch_size x gradient_accumulation_steps of them.
        `samples_per_prompt` consecutive rows answer one prompt. The learning rate follows the schedule of `train`,
        over `total_episodes` or `max_steps`.
        """
        start = time.monotonic()
        if not len(queries) == len(responses) == len(scores) == self.local_rows:
            raise UserError(
                f"step() got {len(queries)} queries, {len(responses)} responses and {len(scores)} scores; it takes "
                f"{self.local_rows} of each, per_device_train_batch_size x gradient_accumulation_steps."
            )
        if self.args.group_size > 1 and self.accelerator.num_processes > 1:
            raise UserError("step() with trainer.samples_per_prompt works in one process only; call train().")
        asked, answers = _token_rows(queries), _token_rows(responses)
        for number, (query, answer) in enumerate(zip(asked, answers, strict=True)):
            if not query or not answer:
                raise UserError(f"row {number} of step() has an empty {'response' if query else 'query'}.")
        check_positions(language_model(self.policy_model), asked, max(map(len, answers)))
        if self.learner is None:
            self.begin(None)
        batch = make_batch(asked, answers).to(self.accelerator.device)
        judged = torch.tensor([float(score) for score in scores], device=self.accelerator.device)
        self.model.eval()
        with self._whole():
            rollout = self.run_networks(batch, batch.texts(self.processing_class), judged, self.sampling)
        check_drawable(rollout, self.sampling)
        return self._learn(rollout, start)

    @torch.no_grad()
    def generate(
        self, query_tensor: Any, *, max_new_tokens: int | None = None, return_prompt: bool = True, **options: Any
    ) -> Any:
        """Sample responses for `step`: a tensor (1, tokens) for one query (tokens,), a list for a list of queries.

        `options` are the sampling options of `transformers` that PPO supports: temperature, min_new_tokens,
        eos_token_id, suppress_tokens. `step` then computes probabilities with the same options. Tokens are drawn with
        torch's global generator.
        """
        single = isinstance(query_tensor, Tensor) and query_tensor.dim() == 1
        rows = _token_rows([query_tensor] if single else query_tensor)
        self.sampling = change_sampling(self.sampling, options, self.processing_class)
        longest, size = max_new_tokens or self.args.response_length, self.args.local_rollout_forward_batch_size
        check_positions(language_model(self.policy_model), rows, longest)
        self.model.eval()
        found: list[Tensor] = []
        with self._whole(), autocast(self.model.bf16, self.accelerator.device):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                limits, draws = torch.full((len(part),), longest), torch.rand(longest, len(part))
                batch = sample(self.policy_model, part, limits, self.sampling, draws)
                ends = batch.prompt_lengths + batch.response_lengths
                starts = 0 * ends if return_prompt else batch.prompt_lengths
                found += [row[a:b] for row, a, b in zip(batch.tokens, starts.tolist(), ends.tolist(), strict=True)]
        return found[0][None] if single else found

    def _roll_out(self, update: int) -> Rollout:
        """Sample and score the batch of an update. Every process gets the whole batch."""
        seed = self.args.seed
        chosen = prompts_of_update(len(self.prompts.ids), self.batch_prompts, update, seed)
        chosen = [prompt for prompt in chosen for _ in range(self.args.group_size)]
        # For rewards that use random numbers.
        set_seed(derive_seed(seed, f"reward of process {self.accelerator.process_index}", update) % 2**32)
        limits, uniforms = self.draws(self.batch_rows, "rollout", update)
        return self.rollout_of(self.prompts.pick(chosen), limits, uniforms, self.sampling)

    def _estimate(self, rollout: Rollout) -> Experience:
        """Compute the rewards of each token, advantages and returns."""
        args, batch, mask = self.args, rollout.batch, rollout.batch.response_mask
        first = self.state.global_step == 0
        if first and self.reference.same:  # then their KL is 0
            apart = rms((rollout.log_probs - rollout.ref_log_probs)[mask])
            told = f"log-probabilities of policy and reference differ by {apart:.3g} (root mean square) before any step"
            self._check_agreement(apart, f"{told}, though both have the same weights", rollout)
        self.reference.same = False  # from the first step on
        scores = self._maximised(rollout)
        values = rollout.values
        if first and self.model.value_head is not None and not values.any():
            # The value head's bias starts at the mean score. Adam moves a bias by only about one learning rate per
            # step, so the weights would have to learn the mean.
            expected = float(scores.mean())
            self.learner.fill(self.model.value_head.bias, expected)
            values = (values + expected) * mask
            rollout = rollout._replace(values=values)
        kl = kl_estimate(rollout.log_probs, rollout.ref_log_probs, args.kl_estimator) * mask
        rewards = token_rewards(scores, kl, batch.response_lengths, 0.0 if args.kl_in_loss else self.kl_coef)
        if args.advantage != "gae":
            advantages = group_advantages(rewards.sum(1), args.group_size, args.advantage)[:, None] * mask
            return Experience(rollout, kl, scores, advantages, values, values)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages = gae(rewards, values, mask, args.gamma, args.lam)
        critic_lam = args.lam if args.critic_lam is None else args.critic_lam
        returns = gae(rewards, values, mask, args.gamma, critic_lam) + values
        to_go = gae(rewards, torch.zeros_like(values), mask, args.gamma, 1.0)
        return Experience(rollout, kl, scores, whiten(advantages, mask), returns, to_go)

    def _maximised(self, rollout: Rollout) -> Tensor:
        """Return the scores (batch,) that PPO maximises."""
        args, scores, last = self.args, rollout.scores, rollout.batch.last_tokens
        if args.use_score_scaling:
            self.moments = add_moments(self.moments, scores)
            scores = (scores - (self.moments.mean if args.use_score_norm else 0)) / self.moments.deviation
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~torch.isin(last, last.new_tensor(self.sampling.stop_ids))
        return scores

    def _optimise(self, experience: Experience, update: int) -> dict[str, float]:
        """Train for some epochs of minibatches on one batch; returns the means of the steps' statistics."""
        args, steps = self.args, list[dict[str, Tensor]]()
        self.model.train()
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "minibatches", update))
        batch = experience.rollout.batch.to("cpu")  # every micro-batch reads its lengths
        orders = [torch.randperm(self.batch_rows, generator=generator) for _ in range(args.num_ppo_epochs)]
        for minibatch in torch.cat(orders).split(self.batch_rows // args.num_mini_batches):
            found = self._backward(experience, batch, minibatch, update, len(steps))
            if not steps and bool(found["val/ratio"].isfinite()):
                ratio, k2 = float(found["val/ratio"]), float(found["policy/approxkl_avg"])
                told = f"the ratio of new to old probabilities is {ratio:.6g} before any step, and should be 1"
                self._check_agreement(max(abs(ratio - 1), (2 * k2) ** 0.5), told, experience.rollout)
            if steps and args.max_update_kl is not None and found["policy/approxkl_avg"] > args.max_update_kl:
                self.learner.drop()
                break
            steps.append({**found, "grad_norm": self.learner.step().to(found["val/ratio"])})
        every = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        means = dict(zip(every, torch.stack([figures.mean() for figures in every.values()]).tolist(), strict=True))
        means["val/ratio_var"] = max(means.pop("squared_ratio") - means["val/ratio"] ** 2, 0.0)
        means["policy/optimizer_steps"] = float(len(steps))
        worst = {**means, "val/ratio_max": float(every["val/ratio"].max())}
        check_health(worst, args.ratio_threshold, update, Path(str(args.output_dir)))
        return means

    def _check_agreement(self, apart: float, message: str, rollout: Rollout) -> None:
        """Raise UserError with the likeliest reason if results are further `apart` than rounding explains."""
        if not apart <= tolerance(self.model, rollout.log_probs):
            with self._whole():
                why = diagnose(self.model, rollout, self.sampling)
            raise UserError(f"{message}: {why}.")

    def _backward(
        self, experience: Experience, batch: Batch, minibatch: Tensor, update: int, step: int
    ) -> dict[str, Tensor]:  # fmt: skip
        """Compute one minibatch's gradient, summed over micro-batches and processes; returns statistics by name.

        `batch` is the rollout's batch on the CPU; `minibatch` (rows,) are indices of its rows.
        """
        args, rollout, device = self.args, experience.rollout, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count, rows = batch.response_lengths[minibatch].sum(), len(minibatch)
        seen, figures = dict[str, Tensor](), list[Tensor]()
        if args.ptx_coef:
            self._backward_ptx(update, step, world * len(minibatch[rank::world]))
        # Rows of similar length go together, because a micro-batch is as wide as its longest row.
        widths = (batch.prompt_lengths + batch.response_lengths)[minibatch]
        mine = minibatch[widths.argsort(stable=True)][rank::world]
        parts = mine.split(args.per_device_train_batch_size)
        for number, index in enumerate(parts):
            part = batch.rows(index).to(device)
            index, mask = index.to(device, non_blocking=True), part.response_mask
            width = mask.shape[1]
            old, old_values = rollout.log_probs[index, :width], rollout.values[index, :width]
            advantages, returns = experience.advantages[index, :width], experience.returns[index, :width]
            shares = loss_shares(
                args.advantage, mask.to(old.dtype), part.response_lengths, count, rows, args.response_length
            )
            with self.learner.adding(last=number == len(parts) - 1) as network:
                new = network(part, self.sampling)
                policy = policy_loss(
                    new.log_probs, old, advantages, mask, args.cliprange, count, shares, args.advantage == "rloo"
                )
                loss = policy.loss
                if self.model.has_critic:
                    value = value_loss(new.values, old_values, returns, mask, args.cliprange_value, count)
                    loss = loss + args.vf_coef * value.loss
                if args.kl_in_loss:
                    kl = kl_estimate(new.log_probs, rollout.ref_log_probs[index, :width], "k3")
                    loss = loss + self.kl_coef * (kl * shares).sum()
                if args.entropy_coef:
                    loss = loss - args.entropy_coef * new.entropy.sum() / count
                self.learner.backward(loss * world)  # backward() averages over processes; this is a sum
            seen = {
                "loss/policy_avg": policy.loss,
                "val/ratio": policy.ratio,
                "squared_ratio": policy.squared_ratio,
                "policy/approxkl_avg": policy.approx_kl,
                "policy/clipfrac_avg": policy.clipped,
                "policy/update_entropy": new.entropy.sum() / count,
            }
            if self.model.has_critic:
                seen |= {"loss/value_avg": value.loss, "val/clipfrac_avg": value.clipped}
            figures.append(torch.stack([figure.detach().to(old.dtype) for figure in seen.values()]))
        total = torch.stack(figures).sum(0)
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
        return dict(zip(seen, total.unbind(), strict=True))

    def _backward_ptx(self, update: int, step: int, rows: int) -> None:
        """Add the gradient of -ptx_coef x E[log p(pretraining text)], per token (InstructGPT, eq. 2)."""
        args, texts = self.args, self.ptx
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        turn = update * args.num_ppo_epochs * args.num_mini_batches + step
        chosen = [texts[i] for i in prompts_of_update(len(texts), args.ptx_batch_size or rows, turn, args.seed + 1)]
        count = sum(len(text) - 1 for text in chosen)
        mine = sorted(chosen, key=len)[rank::world]
        for start in range(0, len(mine), args.per_device_train_batch_size):
            part = mine[start : start + args.per_device_train_batch_size]
            batch = make_batch([t[:1] for t in part], [t[1:] for t in part]).to(self.accelerator.device)
            with self.learner.adding(last=False) as network:
                found = network(batch, Sampling(), values=self.learner.every_weight)
                loss = -args.ptx_coef * found.log_probs.sum() / count * world
                self.learner.backward(loss + 0 * found.values.sum())

    def _describe(self, experience: Experience) -> dict[str, float]:
        """Return an update's statistics under TRL's names. Means are only over tokens that the policy sampled."""
        rollout, mask = experience.rollout, experience.rollout.batch.response_mask
        kl, scores = float(experience.kl.sum(1).mean()), rollout.scores.float()
        eos = self.processing_class.eos_token_id
        stats = {
            "objective/kl": kl,
            "objective/entropy": -float(rollout.log_probs.sum(1).mean()),
            "objective/non_score_reward": -self.kl_coef * kl,
            "objective/rlhf_reward": float(experience.scores.mean()) - self.kl_coef * kl,
            "objective/scores": float(scores.mean()),
            "objective/scores_std": float(scores.std()) if len(scores) > 1 else 0.0,
            "objective/kl_coef": self.kl_coef,
            "policy/entropy_avg": float(masked_mean(rollout.entropy, mask)),
            "val/response_length": float(rollout.batch.response_lengths.float().mean()),
            "val/num_eos_tokens": 0.0 if eos is None else float((rollout.batch.last_tokens == eos).sum()),
        }
        if self.model.has_critic:
            judged, came = rollout.values[mask], experience.rewards_to_go[mask]
            stats["val/explained_variance"] = explained_variance(judged, came)
        if self.args.group_size > 1:  # share of prompts that teach nothing; TRL's name
            groups = experience.scores.view(-1, self.args.group_size)
            stats["frac_reward_zero_std"] = float((groups == groups[:, :1]).all(1).float().mean())
        length, spread = stats["val/response_length"], stats["objective/scores_std"]
        figures, warnings = self.watch.update(rollout.responses, length, kl, spread)
        for warning in warnings:
            self.warn(f"update {self.state.global_step + 1}: {warning}")
        return {**stats, **figures}


def _token_rows(rows: Sequence[Any]) -> list[list[int]]:
    return [torch.as_tensor(row).flatten().tolist() for row in rows]

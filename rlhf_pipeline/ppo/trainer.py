"""The PPO trainer: roll out, score, estimate advantages, optimise, log."""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.adapters import freeze_in_bf16
from rlhf_pipeline.models.networks import language_model
from rlhf_pipeline.models.precision import autocast, fuse_gelu
from rlhf_pipeline.models.sampling import Batch, Sampling, check_positions, make_batch, sample, uniform_draws
from rlhf_pipeline.ppo.actor_critic import (
    ActorCritic,
    Reference,
    separate_critic,
    with_master_weights,
    without_dropout,
)
from rlhf_pipeline.ppo.checks import (
    check_adapter,
    check_drawable,
    check_first_ratio,
    check_head,
    check_health,
    check_reference,
)
from rlhf_pipeline.ppo.config import PPOConfig, change_sampling, check_config, make_sampling
from rlhf_pipeline.ppo.learner import check_sharding
from rlhf_pipeline.ppo.lifecycle import Lifecycle
from rlhf_pipeline.ppo.objective import (
    Moments,
    add_moments,
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    next_kl_coef,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from rlhf_pipeline.ppo.prompts import Prompts, derive_seed, prompts_of_update, read_prompts, seed_everything
from rlhf_pipeline.ppo.rollout import Rollout, TextReward, make_judge, merge, observe, roll_out
from rlhf_pipeline.ppo.trl_parent import ParentTrainer
from rlhf_pipeline.ppo.watch import CollapseWatch
from rlhf_pipeline.processes import check_gpus, sharding

P = ParamSpec("P")


class Experience(NamedTuple):
    """A rollout, and what is to be learnt from it. `time` is the longest response."""

    rollout: Rollout
    kl: Tensor  # (batch, time), of policy and reference
    scores: Tensor  # (batch,): the reward as it is maximised, scaled, clipped and fined
    advantages: Tensor  # (batch, time), whitened
    returns: Tensor  # (batch, time), what the critic learns
    rewards_to_go: Tensor  # (batch, time), what came after each token, whatever the critic thought


def _takes_old_names(constructor: Callable[P, None]) -> Callable[P, None]:
    """Let the constructor take the keywords of TRL 0.12, too."""
    new = {"config": "args", "tokenizer": "processing_class", "policy": "model", "ref_policy": "ref_model"}

    @functools.wraps(constructor)
    def taking(*given: P.args, **options: P.kwargs) -> None:
        renamed: Any = {new.get(name, name): value for name, value in options.items()}
        constructor(*given, **renamed)

    return taking


class PPOTrainer(Lifecycle, ParentTrainer):
    """Proximal policy optimisation of a language model, under the name and constructor of TRL's PPOTrainer.

    `reward_model` is a function of texts, `(prompts, completions) -> floats`, or TRL's reward model over the policy's
    own vocabulary. `train_dataset` has `input_ids`, or is a list of lists of token ids; so is `eval_dataset`, and
    `ptx_dataset`, the pretraining texts of PPO-ptx. A `value_model` is a critic of its own. With a `peft_config` the
    reference is the policy with its adapter off. Every random draw is derived from (seed, update), so a resumed run
    repeats what an unbroken one would have done, and any number of processes what one would have.
    """

    # Narrower than Trainer's own declarations: these are never None here.
    args: PPOConfig
    model: ActorCritic
    processing_class: PreTrainedTokenizerBase
    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl

    @_takes_old_names
    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: nn.Module | TextReward | None = None,
        train_dataset: Any = None,
        value_model: nn.Module | None = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        ptx_dataset: Sequence[Sequence[int]] | None = None,
    ) -> None:
        local_rows = check_config(args)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise UserError("trainer.eval_steps and eval_strategy need held-out prompts: pass an eval_dataset.")
        model, ref_model, value_model = _networks(
            args, model, ref_model, reward_model, value_model, peft_config, processing_class
        )
        actor = ActorCritic(model, value_model, bool(args.bf16))
        # Trainer's own constructor: TRL's builds a second backbone for the critic and an optimizer over it.
        Trainer.__init__(
            self, actor, args, eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
            optimizers=optimizers,
        )  # fmt: skip
        self._check_launch(optimizers[0])
        self.policy_model, self.value_model = model, value_model
        self.reward_model, self.ref_model, self.train_dataset = reward_model, ref_model, train_dataset
        self.local_rows, self.batch_rows = local_rows, local_rows * self.accelerator.num_processes
        self.prompts = read_prompts([] if train_dataset is None else train_dataset, processing_class, data_collator)
        self.eval_prompts: Prompts | None = None
        if eval_dataset is not None:
            held_out = read_prompts(eval_dataset, processing_class, data_collator)
            self.eval_prompts = held_out.pick(range(len(held_out.ids))[: args.eval_samples])
        self.ptx = None if ptx_dataset is None else read_prompts(ptx_dataset, processing_class).ids
        self._check_prompts()
        known = language_model(model).get_input_embeddings().num_embeddings
        self.sampling: Sampling = make_sampling(args, processing_class, known)
        rows_at_once = args.local_rollout_forward_batch_size
        self.judge: Any = reward_model and make_judge(reward_model, min(len(processing_class), known), rows_at_once)
        for network in (reward_model, ref_model):
            if isinstance(network, nn.Module):
                network.to(self.accelerator.device)
        check_head(actor)
        if peft_config is not None:
            with autocast(actor.bf16, self.accelerator.device):
                check_adapter(actor)
        checkpointing = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        for network in (model, value_model) if args.gradient_checkpointing else ():
            if isinstance(network, PreTrainedModel | PeftModel):
                network.gradient_checkpointing_enable(checkpointing)
        self.reference = Reference(ref_model, actor, args.ref_adapter_name, args.model_adapter_name)
        self.reference.same |= peft_config is not None  # as was just checked
        self.kl_coef, self.moments, self.watch = args.kl_coef, Moments(), CollapseWatch(args.watch_window)
        # What a script for TRL may look at.
        self.is_peft_model = isinstance(model, PeftModel)
        self.model_adapter_name, self.ref_adapter_name = args.model_adapter_name, args.ref_adapter_name
        self.train_dataset_len = len(self.prompts.ids)
        self.stop_token_id = self.sampling.stop_ids[0] if self.sampling.stop_ids else None
        self.last_rollout: Rollout | None = None
        self.learner: Any = None  # made as the training begins

    def create_optimizer(self, model: Any = None) -> Any:
        """As Trainer's; the critic has a learning rate of its own.

        One layer on a trunk's states may take larger steps than a network: by default 30 times as large.
        """
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate, shared = self.args.critic_learning_rate, self.value_model is None
        if rate is None:
            rate = 30 * self.args.learning_rate if shared else self.args.learning_rate
        if made and rate != self.args.learning_rate:
            critic = {id(p) for p in (self.model.value_head if shared else self.value_model).parameters()}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in critic]
                group["params"] = [p for p in group["params"] if id(p) not in critic]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _check_launch(self, optimizer: Any) -> None:
        """Refuse what would silently do something else than asked."""
        check_gpus(self.args.n_gpu, f"accelerate launch --num_processes {self.args.n_gpu} your_script.py")
        if self.is_fsdp_enabled:
            raise UserError("PPOTrainer does not run under FSDP; launch it with DeepSpeed, as DDP or in one process.")
        if self.is_deepspeed_enabled:
            check_sharding(self.accelerator, self.args)
        if self.accelerator.mixed_precision == "fp16":
            raise UserError("fp16 is not carried out: its range is too small for PPO's ratios; use bf16.")
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            lost = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
            if lost:
                raise UserError(
                    f"the optimizer that was passed does not hold {', '.join(lost[:3])}; leave optimizers out and one "
                    "over policy and critic is made, or pass a value_model and put its weights in."
                )

    def _check_prompts(self) -> None:
        args, rows = self.args, self.batch_rows
        if self.train_dataset is not None and len(self.prompts.ids) < rows:
            raise UserError(
                f"{len(self.prompts.ids)} prompts do not fill one batch of {rows}; "
                "lower trainer.per_device_train_batch_size."
            )
        policy = language_model(self.policy_model)
        vocabulary = policy.get_input_embeddings().num_embeddings
        texts = [text[: args.ptx_max_length] for text in self.ptx or [] if len(text) > 1]
        self.ptx = texts
        held_out = self.eval_prompts.ids if self.eval_prompts else []
        for rows_of, room in ((self.prompts.ids, args.response_length), (held_out, args.response_length), (texts, 0)):
            if not rows_of:
                continue
            check_positions(policy, rows_of, room)
            largest = max(max(ids) for ids in rows_of)
            if largest >= vocabulary:
                raise UserError(
                    f"a text has the token id {largest} and the policy knows ids below {vocabulary}; after adding "
                    "tokens call model.resize_token_embeddings(len(tokenizer))."
                )
        if args.ptx_coef and not self.ptx:
            raise UserError("trainer.ptx_coef needs pretraining texts: ptx_dataset, or ptx.name= on the command line.")

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Run PPO until `total_episodes`, from a checkpoint where one is given; `True` takes the newest."""
        if self.train_dataset is None or self.judge is None:
            raise UserError("train() needs a reward_model and a train_dataset; without them call step().")
        self.begin(resume_from_checkpoint)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            start = time.monotonic()
            # 1. Sample responses to a batch of prompts; 2. score them, and see them with policy, reference and critic.
            rollout = self._roll_out(self.state.global_step)
            self._update(rollout, start)
        self.end()

    def step(self, queries: Sequence[Any], responses: Sequence[Any], scores: Sequence[Any]) -> dict[str, float]:
        """One PPO update on responses that you sampled and scored, as in TRL 0.7 to 0.11; returns its statistics.

        `queries` and `responses` are rows of token ids without padding, tensors or lists; `scores` is one number a
        row. A process passes its own rows: per_device_train_batch_size x gradient_accumulation_steps of them. The
        schedule of the learning rate is that of `train`, over `total_episodes` or `max_steps`.
        """
        start = time.monotonic()
        if not len(queries) == len(responses) == len(scores) == self.local_rows:
            raise UserError(
                f"step() got {len(queries)} queries, {len(responses)} responses and {len(scores)} scores; it takes "
                f"{self.local_rows} of each, per_device_train_batch_size x gradient_accumulation_steps."
            )
        if self.learner is None:
            self.begin(None)
        asked, answers = ([torch.as_tensor(row).flatten().tolist() for row in rows] for rows in (queries, responses))
        for number, (query, answer) in enumerate(zip(asked, answers, strict=True)):
            if not query or not answer:
                raise UserError(f"row {number} of step() has an empty {'response' if query else 'query'}.")
        check_positions(language_model(self.policy_model), asked, max(map(len, answers)))
        batch = make_batch(asked, answers).to(self.accelerator.device)
        judged = torch.tensor([float(score) for score in scores], device=self.accelerator.device)
        self.model.eval()
        with self._whole():
            part = observe(
                self.model, self.reference, batch, *batch.texts(self.processing_class), judged, self.sampling,
                self.args.local_rollout_forward_batch_size,
            )  # fmt: skip
        check_drawable(part, self.sampling)
        return self._update(self._merged(part), start)

    @torch.no_grad()
    def generate(
        self, query_tensor: Any, *, max_new_tokens: int | None = None, return_prompt: bool = True, **options: Any
    ) -> Any:
        """Responses for `step`, drawn from the policy: of one query (tokens,) a tensor (1, tokens), of a list a list.

        The sampling options of `transformers` that PPO can learn under are taken (temperature, min_new_tokens,
        eos_token_id, suppress_tokens), and `step` then computes probabilities under the same. Tokens are drawn with
        torch's global generator.
        """
        single = isinstance(query_tensor, Tensor) and query_tensor.dim() == 1
        rows = [torch.as_tensor(row).flatten().tolist() for row in ([query_tensor] if single else query_tensor)]
        self.sampling = change_sampling(self.sampling, options, self.processing_class)
        limits = torch.full((len(rows),), max_new_tokens or self.args.response_length)
        check_positions(language_model(self.policy_model), rows, int(limits[0]))
        self.model.eval()
        found: list[Tensor] = []
        with self._whole(), autocast(self.model.bf16, self.accelerator.device):
            for start in range(0, len(rows), self.args.local_rollout_forward_batch_size):
                part = slice(start, start + self.args.local_rollout_forward_batch_size)
                draws = torch.rand(int(limits[0]), len(limits[part]))
                batch = sample(self.policy_model, rows[part], limits[part], self.sampling, draws)
                ends = batch.prompt_lengths + batch.response_lengths
                starts = 0 * ends if return_prompt else batch.prompt_lengths
                found += [row[a:b] for row, a, b in zip(batch.tokens, starts.tolist(), ends.tolist(), strict=True)]
        return found[0][None] if single else found

    def _update(self, rollout: Rollout, start: float) -> dict[str, float]:
        """The rest of an update whose rollout was begun at `start`, in seconds of the monotonic clock."""
        # 3. Rewards at each token, advantages and returns.
        experience = self._estimate(rollout)
        # 4. Some epochs of clipped steps for policy and critic.
        stats = self._optimise(experience, self.state.global_step)
        stats = {**self._describe(experience), **stats, "eps": self.batch_rows / (time.monotonic() - start)}
        # 5. The KL coefficient of the next update, where it adapts.
        self._steer(experience)
        self.end_update(rollout, stats)
        return stats

    def _roll_out(self, update: int) -> Rollout:
        """Sample and judge: this process's share of the batch; then everyone has all of it."""
        args, count = self.args, len(self.prompts.ids)
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "rollout", update))
        shortest = args.min_response_length or args.response_length
        limits = torch.randint(shortest, args.response_length + 1, (self.batch_rows,), generator=generator)
        chosen = prompts_of_update(count, self.batch_rows, update, args.seed)
        seed_everything(derive_seed(args.seed, f"reward of process {self.accelerator.process_index}", update))
        return self._share(self.prompts.pick(chosen), limits, self.sampling, uniform_draws(limits, generator))

    def _share(self, prompts: Prompts, limits: Tensor, sampling: Sampling, uniforms: Tensor) -> Rollout:
        """Roll out over all processes: process r has rows r, r + n, ...; each draws what one process would have."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.model.eval()
        mine = range(rank, len(prompts.ids), world)
        with self._whole():
            part = roll_out(
                self.model, self.reference, self.judge, self.processing_class, prompts.pick(mine),
                limits[rank::world], sampling, uniforms[:, rank::world], self.args.local_rollout_forward_batch_size,
            )  # fmt: skip
        return self._merged(part)

    def _merged(self, part: Rollout) -> Rollout:
        """The rollouts of all processes as one."""
        if self.accelerator.num_processes == 1:
            return part
        return merge(gather_object([part.to("cpu")])).to(self.accelerator.device)

    def _estimate(self, rollout: Rollout) -> Experience:
        """Rewards at every token, advantages and returns."""
        args, batch, mask = self.args, rollout.batch, rollout.batch.response_mask
        if self.state.global_step == 0 and self.reference.same:
            check_reference(rollout, self.model, self.sampling, self._whole)
        self.reference.same = False  # from the first step on
        scores = rollout.scores
        if args.use_score_scaling:
            self.moments = add_moments(self.moments, scores)
            scores = (scores - (self.moments.mean if args.use_score_norm else 0)) / self.moments.deviation
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is not None:
            last = batch.last_tokens
            scores = scores - args.missing_eos_penalty * ~torch.isin(last, last.new_tensor(self.sampling.stop_ids))
        values = rollout.values
        if self.state.global_step == 0 and self.value_model is None and not values.any():
            # A value head starts at the mean score. It could not get there by itself: Adam moves a bias by about one
            # learning rate a step, and the weights would take up what it lacks.
            expected = float(scores.mean())
            self.learner.fill(self.model.value_head.bias, expected)
            values = (values + expected) * mask
            rollout = rollout._replace(values=values)
        kl = kl_estimate(rollout.log_probs, rollout.ref_log_probs, args.kl_estimator) * mask
        rewards = token_rewards(scores, kl, batch.response_lengths, self.kl_coef)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages = gae(rewards, values, mask, args.gamma, args.lam)
        critic_lam = args.lam if args.critic_lam is None else args.critic_lam
        returns = gae(rewards, values, mask, args.gamma, critic_lam) + values
        to_go = gae(rewards, torch.zeros_like(values), mask, args.gamma, 1.0)
        return Experience(rollout, kl, scores, whiten(advantages, mask), returns, to_go)

    def _optimise(self, experience: Experience, update: int) -> dict[str, float]:
        """Some epochs of minibatches on one batch of experience; the means of its steps' statistics."""
        args, steps = self.args, list[dict[str, Tensor]]()
        self.model.train()
        order = torch.Generator().manual_seed(derive_seed(args.seed, "minibatches", update))
        rows = self.batch_rows // args.num_mini_batches
        batch = experience.rollout.batch.to("cpu")  # its lengths are asked for in every micro-batch
        for _ in range(args.num_ppo_epochs):
            for minibatch in torch.randperm(self.batch_rows, generator=order).split(rows):
                found = self._backward(experience, batch, minibatch, update, len(steps))
                if not steps and bool(found["val/ratio"].isfinite()):
                    ratio, approx_kl = float(found["val/ratio"]), float(found["policy/approxkl_avg"])
                    check_first_ratio(ratio, approx_kl, self.model, experience.rollout, self.sampling, self._whole)
                if steps and args.max_update_kl is not None and found["policy/approxkl_avg"] > args.max_update_kl:
                    self.learner.drop()
                    return self._means(steps, update)
                steps.append({**found, "grad_norm": self.learner.step().to(found["val/ratio"])})
        return self._means(steps, update)

    def _means(self, steps: list[dict[str, Tensor]], update: int) -> dict[str, float]:
        every = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        means = dict(zip(every, torch.stack([values.mean() for values in every.values()]).tolist(), strict=True))
        squares = means.pop("squared_ratio")
        means["val/ratio_var"] = max(squares - means["val/ratio"] ** 2, 0.0)
        means["policy/optimizer_steps"] = float(len(steps))
        worst = {**means, "val/ratio_max": float(every["val/ratio"].max())}
        check_health(worst, self.args.ratio_threshold, update, self.last_checkpoint)
        return means

    def _backward(
        self, experience: Experience, batch: Batch, minibatch: Tensor, update: int, step: int
    ) -> dict[str, Tensor]:  # fmt: skip
        """The gradient of one minibatch, summed over micro-batches and processes, and its statistics by name.

        `batch` is the rollout's on the CPU, `minibatch` (rows,) an index there.
        """
        args, rollout, device = self.args, experience.rollout, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count = batch.response_lengths[minibatch].sum()
        total = torch.zeros((), device=device, dtype=rollout.log_probs.dtype)
        seen = dict[str, Tensor]()
        if args.ptx_coef:
            self._backward_ptx(update, step, world * len(minibatch[rank::world]))
        # Rows of like length together: a micro-batch is as wide as its longest row.
        widths = (batch.prompt_lengths + batch.response_lengths)[minibatch]
        mine = minibatch[widths.argsort(stable=True)][rank::world]
        parts = mine.split(args.per_device_train_batch_size)
        for number, index in enumerate(parts):
            part = batch.rows(index).to(device)
            index, mask = index.to(device, non_blocking=True), part.response_mask
            width = mask.shape[1]
            old, old_values = rollout.log_probs[index, :width], rollout.values[index, :width]
            advantages, returns = experience.advantages[index, :width], experience.returns[index, :width]
            with self.learner.adding(last=number == len(parts) - 1) as network:
                new = network(part, self.sampling)
                policy = policy_loss(new.log_probs, old, advantages, mask, args.cliprange, count)
                value = value_loss(new.values, old_values, returns, mask, args.cliprange_value, count)
                loss = policy.loss + args.vf_coef * value.loss
                if args.entropy_coef:
                    loss = loss - args.entropy_coef * new.entropy.sum() / count
                self.learner.backward(loss * world)  # processes are averaged, and this is a sum
            seen = {
                "loss/policy_avg": policy.loss,
                "val/ratio": policy.ratio,
                "squared_ratio": policy.squared_ratio,
                "policy/approxkl_avg": policy.approx_kl,
                "policy/clipfrac_avg": policy.clipped,
                "loss/value_avg": value.loss,
                "val/clipfrac_avg": value.clipped,
                "policy/update_entropy": new.entropy.sum() / count,
            }
            total = total + torch.stack([figure.detach().to(total.dtype) for figure in seen.values()])
        if world > 1:
            total = self.accelerator.reduce(total, "sum")
        return dict(zip(seen, total.unbind(), strict=True))

    def _backward_ptx(self, update: int, step: int, rows: int) -> None:
        """The gradient of -ptx_coef x E[log p(pretraining text)], a token (InstructGPT, eq. 2)."""
        args, texts = self.args, self.ptx or []
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        turn = update * args.num_ppo_epochs * args.num_mini_batches + step
        rows = args.ptx_batch_size or rows
        chosen = [texts[i] for i in prompts_of_update(len(texts), rows, turn, args.seed + 1)]
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
        """An update in TRL's names. Means are over tokens that the policy chose, and nothing else."""
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
            "val/explained_variance": explained_variance(rollout.values[mask], experience.rewards_to_go[mask]),
        }
        figures, warnings = self.watch.update(rollout.responses, stats["val/response_length"], kl)
        for warning in warnings:
            self.warn(f"update {self.state.global_step + 1}: {warning}")
        return {**stats, **figures}

    def _steer(self, experience: Experience) -> None:
        """The adaptive KL coefficient of the next update."""
        args = self.args
        if args.kl_target is not None:
            kl = float(experience.kl.sum(1).mean())
            self.kl_coef = next_kl_coef(self.kl_coef, kl, args.kl_target, self.batch_rows, args.kl_horizon)


def _networks(
    args: PPOConfig,
    model: Any,
    ref_model: Any,
    reward_model: Any,
    value_model: Any,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Any, Any, Any]:
    """Policy, reference (None: the policy, its adapter off) and separate critic (None: shared), made fit to train."""
    if ref_model is model:
        raise UserError("model and ref_model are one object; pass a copy, or None and a copy is made.")
    if value_model is not None and value_model is reward_model:
        raise UserError("value_model and reward_model are one object, and only one of them is trained; pass a copy.")
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise UserError("the model has an adapter already; pass it without a peft_config, or merge it first.")
        model = get_peft_model(model, peft_config)
    if value_model is None and args.critic == "separate":
        value_model = separate_critic(args.critic_init, model, reward_model, tokenizer, peft_config)
    if ref_model is None and not isinstance(model, PeftModel):
        ref_model = copy.deepcopy(model).requires_grad_(False)
    networks = [model, ref_model, value_model, *([reward_model] if isinstance(reward_model, nn.Module) else [])]
    without_dropout(*networks)
    for network in networks:
        if network is not None:
            fuse_gelu(network)
    if with_master_weights(model, ref_model, value_model):
        print("weights stored in 16 bits are trained as fp32", flush=True)
    if args.bf16 and sharding() is None:
        for network in (model, value_model):
            if isinstance(network, PeftModel):
                freeze_in_bf16(network, keep=network is model and args.should_save)
    return model, ref_model, value_model

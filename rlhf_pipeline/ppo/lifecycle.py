"""The trainer around the algorithm: construction, resuming, callbacks, evaluation, checkpoints, saving."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import ExportableState

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.metrics import distinct
from rlhf_pipeline.models.networks import language_model
from rlhf_pipeline.models.precision import autocast
from rlhf_pipeline.models.sampling import Batch, Sampling, check_positions, join_batches, sample, uniform_draws
from rlhf_pipeline.ppo.actor_critic import ActorCritic, Reference, prepare_networks
from rlhf_pipeline.ppo.checks import check_head
from rlhf_pipeline.ppo.config import PPOConfig, check_config, make_sampling
from rlhf_pipeline.ppo.learner import check_sharding, make_learner
from rlhf_pipeline.ppo.objective import Moments
from rlhf_pipeline.ppo.prompts import Prompts, derive_seed, read_prompts
from rlhf_pipeline.ppo.rollout import Rollout, TextReward, make_batch_reward, merge
from rlhf_pipeline.ppo.storage import WEIGHTS, load_weights, save_policy, save_weights
from rlhf_pipeline.ppo.trl_parent import ParentTrainer
from rlhf_pipeline.ppo.watch import CollapseWatch
from rlhf_pipeline.processes import check_gpus
from rlhf_pipeline.runs.checkpoints import drop_old, fault_of, newest_whole, replacing, seal
from rlhf_pipeline.texts import printable

P = ParamSpec("P")
# Keywords of TRL 0.12 to 0.14, and their names today.
_RENAMED = {"config": "args", "tokenizer": "processing_class", "policy": "model", "ref_policy": "ref_model"}


def _takes_old_keywords(constructor: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(constructor)
    def renaming(*args: P.args, **options: P.kwargs) -> None:
        renamed: Any = {_RENAMED.get(name, name): value for name, value in options.items()}
        constructor(*args, **renamed)

    return renaming


@dataclasses.dataclass
class PPOState(TrainerState):
    """transformers' state, and in `episode` the number of responses trained on so far."""

    episode: int = 0


class Lifecycle(ParentTrainer):
    """The parts of PPOTrainer that are not PPO."""

    # Narrower than Trainer's own declarations: these are never None here.
    args: PPOConfig
    model: ActorCritic
    processing_class: PreTrainedTokenizerBase
    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl
    on_warning: Callable[[int, str], None] | None = None  # called with the update's number and the warning

    @_takes_old_keywords
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
        self.local_rows = check_config(args)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise UserError("trainer.eval_steps and eval_strategy need held-out prompts: pass an eval_dataset.")
        if value_model is not None and args.advantage != "gae":
            raise UserError(f"trainer.advantage={args.advantage} has no critic; leave value_model out.")
        model, ref_model, value_model = prepare_networks(
            args, model, ref_model, reward_model, value_model, peft_config, processing_class
        )
        actor = ActorCritic(model, value_model, bool(args.bf16), critic=args.advantage == "gae")
        # Trainer's own constructor: TRL's builds a second backbone for the critic and an optimizer over it.
        Trainer.__init__(
            self, actor, args, eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
            optimizers=optimizers,
        )  # fmt: skip
        self._check_launch(optimizers[0])
        self.batch_rows = self.local_rows * self.accelerator.num_processes
        self.batch_prompts = self.batch_rows // args.group_size
        self.policy_model, self.value_model = model, value_model
        self.reward_model, self.ref_model, self.train_dataset = reward_model, ref_model, train_dataset
        self.prompts = read_prompts([] if train_dataset is None else train_dataset, processing_class, data_collator)
        self.eval_prompts: Prompts | None = None
        if eval_dataset is not None:
            held_out = read_prompts(eval_dataset, processing_class, data_collator)
            self.eval_prompts = held_out.pick(range(len(held_out.ids))[: args.eval_samples])
        texts = [] if ptx_dataset is None else read_prompts(ptx_dataset, processing_class).ids
        self.ptx = [text[: args.ptx_max_length] for text in texts if len(text) > 1]
        self._check_prompts()
        known = language_model(model).get_input_embeddings().num_embeddings
        self.sampling: Sampling = make_sampling(args, processing_class, known)
        rows_at_once = args.local_rollout_forward_batch_size
        self.batch_reward: Any = reward_model and make_batch_reward(
            reward_model, min(len(processing_class), known), rows_at_once
        )
        for network in (reward_model, ref_model):
            if isinstance(network, nn.Module):
                network.to(self.accelerator.device)
        check_head(actor)
        for network in (model, value_model) if args.gradient_checkpointing else ():
            if isinstance(network, PreTrainedModel | PeftModel):
                network.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        self.reference = Reference(ref_model, actor, args.ref_adapter_name, args.model_adapter_name)
        self.reference.same |= peft_config is not None  # a fresh adapter
        self.last_rollout: Rollout | None = None
        self.learner: Any = None  # made by `begin`

    def _check_launch(self, optimizer: Any) -> None:
        """Refuse launches and optimizers that would silently train something else."""
        check_gpus(self.args.n_gpu, f"accelerate launch --num_processes {self.args.n_gpu} your_script.py")
        if self.is_fsdp_enabled:
            raise UserError("PPOTrainer does not run under FSDP; launch it with DeepSpeed, as DDP or in one process.")
        if self.is_deepspeed_enabled:
            check_sharding(self.accelerator, self.args)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else None
        lost = [n for n, p in self.model.named_parameters() if held and p.requires_grad and id(p) not in held]
        if lost:
            raise UserError(
                f"the optimizer that was passed does not hold {', '.join(lost[:3])}; leave optimizers out to have "
                "one made for policy and critic, or pass a value_model and add its weights to the optimizer."
            )

    def _check_prompts(self) -> None:
        """Refuse too few prompts, texts longer than the policy's positions, and token ids that it does not know."""
        args, policy = self.args, language_model(self.policy_model)
        if self.train_dataset is not None and len(self.prompts.ids) < self.batch_prompts:
            raise UserError(
                f"{len(self.prompts.ids)} prompts do not fill one batch of {self.batch_prompts}; "
                "lower trainer.per_device_train_batch_size."
            )
        if args.ptx_coef and not self.ptx:
            raise UserError("trainer.ptx_coef needs pretraining texts: ptx_dataset, or ptx.name= on the command line.")
        vocabulary = policy.get_input_embeddings().num_embeddings
        held_out = self.eval_prompts.ids if self.eval_prompts else []
        for ids, room in ((self.prompts.ids, args.response_length), (held_out, args.response_length), (self.ptx, 0)):
            if ids:
                check_positions(policy, ids, room)
            largest = max(map(max, ids), default=0)
            if largest >= vocabulary:
                raise UserError(
                    f"a text has the token id {largest} and the policy knows ids below {vocabulary}; after adding "
                    "tokens call model.resize_token_embeddings(len(tokenizer))."
                )

    # -- beginning and end

    def begin(self, resume_from_checkpoint: str | bool | None) -> None:
        """Make optimizer, schedule and state, and load them from a checkpoint if one is given. True: the newest."""
        args = self.args
        a_pass = len(self.prompts.ids) * args.group_size  # responses in one pass over the prompts
        episodes = args.total_episodes or int(args.num_train_epochs * a_pass)
        if not episodes and args.max_steps <= 0:
            raise UserError("without a train_dataset, set the length of the training: total_episodes= or max_steps=.")
        updates = args.max_steps if args.max_steps > 0 else math.ceil(episodes / self.batch_rows)
        if self._created_lr_scheduler:  # by an earlier call of `train`
            self.lr_scheduler = None
        self.create_optimizer_and_scheduler(num_training_steps=updates)
        self.kl_coef, self.moments, self.watch = args.kl_coef, Moments(), CollapseWatch(args.watch_window)
        self.state = PPOState()
        folder = self._checkpoint_of(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder:  # before the learner is made, because sharding copies the weights
            self._load_weights(folder)
        if self.learner is None:
            self.learner = make_learner(self.accelerator, self.model, self.optimizer, args.max_grad_norm)
            self.optimizer, self.model_wrapped = self.learner.optimizer, self.learner.network
        if folder:
            self._load_state(folder)
        self.state.init_training_references(self, updates, math.ceil(episodes / (a_pass or self.batch_rows)), None)
        self.state.compute_steps(args, updates)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        self.control._new_training()
        self.control = handler.on_train_begin(args, self.state, self.control)
        self.control = handler.on_epoch_begin(args, self.state, self.control)
        if args.eval_on_start and not folder:
            self.evaluate()

    def create_optimizer(self, model: Any = None) -> Any:
        """Make Trainer's optimizer, with another learning rate for the critic.

        A value head's default is 30 times the policy's: one layer tolerates larger steps than a whole network.
        """
        made, shared = self.optimizer is None and self.model.has_critic, self.value_model is None
        optimizer, rate = super().create_optimizer(model), self.args.critic_learning_rate
        if rate is None:
            rate = (30 if shared else 1) * self.args.learning_rate
        if made and rate != self.args.learning_rate:
            critic = {id(p) for p in (self.model.value_head if shared else self.value_model).parameters()}
            groups = list[dict[str, Any]]()
            for own, lr in ((False, self.args.learning_rate), (True, rate)):
                for group in optimizer.param_groups:
                    params = [p for p in group["params"] if (id(p) in critic) == own]
                    groups += [{**group, "params": params, "lr": lr}] if params else []
            optimizer.param_groups[:] = groups
        return optimizer

    def end_update(self, rollout: Rollout, stats: dict[str, float]) -> None:
        """Count the update; log, evaluate and save as the callbacks decide."""
        args, state, handler = self.args, self.state, self.callback_handler
        learning_rate, epoch = self.lr_scheduler.get_last_lr()[0], int(state.epoch or 0)
        self.lr_scheduler.step()
        self.last_rollout = rollout
        state.global_step += 1
        state.episode = state.global_step * self.batch_rows
        state.epoch = state.episode / (len(self.prompts.ids) * args.group_size or self.batch_rows)
        self.control = handler.on_step_end(args, state, self.control)
        ended = state.global_step >= state.max_steps
        if int(state.epoch) > epoch or ended:
            self.control = handler.on_epoch_end(args, state, self.control)
            if not ended:
                self.control = handler.on_epoch_begin(args, state, self.control)
        if self.control.should_log or ended:
            self.log({**stats, "lr": learning_rate, "episode": state.episode})
        if self.control.should_evaluate and self._determine_best_metric(self.evaluate(), None):
            state.best_global_step = state.global_step
            if args.load_best_model_at_end or args.save_strategy != "no":
                self._save_best()
            self.control.should_save |= args.save_strategy == "best"
        every = max(1, state.max_steps // args.num_sample_generations) if args.num_sample_generations > 0 else 0
        if every and (state.global_step - 1) % every == 0:
            self.generate_completions(sampling=True)
        if self.control.should_save:
            self._save_checkpoint()
            self.control = handler.on_save(args, state, self.control)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def end(self) -> None:
        """Load the best policy if `load_best_model_at_end` is set."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            self._load_weights(Path(self.args.output_dir) / "best")
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def warn(self, message: str) -> None:
        """Print a warning in process 0."""
        if self.is_world_process_zero():
            tqdm.write(f"warning: {message}")  # above the progress bar if there is one
            if self.on_warning:
                self.on_warning(self.state.global_step + 1, message)

    # -- sampling and scoring, over all processes

    def draws(self, rows: int, use: str, update: int) -> tuple[Tensor, Tensor]:
        """Return each response's length limit (rows,), and the random numbers to sample it with, (longest, rows)."""
        args, generator = self.args, torch.Generator()
        generator.manual_seed(derive_seed(args.seed, use, update))
        limits = torch.randint(
            args.min_response_length or args.response_length, args.response_length + 1, (rows,), generator=generator
        )
        return limits, uniform_draws(limits, generator)

    def rollout_of(self, prompts: Prompts, limits: Tensor, uniforms: Tensor, sampling: Sampling) -> Rollout:
        """Sample a response to each prompt, score it, and run all networks on it.

        Process r of n has rows r, r + n, ... Each row uses the random numbers that it would use in one process.
        """
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        prompts, limits, uniforms = prompts.pick(range(len(limits))[share]), limits[share], uniforms[:, share]
        size = self.args.local_rollout_forward_batch_size
        self.model.eval()
        with self._whole():
            with autocast(self.model.bf16, self.accelerator.device):
                parts = [slice(start, start + size) for start in range(0, len(limits), size)]
                batch = join_batches(
                    [sample(self.policy_model, prompts.ids[p], limits[p], sampling, uniforms[:, p]) for p in parts]
                )
            texts = batch.texts(self.processing_class)
            with torch.no_grad():
                scores = self.batch_reward(batch, *texts, prompts.columns).to(self.accelerator.device)
            return self.run_networks(batch, texts, scores, sampling)

    @torch.no_grad()
    def run_networks(
        self, batch: Batch, texts: tuple[list[str], list[str]], scores: Tensor, sampling: Sampling
    ) -> Rollout:
        """Run all networks on this process's prompts and responses. Returns the merged rollout of all processes."""
        if scores.shape != (len(batch.tokens),):
            count, responses = tuple(scores.shape), len(batch.tokens)
            raise UserError(f"the reward gave {count} numbers for {responses} responses; return one for each.")
        for score, prompt, response in zip(scores.tolist(), *texts, strict=True):
            if not math.isfinite(score):
                raise UserError(f"the reward of {response[:80]!r} (to {prompt[:80]!r}) is {score}; it must be finite.")
        width = batch.response_mask.shape[1]
        # Rows of similar length go together, because a forward pass is as wide as its longest row.
        by_length = (batch.prompt_lengths + batch.response_lengths).argsort(stable=True)
        found = []
        for index in by_length.split(self.args.local_rollout_forward_batch_size):
            part = batch.rows(index)
            seen, ref_log_probs = self.model(part, sampling), self.reference.log_probs(part, sampling)
            figures = torch.stack([seen.log_probs, ref_log_probs, seen.values, seen.entropy])
            found.append(nn.functional.pad(figures, (0, width - figures.shape[-1])))
        log_probs, ref_log_probs, values, entropy = torch.cat(found, 1)[:, by_length.argsort()]
        rollout = Rollout(batch, log_probs, ref_log_probs, values, entropy, scores, *texts)
        if self.accelerator.num_processes == 1:
            return rollout
        return merge(gather_object([rollout.to("cpu")])).to(self.accelerator.device)

    # -- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample responses to the held-out prompts, always with the same random numbers, and log the means."""
        prompts = self.eval_prompts if eval_dataset is None else read_prompts(eval_dataset, self.processing_class)
        if prompts is None:
            raise UserError("evaluate() needs held-out prompts: pass an eval_dataset.")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(prompts).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, prompts: Prompts | None = None) -> dict[str, float]:
        """Return the metrics of `evaluate` without logging them. By default the prompts are the held-out ones."""
        prompts = prompts or self.eval_prompts
        assert prompts
        size = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        self.callback_handler.eval_dataloader = range(0, len(prompts.ids), size)  # for progress bars: how many steps
        rewards, kls, lengths, responses = [], [], [], []
        for rollout in self._answers(prompts, self.sampling, "evaluate"):
            rewards.append(rollout.scores.float())
            kls.append((rollout.log_probs - rollout.ref_log_probs).sum(1))
            lengths.append(rollout.batch.response_lengths.float())
            responses += rollout.responses
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reward, kl = torch.cat(rewards), float(torch.cat(kls).mean())
        return {
            "score": float(reward.mean()) - self.args.selection_kl_coef * kl,
            "reward": float(reward.mean()),
            "reward_stderr": float(reward.std() / math.sqrt(len(reward))) if len(reward) > 1 else 0.0,
            "kl": kl,
            "length": float(torch.cat(lengths).mean()),
            "distinct_2": distinct(responses, 2),
        }

    def _answers(self, prompts: Prompts, sampling: Sampling, use: str) -> Iterator[Rollout]:
        """Yield rollouts of held-out prompts in parts. The size of a part does not change the random numbers."""
        count, world = len(prompts.ids), self.accelerator.num_processes
        limits, uniforms = self.draws(count, use, 0)
        size = self.args.per_device_eval_batch_size * world
        for start in range(0, count, size):
            own = list(range(start, min(start + size, count)))
            rows = [*own, *own[-1:] * (-len(own) % world)]  # repeats the last: all processes take as many
            rollout = self.rollout_of(prompts.pick(rows), limits[rows], uniforms[:, rows], sampling)
            yield rollout.rows(torch.arange(len(own), device=rollout.scores.device))

    def generate_completions(self, sampling: bool = False) -> None:
        """Print five held-out prompts with near-greedy responses and their scores, as TRL's trainer does.

        With `sampling` only one batch of prompts is answered, else all of them.
        """
        if self.eval_prompts is None:
            return
        prompts = self.eval_prompts
        if sampling:
            prompts = prompts.pick(range(len(prompts.ids))[: self.args.per_device_eval_batch_size])
        near_greedy = dataclasses.replace(self.sampling, temperature=0.01)
        table = Table("query", "model response", "score", show_lines=True)
        for found in self._answers(prompts, near_greedy, "completions"):
            for query, response, score in zip(found.prompts, found.responses, found.scores.tolist(), strict=True):
                if table.row_count < 5:
                    table.add_row(Text(printable(query)), Text(printable(response)), f"{score:.3f}")  # Text: not markup
        if self.is_world_process_zero():
            with tqdm.external_write_mode():  # above the progress bar if there is one
                Console(color_system=None).print(table)  # the command line would escape its codes

    # -- checkpoints: each is complete or absent

    def _checkpoint_of(self, asked: str | bool) -> Path:
        found = newest_whole(Path(self.args.output_dir)) if asked is True else Path(str(asked))
        if found is not None and (fault := fault_of(found)):
            raise UserError(f"{found} is damaged ({fault}); resume from another checkpoint.")
        if found is None or not (found / "trainer_state.json").exists():
            raise UserError(
                f"there is no checkpoint to resume from in {found or self.args.output_dir}; call train() without one."
            )
        return found

    def _save_checkpoint(self, *_: Any) -> None:
        moments = self.learner.state_dict()
        with self._whole():
            if self.is_world_process_zero():
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                with replacing(folder) as temporary:
                    save_weights(self.model, temporary / WEIGHTS)
                    torch.save(moments, temporary / "optimizer.pt")
                    torch.save(self.lr_scheduler.state_dict(), temporary / "scheduler.pt")
                    exported = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
                    self.state.stateful_callbacks = {type(each).__name__: each.state() for each in exported}
                    self.state.save_to_json(str(temporary / "trainer_state.json"))
                    own = {"kl_coef": self.kl_coef, "moments": self.moments, "watch": vars(self.watch)}
                    (temporary / "ppo_state.json").write_text(json.dumps(own))
                    seal(temporary)
                drop_old(folder.parent, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _load_weights(self, folder: Path) -> None:
        with torch.no_grad(), self._whole(change=True):
            load_weights(self.model, folder / WEIGHTS)

    def _load_state(self, folder: Path) -> None:
        self.learner.load_state_dict(folder / "optimizer.pt")
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self.state = PPOState.load_from_json(str(folder / "trainer_state.json"))
        for callback in self.callback_handler.callbacks:
            kept = self.state.stateful_callbacks.get(type(callback).__name__, {})
            for name, value in kept.get("attributes", {}).items():
                setattr(callback, name, value)
        own = json.loads((folder / "ppo_state.json").read_text())
        self.kl_coef, self.moments = own["kl_coef"], Moments(*own["moments"])
        self.watch = CollapseWatch(**{**own["watch"], "window": self.args.watch_window})

    def _save_best(self) -> None:
        folder = Path(self.args.output_dir) / "best"
        with self._whole():
            if self.is_world_process_zero():
                with replacing(folder) as temporary:
                    self._write(temporary, merge=False)
                    save_weights(self.model, temporary / WEIGHTS)
        self.state.best_model_checkpoint = str(folder)
        self.accelerator.wait_for_everyone()

    def _whole(self, change: bool = False) -> AbstractContextManager[None]:
        """Gather all weights in this process if they are sharded."""
        return self.learner.whole(change) if self.learner else nullcontext()

    # -- the result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, merge: bool = False) -> None:
        """Write the policy, which AutoModelForCausalLM opens, and the critic next to it.

        An adapter is saved as an adapter. With `merge` it is merged into its base model.
        """
        with self._whole():
            if self.is_world_process_zero():
                self._write(Path(output_dir or self.args.output_dir), merge)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _write(self, folder: Path, merge: bool) -> None:
        save_policy(self.model, self.processing_class, folder, self.sampling, self.args.response_length, merge)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:  # fmt: skip
        """Write a draft of the model card, README.md in `output_dir`, as TRL's trainers do. push_to_hub calls it."""
        more = [tags] if isinstance(tags, str) else tags or []
        Trainer.create_model_card(
            self, model_name=model_name, dataset_tags=dataset_name, tags=["ppo", "rlhf_pipeline", "trl", *more]
        )

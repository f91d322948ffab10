"""What surrounds the algorithm: beginning, resuming, callbacks, evaluation, checkpoints, TRL's other methods."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.metrics import distinct
from rlhf_pipeline.models.sampling import Sampling, uniform_draws
from rlhf_pipeline.ppo.learner import make_learner
from rlhf_pipeline.ppo.objective import Moments
from rlhf_pipeline.ppo.prompts import derive_seed, read_prompts
from rlhf_pipeline.ppo.storage import (
    WEIGHTS,
    fresh_folder,
    generation_config,
    load_weights,
    save_policy,
    save_weights,
)
from rlhf_pipeline.ppo.watch import CollapseWatch
from rlhf_pipeline.runs.checkpoints import drop_old, fault_of, newest_whole, put_in_place, seal, step_of
from rlhf_pipeline.texts import shown

_ON_THE_CARD = (
    "learning_rate",
    "kl_coef",
    "num_ppo_epochs",
    "num_mini_batches",
    "response_length",
    "temperature",
    "total_episodes",
)


@dataclasses.dataclass
class PPOState(TrainerState):
    """transformers' state with the number of `episode`s, responses, that were learnt from."""

    episode: int = 0


class Lifecycle(Trainer):
    """The parts of PPOTrainer that are not PPO. It expects the attributes that PPOTrainer's constructor makes."""

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl
    prompts: Any
    eval_prompts: Any
    batch_rows: int
    kl_coef: float
    moments: Moments
    watch: Any
    sampling: Sampling
    learner: Any
    last_rollout: Any
    made_scheduler: bool = False
    on_warning: Callable[[int, str], None] | None = None  # told of each warning, with its update

    # -- beginning and end

    def begin(self, resume_from_checkpoint: str | bool | None) -> None:
        """Optimizer, schedule and state; from a checkpoint where one is given."""
        args = self.args
        count = len(self.prompts.ids) or self.batch_rows
        episodes = args.total_episodes or int(args.num_train_epochs * len(self.prompts.ids))
        if not episodes and args.max_steps <= 0:
            raise UserError("without a train_dataset, total_episodes= or max_steps= says how long the training is.")
        updates = args.max_steps if args.max_steps > 0 else math.ceil(episodes / self.batch_rows)
        if self.learner is not None and self.made_scheduler:  # a second training in this process
            self.lr_scheduler = None
        self.made_scheduler = self.lr_scheduler is None
        self.create_optimizer_and_scheduler(num_training_steps=updates)
        self.kl_coef, self.moments, self.watch = args.kl_coef, Moments(), CollapseWatch(args.watch_window)
        folder = self._checkpoint_of(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder:  # before the learner is made: what shards the weights copies them
            self._load_weights(folder)
        if self.learner is None:
            self.learner = make_learner(self.accelerator, self.model, self.optimizer, args.max_grad_norm)
            self.optimizer, self.model_wrapped = self.learner.optimizer, self.learner.network
        self.state = PPOState(max_steps=updates, is_world_process_zero=self.is_world_process_zero())
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.num_train_epochs = math.ceil(episodes / count)
        if folder:
            self._load_checkpoint(folder)
            self.state.max_steps = updates
        for name in ("logging_steps", "eval_steps", "save_steps"):  # below 1 they are shares of the whole
            asked = getattr(args, name) or 1
            setattr(self.state, name, max(1, math.ceil(asked * updates) if asked < 1 else int(asked)))
        self.state.train_batch_size = args.per_device_train_batch_size
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        self.control._new_training()
        self.control = handler.on_train_begin(args, self.state, self.control)
        self.control = handler.on_epoch_begin(args, self.state, self.control)
        if args.eval_on_start and not resume_from_checkpoint:
            self.evaluate()

    def end(self) -> None:
        """The best policy back, where that was asked for; the last words to the callbacks."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            self._load_weights(Path(self.args.output_dir) / "best")
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def end_update(self, rollout: Any, stats: dict[str, float]) -> None:
        """Log, evaluate and save as the callbacks decide."""
        args, state = self.args, self.state
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        state.global_step += 1
        episode, epoch_before = state.global_step * self.batch_rows, int(state.epoch or 0)
        state.epoch = episode / (len(self.prompts.ids) or self.batch_rows)
        state.episode = episode
        self.last_rollout = rollout
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        ended = state.global_step >= state.max_steps
        if int(state.epoch) > epoch_before or ended:
            self.control = self.callback_handler.on_epoch_end(args, state, self.control)
            if not ended:
                self.control = self.callback_handler.on_epoch_begin(args, state, self.control)
        if self.control.should_log or state.global_step == state.max_steps:
            self.log({**stats, "lr": learning_rate, "episode": episode})
        if self.control.should_evaluate:
            metrics = self.evaluate()
            if self._determine_best_metric(metrics, None):
                state.best_global_step = state.global_step
                if args.load_best_model_at_end or args.save_strategy != "no":
                    self._save_best()
                self.control.should_save = self.control.should_save or args.save_strategy == "best"
        every = max(1, state.max_steps // args.num_sample_generations) if args.num_sample_generations > 0 else 0
        if every and (state.global_step - 1) % every == 0:
            self.generate_completions(sampling=True)
        if self.control.should_save:
            self._save_checkpoint()
            self.control = self.callback_handler.on_save(args, state, self.control)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def warn(self, message: str) -> None:
        """One line for the user, once over all processes."""
        if self.is_world_process_zero():
            tqdm.write(f"warning: {message}")  # above the progress bar, where there is one
            if self.on_warning:
                self.on_warning(self.state.global_step + 1, message)

    def get_train_dataloader(self) -> Any:
        """There is none: each update draws its prompts by (seed, update)."""
        raise UserError("PPOTrainer has no data loader; its prompts are in trainer.prompts.ids, as token ids.")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """There is none: `evaluate` and `measure` answer the prompts themselves."""
        raise UserError("PPOTrainer has no data loader; call evaluate(), or read trainer.eval_prompts.ids.")

    # -- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the held-out prompts, with the same random numbers each time, and log the means."""
        prompts = self.eval_prompts if eval_dataset is None else read_prompts(eval_dataset, self.processing_class)
        if prompts is None:
            raise UserError("evaluate() needs held-out prompts: pass an eval_dataset.")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(prompts).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, prompts: Any = None) -> dict[str, float]:
        """The means of the answers to prompts, by default the held-out ones, without a word to any log."""
        prompts = prompts or self.eval_prompts
        size = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        self.callback_handler.eval_dataloader = range(0, len(prompts.ids), size)  # as Trainer's: how many there will be
        rewards, kls, lengths, answers = [], [], [], []
        for rollout in self._answers(prompts, self.sampling, derive_seed(self.args.seed, "evaluate", 0)):
            rewards.append(rollout.scores.float())
            kls.append((rollout.log_probs - rollout.ref_log_probs).sum(1).float())
            lengths.append(rollout.batch.response_lengths.float())
            answers += rollout.responses
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reward, kl = torch.cat(rewards), float(torch.cat(kls).mean())
        self.model.train()
        return {
            "score": float(reward.mean()) - self.args.selection_kl_coef * kl,
            "reward": float(reward.mean()),
            "reward_stderr": float(reward.std() / math.sqrt(len(reward))) if len(reward) > 1 else 0.0,
            "kl": kl,
            "length": float(torch.cat(lengths).mean()),
            "distinct_2": distinct(answers, 2),
        }

    def _answers(self, prompts: Any, sampling: Sampling, seed: int) -> Iterator[Any]:
        """Rollouts of prompts that are not trained on, part by part; how they are parted changes no draw.

        Every process needs a row: the last of a part is repeated for those that would have none.
        """
        args, count, world = self.args, len(prompts.ids), self.accelerator.num_processes
        generator = torch.Generator().manual_seed(seed)
        shortest = args.min_response_length or args.response_length
        limits = torch.randint(shortest, args.response_length + 1, (count,), generator=generator)
        uniforms = uniform_draws(limits, generator)
        size = args.per_device_eval_batch_size * world
        for start in range(0, count, size):
            own = list(range(start, min(start + size, count)))
            rows = [*own, *own[-1:] * (-len(own) % world)]
            rollout = self._share(prompts.pick(rows), limits[rows], sampling, uniforms[:, rows])
            yield rollout.first(len(own))

    def generate_completions(self, sampling: bool = False) -> None:
        """Print how the policy goes on from held-out prompts, all but greedily; with `sampling` one batch of them."""
        if self.eval_prompts is None:
            return
        calm = dataclasses.replace(self.sampling, temperature=0.01)
        prompts, rows = self.eval_prompts, list[tuple[str, str, float]]()
        if sampling:
            prompts = prompts.pick(range(len(prompts.ids))[: self.args.per_device_eval_batch_size])
        for found in self._answers(prompts, calm, derive_seed(self.args.seed, "completions", 0)):
            rows += zip(found.prompts, found.responses, found.scores.tolist(), strict=True)
        self.model.train()
        if self.is_world_process_zero():
            table = Table("query", "model response", "score", show_lines=True)
            for query, response, score in rows[:5]:
                table.add_row(Text(shown(query)), Text(shown(response)), f"{score:.3f}")  # it is no markup
            with tqdm.external_write_mode():  # above the progress bar, where there is one
                Console().print(table)

    # -- checkpoints: whole or not there

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint of this run."""
        found = newest_whole(Path(self.args.output_dir))
        return str(found) if found else None

    def _checkpoint_of(self, asked: str | bool) -> Path:
        found = newest_whole(Path(self.args.output_dir)) if asked is True else Path(str(asked))
        if found is not None and (fault := fault_of(found)):
            raise UserError(f"{found} is damaged ({fault}); resume from another checkpoint.")
        if found is None or not (found / "trainer_state.json").exists():
            where = self.args.output_dir if found is None else found
            raise UserError(f"there is no checkpoint to resume from in {where}; call train() without one.")
        return found

    def _save_checkpoint(self, *_: Any) -> None:
        moments = self.learner.state_dict()
        with self._whole():
            if self.is_world_process_zero():
                self._write_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", moments)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path, moments: Any) -> None:
        temporary = fresh_folder(folder)
        save_weights(self.model, temporary / WEIGHTS)
        torch.save(moments, temporary / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), temporary / "scheduler.pt")
        exported = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
        self.state.stateful_callbacks = {type(each).__name__: each.state() for each in exported}
        self.state.save_to_json(str(temporary / "trainer_state.json"))
        own = {"kl_coef": self.kl_coef, "moments": self.moments, "watch": self.watch.state_dict()}
        (temporary / "ppo_state.json").write_text(json.dumps(own))
        seal(temporary)
        put_in_place(temporary, folder)
        drop_old(folder.parent, self.args.save_total_limit)

    def _load_weights(self, folder: Path) -> None:
        with torch.no_grad(), self._whole(change=True):
            load_weights(self.model, folder / WEIGHTS)

    def _whole(self, change: bool = False) -> AbstractContextManager[None]:
        """All weights at hand, also where they are in shards."""
        return self.learner.whole(change) if self.learner else nullcontext()

    def _load_checkpoint(self, folder: Path) -> None:
        self.learner.load_state_dict(folder / "optimizer.pt")
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self.state = PPOState.load_from_json(str(folder / "trainer_state.json"))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        if self.state.global_step != step_of(folder) >= 0:
            raise UserError(f"{folder} says that it is of step {self.state.global_step}; it was renamed or mixed up.")
        for callback in self.callback_handler.callbacks:
            kept = self.state.stateful_callbacks.get(type(callback).__name__)
            for name, value in (kept or {}).get("attributes", {}).items():
                setattr(callback, name, value)
        own = json.loads((folder / "ppo_state.json").read_text())
        self.kl_coef, self.moments = own["kl_coef"], Moments(*own["moments"])
        self.watch.load_state_dict(own["watch"])

    def _save_best(self) -> None:
        folder = Path(self.args.output_dir) / "best"
        with self._whole():
            if self.is_world_process_zero():
                temporary = fresh_folder(folder)
                self._write(temporary, merge=False)
                save_weights(self.model, temporary / WEIGHTS)
                put_in_place(temporary, folder)
        self.state.best_model_checkpoint = str(folder)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False, merge: bool = False) -> None:
        """The policy alone, as AutoModelForCausalLM opens it, with the critic beside it.

        An adapter is saved as one; with `merge`, the policy as one model that needs no other.
        """
        with self._whole():
            if self.is_world_process_zero():
                self._write(Path(output_dir or self.args.output_dir), merge)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:  # fmt: skip
        """Write a draft of the model's card, README.md in `output_dir`, as TRL's trainers do; push_to_hub calls it."""
        if not self.is_world_process_zero():
            return
        base = getattr(self.model.config, "_name_or_path", "")
        base = None if not base or Path(base).exists() else base
        name = model_name or Path(str(self.args.output_dir)).name
        more = [tags] if isinstance(tags, str) else tags or []
        data = ModelCardData(
            library_name="transformers", pipeline_tag="text-generation", base_model=base, datasets=dataset_name,
            model_name=name, tags=sorted({"generated_from_trainer", "rlhf_pipeline", "trl", "ppo", *more}),
        )  # fmt: skip
        card = ModelCard.from_template(
            data,
            template_path=str(Path(__file__).with_name("card.md")),
            base_model=base,
            dataset_name=dataset_name,
            hub_model_id=self.hub_model_id or name,
            settings={name: getattr(self.args, name) for name in _ON_THE_CARD},
            versions=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl")),
        )
        card.save(Path(str(self.args.output_dir)) / "README.md")

    def _write(self, folder: Path, merge: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        how = generation_config(self.sampling, self.args.response_length, self.processing_class)
        save_policy(self.model, self.processing_class, folder, how, merge)

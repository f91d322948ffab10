"""Code that the stages share: a trainer's settings, its log and its progress bar."""

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from rlhf_pipeline.data import Splits, load_data
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_error
from rlhf_pipeline.models.networks import positions
from rlhf_pipeline.models.precision import choose_bf16
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.processes import agree, check_gpus, processes, sharding
from rlhf_pipeline.progress import at_terminal, progress
from rlhf_pipeline.runs.checkpoints import SEAL, seal
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.same_work import batch_of
from rlhf_pipeline.settings import Settings, trainer_fields
from rlhf_pipeline.texts import mismatch

A = TypeVar("A", bound=TrainingArguments)

# Fields dropped from a Trainer's log rows: they depend on the clock (`RunDir.log` adds the time) or restart on resume.
_LEFT_OUT = ("runtime", "per_second", "preparation_time", "total_flos", "num_tokens")
# Fields of a Trainer's log rows that the bar shows, and under which name.
_BAR = {
    "loss": "loss",
    "accuracy": "accuracy",
    "objective/scores": "reward",
    "objective/kl": "kl",
    "eval_loss": "held-out",
    "eval_accuracy": "held-out accuracy",
    "eval_reward": "held-out",
}


@contextmanager
def building() -> Iterator[None]:
    """Turn errors in the settings that transformers and peft raise while the trainer is built into a `UserError`."""
    try:
        yield
    except (ImportError, ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        if disk_error(error):
            raise
        raise UserError(f"the trainer cannot be built with these settings: {' '.join(str(error).split())}") from error


def trainer_args(kind: type[A], settings: Settings, out: RunDir) -> A:
    """Return the stage's TRL config. Raises UserError if TRL refuses a setting, before any model is loaded."""
    quiet()
    use_threads(out)
    # An earlier stage of this process may have left other settings.
    AcceleratorState._reset_state(reset_partial_state=False)
    values = {"disable_tqdm": True, "logging_first_step": True, **settings.trainer}
    cut = agree(lambda: batch_of(out, settings) or {})
    if said := [f"trainer.{name}={value}" for name, value in cut.items() if values.get(name, 1) != value]:
        print(f"{', '.join(said)}: the same rows per step as before, on {processes()} process(es)", flush=True)
    values |= cut
    values["report_to"] = []  # trackers follow the run directory's log
    floats = {name for name, kind in trainer_fields(settings.stage).items() if kind is float}
    values |= {name: float(values[name]) for name in floats & {*values} if values[name] is not None}
    if settings.stage != "ppo":  # PPO sets these itself, and has no loader
        values["logging_nan_inf_filter"] = False  # it would show a loss of 0 instead of NaN
        if not torch.cuda.is_available():
            values.setdefault("dataloader_pin_memory", False)
        if not values.get("fp16"):
            values["bf16"], chosen = choose_bf16(values.get("bf16", "auto"))
            print(f"computing in {chosen}", flush=True)
    if values.get("save_total_limit") == 1:
        values["save_total_limit"] = 2  # the older one is deleted before the newer is known to be complete
    if not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)  # without it, transformers refuses bf16 on a CPU
    if values.get("fsdp") and sharding() != "fsdp":  # otherwise transformers sets it in the environment
        raise UserError("trainer.fsdp is set by the launcher; use make sft LAUNCH=fsdp PROCS=2.")
    if processes() > 1 and values.get("average_tokens_across_devices") is False:
        raise UserError(
            "trainer.average_tokens_across_devices=false would weigh tokens differently on each process; leave it out."
        )
    try:
        args = kind(output_dir=str(out.checkpoints), seed=settings.seed, **values)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{kind.__name__} refuses these trainer settings: {error}") from error
    check_gpus(args.n_gpu, f"make {settings.stage} LAUNCH=ddp PROCS={args.n_gpu}")
    set_seed(settings.seed)
    return args


def use_threads(out: RunDir) -> None:
    """Resume with the number of threads that the stage began with: the split of a sum decides its rounding."""
    before = out.record if out.last_checkpoint() else {}
    threads = (before.get("hardware") or {}).get("threads")
    if threads and threads != torch.get_num_threads() and before.get("processes", 1) == processes():
        torch.set_num_threads(int(threads))
        print(f"computing on {threads} threads, as before", flush=True)


def limit_length(args: Any, model: Any) -> int:
    """Limit `max_length`, in tokens, to the model's positions."""
    places = positions(model)
    args.max_length = min(args.max_length or (512 if places == sys.maxsize else places), places)
    return int(args.max_length)


def quiet() -> None:
    """Silence the libraries' progress bars and the warnings that a user cannot act on."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # TRL's deprecation warnings name the module that makes its trainer, which is ours.
    chatty = "torch|transformers|trl|datasets|accelerate|peft|multiprocess|rlhf_pipeline"
    warnings.filterwarnings("ignore", module=f"({chatty})")


def attach_log(trainer: transformers.Trainer, out: RunDir) -> str | None:
    """Log a trainer's rows to the run directory, show a bar, and return the checkpoint to resume from."""
    if out.stage != "ppo":  # PPO has no loader
        with building():
            trainer.get_train_dataloader()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunLog(out))
    trainer.add_callback(Bar(out.stage, "update" if out.stage == "ppo" else "step"))
    checkpoint = out.last_checkpoint()
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    out.rewind(step)
    if out.leads:
        out.observer.started(out.config(), step)
    if checkpoint:
        print(f"resuming from {checkpoint}", flush=True)
    return str(checkpoint) if checkpoint else None


def sharded_weights(trainer: transformers.Trainer) -> dict[str, Any] | None:
    """Gather the weights of a sharded model on the first process; None if each process has the whole model."""
    if not (kind := sharding()):
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if kind == "fsdp":
        found: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return {name: weight for name, weight in found.items() if name not in model.all_tied_weights_keys}
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in model.named_parameters():  # the model itself may be in bf16
        weight = safe_get_full_fp32_param(parameter)  # all processes take part
        if trainer.is_world_process_zero():
            weights[name] = weight.cpu().clone()
    return weights


def check_finite(model: Any, when: str) -> None:
    """Refuse to save weights that are not finite."""
    if model is not None and not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        raise UserError(f"the weights are not finite {when}, and are not saved; lower trainer.learning_rate.")


class RunLog(TrainerCallback):
    """Writes `metrics.jsonl`, and marks a checkpoint once it is complete."""

    def __init__(self, out: RunDir) -> None:
        self.out = out

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, Any] | None = None, **_: Any) -> None:  # fmt: skip
        """Write one row per log. A loss that is not finite ends the training at the last good checkpoint."""
        for name in ("loss", "eval_loss"):
            if not math.isfinite(value := float((logs or {}).get(name, 0.0))):
                raise UserError(
                    f"{name} is {value} at step {state.global_step}; the checkpoints before it are kept. Lower "
                    "trainer.learning_rate, or look for rows that overflow."
                )
        row = {key: value for key, value in (logs or {}).items() if not key.endswith(_LEFT_OUT) and key != "eps"}
        if row and "train_loss" not in row:
            self.out.log(state.global_step, row)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the number of steps for the record: the last may not have been logged."""
        self.out.steps = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                model: Any = None, **_: Any) -> None:  # fmt: skip
        """Mark the checkpoint as complete."""
        check_finite(model, f"at step {state.global_step}")
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (folder / SEAL).exists():
            seal(folder)


class Bar(TrainerCallback):
    """A bar of training steps with the latest metrics, and a bar of batches during evaluation."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit, self.shown = title, unit, dict[str, float]()
        self.bar: Any = None
        self.measured: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start at the training's first step, which after a resume is not 0."""
        self.bar = progress(state.max_steps, self.title, self.unit, initial=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                           eval_dataloader: Any = None, **_: Any) -> None:  # fmt: skip
        """Count one evaluated batch. After the last, remove the bar."""
        if self.measured is None:
            self.measured = progress(len(eval_dataloader), "held-out", "batch", delay=1, leave=False)
        self.measured.update()
        if self.measured.n >= self.measured.total:
            self.measured.clear()  # close() leaves a bar that a printed line drew within its delay
            self.measured.close()
            self.measured = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, Any] | None = None, **_: Any) -> None:  # fmt: skip
        """Show the latest metrics; in a log file they are in the next line."""
        found = {key: float(value) for key, value in (logs or {}).items() if key in _BAR}
        self.shown = {key: value for key in _BAR if (value := found.get(key, self.shown.get(key))) is not None}
        if self.bar is not None:
            figures = ", ".join(f"{_BAR[key]}={value:.3f}" for key, value in self.shown.items())
            self.bar.set_postfix_str(figures, refresh=at_terminal())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the full bar on the screen."""
        self.bar.close()


def reward_origins(reward: Reward, where: str, role: str = "reward") -> dict[str, str]:
    """Return the origin of a reward and of each of its parts, for a run's lineage."""
    return {role: where, **{f"{role}.parts[{number}]": part for number, part in enumerate(reward.parts)}}


def check_languages(reward: Reward, tokenizer: Any, strings: Sequence[str]) -> None:
    """Warn, in one line each, if the policy or the reward was made for texts in another script."""
    for what, reason in (("policy", mismatch(tokenizer, strings)), ("reward", reward.unfit(strings))):
        if reason:
            print(f"warning: {what}: {reason}", flush=True)


def read_data(choice: dict[str, Any], seed: int, answers: bool = False) -> Splits[Any]:
    """Print a line and read the chosen data. The line comes first, because large files take time."""
    path = choice.get("path") or ""
    print_input("data", f"{choice['name']} {path if isinstance(path, str) else ', '.join(path)}".rstrip())
    return load_data(choice, seed, answers)


def print_input(role: str, where: str) -> None:
    """Print one line for an input of the stage."""
    print(f"{role:<7} {where}", flush=True)

"""What PPO would take on given machines, of memory, FLOPs and time: computed from configurations, in seconds.

python -m rlhf_pipeline stage=plan policy=gpt2_scratch policy.size=xl plan.gpus=8 plan.gpu=a100
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.classifiers import register
from rlhf_pipeline.models.policies import lora_config, open_config, policy_config
from rlhf_pipeline.models.precision import native_bf16
from rlhf_pipeline.models.rewards import ON_THE_HUB, TRAINABLE
from rlhf_pipeline.plan.devices import DEVICES, GIB, Device
from rlhf_pipeline.plan.launches import Job, Work, fewest, launches, needs
from rlhf_pipeline.plan.networks import count, count_classifier
from rlhf_pipeline.ppo.config import PPOConfig, check_config
from rlhf_pipeline.report.tables import plan_table
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.setup import quiet

_FEW = 8  # responses that are rolled out at once, where memory is short
_LONGEST_PROMPT = 256  # tokens, where neither the data nor the user says


def run(settings: Settings, out: RunDir) -> None:
    """Count the networks, compute each launch, name the simplest that fits; print it."""
    quiet()
    config, where = policy_config(settings.policy, out.upstream("sft", "pretrain", policy=settings.policy))
    reward, judge = count_reward(settings.reward, out.upstream("reward"))
    found = {**plan(settings, config, reward), "policy": where, "reward": judge}
    if settings.plan.json:
        print(json.dumps(found, indent=1))
    else:
        plan_table(found)


def plan(settings: Settings, config: Any, reward: int) -> dict[str, Any]:
    """All that is computed of PPO with a policy of this configuration, as plain values; bytes, seconds, FLOPs.

    `reward` is the number of the reward's parameters. Raises `UserError` for settings that PPO refuses.
    """
    asked, device = settings.plan, device_of(settings)
    args, job = prepare(settings, config, reward)
    on = (job, device, asked.mfu)
    rows = [needs(asked.launch, asked.gpus, *on)] if asked.launch else launches(asked.gpus, *on)
    for row in rows:  # of the whole run, if its length is known
        episodes = job.work.rows * asked.gpus
        row["updates"] = (
            args.max_steps if args.max_steps > 0 else math.ceil((args.total_episodes or 0) / episodes) or None
        )
        row["run_seconds"] = row["update_seconds"] * row["updates"] if row["updates"] else None
    chosen = next((row["launch"] for row in rows if row["fits"]), None)
    least = fewest(asked.gpus, *on) if chosen else None
    helps = {}
    for name, other in [] if chosen else smaller(settings):
        every = launches(asked.gpus, prepare(other, config, reward)[1], device, asked.mfu)
        best = min(every, key=lambda row: float(row["bytes"]))
        helps[name] = {key: best[key] for key in ("launch", "bytes", "fits")}
    return {
        "computed": True,
        "gpus": asked.gpus,
        "gpu": asked.gpu,
        "memory": device.memory,
        "mfu": asked.mfu,
        "parameters": {
            "policy": job.policy.parameters, "value_head": job.value_head,
            "critic": job.critic.parameters if job.critic else 0, "reference": job.reference,
            "reward": reward, "trained": job.trained,
        },
        "reference_bytes": job.reference_bytes,
        "work": asdict(job.work),
        "launches": rows,
        "chosen": chosen,
        "fewest": {"launch": least["launch"], "gpus": least["processes"]} if least else None,
        "helps": helps,
    }  # fmt: skip


def prepare(settings: Settings, config: Any, reward: int) -> tuple[PPOConfig, Job]:
    """PPO's settings, its networks and what a process does in an update."""
    values = {key: value for key, value in settings.trainer.items() if key not in ("bf16", "report_to")}
    try:
        args = PPOConfig(output_dir="unused", bf16=False, report_to="none", **{"use_cpu": True, **values})
    except (ValueError, TypeError) as error:
        raise UserError(f"PPOConfig refuses these trainer settings: {error}") from error
    rows = check_config(args, script=False)
    bf16 = settings.trainer.get("bf16", "auto")
    if bf16 in ("auto", None):
        bf16 = native_bf16() if settings.plan.gpu == "cpu" else True
    prompt, mean = prompt_lengths(settings, config, args.response_length)
    work = Work(
        rows, min(args.per_device_train_batch_size, rows // args.num_mini_batches), args.num_mini_batches,
        args.num_ppo_epochs, args.local_rollout_forward_batch_size, prompt, args.response_length, mean,
        ((args.min_response_length or args.response_length) + args.response_length) / 2,
        bool(bf16), args.gradient_checkpointing,
    )  # fmt: skip
    lora = lora_config(settings.policy)
    policy = count(config, work.width, work.bf16, lora)
    critic = count(config, work.width, work.bf16, lora, critic=True) if args.critic == "separate" else None
    return args, Job(policy, critic, 0 if lora else policy.parameters, reward, work)


def prompt_lengths(settings: Settings, config: Any, response: int) -> tuple[int, float]:
    """The longest prompt and the mean, in tokens: as asked, as the data draws them, or 256 if there is room."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    asked = settings.plan.prompt_tokens
    first, last = (asked, asked) if asked else settings.data.get("prompt_tokens") or (_LONGEST_PROMPT,) * 2
    if response >= positions or (asked and asked + response > positions):
        raise UserError(
            f"a prompt and its response take up to {last + response} tokens, and the policy has {positions} "
            "positions; lower trainer.response_length or plan.prompt_tokens."
        )
    last = int(min(last, positions - response))
    return last, (min(first, last) + last) / 2


def device_of(settings: Settings) -> Device:
    """The accelerator that is named, with the user's own figures over its data sheet's."""
    asked, device = settings.plan, DEVICES[settings.plan.gpu]
    flops = {"bf16": asked.flops, "fp32": asked.flops} if asked.flops else {}
    return replace(device, memory=asked.gpu_memory * GIB if asked.gpu_memory else device.memory, **flops)


def count_reward(choice: dict[str, Any], upstream: Path | None) -> tuple[int, str]:
    """How many parameters the reward has, and which model was counted; a rule has none."""
    if choice["name"] == "sum":
        counts, names = zip(*(count_reward(part, upstream) for part in choice["parts"]), strict=True)
        return sum(counts), " + ".join(names)
    if choice["name"] not in TRAINABLE:
        return 0, f"{choice['name']}, without parameters of its own"
    path = choice.get("path") or upstream or ON_THE_HUB.get(choice["name"], (None,))[0]
    if path is None:
        return 0, f"{choice['name']}, not trained yet: counted as none"
    register()
    return count_classifier(open_config(str(path), "reward.path")), str(path)


def smaller(settings: Settings) -> list[tuple[str, Settings]]:
    """The same job with less to hold, named by the settings to add: one by one, then all together.

    An adapter changes what is learnt, so it is last.
    """
    trainer = settings.trainer
    rows, parts = trainer.get("per_device_train_batch_size", 8), trainer.get("gradient_accumulation_steps", 1)
    candidates: list[tuple[bool, dict[str, Any]]] = [
        (trainer.get("bf16") is False, {"bf16": True}),
        (trainer.get("critic") == "separate", {"critic": "shared"}),
        (not trainer.get("gradient_checkpointing"), {"gradient_checkpointing": True}),
        (trainer.get("local_rollout_forward_batch_size", 64) > _FEW, {"local_rollout_forward_batch_size": _FEW}),
        (rows > 1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * parts}),
    ]
    found, together = list[tuple[str, Settings]](), settings
    for applies, change in candidates:
        if applies:
            name = " ".join(f"trainer.{key}={str(value).lower()}" for key, value in change.items())
            found.append((name, replace(settings, trainer={**trainer, **change})))
            together = replace(together, trainer={**together.trainer, **change})
    if not settings.policy.get("lora"):
        adapter = {**settings.policy, "lora": {"r": 8}}
        found.append(("policy.lora.r=8", replace(settings, policy=adapter)))
        together = replace(together, policy=adapter)
    return [*found, (" ".join(name for name, _ in found), together)] if len(found) > 1 else found

"""What PPO would take on given machines, of memory, FLOPs and time: computed from configurations, in seconds.

python -m rlhf_pipeline stage=plan policy=gpt2_scratch policy.size=xl plan.gpus=8 plan.gpu=a100
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.plan.devices import DEVICES, GIB, Device
from rlhf_pipeline.plan.launches import Option, fewest, option, options
from rlhf_pipeline.plan.memory import Roles, Work, reference_bytes
from rlhf_pipeline.plan.networks import count_classifier, count_critic, count_policy
from rlhf_pipeline.policies import lora_config, open_config, policy_config
from rlhf_pipeline.ppo.config import PPOConfig, check_config
from rlhf_pipeline.precision import native_bf16
from rlhf_pipeline.reward_model import register
from rlhf_pipeline.rewards import ON_THE_HUB, TRAINABLE
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.common import quiet
from rlhf_pipeline.tables import plan_table

_FEW = 8  # responses that are rolled out at once, where memory is short
_LONGEST_PROMPT = 256  # tokens, where neither the data nor the user says


def run(settings: Settings, out: RunDir) -> None:
    """Count the networks, reckon each launch, name the simplest that fits; print it."""
    quiet()
    config, where = policy_config(settings.policy, out.upstream("sft", "pretrain", policy=settings.policy))
    reward, judge = reward_parameters(settings.reward, out.upstream("reward"))
    found = plan(settings, config, reward)
    found["policy"], found["reward"] = where, judge
    if settings.plan.json:
        print(json.dumps(found, indent=1))
    else:
        plan_table(found)


def plan(settings: Settings, config: Any, reward: int) -> dict[str, Any]:
    """All that is computed of PPO with a policy of this configuration, as plain values; bytes, seconds, FLOPs.

    `reward` is the number of the reward's parameters. Settings that PPO refuses are a `UserError`.
    """
    asked, device, cpu = settings.plan, device_of(settings), settings.plan.gpu == "cpu"
    args, work, roles = prepared(settings, config, reward)
    reckoned = (roles, work, device, cpu, asked.mfu)
    every = [option(asked.launch, asked.gpus, *reckoned)] if asked.launch else options(asked.gpus, *reckoned)
    chosen = next((each for each in every if each.fits), None)
    least = fewest(asked.gpus, *reckoned) if chosen else None
    return {
        "computed": True,
        "gpus": asked.gpus,
        "gpu": asked.gpu,
        "memory": device.memory,
        "mfu": asked.mfu,
        "parameters": {
            "policy": roles.policy.parameters, "value_head": roles.value_head,
            "critic": roles.critic.parameters if roles.critic else 0, "reference": roles.reference,
            "reward": reward, "trained": roles.trained,
        },
        "reference_bytes": reference_bytes(roles, work.bf16),
        "work": dataclasses.asdict(work),
        "launches": [as_row(each, args, work) for each in every],
        "chosen": chosen.launch if chosen else None,
        "fewest": {"launch": least.launch, "gpus": least.processes} if least else None,
        "helps": {} if chosen else dict(what_helps(settings, config, reward)),
    }  # fmt: skip


def as_row(found: Option, args: PPOConfig, work: Work) -> dict[str, Any]:
    """A launch as plain values, with the updates and seconds of the whole run where its length is known."""
    updates = args.max_steps if args.max_steps > 0 else None
    if not updates and args.total_episodes:
        updates = math.ceil(args.total_episodes / (work.rows * found.processes))
    run = {"updates": updates, "run_seconds": found.update * updates if updates else None}
    sums = {"bytes": found.bytes, "update_seconds": found.update, "update_flops": sum(found.flops.values())}
    return {**dataclasses.asdict(found), **sums, **run}


def prepared(settings: Settings, config: Any, reward: int) -> tuple[PPOConfig, Work, Roles]:
    """PPO's settings, what a process does in an update, and the networks."""
    asked, values = settings.plan, {k: v for k, v in settings.trainer.items() if k not in ("bf16", "report_to")}
    try:
        args = PPOConfig(output_dir="unused", bf16=False, report_to="none", **{"use_cpu": True, **values})
    except (ValueError, TypeError) as error:
        raise UserError(f"PPOConfig refuses these trainer settings: {error}") from error
    rows = check_config(args, script=False)
    bf16 = settings.trainer.get("bf16", "auto")
    if bf16 in ("auto", None):
        bf16 = native_bf16() if asked.gpu == "cpu" else True
    prompt, mean = prompts_of(settings, config, args.response_length)
    micro = min(args.per_device_train_batch_size, rows // args.num_mini_batches)
    work = Work(
        rows, micro, args.num_mini_batches, args.num_ppo_epochs,
        args.local_rollout_forward_batch_size, prompt, args.response_length, mean,
        ((args.min_response_length or args.response_length) + args.response_length) / 2,
        bool(bf16), args.gradient_checkpointing,
        asked.gpu == "cpu" and not str(getattr(config, "dtype", None)).endswith("bfloat16"),
    )  # fmt: skip
    adapter = lora_config(settings.policy)
    policy = count_policy(config, work.width, work.bf16, adapter)
    critic = count_critic(config, work.width, work.bf16, adapter) if args.critic == "separate" else None
    return args, work, Roles(policy, critic, 0 if adapter else policy.parameters, reward)


def prompts_of(settings: Settings, config: Any, response: int) -> tuple[int, float]:
    """The longest prompt and the mean, in tokens: as said, as the data draws them, else 256 as far as there is room."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    said = settings.plan.prompt_tokens
    first, last = (said, said) if said else settings.data.get("prompt_tokens") or (_LONGEST_PROMPT,) * 2
    if response >= positions or (said and said + response > positions):
        raise UserError(
            f"a prompt and its response take up to {last + response} tokens, and the policy has {positions} "
            "positions; lower trainer.response_length or plan.prompt_tokens."
        )
    last = int(min(last, positions - response))
    return last, (min(first, last) + last) / 2


def device_of(settings: Settings) -> Device:
    """The accelerator that is named, with what is said of it."""
    asked, device = settings.plan, DEVICES[settings.plan.gpu]
    if asked.gpu_memory:
        device = dataclasses.replace(device, memory=asked.gpu_memory * GIB)
    if asked.flops:
        device = dataclasses.replace(device, bf16=asked.flops, fp32=asked.flops)
    return device


def reward_parameters(choice: dict[str, Any], upstream: Path | None) -> tuple[int, str]:
    """How many the reward has, and what is counted: a classifier's if its configuration can be had, else none."""
    register()
    parts = choice["parts"] if choice["name"] == "sum" else [choice]
    total, said = 0, list[str]()
    for part in parts:
        if part["name"] == "sum":
            count, where = reward_parameters(part, upstream)
            total, said = total + count, [*said, where]
            continue
        if part["name"] not in TRAINABLE:
            said.append(f"{part['name']}, which has none that we know of")
            continue
        path = part.get("path") or upstream or ON_THE_HUB.get(part["name"], (None,))[0]
        if path is None:
            said.append(f"{part['name']}, not trained yet: counted as none")
            continue
        total += count_classifier(open_config(str(path), "reward.path"))
        said.append(str(path))
    return total, " + ".join(said)


def what_helps(settings: Settings, config: Any, reward: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that need less, one by one and then all together, each with the launch that needs least with it."""
    for name, other in smaller(settings).items():
        _, work, roles = prepared(other, config, reward)
        reckoned = (roles, work, device_of(settings), settings.plan.gpu == "cpu", settings.plan.mfu)
        least = min(options(settings.plan.gpus, *reckoned), key=lambda each: each.bytes)
        yield name, {"launch": least.launch, "bytes": least.bytes, "fits": least.fits}


def smaller(settings: Settings) -> dict[str, Settings]:
    """The same job with less to hold, by what is said for it; an adapter changes what is learnt, so it is last."""
    trainer = settings.trainer
    rows, parts = trainer.get("per_device_train_batch_size", 8), trainer.get("gradient_accumulation_steps", 1)
    changes: list[dict[str, Any]] = []
    if trainer.get("bf16") is False:
        changes.append({"bf16": True})
    if trainer.get("critic") == "separate":
        changes.append({"critic": "shared"})
    if not trainer.get("gradient_checkpointing"):
        changes.append({"gradient_checkpointing": True})
    if trainer.get("local_rollout_forward_batch_size", 64) > _FEW:
        changes.append({"local_rollout_forward_batch_size": _FEW})
    if rows > 1:
        changes.append({"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * parts})
    found, all_of_them = dict[str, Settings](), settings
    for change in changes:
        name = " ".join(f"trainer.{key}={str(value).lower()}" for key, value in change.items())
        found[name] = dataclasses.replace(settings, trainer={**trainer, **change})
        all_of_them = dataclasses.replace(all_of_them, trainer={**all_of_them.trainer, **change})
    if not settings.policy.get("lora"):
        adapter = {**settings.policy, "lora": {"r": 8}}
        found["policy.lora.r=8"] = dataclasses.replace(settings, policy=adapter)
        all_of_them = dataclasses.replace(all_of_them, policy=adapter)
    return {**found, " ".join(found): all_of_them} if len(found) > 1 else found

"""The memory, FLOPs and time that PPO needs on given machines, computed from configurations within seconds.

python -m rlhf_pipeline stage=plan policy=gpt2_scratch policy.size=xl plan.gpus=8 plan.gpu=a100
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.classifiers import register
from rlhf_pipeline.models.policies import lora_config, open_config, policy_config
from rlhf_pipeline.models.precision import native_bf16
from rlhf_pipeline.models.rewards import ON_THE_HUB, TRAINABLE
from rlhf_pipeline.plan import DEVICES, GIB, Job, Work, count, count_classifier, launches, needs
from rlhf_pipeline.ppo.config import PPOConfig, check_config
from rlhf_pipeline.report.tables import plan_table
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.setup import quiet

_LONGEST_PROMPT = 256  # tokens, if neither the data nor the user sets it


def run(settings: Settings, out: RunDir) -> None:
    """Count the networks' parameters, compute each launch, choose the simplest that fits, and print the plan."""
    asked, gpus, mfu = settings.plan, settings.plan.gpus, settings.plan.mfu
    if asked.launch and (asked.launch == "single") != (gpus == 1):
        raise UserError("plan.launch=single goes with plan.gpus=1, and every other launch with more.")
    quiet()
    config, where = policy_config(settings.policy, out.upstream("sft", "pretrain", policy=settings.policy))
    reward, judge = _count_reward(settings.reward, out.upstream("reward"))
    device = DEVICES[asked.gpu]
    device = device._replace(memory=asked.gpu_memory * GIB if asked.gpu_memory else device.memory)
    device = device._replace(bf16=asked.flops, fp32=asked.flops) if asked.flops else device
    args, job = _prepare(settings, config, reward)
    rows = [needs(asked.launch, gpus, job, device, mfu)] if asked.launch else launches(gpus, job, device, mfu)
    updates = args.max_steps if args.max_steps > 0 else math.ceil((args.total_episodes or 0) / (job.work.rows * gpus))
    for row in rows:  # of the whole run, if its length is known
        row |= {"updates": updates or None, "run_seconds": row["update_seconds"] * updates or None}
    chosen = next((row["launch"] for row in rows if row["fits"]), None)
    net, separate = job.net, job.net.trunks > 1
    plan = {
        "computed": True, "gpus": gpus, "gpu": asked.gpu, "memory": device.memory, "mfu": mfu,
        "parameters": {
            "policy": net.policy, "value_head": 0 if separate else net.critic, "critic": net.critic if separate else 0,
            "reference": 0 if net.adapter else net.policy, "reward": reward, "trained": net.trained,
        },
        "reference_bytes": job.reference_bytes, "work": asdict(job.work), "launches": rows, "chosen": chosen,
        "policy": where, "reward": judge,
    }  # fmt: skip
    if asked.json:
        print(json.dumps(plan, indent=1))
    else:
        plan_table(plan)


def _prepare(settings: Settings, config: Any, reward: int) -> tuple[PPOConfig, Job]:
    """Return PPO's settings, and its networks with a process's work per update. `reward` counts its parameters."""
    values = {key: value for key, value in settings.trainer.items() if key not in ("bf16", "report_to")}
    try:
        args = PPOConfig(output_dir="unused", bf16=False, report_to="none", **{"use_cpu": True, **values})
    except (ValueError, TypeError) as error:
        raise UserError(f"PPOConfig refuses these trainer settings: {error}") from error
    rows = check_config(args, script=False)
    bf16 = settings.trainer.get("bf16", "auto")
    if bf16 in ("auto", None):
        bf16 = native_bf16() if settings.plan.gpu == "cpu" else True
    prompt, mean = _prompt_lengths(settings, config, args.response_length)
    work = Work(
        rows=rows, micro=min(args.per_device_train_batch_size, rows // args.num_mini_batches),
        minibatches=args.num_mini_batches, epochs=args.num_ppo_epochs, at_once=args.local_rollout_forward_batch_size,
        prompt=prompt, response=args.response_length,
        length=mean + ((args.min_response_length or args.response_length) + args.response_length) / 2,
        bf16=bool(bf16), checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    tokens, lora = prompt + args.response_length - 1, lora_config(settings.policy)
    return args, Job(count(config, tokens, work.bf16, lora, args.critic == "separate"), reward, work)


def _prompt_lengths(settings: Settings, config: Any, response: int) -> tuple[int, float]:
    """Return the longest and the mean prompt, in tokens, of plan.prompt_tokens, else of the data, else at most 256."""
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


def _count_reward(choice: dict[str, Any], upstream: Path | None) -> tuple[int, str]:
    """Return the reward's number of parameters, and which model was counted. A rule has none."""
    if "parts" in choice:
        counts, names = zip(*(_count_reward(part, upstream) for part in choice["parts"]), strict=True)
        return sum(counts), " + ".join(names)
    if choice["name"] not in TRAINABLE:
        return 0, f"{choice['name']}, without parameters of its own"
    path = choice.get("path") or upstream or ON_THE_HUB.get(choice["name"], (None,))[0]
    if path is None:
        return 0, f"{choice['name']}, not trained yet: counted as 0 parameters"
    register()
    return count_classifier(open_config(str(path), "reward.path")), str(path)

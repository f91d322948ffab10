"""Compares the memory that the plan computes with the peak memory of real PPO processes on this machine.

python tests/benchmarks/plan.py

Our PPOTrainer trains each shape for two updates in a fresh process. The memory of the libraries does not count: the
figure is the peak of resident memory, minus that after an update of a tiny network. It is measured twice: with malloc's
defaults, for which the plan adds malloc's fragmentation; and with every block of 64 KiB or more returned at once
(MALLOC_MMAP_THRESHOLD_), which tests the plan's own sums.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

import ppo_speed
import torch
from networks import GPT2_SMALL, SMALL, resident, small_tokenizer
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_pipeline.plan import DEVICES, Job, Work, count, needs
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer

MIB = 2**20


@dataclass(frozen=True)
class Shape(ppo_speed.Work):
    """The shape of a GPT-2 and the size of an update."""

    epochs: int = 2
    critic: str = "shared"
    checkpointing: bool = False
    lora: int = 0  # rank


SHAPES = {
    "GPT-2 124 M": Shape(**GPT2_SMALL, batch=16, response=(24, 24)),
    "small": Shape(**SMALL, batch=64, response=(48, 48)),
    "small, separate critic": Shape(**SMALL, batch=64, response=(48, 48), critic="separate"),
    "GPT-2 124 M, LoRA": Shape(**GPT2_SMALL, batch=16, response=(24, 24), lora=8),
    "GPT-2 124 M, checkpointing": Shape(**GPT2_SMALL, batch=32, response=(48, 48), checkpointing=True, epochs=1),
    "small, 4 micro-batches": Shape(
        **{**SMALL, "vocabulary": 50257}, batch=128, response=(16, 16), micro_batches=4, minibatches=2,
        critic="separate",
    ),
}  # fmt: skip


def config_of(shape: Shape) -> GPT2Config:
    """The policy's configuration. The trainer switches its dropout off."""
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return GPT2Config(
        vocab_size=shape.vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, **tokens
    )


def lora_of(shape: Shape) -> LoraConfig | None:
    """peft's configuration, or None."""
    return LoraConfig(task_type="CAUSAL_LM", r=shape.lora) if shape.lora else None


def computed(shape: Shape, slack: float) -> tuple[str, float]:
    """Return the moment of the plan's peak, and its bytes."""
    micro = shape.batch // max(shape.micro_batches, shape.minibatches)
    prompt, response = shape.prompt[1], shape.response[1]
    work = Work(
        rows=shape.batch, micro=micro, minibatches=shape.minibatches, epochs=shape.epochs, at_once=64,
        prompt=prompt, response=response, length=prompt + response,
        bf16=False, checkpointing=shape.checkpointing,
    )  # fmt: skip
    net = count(config_of(shape), prompt + response - 1, False, lora_of(shape), shape.critic == "separate")
    job = Job(net, 0, work)
    found = needs("single", 1, job, DEVICES["cpu"]._replace(base=0, slack=slack), mfu=0.5)
    return found["moment"], sum(found["parts"].values())


# -- a shape's process


def be_worker(shape: Shape, folder: str) -> None:
    """Train for two updates; print the memory before them and the peak."""
    tokenizer = small_tokenizer()

    def reward(prompts: list[str], answers: list[str]) -> list[float]:
        return [float(len(answer)) for answer in answers]

    def train(shape: Shape) -> None:
        args = PPOConfig(
            output_dir=folder, per_device_train_batch_size=shape.batch // shape.micro_batches,
            gradient_accumulation_steps=shape.micro_batches, num_mini_batches=shape.minibatches,
            num_ppo_epochs=shape.epochs, response_length=shape.response[1], local_rollout_forward_batch_size=64,
            stop_token=None, total_episodes=2 * shape.batch, learning_rate=1e-6, bf16=False, critic=shape.critic,
            gradient_checkpointing=shape.checkpointing, num_sample_generations=0, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        prompts = torch.randint(2, 300, (4 * shape.batch, shape.prompt[1])).tolist()
        policy = GPT2LMHeadModel(config_of(shape))
        PPOTrainer(args, tokenizer, policy, None, reward, prompts, peft_config=lora_of(shape)).train()

    train(Shape(1, 32, 1, 300, batch=2, response=(4, 4)))  # libraries load parts of themselves at first use
    before = resident("VmRSS")
    train(shape)
    print(json.dumps({"before": before, "most": resident("VmHWM")}), file=sys.stderr)


def measured(shape: Shape, exact: bool) -> int:
    """Train in a new process; returns its peak in bytes, without the libraries."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"MALLOC_MMAP_THRESHOLD_": "65536"} if exact else {})}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(shape)), folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    report: dict[str, int] = json.loads(done.stderr.strip().splitlines()[-1])
    return report["most"] - report["before"]


def main() -> None:
    """Print a Markdown table, one row per shape."""
    if sys.argv[1:2] == ["--worker"]:
        return be_worker(Shape(**json.loads(sys.argv[2])), sys.argv[3])
    print("| shape, MiB | fullest at | plan | measured | error | plan, in use | measured | error |\n|" + " --- |" * 8)
    for name, shape in SHAPES.items():
        cells = []
        for slack in (DEVICES["cpu"].slack, 0):
            moment, total = computed(shape, slack)
            really = measured(shape, exact=not slack)
            cells += [f"{total / MIB:.0f}", f"{really / MIB:.0f}", f"{total / really - 1:+.1%}"]
        print(f"| {name} | {moment} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

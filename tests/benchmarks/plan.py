"""Compares the memory that the plan computes with the peak memory of real PPO processes on this machine.

python tests/benchmarks/plan.py [--only NAME;...] [--parts]

Our PPOTrainer trains each shape for two updates in a fresh process. The memory of the libraries does not count: the
figure is the peak of resident memory, minus that after an update of a tiny network. It is measured twice: with malloc's
defaults, for which the plan adds malloc's fragmentation; and with every block of 64 KiB or more returned at once
(MALLOC_MMAP_THRESHOLD_), which tests the plan's own sums.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.plan import DEVICES, Job, Work, count, needs

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """The shape of a GPT-2 and the size of an update."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    response: int
    prompt: int = 16
    micro_batches: int = 1
    minibatches: int = 1
    epochs: int = 2
    critic: str = "shared"
    checkpointing: bool = False
    lora: int = 0  # rank


GPT2_SMALL = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257}
SMALL = {"layers": 6, "width": 256, "heads": 4}
SHAPES = {
    "GPT-2 124 M": Shape(**GPT2_SMALL, batch=16, response=24),
    "small": Shape(**SMALL, vocabulary=8192, batch=64, response=48),
    "small, separate critic": Shape(**SMALL, vocabulary=8192, batch=64, response=48, critic="separate"),
    "GPT-2 124 M, LoRA": Shape(**GPT2_SMALL, batch=16, response=24, lora=8),
    "GPT-2 124 M, checkpointing": Shape(**GPT2_SMALL, batch=32, response=48, checkpointing=True, epochs=1),
    "small, 4 micro-batches": Shape(
        **SMALL, vocabulary=50257, batch=128, response=16, micro_batches=4, minibatches=2, critic="separate"
    ),
}


def config_of(shape: Shape) -> Any:
    """The policy's configuration. The trainer switches its dropout off."""
    from transformers import GPT2Config

    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return GPT2Config(
        vocab_size=shape.vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, **tokens
    )


def lora_of(shape: Shape) -> Any:
    """peft's configuration, or None."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=shape.lora) if shape.lora else None


def computed(shape: Shape, slack: float) -> tuple[str, dict[str, float]]:
    """Return the moment of the plan's peak, and its bytes by part."""
    micro = shape.batch // max(shape.micro_batches, shape.minibatches)
    work = Work(
        rows=shape.batch, micro=micro, minibatches=shape.minibatches, epochs=shape.epochs, at_once=64,
        prompt=shape.prompt, response=shape.response, length=shape.prompt + shape.response,
        bf16=False, checkpointing=shape.checkpointing,
    )  # fmt: skip
    tokens = shape.prompt + shape.response - 1
    job = Job(count(config_of(shape), tokens, False, lora_of(shape), shape.critic == "separate"), 0, work)
    found = needs("single", 1, job, DEVICES["cpu"]._replace(base=0, slack=slack), mfu=0.5)
    return found["moment"], found["parts"]


# -- a shape's process


def resident(what: str) -> int:
    """Return bytes: VmRSS, the current memory, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def be_worker(shape: Shape, folder: str) -> None:
    """Train for two updates; print the memory before them and the peak."""
    import torch
    from transformers import GPT2LMHeadModel

    from rlhf_pipeline.models.policies import train_tokenizer
    from rlhf_pipeline.ppo import PPOConfig, PPOTrainer

    tokenizer = train_tokenizer(["A film that nobody needed, and that everybody saw."], 300, 1024)

    def reward(prompts: list[str], answers: list[str]) -> list[float]:
        return [float(len(answer)) for answer in answers]

    def train(shape: Shape) -> None:
        args = PPOConfig(
            output_dir=folder, per_device_train_batch_size=shape.batch // shape.micro_batches,
            gradient_accumulation_steps=shape.micro_batches, num_mini_batches=shape.minibatches,
            num_ppo_epochs=shape.epochs, response_length=shape.response, local_rollout_forward_batch_size=64,
            stop_token=None, total_episodes=2 * shape.batch, learning_rate=1e-6, bf16=False, critic=shape.critic,
            gradient_checkpointing=shape.checkpointing, num_sample_generations=0, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        prompts = torch.randint(2, 300, (4 * shape.batch, shape.prompt)).tolist()
        policy = GPT2LMHeadModel(config_of(shape))
        PPOTrainer(args, tokenizer, policy, None, reward, prompts, peft_config=lora_of(shape)).train()

    train(Shape(1, 32, 1, 300, batch=2, response=4))  # libraries load parts of themselves at first use
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"shapes, separated by semicolons: {'; '.join(SHAPES)}", default="")
    parser.add_argument("--parts", action="store_true", help="also print the parts of the computed peaks")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return be_worker(Shape(**json.loads(asked.worker[0])), asked.worker[1])
    chosen = [name for name in asked.only.split(";") if name] or list(SHAPES)
    if unknown := set(chosen) - set(SHAPES):
        parser.error(f"no shape is called {', '.join(unknown)}. Known: {'; '.join(SHAPES)}.")
    print("| shape, MiB | fullest at | plan | measured | error | plan, in use | measured | error |\n|" + " --- |" * 8)
    for name in chosen:
        cells = []
        for slack in (DEVICES["cpu"].slack, 0):
            moment, parts = computed(SHAPES[name], slack)
            total, really = sum(parts.values()), measured(SHAPES[name], exact=not slack)
            cells += [f"{total / MIB:.0f}", f"{really / MIB:.0f}", f"{total / really - 1:+.1%}"]
        print(f"| {name} | {moment} | {' | '.join(cells)} |", flush=True)
        if asked.parts:
            print("   ", {part: round(size / MIB) for part, size in parts.items()}, flush=True)


if __name__ == "__main__":
    main()

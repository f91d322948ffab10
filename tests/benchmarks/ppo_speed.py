"""Seconds and memory of an update: TRL's own trainers against our PPOTrainer, on the same work, in one run.

python tests/benchmarks/ppo_speed.py [--quick] [--only NAME,...] [--levers NAME,...] [--pairs 5] [--results FOLDER]
python tests/benchmarks/ppo_speed.py --algorithms rloo,grpo [--quick] [--only NAME,...] [--pairs 5] [--results FOLDER]

PPO is compared with the PPOTrainer of TRL 1.12, the last version that has one; RLOO and GRPO with RLOOTrainer and
GRPOTrainer of the installed TRL. For RLOO and GRPO each prompt gets 4 responses, the reward is a function of texts, and
gradient checkpointing is off on both sides.

Each side is a process on the same cores, with the same randomly initialised models. After each update it waits for the
driver, so only one side computes at a time. The sides take turns, unless they do not fit into memory together.
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kept import Kept, Row, add_options, by_machine, say, spread, table
from networks import DEVICE, GPT2_SMALL, QUICK, SMALL, gpt2_config, peak_memory, small_tokenizer, synchronize
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback

from rlhf_pipeline.models import precision

CORES = sorted(os.sched_getaffinity(0))
ENVIRONMENT = {"OMP_NUM_THREADS": str(len(CORES))}  # of every side
ENVIRONMENT |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE"), "1")


@dataclass(frozen=True)
class Work:
    """The shape of a GPT-2 and the size of an update."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int  # responses per update
    response: tuple[int, int]  # shortest and longest, in tokens, drawn for each sample; TRL always samples the longest
    epochs: int
    prompt: tuple[int, int] = (16, 16)  # shortest and longest, in tokens
    micro_batches: int = 1  # per batch
    minibatches: int = 1  # optimizer steps per epoch
    alone: bool = False  # the sides run one after the other, because together they do not fit into 24 GiB
    algorithm: str = "ppo"  # or rloo or grpo

    @property
    def steps(self) -> int:
        """Optimizer steps of an update."""
        return self.epochs * self.minibatches

    def title(self) -> str:
        """The row's name in a table."""
        response = " to ".join(map(str, dict.fromkeys(self.response)))
        shape = f"{self.layers} x {self.width}, V {self.vocabulary:,}"
        return f"{self.algorithm.upper()}; {shape}; {self.batch}, {response}, {self.epochs}"

    def gflop(self) -> float:
        """The operations that our update needs, in 10^9: with PPO's shared critic, without attention scores."""
        responses = self.batch * sum(self.response) / 2
        tokens = responses + self.batch * sum(self.prompt) / 2
        body = 2 * 12 * self.layers * self.width**2 * tokens
        forward = body + 2 * self.width * self.vocabulary * responses  # the head runs for response tokens only
        reward = body if self.algorithm == "ppo" else 0  # no LM head in PPO's reward model; a function otherwise
        rollout = 3 * forward + reward  # sampling, log-probabilities, reference
        return (rollout + 3 * self.epochs * forward) / 1e9  # a backward pass costs two forward passes


WORKS = {
    "gpt2_small_b16": Work(**GPT2_SMALL, batch=16, response=(24, 24), epochs=4),
    "small_b16": Work(**SMALL, batch=16, response=(24, 24), epochs=4),
    "small_b64": Work(**SMALL, batch=64, response=(48, 48), epochs=4),
    "gpt2_small_b64": Work(**GPT2_SMALL, batch=64, response=(24, 24), epochs=4, alone=True),
    "imdb": Work(
        **{**SMALL, "vocabulary": 50257}, batch=256, micro_batches=4, minibatches=4,
        prompt=(2, 7), response=(4, 15), epochs=4,
    ),
}  # fmt: skip
QUICK_WORKS = {
    "quick": Work(**QUICK, batch=8, micro_batches=2, minibatches=2, prompt=(2, 7), response=(4, 15), epochs=2)
}


@dataclass(frozen=True)
class Side:
    """A trainer, and its settings on top of the common ones."""

    trainer: str  # trl or ours
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    without: str = ""  # the optimisation that `switch_off` switches off


# TRL's own bf16 flag has no effect on transformers 5; accelerate's variable has.
SIDES = {
    "TRL": Side("trl", {"bf16": False}),
    "TRL autocast": Side("trl", {"bf16": False}, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "ours": Side("ours", {"bf16": "auto"}),
    "ours separate": Side("ours", {"bf16": False, "critic": "separate"}),  # computes the same as TRL
}
LEVERS = {
    "all on": Side("ours"),
    "a separate critic": Side("ours", {"critic": "separate"}),
    "GELU op by op": Side("ours", without="gelu"),
    "log p by autograd": Side("ours", without="likelihood"),
    "gc.collect() an update": Side("ours", without="gc"),
    "fp32": Side("ours", {"bf16": False}),
}
GROUP = 4  # responses per prompt in RLOO and GRPO
NEEDS_BF16 = ("TRL autocast", "fp32")  # where bf16 is emulated, the first is slow and the second our default


# -- a side's process


class Stopwatch(TrainerCallback):
    """Reports each update's seconds and the process's peak memory, then waits for the driver.

    `steps`: how often the trainer calls on_step_end per update.
    """

    def __init__(self, pipe: Any, collect: bool, steps: int) -> None:
        self.pipe, self.collect, self.steps, self.start = pipe, collect, steps, 0.0
        self.parts: dict[str, float] = {}  # seconds of the update so far, by part

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Report that the trainer is built. The first update waits too."""
        self._report({"ready": True})

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Report an update if one is done. Work after this call counts for the next update."""
        if state.global_step % self.steps:
            return
        if self.collect:
            gc.collect()
        synchronize()
        self._report({"seconds": time.perf_counter() - self.start, "parts": self.parts, "peak": peak_memory()})

    def _report(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.pipe, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the driver has gone
        self.start, self.parts = time.perf_counter(), {}

    def clock(self, owner: Any, name: str, part: str) -> None:
        """Add the time of a function of `owner` to one part of the update."""
        plain = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                synchronize()
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def clock_ours(trainer: Any, stopwatch: Stopwatch) -> None:
    """Time the parts of our trainer's update. The remaining time is the table's `rest`."""
    from rlhf_pipeline.ppo import lifecycle

    stopwatch.clock(lifecycle, "sample", "rollout")
    stopwatch.clock(trainer, "batch_reward", "reward")
    stopwatch.clock(trainer.reference, "log_probs", "reference")
    stopwatch.clock(trainer.model, "forward", "forward")  # in the rollout and in each epoch
    begin = trainer.begin

    def begin_and_clock(*args: Any) -> None:
        begin(*args)
        stopwatch.clock(trainer.learner, "backward", "backward")
        stopwatch.clock(trainer.learner, "step", "optimizer")

    trainer.begin = begin_and_clock


def switch_off(what: str) -> None:
    """Switch off one of our optimisations. Call this before the trainer is imported."""
    from rlhf_pipeline.models import likelihood

    if what == "gelu":
        precision.fuse_gelu = lambda model: 0
    if what == "likelihood":
        likelihood.matrix_head = lambda model: None  # as for a model that changes its logits


def make_trainer(work: Work, side: Side, stopwatch: Stopwatch, folder: str) -> Any:
    """Make TRL's or our trainer, with the same random models and prompts."""
    from datasets import Dataset

    switch_off(side.without)
    tokenizer = small_tokenizer()
    tokenizer.padding_side = "left"
    # The tokenizer gets as many tokens as the model has. We never sample ids without a token, which would save work.
    own = len(tokenizer)
    tokenizer.add_tokens([f"<{number}>" for number in range(work.vocabulary - own)])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = gpt2_config(
        layers=work.layers, width=work.width, heads=work.heads, vocabulary=work.vocabulary, **ids
    )  # fmt: skip
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(config)
    reward, critic = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)

    def prompts(count: int) -> Dataset:
        lengths = torch.randint(work.prompt[0], work.prompt[1] + 1, (count,)).tolist()
        # Only added tokens: the tokenizer always reads their text as the same tokens.
        every = [torch.randint(own, len(tokenizer), (length,)).tolist() for length in lengths]
        if side.trainer == "trl" and work.algorithm != "ppo":
            return Dataset.from_dict({"prompt": ["".join(tokenizer.convert_ids_to_tokens(row)) for row in every]})
        return Dataset.from_dict({"input_ids": every})

    common: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
        **side.settings,
    }
    data = prompts(16 * work.batch)  # enough for a single pass: at its end TRL's gradient accumulation is wrong
    if side.trainer == "trl" and work.algorithm != "ppo":
        policy.save_pretrained(folder)  # TRL loads the reference from the policy's folder
        return trl_group_trainer(work, common, GPT2LMHeadModel.from_pretrained(folder), tokenizer, data, stopwatch)
    if side.trainer == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from rlhf_pipeline.ppo import PPOConfig, PPOTrainer
    settings: dict[str, Any] = {
        "per_device_train_batch_size": work.batch // work.micro_batches,
        "gradient_accumulation_steps": work.micro_batches,
        "num_mini_batches": work.minibatches,
        "num_ppo_epochs": work.epochs,
        "response_length": work.response[1],
        "local_rollout_forward_batch_size": 64,
        "stop_token": None,
        "total_episodes": work.batch * 1000,  # the driver ends it
        "num_sample_generations": 0,
    }
    if side.trainer == "ours":
        settings["min_response_length"] = work.response[0]
    if work.algorithm != "ppo":
        settings |= {"advantage": work.algorithm, "samples_per_prompt": GROUP, "temperature": 1.0}
    trainer = PPOTrainer(
        PPOConfig(**common, **settings),
        tokenizer,
        policy,
        copy.deepcopy(policy),
        reward if work.algorithm == "ppo" else digits,
        data,
        value_model=critic if side.trainer == "trl" else None,
        eval_dataset=prompts(4),
        callbacks=[stopwatch],
    )
    if side.trainer == "ours":
        clock_ours(trainer, stopwatch)
    return trainer


def trl_group_trainer(
    work: Work, common: dict[str, Any], policy: Any, tokenizer: Any, data: Any, stopwatch: Stopwatch
) -> Any:
    """TRL's RLOOTrainer or GRPOTrainer, with our batches, iterations, and KL to a reference."""
    import trl

    name = work.algorithm.upper()
    parts = max(work.micro_batches, work.minibatches)  # forward and backward passes per batch
    args = getattr(trl, f"{name}Config")(
        **common,
        num_generations=GROUP,
        per_device_train_batch_size=work.batch // parts,
        gradient_accumulation_steps=parts // work.minibatches,
        steps_per_generation=parts,
        num_iterations=work.epochs,
        max_steps=work.steps * 1000,
        max_completion_length=work.response[1],
        generation_kwargs={"min_new_tokens": work.response[1]},  # no EOS: all responses have this length
        beta=0.05,
        disable_dropout=True,
    )
    return getattr(trl, f"{name}Trainer")(policy, digits, args, data, processing_class=tokenizer, callbacks=[stopwatch])


def digits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of digits in each response: a reward that takes no time."""
    return [sum(map(str.isdigit, text)) / (len(text) or 1) for text in completions]


def be_worker(work: dict[str, Any], side: dict[str, Any], folder: str) -> None:
    """Train until the driver ends the process."""
    os.sched_setaffinity(0, CORES)
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the trainers' output goes to the log
    job, chosen = Work(**work), Side(**side)
    steps = job.steps if chosen.trainer == "trl" and job.algorithm != "ppo" else 1
    make_trainer(job, chosen, Stopwatch(pipe, chosen.without == "gc", steps), folder).train()


# -- the driver


class Worker:
    """The driver's view of a side's process."""

    def __init__(self, name: str, work: Work, side: Side, folder: Path) -> None:
        self.name, self.log = name, folder / "log"
        folder.mkdir()
        clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps([asdict(work), asdict(side), str(folder)])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**clean, **ENVIRONMENT, **side.environment},
            )  # fmt: skip
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.peak = 0

    def hear(self) -> dict[str, Any]:
        """Wait for the worker's next report, and return it."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}:\n{self.log.read_text()[-3000:]}")
        report: dict[str, Any] = json.loads(line)
        return report

    def update(self, count: bool = True) -> None:
        """Let it do one update."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        report = self.hear()
        self.peak = report["peak"]
        if count:
            self.seconds.append(report["seconds"])
            self.parts.append(report["parts"])

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()


def matmul_rate() -> float:
    """Return the GFLOP/s of a matrix product in our update's number format; the best of two sizes."""
    dtype = torch.bfloat16 if precision.native_bf16() else torch.float32
    rates = []
    for size in (1024, 2048):
        left, right = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
        for _ in range(2):
            start = time.perf_counter()
            left @ right
            synchronize()
            rates.append(2 * size**3 / 1e9 / (time.perf_counter() - start))
    return max(rates)


def measure(name: str, work: Work, sides: dict[str, Side], pairs: int, warm_up: int) -> dict[str, Any]:
    """Let the sides take turns; returns their seconds per update and peak bytes, and the machine's matmul rate."""
    if work.alone and len(sides) > 1:
        found = [measure(name, replace(work, alone=False), {t: s}, pairs, warm_up) for t, s in sides.items()]
        each = {title: figures for one in found for title, figures in one["sides"].items()}
        return {**found[0], "sides": each, "matmul_gflops": median(one["matmul_gflops"] for one in found)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = [stack.enter_context(Worker(title, work, side, folder / title)) for title, side in sides.items()]
        for worker in workers:
            worker.hear()
        rates = []
        for turn in range(warm_up + pairs):
            rates.append(matmul_rate())
            for place in range(len(workers)):  # each round another side starts
                workers[(turn + place) % len(workers)].update(count=turn >= warm_up)
            say(f"{name}: {max(turn + 1 - warm_up, 0)} of {pairs} rounds")
    return {
        "sides": {w.name: {"seconds": w.seconds, "peak": w.peak, "parts": w.parts} for w in workers},
        "gflop": work.gflop(),
        "matmul_gflops": median(rates),
    }


# -- tables


def speed_ratios(result: dict[str, Any], one: str, other: str) -> list[float]:
    """Return the seconds of `one` divided by those of `other`, for each round."""
    each = (result["sides"][side]["seconds"] for side in (one, other))
    return [a / b for a, b in zip(*each, strict=True)]


@by_machine
def ppo_table(rows: Sequence[Row]) -> str:
    """One row per side of each configuration: seconds, memory, and our share of the machine's rate."""
    lines = []
    for row in rows:
        first = Work(**row["work"]).title()
        for side, figures in row["sides"].items():
            seconds = median(figures["seconds"])
            share = f"{row['gflop'] / seconds / row['matmul_gflops']:.0%}" if side == "ours" else ""
            ratios = spread(speed_ratios(row, "TRL", side)) if side != "TRL" else ""
            memory = f"{figures['peak'] / row['sides']['TRL']['peak']:.0%}" if side != "TRL" else ""
            lines.append([first, side, f"{seconds:.3g}", ratios, f"{figures['peak'] / 2**30:.2f}", memory, share])
            first = ""
    header = ["GPT-2; batch, response, epochs", "trainer", "s/update", "times as fast as TRL (range)"]
    return table([*header, "peak GiB", "of TRL's", "of the matmul rate"], lines)


def parts_table(rows: Sequence[Row]) -> str:
    """The share of our update's time that each part takes: medians over the rounds."""
    parts = ["rollout", "reward", "reference", "forward", "backward", "optimizer"]
    lines = []
    for row in rows:
        ours = row["sides"]["ours"]
        each = zip(ours["seconds"], ours["parts"], strict=True)
        shares = [[own.get(part, 0.0) / seconds for part in parts] for seconds, own in each]
        whole = [[*own, 1 - sum(own)] for own in shares]
        middle = [median(column) for column in zip(*whole, strict=True)]
        lines.append([Work(**row["work"]).title(), *(f"{share:.0%}" for share in middle)])
    return table(["of our update's time", *parts, "rest"], lines)


def levers_table(row: Row) -> str:
    """Our update with one optimisation off at a time."""
    lines = []
    for title, side in row["sides"].items():
        ratio = median(speed_ratios(row, title, "all on"))
        lines.append([title, f"{median(side['seconds']):.3f}", f"{ratio:.2f}", f"{side['peak'] / 2**30:.2f}"])
    return table([f"{row['name']}: ours with", "s/update", "of all on", "GiB"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--algorithms", default="ppo", help="ppo (default), or rloo and grpo, comma-separated")
    parser.add_argument("--only", help=f"comma-separated: {', '.join(WORKS)}; or none, for the levers alone")
    parser.add_argument("--levers", help="configurations to switch optimisations off in (without --only: small_b16)")
    parser.add_argument("--pairs", type=int, help="measured rounds (default: 5)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return be_worker(*json.loads(asked.worker))

    works, warm_up = (QUICK_WORKS, 1) if asked.quick else (WORKS, 2)
    usual = "quick" if asked.quick else "small_b16"
    algorithms = asked.algorithms.split(",")
    if (groups := algorithms != ["ppo"]) and not {*algorithms} <= {"rloo", "grpo"}:
        parser.error("--algorithms takes ppo, or any of rloo,grpo: their trainers are in different versions of TRL.")
    default = {"only": usual if groups else ",".join(works), "levers": "" if asked.only or groups else usual}
    only, levers_in = (
        [name for name in (getattr(asked, option) or given).split(",") if name not in ("", "none")]
        for option, given in default.items()
    )
    if unknown := {*only, *levers_in} - set(works):
        parser.error(f"no configuration is called {', '.join(unknown)}. Known: {', '.join(works)}.")
    pairs = asked.pairs or (1 if asked.quick else 5)
    dropped = () if precision.native_bf16() else NEEDS_BF16
    dropped += ("ours separate",) * groups  # it has a critic
    sides, levers = ({k: v for k, v in table.items() if k not in dropped} for table in (SIDES, LEVERS))
    if not precision.native_bf16():
        say(f"skipped because this machine has no native bf16: {', '.join(NEEDS_BF16)}")
    kept = Kept("ppo", asked, DEVICE)
    torch.set_num_threads(len(CORES))

    def measured(name: str, algorithm: str, sides: dict[str, Side], more: str = "") -> Row:
        """Measure and keep one configuration; a later one may run out of memory."""
        work, title = replace(works[name], algorithm=algorithm), f"{name} {algorithm}{more}"
        found = measure(title, work, sides, pairs, warm_up)
        return kept.add(title, {"n": pairs, "work": asdict(work), **found})

    rows = [measured(name, algorithm, sides) for name in only for algorithm in algorithms]
    if rows:
        print(f"{ppo_table(rows)}\n\n{parts_table(rows)}")
    for name in levers_in:
        print(f"\n{levers_table(measured(name, 'ppo', levers, ' levers'))}")


if __name__ == "__main__":
    main()

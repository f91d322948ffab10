"""Seconds and memory of a PPO update: TRL 1.12's own PPOTrainer against ours, on the same work, in one run.

python tests/benchmarks/ppo_speed.py [--quick] [--only NAME,...] [--levers NAME,...] [--pairs 5] [--json FILE]

Every side is a process of its own, on the same cores, with the same randomly initialised models. It waits after each
update until the driver says go, so only one side computes at a time, and the sides take turns, except where together
they would not fit into memory.
"""

import argparse
import copy
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback

from rlhf_pipeline.models import precision
from rlhf_pipeline.models.policies import train_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CORES = sorted(os.sched_getaffinity(0))
ENVIRONMENT = {"OMP_NUM_THREADS": str(len(CORES))}  # of every side
ENVIRONMENT |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE"), "1")


@dataclass(frozen=True)
class Work:
    """A GPT-2's shape, and what one update does with it."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int  # responses an update
    response: tuple[int, int]  # shortest and longest, in tokens, drawn for each sample; TRL always samples the longest
    epochs: int
    prompt: tuple[int, int] = (16, 16)  # shortest and longest, in tokens
    micro_batches: int = 1  # of a batch
    minibatches: int = 1  # optimizer steps an epoch
    alone: bool = False  # each side is over before the next begins: together they would not fit into 24 GiB

    def gflop(self) -> float:
        """What our update with a shared critic cannot do without, in 10^9 operations; attention scores left out."""
        responses = self.batch * sum(self.response) / 2
        tokens = responses + self.batch * sum(self.prompt) / 2
        body = 2 * 12 * self.layers * self.width**2 * tokens
        forward = body + 2 * self.width * self.vocabulary * responses  # the head sees what predicts a response
        rollout = 3 * forward + body  # decode, look back, reference; the reward has no head
        return (rollout + 3 * self.epochs * forward) / 1e9  # a backward pass is twice a forward pass


GPT2_SMALL = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257}
SMALL = {"layers": 6, "width": 256, "heads": 4, "vocabulary": 8192}
WORKS = {
    "gpt2_small_b16": Work(**GPT2_SMALL, batch=16, response=(24, 24), epochs=4),
    "small_b16": Work(**SMALL, batch=16, response=(24, 24), epochs=4),
    "small_b64": Work(**SMALL, batch=64, response=(48, 48), epochs=4),
    "gpt2_small_2epochs": Work(**GPT2_SMALL, batch=16, response=(24, 24), epochs=2),
    "gpt2_small_b64": Work(**GPT2_SMALL, batch=64, response=(24, 24), epochs=4, alone=True),
    "imdb": Work(
        **{**SMALL, "vocabulary": 50257}, batch=256, micro_batches=4, minibatches=4,
        prompt=(2, 7), response=(4, 15), epochs=4,
    ),
}  # fmt: skip
QUICK = {
    "quick": Work(2, 64, 2, 1000, batch=8, micro_batches=2, minibatches=2, prompt=(2, 7), response=(4, 15), epochs=2)
}


@dataclass(frozen=True)
class Side:
    """A trainer, and how it differs from what is set for all."""

    trainer: str  # trl or ours
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    without: str = ""  # what of ours is switched off: a key of `switch_off`


# TRL's own bf16 flag does nothing on transformers 5; accelerate's variable does.
SIDES = {
    "TRL": Side("trl", {"bf16": False}),
    "TRL autocast": Side("trl", {"bf16": False}, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "ours": Side("ours", {"bf16": "auto"}),
    "ours separate": Side("ours", {"bf16": False, "critic": "separate"}),  # TRL's mathematics
}
LEVERS = {
    "all on": Side("ours"),
    "a separate critic": Side("ours", {"critic": "separate"}),
    "GELU op by op": Side("ours", without="gelu"),
    "log p by autograd": Side("ours", without="likelihood"),
    "gc.collect() an update": Side("ours", without="gc"),
    "fp32": Side("ours", {"bf16": False}),
}
NEEDS_BF16 = ("TRL autocast", "fp32")  # where bf16 is emulated the one is slow, and the other what we do anyway


# -- a side's process


class Stopwatch(TrainerCallback):
    """Reports each update's seconds and the process's peak memory, and waits to be told to go on."""

    def __init__(self, pipe: Any, collect: bool) -> None:
        self.pipe, self.collect, self.start = pipe, collect, 0.0
        self.parts: dict[str, float] = {}  # seconds of the update so far, by what took them

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Built; the first update waits as well."""
        self._report({"ready": True})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An update is done. What a trainer tidies up after this call is counted in the next one."""
        if self.collect:
            gc.collect()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        reserved = torch.cuda.max_memory_reserved() if DEVICE == "cuda" else 0
        figures = {"seconds": time.perf_counter() - self.start, "parts": self.parts}
        self._report({**figures, "peak": peak_memory(), "reserved": reserved})

    def _report(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.pipe, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the driver has gone
        self.start, self.parts = time.perf_counter(), {}

    def clock(self, owner: Any, name: str, part: str) -> None:
        """Count what a function of `owner` takes as one part of the update."""
        plain = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)


def clock_ours(trainer: Any, stopwatch: Stopwatch) -> None:
    """Time the parts of an update of our trainer. What is left is the rest of it."""
    from rlhf_pipeline.ppo import lifecycle

    stopwatch.clock(lifecycle, "sample", "rollout")
    stopwatch.clock(trainer, "judge", "reward")
    stopwatch.clock(trainer.reference, "log_probs", "reference")
    stopwatch.clock(trainer.model, "forward", "forward")  # of the rollout's tokens, and in each epoch
    begin = trainer.begin

    def begin_and_clock(*args: Any) -> None:
        begin(*args)
        stopwatch.clock(trainer.learner, "backward", "backward")
        stopwatch.clock(trainer.learner, "step", "optimizer")

    trainer.begin = begin_and_clock


def peak_memory() -> int:
    """The most bytes that this process has held: on the GPU where there is one."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def switch_off(what: str) -> None:
    """Take one of our levers away, before the trainer is imported."""
    from rlhf_pipeline.models import likelihood

    if what == "gelu":
        precision.fuse_gelu = lambda model: 0
    if what == "likelihood":
        likelihood.matrix_head = lambda model: None  # as if the family did something of its own to its logits


def make_trainer(work: Work, side: Side, stopwatch: Stopwatch, folder: str) -> Any:
    """TRL's or our trainer over random models and prompts, the same for both."""
    from datasets import Dataset

    switch_off(side.without)
    if side.trainer == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from rlhf_pipeline.ppo import PPOConfig, PPOTrainer

    tokenizer = train_tokenizer(["A film that nobody needed, and that everybody saw."], 300, 1024)
    tokenizer.padding_side = "left"
    # As many tokens as the model has: ids without a token would never be sampled, which is less work for one side.
    tokenizer.add_tokens([f"<{number}>" for number in range(work.vocabulary - len(tokenizer))])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"vocab_size": work.vocabulary, "n_layer": work.layers, "n_embd": work.width, "n_head": work.heads}
    config = GPT2Config(**shape, **ids, num_labels=1)
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(config)
    reward, critic = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)

    def prompts(count: int) -> Dataset:
        lengths = torch.randint(work.prompt[0], work.prompt[1] + 1, (count,)).tolist()
        return Dataset.from_dict({"input_ids": [torch.randint(2, len(tokenizer), (n,)).tolist() for n in lengths]})

    settings: dict[str, Any] = {
        "per_device_train_batch_size": work.batch // work.micro_batches,
        "gradient_accumulation_steps": work.micro_batches,
        "num_mini_batches": work.minibatches,
        "num_ppo_epochs": work.epochs,
        "response_length": work.response[1],
        "local_rollout_forward_batch_size": 64,
        "stop_token": None,
        "total_episodes": work.batch * 1000,  # the driver ends it
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
    }
    if side.trainer == "ours":
        settings["min_response_length"] = work.response[0]
    args = PPOConfig(output_dir=folder, **settings, **side.settings)
    trainer = PPOTrainer(
        args,
        tokenizer,
        policy,
        copy.deepcopy(policy),
        reward,
        prompts(16 * work.batch),  # enough to stay within one pass: TRL's accumulation is broken at the end of one
        value_model=critic if side.trainer == "trl" else None,
        eval_dataset=prompts(4),
        callbacks=[stopwatch],
    )
    if side.trainer == "ours":
        clock_ours(trainer, stopwatch)
    return trainer


def be_worker(work: dict[str, Any], side: dict[str, Any], folder: str) -> None:
    """Train until the driver hangs up."""
    os.sched_setaffinity(0, CORES)
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the trainers print belongs to the log
    chosen = Side(**side)
    make_trainer(Work(**work), chosen, Stopwatch(pipe, chosen.without == "gc"), folder).train()


# -- the driver


class Worker:
    """A side's process, seen from the driver."""

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
        self.peak = self.reserved = 0

    def hear(self) -> dict[str, Any]:
        """The worker's next report."""
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
        self.peak, self.reserved = report["peak"], report["reserved"]
        if count:
            self.seconds.append(report["seconds"])
            self.parts.append(report["parts"])

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()


def matmul_rate() -> float:
    """GFLOP/s of a matrix product in the number format that our update uses; the better of two sizes."""
    dtype = torch.bfloat16 if precision.native_bf16() else torch.float32
    rates = []
    for size in (1024, 2048):
        left, right = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
        for _ in range(2):
            start = time.perf_counter()
            left @ right
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            rates.append(2 * size**3 / 1e9 / (time.perf_counter() - start))
    return max(rates)


def measure(name: str, work: Work, sides: dict[str, Side], pairs: int, warm_up: int) -> dict[str, Any]:
    """Let the sides take turns; their seconds an update, their peak bytes, and the machine's rate meanwhile."""
    if work.alone and len(sides) > 1:
        found = [
            measure(name, dataclasses.replace(work, alone=False), {t: s}, pairs, warm_up) for t, s in sides.items()
        ]
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
            for place in range(len(workers)):  # another one begins each time
                workers[(turn + place) % len(workers)].update(count=turn >= warm_up)
            say(f"{name}: {max(turn + 1 - warm_up, 0)} of {pairs} rounds")
    return {
        "sides": {
            w.name: {"seconds": w.seconds, "peak": w.peak, "reserved": w.reserved, "parts": w.parts} for w in workers
        },
        "gflop": work.gflop(),
        "matmul_gflops": median(rates),
    }


def say(what: str) -> None:
    """Progress, apart from the tables."""
    print(what, file=sys.stderr, flush=True)


# -- tables


def speed_ratio(result: dict[str, Any], one: str, other: str) -> float:
    """How many times the seconds of `other` `one` takes: the median over the rounds."""
    each = (result["sides"][side]["seconds"] for side in (one, other))
    return median(a / b for a, b in zip(*each, strict=True))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_sides(results: dict[str, dict[str, Any]], sides: Sequence[str]) -> None:
    """Seconds, memory and what of the machine's rate our update reaches, a configuration a row."""
    others = sides[1:]
    header = ["configuration", *(f"{s} s/update" for s in sides), *(f"TRL / {s}" for s in others)]
    header += [*(f"{s} GiB" for s in sides), *(f"TRL / {s}, GiB" for s in others), "ours, of the matmul rate"]
    rows = []
    for name, result in results.items():
        seconds = [median(result["sides"][s]["seconds"]) for s in sides]
        peaks = [result["sides"][s]["peak"] / 2**30 for s in sides]
        share = result["gflop"] / seconds[sides.index("ours")] / result["matmul_gflops"]
        row = [name, *(f"{s:.3f}" for s in seconds), *(f"{speed_ratio(result, 'TRL', s):.2f}" for s in others)]
        row += [*(f"{p:.2f}" for p in peaks), *(f"{peaks[0] / p:.2f}" for p in peaks[1:])]
        rows.append([*row, f"{share:.0%} of {result['matmul_gflops']:.0f} GFLOP/s"])
    print_table(header, rows)


def print_parts(results: dict[str, dict[str, Any]]) -> None:
    """What share of our update's time each part takes: medians over the rounds."""
    parts = ["rollout", "reward", "reference", "forward", "backward", "optimizer"]
    rows = []
    for name, result in results.items():
        ours = result["sides"]["ours"]
        each = zip(ours["seconds"], ours["parts"], strict=True)
        shares = [[own.get(part, 0.0) / seconds for part in parts] for seconds, own in each]
        middle = [median(column) for column in zip(*shares, strict=True)]
        rows.append([name, *(f"{share:.0%}" for share in [*middle, 1 - sum(middle)])])
    print_table(["our update's time", *parts, "rest"], rows)


def print_levers(name: str, result: dict[str, Any]) -> None:
    """Our update with one lever off at a time."""
    rows = []
    for title, side in result["sides"].items():
        ratio = speed_ratio(result, title, "all on")
        rows.append([title, f"{median(side['seconds']):.3f}", f"{ratio:.2f}", f"{side['peak'] / 2**30:.2f}"])
    print_table([f"{name}: ours with", "s/update", "of all on", "GiB"], rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: does the benchmark work?")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(WORKS)}; none for the levers alone")
    parser.add_argument("--levers", help="configurations to switch levers off in (without --only: small_b16)")
    parser.add_argument("--pairs", type=int, help="rounds that count (default: 5)")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return be_worker(*json.loads(asked.worker))

    works, warm_up = (QUICK, 1) if asked.quick else (WORKS, 2)
    default = {"only": ",".join(works), "levers": "" if asked.only else "quick" if asked.quick else "small_b16"}
    only, levers_in = (
        [name for name in (getattr(asked, option) or given).split(",") if name not in ("", "none")]
        for option, given in default.items()
    )
    if unknown := {*only, *levers_in} - set(works):
        parser.error(f"no configuration is called {', '.join(unknown)}. Known: {', '.join(works)}.")
    pairs = asked.pairs or (1 if asked.quick else 5)
    dropped = () if precision.native_bf16() else NEEDS_BF16
    sides, levers = ({k: v for k, v in table.items() if k not in dropped} for table in (SIDES, LEVERS))
    if dropped:
        say(f"left out, as this machine has no native bf16: {', '.join(dropped)}")
    if os.getloadavg()[0] > len(CORES) / 2:
        say(f"the machine is busy (load {os.getloadavg()[0]:.1f} on {len(CORES)} cores): these figures will be rough")
    torch.set_num_threads(len(CORES))
    machine = {"cpu": cpu_name(), "cores": len(CORES), "device": DEVICE, "torch": torch.__version__}
    found: dict[str, Any] = {"machine": machine, "configurations": {}, "levers": {}}
    for kind, chosen, table in (("configurations", only, sides), ("levers", levers_in, levers)):
        for name in chosen:
            found[kind][name] = measure(name, works[name], table, pairs, warm_up)
            if asked.json:  # after each: a later one may run out of memory
                asked.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{machine['cpu']}, {machine['cores']} cores, {DEVICE}, torch {torch.__version__}; medians of {pairs} rounds")
    if only:
        print_sides(found["configurations"], list(sides))
        print_parts(found["configurations"])
    for name, result in found["levers"].items():
        print_levers(name, result)


def cpu_name() -> str:
    """The processor, as it calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

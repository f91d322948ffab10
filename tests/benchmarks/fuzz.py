"""Runs the real command on odd, broken and hostile inputs: none may crash, hang, run code or lose finished work.

python tests/benchmarks/fuzz.py [--count 1000] [--seed 0] [--only command,data,model,run,value] [--keep folder]

Each input depends only on (seed, number). It runs in a fork of this process, which has loaded the libraries, in its own
folder with a copy of a small finished run. At the end the script prints counts by kind; it keeps the failures.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forked import MINIATURE, fork

from rlhf_pipeline.settings import SECTIONS, STAGES, trainer_fields
from rlhf_pipeline.terminal import MESSAGE
from rlhf_pipeline.texts import printable

LIMIT = 60  # seconds; a longer input counts as hanging
MEMORY = 6 << 30  # bytes of address space that an input may add
QUICK = (
    "data.limit=24", "policy=gpt2_scratch", "policy.vocabulary=300", "trainer.max_steps=1",
    "trainer.per_device_train_batch_size=4", "trainer.max_length=32", "name=new",
)  # fmt: skip
EDGES = (
    "null", "nan", "inf", "-inf", "-1", "0", "1", "2", "1e-300", "1e300", "99999999999999999999", "true", "false", "''",
    "x", "好", "[]", "{}", "[1,2]", "{a:1}", "[[[[1]]]]", "${seed}", "${nothing}", "???", "1,2", "auto", "2024", "no",
    "'a b'", "a=b", "\x1b[31m", "‮", "'", '"', "${oc.env:HOME}", "a/b", "../x", "x" * 300, "[" * 200,
)  # fmt: skip
KEYS = (
    "seed", "name", "runs", "overwrite", "policy", "reward", "data", "experiment", "labeler", "labels", "rounds",
    "against", "compare", "sweep", "trainer", "ptx", "hub", "stages", "hub.push", "report.lang", "policy.path",
    "reward.path", "data.path", "policy.size", "policy.lora.r", "reward.parts", "data.labels", "data.columns",
    "stages.ppo.trainer.kl_coef", "hydra/sweeper", "hydra.run.dir", "+x", "~seed", "policy.template",
)  # fmt: skip
ODD = (
    "", "null", "0", "-1", "1e999", "NaN", "[]", "{}", '""', "true", '"\\ud83d"', '"\\u202e\\u001b[31m"', "[[[[]]]]",
    '{"a": {"a": {}}}', "9" * 400, '"' + "long " * 30_000 + '"',
)  # fmt: skip


Input = tuple[list[str], str]  # a command line, for a folder that one of KINDS has prepared, and what is odd about it


def command(draw: random.Random, folder: Path) -> Input:
    """Real or misspelt settings with odd values."""
    stage = draw.choice([*STAGES, "", "nothing", "null", "frontier"])
    keys = [*KEYS]
    for section, of in SECTIONS.items():
        keys += [f"{section}.{name}" for name in of.__dataclass_fields__]
    words = [f"stage={stage}"] if stage else []
    for _ in range(draw.randint(1, 4)):
        key = draw.choice(keys)
        word = f"{key}={draw.choice(EDGES)}" if draw.random() < 0.95 else draw.choice(EDGES)
        words.append("".join(draw.sample(word, len(word))) if draw.random() < 0.03 else word)
    words += draw.choice([[], [], [], ["--cfg", "job"], ["-m"], ["--prompt", draw.choice(EDGES)], ["--nothing"]])
    if not any(word.startswith(("trainer", "--cfg")) for word in words):
        words.append("--cfg=job" if draw.random() < 0.7 else "trainer.max_steps=1")
    return words, " ".join(words)


def value(draw: random.Random, folder: Path) -> Input:
    """An extreme value of a trainer field, in a run that would normally take a second."""
    stage = draw.choice(["pretrain", "sft", "reward", "dpo", "ppo"])
    field = draw.choice(sorted(trainer_fields(stage)))
    words = [f"stage={stage}", *(word for word in QUICK if f"trainer.{field}=" not in word)]
    if stage == "ppo":
        own = ("trainer.total_episodes=4", "trainer.response_length=4", "reward=length", "evaluate.prompts=4")
        words = [word for word in (*words, *own) if "max_" not in word and f"trainer.{field}=" not in word]
    if stage == "dpo":
        rows = [{"prompt": f"a {i}", "chosen": f" b {i}", "rejected": f" c {i}"} for i in range(24)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += ["data=preferences", "data.path=pairs.jsonl"]
    words.append(f"trainer.{field}={draw.choice(EDGES)}")
    return words, words[-1]


def _mutated(draw: random.Random, content: bytes) -> bytes:
    """Content with a few bytes, lines or values changed."""
    for _ in range(draw.randint(1, 4)):
        at, end = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
        before, inside, after = content[:at], content[at:end], content[end:]
        change = draw.randrange(7)
        values = list(re.finditer(rb'"[^"\n]*"|-?\d+\.?\d*|true|false|null', content))
        if change == 0:
            content = before
        elif change == 1:
            content = before + draw.randbytes(draw.randint(1, 8)) + inside + after
        elif change == 2:
            content = before + after
        elif change == 3:
            content += inside
        elif change == 4 and values:
            found = draw.choice(values)
            content = content[: found.start()] + draw.choice(ODD).encode() + content[found.end() :]
        elif change == 5:
            encoding = draw.choice(["utf-16", "gb18030", "utf-8-sig", "latin-1"])
            content = content.decode("utf-8", "replace").encode(encoding, "replace")
        else:
            control = draw.choice([b"\x00", b"\x1b[31m", "\u202e".encode(), b"\r", b"\xed\xa0\xbd"])
            content = before + control + inside + after
    return content


def _rows(row: Callable[[int], dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row(i)) for i in range(40))


SEEDS: dict[str, tuple[str, str, str]] = {  # data entry: stage, name of a file, its content
    "text": ("pretrain", "a.txt", "\n".join(f"a line of text number {i}" for i in range(40))),
    "sentiment": ("reward", "a.csv", "text,label\n" + "\n".join(f"good film {i},{i % 2}" for i in range(40))),
    "instructions": ("sft", "a.jsonl", _rows(lambda i: {"instruction": f"say {i}", "output": f"it is {i}"})),
    "dialogue": ("sft", "a.jsonl", _rows(lambda i: {"messages": [{"role": "user", "content": f"hi {i}"},
                                                                {"role": "assistant", "content": "yes"}]})),
    "preferences": ("dpo", "a.jsonl", _rows(lambda i: {"prompt": f"p {i}", "chosen": f"a{i}", "rejected": f"b{i}"})),
}  # fmt: skip
TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}", "{{ raise_exception('no') }}", "{{ 1/0 }}", "{{ messages[9].content }}",
    "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ messages", "\x1b[31m{{ messages }}",
)  # fmt: skip


def data(draw: random.Random, folder: Path) -> Input:
    """A data file that is damaged or of another kind, or a path that is no file."""
    entry, (stage, name, text) = draw.choice(list(SEEDS.items()))
    content = _mutated(draw, text.encode())
    path = folder / name
    form = draw.randrange(12)
    if form == 0:
        os.mkfifo(path)
    elif form == 1:
        path = Path("/dev/zero")
    elif form == 2:
        path.mkdir()
    elif form == 3:
        path = path.with_suffix(f"{path.suffix}.gz")
        path.write_bytes(_mutated(draw, gzip.compress(content)))
    elif form == 4:
        path.symlink_to(draw.choice(["nowhere", name, "/etc/shadow", "/proc/self/mem"]))
    elif form == 5:
        path = path.with_suffix(draw.choice([".parquet", ".zip", ".tar.gz", ".xlsx", ".tsv", ".txt", ".json", ""]))
        path.write_bytes(content)
    else:
        path.write_bytes(content)
    words = [f"stage={stage}", *QUICK, f"data={entry}", f"data.path={path}"]
    words += ["reward=classifier"] if stage == "reward" else []
    return words, f"{entry}: {path.name} (form {form})"


def model(draw: random.Random, folder: Path) -> Input:
    """A model folder with a damaged file."""
    source = folder / "runs" / "demo" / "sft" / "model"
    place = folder / "strange"
    shutil.copytree(source, place)
    path = draw.choice([file for file in sorted(place.iterdir()) if file.suffix in (".json", ".safetensors", ".jinja")])
    if draw.random() < 0.15:
        path = place / "chat_template.jinja"
        path.write_text(draw.choice(TEMPLATES))
    elif draw.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(_mutated(draw, path.read_bytes()))
    stage = draw.choice(["chat", "chat", "sft"])
    more = ["--prompt", "hello", "chat.response_length=4"] if stage == "chat" else [*QUICK, "data=toy_reviews"]
    own = [word for word in more if not word.startswith(("policy", "data="))]
    return [f"stage={stage}", "policy=causal_lm", "policy.path=strange", *own], path.name


def run(draw: random.Random, folder: Path) -> Input:
    """A finished run with a damaged file, opened again."""
    place = folder / "runs" / "odd"
    shutil.copytree(folder / "runs" / "demo", place)
    read = [file for file in sorted(place.rglob("*")) if file.suffix in (".json", ".yaml", ".jsonl")]
    files = [file for file in read if "model" not in file.parts and file.stat().st_size < 200_000]
    path = draw.choice(files)
    path.write_bytes(_mutated(draw, path.read_bytes()) if draw.random() < 0.8 else draw.choice(ODD).encode())
    words = draw.choice([
        ["stage=chat", "name=odd", "--prompt", "hi", "chat.response_length=4"],
        ["stage=chat", "name=nobody", "--prompt", "hi"],
        ["stage=evaluate", "name=odd", *(w for w in MINIATURE if "stages" not in w)],
        ["stage=pipeline", "name=odd", *MINIATURE],
        ["stage=evaluate", "compare=[demo,odd]", "name=both"],
        ["stage=sft", "name=odd", "data.limit=20"],
        ["--config-path", str(path.parent), "--config-name", "config", "name=again"],
    ])  # fmt: skip
    return words, f"{path.relative_to(place)}: {words[0]}"


KINDS: dict[str, Callable[[random.Random, Path], Input]] = {
    "command": command, "value": value, "data": data, "model": model, "run": run,
}  # fmt: skip


def fault_of(words: Sequence[str], folder: Path, log: Path) -> str | None:
    """Run an input in a forked process; returns what went wrong, or None."""
    child = fork(words, folder, log, _limit_memory)
    began, status = time.monotonic(), None
    while status is None and time.monotonic() - began < LIMIT:
        done, status_now = os.waitpid(child, os.WNOHANG)
        status = status_now if done else None
        time.sleep(0.01)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hangs"
    text = log.read_text(encoding="utf-8", errors="surrogateescape")
    if "Traceback" in text:
        return f"traceback: {text.strip().splitlines()[-1][:150]}"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    if (code := os.WEXITSTATUS(status)) not in (0, 2, 130):
        return f"exit status {code}"
    last = text.rstrip().splitlines()[-1] if text.strip() else ""
    if code == 2 and not last:
        return "no message"
    if code == 2 and len(last) > MESSAGE:
        return f"a message of {len(last)} characters"
    if printable(text, keep="\n\t\r") != text:
        return "control characters on the screen"
    if (folder / "executed").exists():
        return "ran code of the input"
    return None


def _limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def content(folder: Path) -> str:
    """A hash of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def finished_run(folder: Path) -> Path:
    """Make a small finished run to attack. It runs in a new process, because threads here would not survive a fork."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "rlhf_pipeline", "stage=pipeline", *MINIATURE]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    return folder / "runs" / "demo"


def fuzz(made: Path, count: int, seed: int, kinds: Sequence[str], keep: Path) -> tuple[Counter[str], list[str]]:
    """Try `count` inputs on copies of the run `made`; returns counts by kind, and a line per failure."""
    tried: Counter[str] = Counter()
    failures = []
    before = content(made)
    for number in range(count):
        draw, kind = random.Random(f"{seed} {number}"), kinds[number % len(kinds)]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "work"
            shutil.copytree(made.parent, folder / "runs")
            words, what = KINDS[kind](draw, folder)
            log = Path(place) / "log"
            fault = fault_of(words, folder, log)
            demo = folder / "runs" / "demo"
            if fault is None and (not demo.is_dir() or content(demo) != before) and "overwrite" not in what:
                fault = "finished work changed"
            tried[kind] += 1
            if fault:
                failures.append(f"{number} {kind}: {fault} <- {what[:200]!r}")
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, keep / f"{number}.log") if log.exists() else None
                (keep / f"{number}.json").write_text(json.dumps({"words": words, "fault": fault}))
                print(printable(failures[-1]), flush=True)
    return tried, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of inputs, comma-separated")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "rlhf_pipeline_fuzz")
    given: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        tried, failures = fuzz(finished_run(Path(folder)), given.count, given.seed, given.only.split(","), given.keep)
    failed = Counter(line.split(" ")[1].rstrip(":") for line in failures)
    for kind, number in tried.items():
        print(f"{kind:<10}{number:>6} inputs{failed[kind]:>6} failed")
    seconds = time.monotonic() - began
    print(f"{sum(tried.values())} inputs in {seconds:.0f} s, {len(failures)} failed; logs in {given.keep}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

"""A finished model goes to the hub when that is asked for: the model and its card, nothing else, no token anywhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CommandLine
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard
from loopback import answering
from safetensors.numpy import save_file

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.observers import Observers
from rlhf_pipeline.report.publish import last_model, publish
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.lineage import content_hash
from rlhf_pipeline.settings import Hub, Settings

REPEAT = "--config-path runs/demo/sft --config-name config"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with answering(FakeHub()) as server:
        yield server


@pytest.fixture
def sft(workplace: Path) -> RunDir:
    """A finished stage with a model of three files."""
    asked = Settings("sft", "demo", "demo", policy={"name": "gpt2_scratch"}, reward={"name": "classifier"},
                     data={"name": "toy_reviews"}, hub=Hub("me/asked-before"))  # fmt: skip

    def save(folder: Path) -> None:
        (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
        save_file({"wte": np.ones((3, 2), np.float32)}, folder / "model.safetensors")
        (folder / "extra").mkdir()
        (folder / "extra" / "notes.txt").write_text("a file further down")

    out = RunDir.of(asked)
    out.observer = Observers(out.path)
    out.begin(asked, {}, {"name": "toy_reviews", "path": None, "train": 3, "test": 2, "sha256": "ab"})
    out.save_model(save)
    out.finish({"eval_loss": 1.5}, -1.5)
    return out


def run(args: str, endpoint: str, token: str = TOKEN, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, online."""
    usual = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment = {**usual, "HF_ENDPOINT": endpoint, "HF_HOME": str(Path.cwd() / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "rlhf_pipeline", *shlex.split(args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment | more, check=False, timeout=120)


def test_what_is_sent_is_the_model_with_its_card_and_nothing_else(sft: RunDir, hub: FakeHub, workplace: Path) -> None:
    before = content_hash(sft.path)
    done = run(f"{REPEAT} hub.push=me/tiny", hub.url)
    assert done.returncode == 0, done.stderr
    before_it, pushed, after = done.stdout.splitlines()
    assert before_it.startswith("runs/demo/sft is done already: eval_loss 1.5 (")
    assert pushed == f"runs/demo/sft/model -> {hub.url}/me/tiny (private, 4 files)"
    assert after == "next     python -m rlhf_pipeline stage=chat name=demo"
    assert hub.private == {"me/tiny": True}
    sent = hub.files["me/tiny"]
    here = {str(path.relative_to(sft.model)): path.read_bytes() for path in sft.model.rglob("*") if path.is_file()}
    assert set(sent) == {"README.md", "config.json", "model.safetensors", "extra/notes.txt"}
    assert b'model_id = "runs/demo/sft/model"' in here["README.md"]
    here["README.md"] = here["README.md"].replace(b"runs/demo/sft/model", b"me/tiny")
    assert sent == here
    assert ModelCard(sent["README.md"].decode()).data.pipeline_tag == "text-generation"
    assert hub.commits == ["sft of demo"]
    assert content_hash(sft.path) == before  # nothing was trained, and nothing written down
    kept = [path.read_bytes() for path in workplace.rglob("*") if path.is_file()]
    assert TOKEN.encode() not in b"".join([*sent.values(), *kept, done.stdout.encode(), done.stderr.encode()])


def test_who_repeats_a_run_pushes_nothing(sft: RunDir, command_line: CommandLine) -> None:
    assert b"me/asked-before" not in b"".join(path.read_bytes() for path in sft.path.rglob("*") if path.is_file())
    assert command_line(*REPEAT.split()) == 0  # offline, where to push would fail


def test_a_card_that_was_edited_goes_as_it_is_and_one_that_is_missing_is_made(sft: RunDir, hub: FakeHub) -> None:
    card = sft.model / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert run(f"{REPEAT} hub.push=me/tiny", hub.url).returncode == 0
    assert hub.files["me/tiny"]["README.md"].endswith(b"\nMy own words.\n")
    card.unlink()
    assert run(f"{REPEAT} hub.push=me/tiny", hub.url).returncode == 0
    assert b"# demo, sft" in hub.files["me/tiny"]["README.md"]
    assert not card.exists()


def test_public_only_when_that_is_said(sft: RunDir, hub: FakeHub) -> None:
    assert "(public, 4 files)" in run(f"{REPEAT} hub.push=me/open hub.private=false", hub.url).stdout
    assert hub.private == {"me/open": False}
    hub.files.clear()
    refused = run(f"{REPEAT} hub.push=me/open", hub.url)
    assert refused.returncode == 2
    assert "hub.push=me/open: it exists already and is public; add hub.private=false" in refused.stderr
    assert hub.files == {}


def check_plain(done: subprocess.CompletedProcess[str], sft: RunDir, reason: str) -> str:
    """A failure is one line with its reason and the command that tries again, which is given back."""
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: hub.push=me/tiny: {reason}")
    assert TOKEN not in done.stderr + done.stdout
    assert sft.record["status"] == "done"
    said, _, again = done.stderr.strip().partition("; to try again: python -m rlhf_pipeline ")
    assert said.endswith(f"{sft.model} is kept")
    return again


def metadata_fault(message: str) -> dict[str, tuple[int, Any]]:
    return {"/api/validate-yaml": (400, {"errors": [{"message": message}], "warnings": []})}


def test_failures_are_plain_and_name_the_command_that_tries_again(sft: RunDir, hub: FakeHub) -> None:
    push = f"{REPEAT} hub.push=me/tiny"
    check_plain(run(push, hub.url, token="hf_another"), sft, "the hub rejects the token; set HF_TOKEN to a valid one")
    hub.faults = {"/api/repos/create": (403, {"error": "You don't have the rights to create a model under me"})}
    check_plain(run(push, hub.url), sft, "the token has no write access to me/tiny; use a token that has")
    hub.faults = metadata_fault('"tags" must be an array')
    check_plain(run(push, hub.url), sft, 'Invalid metadata in README.md. - "tags" must be an array')
    assert hub.files == {}
    hub.faults.clear()
    check_plain(run(push, hub.url, token=f"{TOKEN}\x0bx"), sft, "")  # which no header takes
    dead = "http://127.0.0.1:9"
    check_plain(run(push, dead), sft, f"the hub at {dead} cannot be reached (")
    check_plain(run(push, dead, HF_HUB_OFFLINE="1"), sft, "HF_HUB_OFFLINE is set, so the hub is not used")
    hub.private.clear()
    lost = f"the hub at {hub.url} needs a token; set HF_TOKEN"
    again = check_plain(run(f"{push} hub.private=false", hub.url, token=""), sft, lost)
    assert hub.private == {}
    assert run(again, hub.url).returncode == 0
    assert hub.private == {"me/tiny": False}


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "extra/more", "."])
def test_what_a_link_points_to_is_not_uploaded(sft: RunDir, workplace: Path, name: str) -> None:
    secret, link = workplace / "secret", sft.model / name
    if name == ".":
        sft.model.rename(secret)
        link = sft.model
    else:
        secret.mkdir() if name == "extra/more" else secret.write_text("mine alone")
        link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(UserError, match=f"hub.push=me/tiny: {re.escape(str(link))} is a symbolic link"):
        publish(sft, Hub("me/tiny"))


def test_secrets_are_not_quoted(sft: RunDir, hub: FakeHub, workplace: Path) -> None:
    mirror = hub.url.replace("://", "://me:s3cret%40@")
    done = run(f"{REPEAT} hub.push=me/tiny", mirror)  # whose login stands where the token would
    check_plain(done, sft, "the hub rejects the token")
    hub.faults = metadata_fault(f"Bearer {TOKEN} of {TOKEN}, and s3cret@")
    check_plain(run(f"{REPEAT} hub.push=me/tiny", hub.url), sft, "Invalid metadata in README.md. - Bearer *** of ***")
    dead = run(f"{REPEAT} hub.push=me/tiny", "http://me:s3cret%40@127.0.0.1:9")
    check_plain(dead, sft, "the hub at http://127.0.0.1:9 cannot be reached (")
    written = [path.read_bytes() for path in workplace.rglob("*") if path.is_file()]
    said = [*written, *(text.encode() for one in (done, dead) for text in (one.stdout, one.stderr))]
    assert not any(b"s3cret" in each or TOKEN.encode() in each for each in said)


def test_a_pipeline_is_known_by_the_policy_that_it_trains_last() -> None:
    def last(*stages: str) -> str:
        every = [Settings(stage, name) for stage, name in (each.split("@") for each in stages)]
        found = last_model(every)
        return f"{found.stage}@{found.name}"

    assert last("pretrain@x", "sft@x", "reward@x", "ppo@x", "evaluate@x") == "ppo@x"
    assert last("sft@x", "reward@x") == "sft@x"
    assert last("reward@x") == "reward@x"
    stages = ("collect", "reward", "ppo", "evaluate")
    rounds = [f"{stage}@x/round{number}" for number in range(1, 12) for stage in stages]
    assert last("sft@x", *rounds) == "ppo@x/round11"
    with pytest.raises(UserError, match="no stage of this pipeline makes a model"):
        last("evaluate@x")

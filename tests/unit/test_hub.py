"""A hub that is down, slow, wrong or not needed: what is opened then, what is said, and how soon.

In processes of their own, since an unreachable hub takes the whole process offline.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from loopback import answering

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explain_failures

DEAD = "http://127.0.0.1:9"
# Loads nothing heavy: the client alone, as transformers calls it.
DOWNLOAD = """
import json, os, time
from huggingface_hub import hf_hub_download
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explain_failures, hub_silence
started, said = time.monotonic(), []
for name in ("some/model", "other/model"):
    try:
        with explain_failures(name, "policy.path"):
            hf_hub_download(name, "config.json")
    except UserError as error:
        said.append(str(error))
seconds = time.monotonic() - started
print(json.dumps([said, seconds, hub_silence(), os.environ.get("HF_HUB_OFFLINE")]))
"""
# The real loaders, of what a first process has put into the cache.
OPEN = """
import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explain_failures, open_pretrained

def tokenizer(where):
    with explain_failures(where, "policy.path"):
        return AutoTokenizer.from_pretrained(where)

def data(where):
    with explain_failures(where, "data.path"):
        return datasets.load_dataset(where)["train"]

def model(where):
    return open_pretrained(AutoModelForCausalLM, where, "policy.path")

for load, where in ((model, "lvwerra/gpt2-imdb"), (tokenizer, "gpt2"), (data, "stanfordnlp/imdb"), (model, "no/such"),
                    (tokenizer, "no/such"), (data, "no/such"), (tokenizer, "a b"), (data, "runs/demo/x")):
    try:
        print("opened", where, type(load(where)).__name__)
    except UserError as error:
        print(error)
if datasets.config.HF_HUB_OFFLINE:
    try:
        model("gpt2")
    except UserError as error:
        print(error)
"""


def run(script: str, home: Path | str, endpoint: str, **more: str) -> list[str]:
    """The lines that a process prints."""
    usual = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment = {**usual, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **more}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@contextmanager
def server(status: int, **headers: str) -> Iterator[str]:
    """An endpoint that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with answering(HTTPServer(("127.0.0.1", 0), Handler)) as http:
        yield f"http://127.0.0.1:{http.server_port}"


@contextmanager
def silent() -> Iterator[str]:
    """An endpoint that accepts and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def check_unreachable(lines: list[str], home: Path, endpoint: str, why: str, seconds: float) -> None:
    announced, result = lines
    said, took, silence, offline = json.loads(result)
    assert announced == f"{silence}; only the cache ({home}) is used."
    assert silence.startswith(f"the hub at {endpoint} cannot be reached (")
    assert why in silence
    assert offline == "1"
    assert took < seconds
    for name, message in zip(("some/model", "other/model"), said, strict=True):
        assert message.startswith(f"policy.path={name} is not in the cache ({home}), and the hub at {endpoint} ")
        assert all(fix in message for fix in ("local path", "HF_ENDPOINT", "make demo"))
        assert "\n" not in message


@pytest.mark.parametrize(
    ("place", "why", "seconds"),
    [
        (nullcontext(DEAD), "refused", 2),
        (nullcontext("hf-mirror.com"), "missing an 'http://' or 'https://' protocol", 2),
        (silent(), "no answer in 5 s", 7),
        (server(503, Retry_After="100000"), "it answers 503 Service Unavailable", 7),
    ],
)
def test_a_hub_that_does_not_serve_is_given_up_on_in_seconds(
    tmp_path: Path, place: AbstractContextManager[str], why: str, seconds: float
) -> None:
    with place as endpoint:
        lines = run(DOWNLOAD, tmp_path, endpoint.replace("://", "://me:s3cret@"))
    check_unreachable(lines, tmp_path, endpoint, why, seconds)
    assert "s3cret" not in "".join(lines)


def test_a_proxy_of_the_environment_counts(tmp_path: Path) -> None:
    with server(404, X_Error_Code="RepoNotFound") as proxy:
        lines = run(DOWNLOAD, tmp_path, "http://no-such-host.invalid", http_proxy=proxy, no_proxy="")
    assert json.loads(lines[-1])[2] is None
    lines = run(DOWNLOAD, tmp_path, "http://no-such-host.invalid", http_proxy=DEAD, no_proxy="")
    check_unreachable(lines, tmp_path, "http://no-such-host.invalid", "refused", seconds=2)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "Repository Not Found for url"),
        (403, "GatedRepo", "if it is private or gated, set HF_TOKEN"),
        (404, "EntryNotFound", "could not be opened (404"),
    ],
)
def test_a_hub_that_answers_is_asked_and_what_it_says_is_passed_on(
    tmp_path: Path, status: int, code: str, words: str
) -> None:
    with server(status, X_Error_Code=code) as endpoint:
        lines = run(DOWNLOAD, tmp_path, endpoint)
    said, _, silence, offline = json.loads(lines[-1])
    assert len(lines) == 1
    assert silence is None
    assert offline is None
    assert all(words in message and "\n" not in message for message in said)


@pytest.fixture(scope="module")
def filled(hub: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The cache that a process with a hub has left, and what it printed."""
    home = tmp_path_factory.mktemp("filled")
    return home, run(OPEN, home, hub["HF_ENDPOINT"])


OPENED = ["opened lvwerra/gpt2-imdb GPT2LMHeadModel", "opened gpt2 GPT2Tokenizer", "opened stanfordnlp/imdb Dataset"]


def test_a_hub_or_mirror_that_answers_is_used(filled: tuple[Path, list[str]], hub: dict[str, str]) -> None:
    lines = filled[1]
    assert lines[:3] == OPENED
    for line in lines[3:6]:
        assert "path=no/such could not be opened (" in line
    assert lines[6].startswith("there is no folder a b")
    assert lines[7].startswith("there is no folder runs/demo/x")
    assert len(lines) == 8


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_a_filled_cache_does_without_a_hub(filled: tuple[Path, list[str]], offline: dict[str, str]) -> None:
    home = filled[0]
    lines = run(OPEN, home, DEAD, **offline)
    why = "HF_HUB_OFFLINE is set, so the hub is not used" if offline else f"the hub at {DEAD} cannot be reached"
    if not offline:
        assert lines.pop(0).startswith(why)
    assert lines[:3] == OPENED
    for line in lines[3:6]:
        assert f"path=no/such is not in the cache ({home}), and {why}" in line
    assert lines[6].startswith("there is no folder a b")
    assert f"policy.path=gpt2 is not in the cache ({home}), and {why}" in lines[8]  # there is only the tokenizer
    assert "RLHF_ALLOW_PICKLE" not in lines[8]


def test_a_path_is_not_asked_of_the_hub(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    (workplace / "runs" / "demo" / "sft").mkdir(parents=True)
    for path, near in {
        "runs/demo/sfd": " (similar: runs/demo/sft)",
        "./runs/dmeo": " (similar: runs/demo)",
        "rnus/demo/sft": " (similar: runs)",
        "/nowhere/at/all": "",
        "~/no-such-folder-here": "",
        "~no-such-user/model": "",
    }.items():
        with pytest.raises(UserError) as caught, explain_failures(path, "policy.path"):
            pytest.fail("the block must not be entered")
        assert str(caught.value) == f"there is no folder {path}{near}; give another, or a hub id."
    (workplace / "mine").mkdir()
    with pytest.raises(UserError) as caught, explain_failures("mine", "policy.path"):
        raise OSError("no config\nand a second line")
    assert str(caught.value).startswith("policy.path=mine could not be opened (no config and a second line); ")

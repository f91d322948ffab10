"""Talking to the policies of the miniature run: from a script, through a pipe, at a terminal."""

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, CommandLine, change

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import Policy, make_policy, open_policy
from rlhf_pipeline.models.sampling import Batch, sample
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.lineage import content_hash
from rlhf_pipeline.settings import Chat as Chatting
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.chat import Talk, open_talk

Chat = Callable[..., tuple[str, str]]


@pytest.fixture
def chat(miniature: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> Chat:
    """`stage=chat` in the miniature run; gives what it said on stdout and on stderr."""

    def call(*args: str, status: int = 0) -> tuple[str, str]:
        where = () if any(arg.startswith("runs=") for arg in args) else (f"runs={miniature.parent}",)
        assert command_line("stage=chat", *where, *args) == status
        said = capsys.readouterr()
        return said.out, said.err

    return call


def test_one_prompt_is_answered_by_the_newest_policy_and_nothing_else_is_on_stdout(chat: Chat, miniature: Path) -> None:
    before = content_hash(miniature)
    with RunDir(miniature.parent, "demo", "ppo").locked():  # a stage that is running is no hindrance
        out, err = chat("--prompt", "I saw this")
    assert out.count("\n") >= 1
    assert "policy" not in out
    assert "reward 0." not in out
    assert f"policy  {miniature}/ppo/model" in err
    assert "reward 0." in err
    assert content_hash(miniature) == before
    assert not (miniature / "chat").exists()


def test_it_is_what_the_policy_says_by_the_runs_own_sampling(
    chat: Chat, miniature: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        "chat", "demo", runs=str(miniature.parent), policy={"name": "causal_lm", "path": str(miniature / "ppo")},
        reward={"name": "classifier", "scale": "probability"}, data={"name": "toy_reviews"},
    )  # fmt: skip
    talk = open_talk(settings, RunDir.of(settings))
    assert talk.length == 8  # as PPO's response_length
    ((_, answer, reward),) = talk.ask("I saw this")
    assert chat("--prompt", "I saw this")[0].endswith(f"/reward/model\n{answer}\n")  # what open_talk said, too
    assert reward == talk.reward(["I saw this"], [answer])[0]  # type: ignore[misc]
    capsys.readouterr()
    ((_, answer, _),) = talk.ask("I saw this", grows=True)
    assert capsys.readouterr().out == f"{answer}\n"


def test_the_seed_and_the_settings_of_a_chat_decide(chat: Chat) -> None:
    asked = ["seed=1", "seed=2", "chat.response_length=1", "chat.temperature=0.001", "chat.temperature=0.001 seed=2"]
    usual, other, short, cold, same = (chat(*words.split(), "--prompt", "I saw this")[0][:-1] for words in asked)
    assert usual != other
    assert chat("--prompt", "I saw this")[0].startswith(short)
    assert len(usual) > len(short)
    assert cold == same


def test_two_policies_are_labelled_and_share_the_prompts(chat: Chat, miniature: Path) -> None:
    out, err = chat("against=sft", "--prompt", "I saw this", "--prompt=The plot was")
    assert [line.partition(":")[0] for line in out.splitlines() if line[:4] in ("ppo:", "sft:")] == ["ppo", "sft"] * 2
    assert err.count("sft: reward 0.") == 2
    other, _ = chat("against=sft", f"policy.path={miniature}/ppo", "--prompt", "I saw this", "--prompt=The plot was")
    assert out == other
    same, _ = chat(f"against={miniature}", "--prompt", "I saw this")
    first, second = same.removeprefix("ppo: ").split(f"{miniature}: ")
    assert first == second


def test_lines_of_a_pipe_are_answered_and_commands_obeyed(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("I saw this\n\n/help\n/reset\nThe plot was\n/quit\nnever read\n"))
    out, err = chat("against=pretrain")
    assert out.count("ppo: ") == out.count("pretrain: ") == 2
    assert "/reset  begin a new conversation" in err
    assert "\na new conversation" in err


def test_a_reward_by_hand_and_none(chat: Chat, miniature: Path, workplace: Path) -> None:
    _, err = chat("name=demo", "reward=length", "reward.target=4", "--prompt", "I saw this")
    assert "reward  length\nreward " in err
    assert "\nreward" not in chat("chat.reward=false", "--prompt", "I saw this")[1]
    assert "has no model yet" in chat("name=demo", "reward=preference_model", "--prompt", "I saw", status=2)[1]
    shutil.copytree(miniature / "sft", workplace / "runs" / "demo" / "sft")
    out, err = chat("runs=runs", "--prompt", "I saw this")
    assert out.strip()
    assert err.endswith("demo/sft/model\n")


def test_what_a_model_writes_never_steers_the_terminal(miniature: Path, workplace: Path, chat: Chat) -> None:
    folder = workplace / "esc"
    shutil.copytree(miniature / "ppo" / "model", folder)
    policy = open_policy(str(folder))
    (escape,) = policy.tokenizer("\x1b")["input_ids"]
    with torch.no_grad():  # this token, whatever was asked
        policy.model.transformer.wte.weight.zero_()[escape] = 1
        policy.model.transformer.ln_f.weight.zero_()
        policy.model.transformer.ln_f.bias.fill_(1)
    policy.save(folder)
    out, err = chat(f"policy.path={folder}", f"against={folder}", "chat.response_length=3", "--prompt", "I saw")
    assert out.count("\\u001b\\u001b\\u001b\n") == 2
    assert "\x1b" not in out + err


DIALOGUE = ["你好吗", "我很好，谢谢你", "今天天气真好", "我们去吃饭吧"] * 10


@pytest.fixture
def chinese(workplace: Path) -> Policy:
    """A Chinese policy from scratch, which lies where a run's PPO would have put it."""
    choice = {"name": "gpt2_scratch", "tokenizer": "characters", "vocabulary": 60, "positions": 32}
    policy = make_policy(choice, DIALOGUE, 0)
    stage = workplace / "runs" / "zh" / "ppo"
    policy.save(stage / "model")
    config = {
        "policy": choice, "data": {"name": "dialogue", "path": "gone.jsonl"}, "reward": {"name": "length"},
        "trainer": {"response_length": 6, "suppress_tokens": ["[UNK]", "[PAD]", "[CLS]", "[MASK]"]},
    }  # fmt: skip
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    (stage / "run.json").write_text(json.dumps({"status": "done", "stage": "ppo", "name": "zh"}))
    return policy


def chinese_talk(chat: Chatting | None = None) -> Talk:
    choices: dict[str, Any] = {"policy": {"name": "causal_lm", "path": "runs/zh"}, "reward": {"name": "length"}}
    settings = Settings("chat", "zh", **choices, chat=chat or Chatting())
    return open_talk(settings, RunDir.of(settings))


def test_chinese_is_asked_turn_by_turn_between_its_special_tokens(
    chinese: Policy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(model: object, prompts: list[list[int]], *more: Any) -> Batch:
        asked.append(chinese.tokenizer.decode(prompts[0]).replace(" ", ""))
        return sample(model, prompts, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("rlhf_pipeline.stages.chat.sample", noted)
    talk = chinese_talk()
    ((_, text, _),) = talk.ask("你好吗")
    talk.ask("我很好")
    assert asked == ["[CLS]你好吗[SEP]", f"[CLS]你好吗[SEP]{text}[SEP]我很好[SEP]"]
    for _ in range(6):
        talk.ask("今天天气真好")
    assert "its oldest turns are dropped" in capsys.readouterr().err
    assert max(len(turns) for turns in talk.turns.values()) < 2 * 8
    with pytest.raises(UserError, match="the prompt takes 62 tokens, and ppo has room for 1 to 26"):
        talk.ask("好" * 60)


def test_a_chinese_run_needs_nothing_said_again(chinese: Policy, chat: Chat) -> None:
    out, err = chat("runs=runs", "name=zh", "--prompt", "你好，“吗”")
    assert "[UNK]" not in out
    assert "reward  length" in err
    talk = chinese_talk()
    assert (talk.policies[0].name, talk.converses, talk.length) == ("ppo", True, 6)
    assert chinese.tokenizer.unk_token_id in talk.policies[0].sampling.suppressed_ids


def test_the_newest_round_answers(miniature: Path, workplace: Path, chat: Chat) -> None:
    run = workplace / "runs" / "demo"
    shutil.copytree(miniature / "sft", run / "sft")
    for name in ("round1", "round2"):
        shutil.copytree(miniature / "ppo", run / name / "ppo")
        change(run / name / "ppo" / "run.json", name=f"demo/{name}")
    (run / "round10" / "ppo").mkdir(parents=True)  # only begun
    out, err = chat("runs=runs", "against=sft", "--prompt", "I saw")
    assert "policy  runs/demo/round2/ppo/model" in err
    assert "sft: " in out


REFUSED = {
    "name=none": ["has no policy to talk to", "name=", "policy.path="],
    "against=reward": ["has made no policy reward. It has: pretrain, sft, ppo"],
    "against=./nowhere": ["there is no folder ./nowhere"],
    "chat.temperature=0": ["chat.temperature is 0; it takes a number above 0"],
    "chat.response_length=0": ["chat.response_length is 0", "at least 1"],
    "chat.response_length=64": ["the policy has 64 positions"],
    "chat.mode=talk": ["chat.mode is 'talk'", "'chat' or 'complete' or null"],
    "chat.top_k=3": ["no setting 'chat.top_k'"],
    "policy.size=small": ["has policy.size=tiny, but here it is small"],
    "trainer.temperature=2": ["stage=chat has no trainer"],
    "-m": ["stage=chat is for one run"],
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_is_said(asked: str, chat: Chat) -> None:
    out, err = chat("--prompt", "I saw this", asked, status=2)
    assert not out
    for part in REFUSED[asked]:
        assert part in err
    assert "Traceback" not in err


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(chat: Chat) -> None:
    assert "tokens, and ppo has room for 1 to 56" in chat("--prompt", "quite wonderful " * 40, status=2)[1]


@pytest.mark.parametrize(("against", "key", "status"), [("null", b"\x04", 0), ("sft", b"\x03", 130)])
def test_at_a_terminal(against: str, key: bytes, status: int, miniature: Path) -> None:
    command = ["-m", "rlhf_pipeline", "stage=chat", f"runs={miniature.parent}", f"against={against}"]
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it, and so would we
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "90"})
    shown = [read_until_asked(terminal)]
    for line in (b"I saw this\n", b"/rest\n", b"/reset\n", key):
        os.write(terminal, line)
        shown.append(read_until_asked(terminal))
    assert left_with(process, lambda: os.write(terminal, key)) == status
    assert "/help lists the commands" in shown[0]
    assert "reward 0." in shown[1]
    assert ("ppo" in shown[1] and "│" in shown[1]) == (against == "sft")
    assert "Did you mean '/reset'?" in shown[2]
    assert "a new conversation" in shown[3]
    assert "Traceback" not in "".join(shown)


def left_with(process: int, again: Callable[[], object], seconds: float = 60) -> int:
    """A process's exit status, which it has to come to.

    As a person would, press the key again after a while: between showing the prompt and waiting for a key, Python's
    readline notes an interrupt but acts on it at the next one.
    """
    presses, end = 1, time.monotonic() + seconds / 3
    while not (waited := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            again() if presses < 3 else os.kill(process, signal.SIGKILL)
            presses, end = presses + 1, end + seconds / 3
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(waited[1])


def read_until_asked(terminal: int, seconds: float = 120) -> str:
    """What a terminal shows up to the next prompt, or to the end of the program."""
    shown, end = b"", time.monotonic() + seconds
    while not shown.endswith(b"> ") and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # on Linux, the end
                part = b""
            if not part:
                break
            shown += part
    return shown.decode()


ROWS = {
    "complete": {"prompt": "Say NUMBER.", "completion": "Yes."},
    "chat": {"messages": [{"role": "user", "content": "Say NUMBER"}, {"role": "assistant", "content": "Yes."}]},
}


@pytest.mark.parametrize("mode", ROWS)
def test_whether_it_converses_is_told_by_the_runs_rows(mode: str, chinese: Policy) -> None:
    row = json.dumps(ROWS[mode]) + "\n"
    Path("rows.jsonl").write_text("".join(row.replace("NUMBER", str(number)) for number in range(20)))
    data = {"name": "instructions", "path": "rows.jsonl", "test_share": 0.5}
    change(Path("runs/zh/ppo/config.yaml"), data=data)
    asked = [Chatting(), Chatting(mode="complete"), Chatting(mode="chat")]
    assert [chinese_talk(chat).converses for chat in asked] == [mode == "chat", False, True]

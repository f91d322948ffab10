"""What the README tells people to type is what the program takes."""

import copy
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, read_words
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny import PROMPTS, TEXTS, good_share, tiny_policy

from rlhf_pipeline import composition
from rlhf_pipeline.models.policies import train_tokenizer

READMES = ("README.md", "README.zh-CN.md")


def blocks(readme: str, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)


def commands(readme: str) -> list[str]:
    """Every command line in code blocks and between backticks, without its comment."""
    lines = [line for block in blocks(readme, "bash") for line in block.replace("\\\n", " ").splitlines()]
    given = dict(re.fullmatch(r'([A-Z]+)="(.*)"', line).groups() for line in lines if re.match(r'[A-Z]+="', line))  # type: ignore[union-attr]
    lines = [re.sub(r"\$([A-Z]+)", lambda name: given[name[1]], line) for line in lines]
    lines += re.findall(r"`((?:python -m rlhf_pipeline|make) [^`]*)`", (ROOT / readme).read_text(encoding="utf-8"))
    return [line.split("  #")[0].split(" # ")[0].strip() for line in lines if line.strip()]


def test_every_table_is_filled_in() -> None:
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert "@" not in re.sub(r"https?://\S+", "", text), "a table is missing"


def swept(argument: str) -> bool:
    """Whether an argument gives a setting several values."""
    return OverridesParser.create().parse_override(argument).is_sweep_override()


@pytest.mark.parametrize("readme", READMES)
def test_every_command_of_the_program_resolves(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a sweep there is none here.
    monkeypatch.setattr(composition, "sweep", lambda runs, said, name, afresh: (name or said, said, {}))
    asked = [c for c in commands(readme) if "-m rlhf_pipeline" in c and "<" not in c]  # by a launcher, too
    assert len(asked) >= 12
    for command in asked:
        words = shlex.split(command.partition("rlhf_pipeline")[2])
        words = [word for word in words if word not in ("-m", "--cfg", "job")]
        plain = [word if re.search(r"[\[{]", word) else re.sub(r"(=[^=,]*),.*", r"\1", word) for word in words]
        # Of a sweep, one job.
        args = [a for a in read_words(*plain) if not a.startswith(("--multirun", "hydra")) and not swept(a)]
        settings = composition.settings_of(args)
        for stage in settings.stages or [settings.stage]:
            again = [*(a for a in args if not a.startswith(("stage=", "rounds="))), f"stage={stage}"]
            assert composition.settings_of(again).stage == stage, command


@pytest.mark.parametrize("readme", READMES)
def test_every_make_target_is_there(readme: str) -> None:
    asked = [c for c in commands(readme) if re.search(r"(^|\s)make ", c)]
    assert len(asked) >= 6
    for command in asked:
        words = [w for w in shlex.split(command[command.index("make ") :]) if not w.startswith("PYTHON=")]
        done = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for readme in READMES:
        own, api = blocks(readme, "python")
        names: dict[str, object] = {}
        exec(own, names)
        assert names["politeness"]([""] * 2, ["Please do.", "No."]) == [1.0, 0.0]  # type: ignore[operator]
        tokenizer = train_tokenizer(TEXTS, 300, 64)
        policy = tiny_policy(tokenizer)
        names = {"tokenizer": tokenizer, "policy": policy, "reference": copy.deepcopy(policy), "reward": good_share}
        exec(api.replace("10_000", "8"), {**names, "prompts": PROMPTS * 4})

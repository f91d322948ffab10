"""What the READMEs tell people to type is what the program takes, and their links lead somewhere."""

import copy
import functools
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, read_words
from hydra.core.override_parser.overrides_parser import OverridesParser
from tiny import PROMPTS, TEXTS, good_share, stats_of_first_update, tiny_policy, tiny_tokenizer, trainer

from rlhf_pipeline import composition
from rlhf_pipeline.models.policies import train_tokenizer

READMES = ("README.md", "README.zh-CN.md")
FOLDERS = [path for top in ("conf", "rlhf_pipeline", "tests") for path in sorted((ROOT / top).rglob("README.md"))]
ROOMS = tuple(path.relative_to(ROOT).as_posix() for path in FOLDERS)
ALL = (*READMES, *ROOMS)


def read(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def blocks(readme: str, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", read(readme), re.DOTALL)


def commands(readme: str) -> list[str]:
    """Every command line in code blocks and between backticks, without its comment."""
    lines = [line for block in blocks(readme, "bash") for line in block.replace("\\\n", " ").splitlines()]
    given = dict(re.fullmatch(r'([A-Z]+)="(.*)"', line).groups() for line in lines if re.match(r'[A-Z]+="', line))  # type: ignore[union-attr]
    lines = [re.sub(r"\$([A-Z]+)", lambda name: given[name[1]], line) for line in lines]
    lines += re.findall(r"`((?:python -m rlhf_pipeline|python tests/|make) ?[^`]*)`", read(readme))
    lines = [line.split("  #")[0].split(" # ")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


@functools.cache
def made(readme: str) -> dict[str, str]:
    """What make would run for every command that calls it."""
    asked = [command for command in commands(readme) if re.search(r"(^|\s)make ", command)]
    shown = {}
    for command in asked:
        words = [w for w in shlex.split(command[command.index("make ") :]) if not w.startswith("PYTHON=")]
        done = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        shown[command] = done.stdout
    return shown


def swept(argument: str) -> bool:
    """Whether an argument gives a setting several values."""
    return OverridesParser.create().parse_override(argument).is_sweep_override()


@pytest.mark.parametrize("readme", ALL)
def test_every_command_of_the_program_resolves(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a sweep there is none here.
    monkeypatch.setattr(composition, "sweep_choices", lambda runs, said, name, afresh: (name or said, said, {}))
    asked = [c for c in commands(readme) if "-m rlhf_pipeline" in c and "<" not in c]  # by a launcher, too
    assert len(asked) >= (12 if readme in READMES else 1)
    for command in asked:
        check_resolves(command)


@functools.cache  # many commands stand in several READMEs
def check_resolves(command: str) -> None:
    words = shlex.split(command.partition("rlhf_pipeline")[2])
    words = [word for word in words if word not in ("-m", "--cfg", "job")]
    plain = [word if re.search(r"[\[{]", word) else re.sub(r"(=[^=,]*),.*", r"\1", word) for word in words]
    # Of a sweep, one job.
    args = [a for a in read_words(*plain) if not a.startswith(("--multirun", "hydra")) and not swept(a)]
    settings = composition.settings_of(args)
    for stage in settings.stages or [settings.stage]:
        again = [*(a for a in args if not a.startswith(("stage=", "rounds="))), f"stage={stage}"]
        assert composition.settings_of(again).stage == stage, command


@pytest.mark.parametrize("readme", ALL)
def test_every_make_target_is_there(readme: str) -> None:
    assert len(made(readme)) >= (6 if readme in READMES else 1)


@pytest.mark.parametrize("readme", ALL)
def test_scripts_files_and_extras_are_there(readme: str) -> None:
    asked = "\n".join([*commands(readme), *made(readme).values()])
    for script, words in re.findall(r"python (tests/\S+\.py)(.*)", asked):
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", words):
            assert f'"{option}"' in source, f"{script} {option}"
    for file in re.findall(r"--config_file (\S+)", asked):
        assert (ROOT / file).is_file(), file
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", read(readme))) <= extras.keys()


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", ALL)
def test_every_link_leads_to_a_file_or_a_heading(readme: str) -> None:
    page = ROOT / readme
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", read(readme), flags=re.DOTALL))
    assert links or readme in ROOMS
    for link in links:
        place, _, heading = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        if heading:
            prose = re.sub(r"```.*?```", "", target.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert heading in anchors(prose), link


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for readme in READMES:
        own, api = blocks(readme, "python")
        names: dict[str, object] = {}
        exec(own, names)
        assert names["enthusiasm"]([""] * 2, ["I loved it.", "No."]) == [1.0, 0.0]  # type: ignore[operator]
        tokenizer = train_tokenizer(TEXTS, 300, 64)
        policy = tiny_policy(tokenizer)
        names = {"tokenizer": tokenizer, "policy": policy, "reference": copy.deepcopy(policy), "reward": good_share}
        exec(api.replace("10_000", "8"), {**names, "prompts": PROMPTS * 4})
    assert not [room for room in ROOMS if blocks(room, "python")], "an example that no test runs"


@pytest.mark.parametrize("options", [{}, {"advantage": "grpo", "samples_per_prompt": 2}])
def test_every_figure_that_ppo_logs_is_explained(options: dict[str, object], tmp_path: Path) -> None:
    logged = stats_of_first_update(trainer(tiny_tokenizer(), tmp_path, **options))
    page = read("rlhf_pipeline/ppo/README.md").partition("## What is logged")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w/]+)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")]
    # Of a row, the second name and those after it have the first one's prefix.
    told = {name for first, *more in rows for name in (first, *more, *(f"{first.split('/')[0]}/{n}" for n in more))}
    assert {name for name in logged if name not in ("step", "seconds")} <= told

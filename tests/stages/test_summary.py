"""How a stage goes and ends: bars with figures, a summary that its files bear out, a next command that runs."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import MINIATURE, ROOT, CommandLine, change, cut_off, read_words, settings_of
from terminal import at_a_terminal, left_standing

from rlhf_pipeline import composition
from rlhf_pipeline.files import read_json, read_jsonl
from rlhf_pipeline.report.summary import command, lasted, next_command, print_done
from rlhf_pipeline.runs.directory import RunDir

STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")


def test_a_summary_says_what_the_files_hold(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = read_jsonl(run / "ppo" / "metrics.jsonl")[0]["objective/scores"]
    for stage, figures, rate in (
        ("pretrain", "{eval_perplexity:.1f}", "steps,"),
        ("sft", "{eval_loss:.3f} {eval_loss_before:.3f}", "steps,"),
        ("reward", "{accuracy:.2%} 300", "steps,"),
        ("ppo", f"{{scores:.3f}} {{kl:.2f}} {first:.3f}", "6 updates, {updates:.0f}/min"),
        (
            "evaluate",
            "{reward_mean:.3f} {kl:.2f} {gain_low:+.3f} {gain_high:+.3f} 24",
            "{speed[prompts_per_second]:.1f}",
        ),
    ):
        print_done(RunDir(Path("runs"), "demo", stage))
        result, took, made = capsys.readouterr().out.splitlines()
        record = read_json(run / stage / "run.json")
        assert result.startswith(f"{stage:<9}")
        for figure in figures.format(**record["results"]).split():
            assert figure in result
        assert took.startswith(f"time     {lasted(record['seconds'])}, ")
        assert rate.format(updates=360 / record["seconds"], **record["results"]) in took
        own = {"evaluate": "evaluation.json", "reward": "model/, quality.json"}.get(stage, "model/")
        assert made == f"made     runs/demo/{stage}: {own}, report.html"


def test_the_next_command_of_each_stage_is_the_next_stages(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in STAGES[:-1]:
        logged = read_jsonl(run / stage / "metrics.jsonl")
        assert read_json(run / stage / "run.json")["steps"] >= logged[-1]["step"]
    for stage, after in zip(STAGES, [*STAGES[1:], "chat"], strict=True):
        assert command_line(f"stage={stage}", *MINIATURE) == 0
        said = capsys.readouterr().out
        assert f"runs/demo/{stage} is done already: " in said
        label, command = said.splitlines()[-1].split(maxsplit=1)
        assert label == "next"
        assert command.startswith(f"python -m rlhf_pipeline stage={after}")
        more = ["--prompt", "This film"] if after == "chat" else []
        assert command_line(*shlex.split(command)[3:], *more) == 0
        assert after == "chat" or f"runs/demo/{after} is done already" in capsys.readouterr().out


NEXT = {
    "stage=sft name=x trainer.learning_rate=1 policy.path=runs/y": "reward name=x policy.path=runs/x/sft",
    "stage=reward name=x reward.path=distilbert seed=3": "ppo name=x reward.path=runs/x/reward seed=3",
    "stage=reward reward=classifier data=sentiment data.path=a.csv policy=gpt2 hub.push=a/b":
        "ppo reward=classifier data=sentiment data.path=a.csv policy=gpt2",
    "stage=ppo experiment=null name=x overwrite=true": "evaluate name=x experiment=null",
    "stage=pretrain stages.pretrain.trainer.max_steps=1 'evaluate.show=[it is]'": "sft 'evaluate.show=[it is]'",
    "stage=dpo name=x data=preferences data.path=a.jsonl": None,
    "stage=dpo name=x data=preferences data.path=a.jsonl reward=length":
        "evaluate name=x data=preferences data.path=a.jsonl reward=length",
    "stage=evaluate name=nobody": None,
}  # fmt: skip


@pytest.mark.parametrize("asked", NEXT)
def test_the_next_command_keeps_what_was_said_of_all_stages(asked: str, workplace: Path) -> None:
    words = read_words(*shlex.split(asked))
    named = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    file = ROOT / "conf" / "experiment" / f"{named[0] if named else 'demo'}.yaml"
    order = [] if "~experiment" in words else list(yaml.safe_load(file.read_text())["stages"])
    found = next_command(composition.settings_of(words), order, words)
    if NEXT[asked] is None:
        assert found is None
    else:
        assert found == f"python -m rlhf_pipeline stage={NEXT[asked]}"
        settings_of(*shlex.split(found)[3:])


@pytest.mark.parametrize("name", ["demo", "coefs/trainer.kl_coef=0.05", "it's here", "a, b", "back\\slash", "${x}"])
def test_a_command_takes_a_name_as_it_is(name: str) -> None:
    words = shlex.split(command("chat", "runs", name=name))
    assert settings_of(*words[3:]).name == name
    assert "runs=elsewhere" in command("chat", "elsewhere", name=name)


def test_a_resumed_run_shows_where_it_begins_and_counts_all_its_time(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off(run / "ppo")
    change(run / "ppo" / "run.json", seconds=0.0)  # which a killed session did not record
    before = read_jsonl(run / "ppo" / "metrics.jsonl")[-1]["seconds"]
    assert command_line("stage=ppo", *MINIATURE) == 0
    said, record = capsys.readouterr(), read_json(run / "ppo" / "run.json")
    bar = [line for line in said.err.splitlines() if line.startswith("ppo: ")]
    assert bar[0] == "ppo:  67% 4/6 [00:00<?, ?update/s]"
    assert re.search(r"100% 6/6 \[.*<00:00, .*update.*, reward=\d\.\d{3}, kl=-?\d\.\d{3}\]$", bar[-1])
    assert "\r" not in said.err
    assert record["seconds"] > before
    assert read_jsonl(run / "ppo" / "metrics.jsonl")[4]["seconds"] > before  # update 5, again
    assert f"time     {lasted(record['seconds'])} in 2 sessions, 6 updates" in said.out


def test_at_a_terminal_bars_show_rate_time_left_reward_and_kl(run: Path, workplace: Path) -> None:
    (workplace / "loud.py").write_text(
        "def loud(prompts, texts):\n    print('judged', len(texts))\n    return [float(len(t)) for t in texts]\n"
    )
    args = ["reward=python", "reward.path=loud.py:loud", "experiment=demo", "name=bar", "policy.path=runs/demo/sft"]
    status, shown = at_a_terminal(["-m", "rlhf_pipeline", "stage=ppo", *args, *MINIATURE], workplace)
    assert status == 0, shown
    assert re.search(r"ppo:  33%\|.*\| 2/6 \[\d\d:\d\d<\d\d:\d\d, .*(update/s|s/update), reward=\d+\.\d{3}, kl=", shown)
    lines = left_standing(shown)
    assert lines[0] == "loading PyTorch and TRL"
    judged = [line for line in lines if "judged" in line]
    assert len(judged) >= 6
    assert all(re.fullmatch(r"judged \d+", line) for line in judged)
    *_, result, took, made, after = (line for line in lines if line)
    found = read_json(workplace / "runs/bar/ppo/run.json")["results"]
    assert result.startswith(f"ppo      reward {found['scores']:.3f} at KL {found['kl']:.2f}, from ")
    assert took.startswith("time     ")
    assert made == "made     runs/bar/ppo: model/, report.html"
    assert after.startswith("next     python -m rlhf_pipeline stage=evaluate reward=python")
    samples = read_jsonl(workplace / "runs/bar/ppo/samples.jsonl")
    assert all(row["reward"] == len(row["response"]) for row in samples)

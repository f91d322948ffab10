"""What the command line refuses, in what words and how soon; what it makes of experiments and overrides."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, CommandLine, Refused, read_words, settings_of
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf_pipeline.settings import STAGES, trainer_fields
from rlhf_pipeline.usage import CONF, asks_for_help
from rlhf_pipeline.words import as_user_types

REFUSED = {
    "stage=sfd": ["no stage is called 'sfd'", "Did you mean 'sft'", "pretrain"],
    "stage=sft policy=gpt3": ["no policy is called 'gpt3'", "Did you mean 'gpt2'"],
    "stage=sft trainer.learning_rat=1": ["trainer.learning_rat is not a field of SFTConfig", "'learning_rate'"],
    "stage=sft trainer.learning_rate=fast": ["trainer.learning_rate is 'fast'", "takes a number"],
    "stage=ppo trainer.kl_estimator=k2": ["trainer.kl_estimator is 'k2'", "'k1' or 'k3'"],
    "stage=ppo trainer.bf16=maybe": ["trainer.bf16 is 'maybe'", "true or false or 'auto' or null"],
    "stage=sft trainer.output_dir=x": ["trainer.output_dir cannot be set", "name="],
    "stage=sft compare=[a,b]": ["compare= is only for stage=evaluate"],
    "stage=evaluate compare=a": ["compare is 'a'", "list"],
    "stage=evaluate compare=[a]": ["2 to 8 different runs", "compare=[run1,run2]"],
    "stage=evaluate compare=[a,b]": ["holds no stage that has run"],
    "stage=sft report.lang=fr": ["report.lang is 'fr'", "'en' or 'zh'"],
    "stage=evaluate trainer.learning_rate=1": ["stage=evaluate has no trainer"],
    "stage=pipeline trainer.learning_rate=1": ["set stages.<stage>.trainer.learning_rate="],
    "stage=sft policy.sise=tiny": ["policy=gpt2_scratch: there is no setting 'policy.sise'", "Did you mean 'size'"],
    "stage=sft policy.size=huge": ["policy.size is 'huge'", "'tiny'"],
    "stage=sft data=text": ["data.path is not set"],
    "stage=pretrain data=preferences data.path=x": ["holds rows of Preference", "toy_reviews"],
    "stage=reward reward=length": ["cannot be trained", "classifier"],
    "stage=evaluate evaluate.promts=9": ["no setting 'evaluate.promts'", "'prompts'"],
    "stage=evaluate evaluate.batch_size=0": ["evaluate.batch_size is 0; it takes a whole number of at least 1"],
    "stage=sft data.limit=-1": ["data.limit is -1;", "of at least 1"],
    "stage=sft trainer.hub_token=hf_secret": ["trainer.hub_token cannot be set", "HF_TOKEN"],
    "stage=sft hub.push=nobody": ["hub.push=nobody is not a repository of the hub", "user/name"],
    "stage=evaluate hub.push=a/b": ["stage=evaluate makes no model", "ppo"],
    "stage=sft nam=x": ["no setting 'nam'", "Did you mean 'name'"],
    "stage=sft +kl.taget=6": ["no setting 'kl'"],
    "stage=ppo trainer.total_episodes=0": ["trainer.total_episodes is 0; it takes a number of at least 1"],
    "stage=ppo trainer.temperature=0.0": ["trainer.temperature is 0.0; it takes a number above 0"],
    "stage=sft seed=one": ["seed is 'one'", "takes a whole number"],
    "stage=sft name=../x": ["is not a run name"],
    "stage=sft stages.sfd.trainer.seed=1": ["stages.sfd is not a stage"],
    "--foo": ["there is no option --foo", "Did you mean '--info'", "--config-path"],
    "--cfg x stage=sft": ["--cfg/-c: invalid choice: 'x'"],
    "--config-name": ["--config-name/-cn: expected one argument"],
    "--config-path nix --config-name config": ["--config-path: there is no folder", "nix"],
    "--config-path . --config-name nix": ["there is no configuration 'nix'"],
    "sft": ["'sft' is not a setting", "stage=sft"],
    "stage=sft 数据=3": ["'数据=3' is not a setting"],
    "stage=sft data=文本": ["no data is called '文本'", "Known: dialogue"],
    "stage=sft labeler=lengt": ["no reward is called 'lengt'", "Did you mean 'length'"],
    "stage=sft hydra/launcher=foo": ["no hydra/launcher is called 'foo'", "Known: basic"],
    "stage=sft data=text data.path=": ["data.path= leaves data.path without a value", "data.path=<value>"],
    "stage=sft policy=": ["policy= leaves policy without a value"],
    "stage=sft ~policy": ["~policy leaves policy without a value"],
    "stage=sft +policy=gpt2": ["+policy= would add a second choice"],
    "stage=sft trainer=5": ["trainer=5 is not valid"],
    "stage=sft stages.sft=3": ["stages.sft=3 is not valid", "stages.sft.<key>="],
    "stage=sft seed=-1": ["seed is -1", "from 0 to 4294967295"],
    "stage=sft seed=1 seed=2": ["seed= is given 2 times"],
    "stage=sft policy=null": ["no policy is called 'null'"],
    "stage=ppo rounds=2": ["rounds= is only for stage=pipeline"],
    f"stage=sft policy.x={'[' * 200}{']' * 200}": ["nested too deeply"],
    f"stage=sft name={'n' * 300}": ["is too long for a folder", "200 bytes"],
    "stage=sft runs=/etc/hostname": ["/etc/hostname is a file"],
    "stage=sft trainer.learning_rate=nan": ["trainer.learning_rate is nan"],
    "stage=sft trainer.neftune_noise_alpha=inf": ["trainer.neftune_noise_alpha is inf; it takes a finite number"],
    "stage=sft trainer.max_steps=0": ["trainer.max_steps is 0", "-1 for no limit"],
    "stage=sft trainer.label_smoothing_factor=2": ["trainer.label_smoothing_factor is 2", "from 0 to 1"],
    "stage=sft data=\x1b[31mred": [r"no data is called '\u001b[31mred'"],
    "stage=sft trainer.learning_rate=": ["trainer.learning_rate is ''"],
    "stage=sft trainer.learning_rate=1(2": ["trainer.learning_rate is '1(2'"],
    "stage=sft seed=1,2": ["seed=1,2 has several values", "-m"],
    "stage=sft policy.path=${nix}": ["${nix}", "no setting 'nix'"],
    "stage=ppo trainer.total_episodes=nan": ["trainer.total_episodes is nan", "takes a whole number or null"],
    "stage=ppo trainer.learning_rate=inf": ["trainer.learning_rate is inf; it takes a number of at least 0"],
    "stage=sft data.prompt_tokens=[1]": ["data.prompt_tokens is [1]", "a list of 2 (a whole number each)"],
    "stage=ppo reward=sum reward.parts=3": ["reward.parts is 3; it takes a list (settings, as in {key: value}"],
    "stage=sft policy=[gpt2]": ["no policy is called '[gpt2]'"],
    "stage=sft labeler=2 -m --cfg=job": ["no reward is called '2'"],
    "stage=sft hydra/sweeper=0 --cfg=job": ["no hydra/sweeper is called '0'", "grid"],
    "stage=null -m trainer.max_steps=1": ["no stage is called 'null'"],
    "stage=sft policy=2,1.5 -m": ["no policy is called '2'"],
    "stage=1": ["no stage is called '1'"],
    "stage=sft stages=[a]": ["stages is a section of settings, so stages=[a] is not valid"],
    "": ["choose a stage: stage=<pretrain|"],
    "stage=pipeline policy=gpt2": ["choose an experiment, as in experiment=demo"],
    "stage=sft --prompt x": ["--prompt is only for stage=chat"],
    "stage=sft against=ppo": ["against=ppo is only for stage=chat"],
    "stage=chat --prompt": ["--prompt takes a text"],
    "stage=chat --prompt ' '": ["--prompt is empty"],
    "stage=pretrain trainer.run_name=${oc.env:SECRET}": ["let the shell fill it in"],
    "stage=compare experiment=compare comparison.seed=[1]": ["comparison.seed"],
    "stage=compare experiment=compare comparison.at_once=0": ["comparison.at_once"],
    "stage=reward experiment=chinese_dialog_from_scratch data.path=a.jsonl": ["add stages.reward.data.path="],
    "stage=evaluate evaluate.held_out_tokens=-1": ["evaluate.held_out_tokens is -1", "of at least 0"],
    "stage=evaluate evaluate.policies=[\"''\"]": ["evaluate.policies has an empty name"],
    "stage=evaluate evaluate.rewards=[length]": ["evaluate.rewards is ['length']; it takes a list (settings"],
    "stage=evaluate evaluate.rewards=[{name:lenght}]": ["evaluate.rewards[0]: no reward is called", "'length'"],
    "stage=evaluate evaluate.rewards=[{name:length,goal:3}]": ["evaluate.rewards[0]: reward=length", "'reward.goal'"],
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_wrong_is_named_with_what_is_near(
    asked: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    said = refused(asked)
    assert said.startswith("error: ")
    for part in REFUSED[asked]:
        assert part in said
    assert "++" not in said
    assert "hunter2" not in said
    assert said.count("\n") == 1
    assert not Path("runs").exists()


def test_a_folder_of_configurations_is_one_below_the_current_folder(workplace: Path) -> None:
    absolute = str(workplace / "runs" / "demo")
    for asked in ("--config-path runs/demo", "-cp runs/demo", "--config-path=runs/demo", f"--config-path {absolute}"):
        assert read_words(*asked.split(), "-cn=config") == ["--config-path", absolute, "--config-name", "config"]


ABSENT = {
    "stage=ppo": "reward=classifier has no model yet; run stage=reward first",
    "stage=sft data=text data.path=nothing.txt": "no file at nothing.txt",
    "stage=sft policy.path=runs/nothing": "there is no folder runs/nothing",
    "stage=pipeline experiment=chinese_dialog_from_scratch data.path=here.txt stages.reward.data.path=gone.csv":
        "no file at gone.csv",
}  # fmt: skip


@pytest.mark.parametrize(
    "asked", ["--help", "--foo", "stage=sft trainer.learning_rat=1", "stage=ppo --cfg job", *ABSENT]
)
def test_refusals_and_help_load_no_torch(asked: str, workplace: Path) -> None:
    (workplace / "here.txt").write_text("x")
    code = (
        "import sys; sys.argv = ['rlhf_pipeline', *sys.argv[1:]]\n"
        "from rlhf_pipeline.__main__ import start\n"
        "try: start()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'trl', 'tqdm', *(['hydra'] if '--help' in sys.argv else [])} & {*sys.modules} or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code, *asked.split()], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("none"), done.stdout + done.stderr
    assert ABSENT.get(asked, "") in done.stderr


def test_help_may_be_asked_for_anywhere_but_in_a_prompt() -> None:
    assert asks_for_help(["stage=chat", "-h"])
    assert not asks_for_help(["stage=chat", "--prompt", "--help"])


def test_settings_come_before_options_and_an_own_choice_leaves_the_demos_experiment() -> None:
    for typed, read in {
        "stage=sft policy=gpt2": "stage=sft policy=gpt2 ~experiment",
        "stage=sft policy=gpt2 experiment=demo": "stage=sft policy=gpt2 experiment=demo",
        "--cfg job stage=sft policy=gpt2": "stage=sft policy=gpt2 ~experiment --cfg job",
        "--cfg job stage=sft -m seed=1": "stage=sft seed=1 --cfg job",
        "stage=sft trainer.max_steps=3": "stage=sft ++trainer.max_steps=3",
        "stage=chat --cfg job --prompt x": "stage=chat ++chat.prompt=['x'] --cfg job",
    }.items():
        assert " ".join(read_words(*typed.split())) == read


TEXTS = (
    "it's", 'say "x"', "a,b", "{a: b}", "$x ${name} \\${name} \\\\${x}", "a\nb", "你好，“吗”？", "\\", "a\\'", "[1]",
    "null", "5", " =x ", "${", "}\\${'\\", "--prompt", "stage=sft", "a=1,2",
)  # fmt: skip


SIGNS = (
    "情感", "a=b", "reviews (1)", "[1]", "{a}", "a,b", "a:b", "it's", 'say "x"', "#1", "$HOME", "${name}", "5%", "a\\b",
    " a ", "a  b", "'x'", "~x", "+x", "-x", "@x", "a;b", "\\", "choice(a,b)", "[a,b]", "?", "*", "true", "7", "null",
)  # fmt: skip


def test_a_path_that_is_there_is_what_the_shell_handed_over(workplace: Path) -> None:
    for text in SIGNS:
        Path(text).touch()
        asked = settings_of("stage=sft", "data=text", f"data.path={text}", f"policy.path={text}", f"name={text}")
        assert [asked.data["path"], asked.policy["path"], asked.name] == [text] * 3
        value = read_words(f"data.path={text}")[0].partition("=")[2]
        for key in ("labels", "against", "stages.chat.policy.path", "evaluate.policies", "-m stage=sft data.path"):
            *more, name = key.split()
            assert read_words(*more, f"{name}={text}")[len(more[1:])].partition("=")[2] == value
    for text in ("情感 (1)", "it's", 'say "x"', "[1]", "{a}", "$HOME", "a\\b", "null"):  # of a list
        assert settings_of("stage=evaluate", f"compare=[{text},b, {text}]").compare == [text, "b", text]


def test_a_path_that_is_not_there_keeps_its_signs_too(workplace: Path) -> None:
    for text in SIGNS:
        if text not in ("[1]", "${name}", "'x'", "[a,b]", "null"):  # lists, interpolations, quotes and null stay such
            assert settings_of("stage=sft", f"name={text}").name == text
    assert settings_of("stage=sft", "name='x (1)'").name == "x (1)"  # quoted for Hydra, as one had to before
    assert settings_of("stage=sft", "name=${experiment}-2", "experiment=demo").name == "demo-2"
    assert settings_of("stage=sft", "data=text", "data.path=x", "policy.path=null").policy["path"] is None


def test_lists_of_paths_and_sweeps_keep_their_meaning(workplace: Path) -> None:
    given = ("stage=reward", "reward=preference_model", "data=preferences")
    assert settings_of(*given, "data.path=[a.jsonl,评论 (1).jsonl]").data["path"] == ["a.jsonl", "评论 (1).jsonl"]
    assert settings_of(*given, "data.path=['c,d.jsonl',e]").data["path"] == ["c,d.jsonl", "e"]
    assert settings_of("stage=evaluate", "compare=[]").compare == []
    for paths in ("a,情感", "choice(a,b)"):
        word = read_words("-m", "stage=ppo", f"policy.path={paths}")[1]
        swept = OverridesParser.create().parse_override(word).sweep_iterator()
        assert len([*swept]) == 2
    Path("[a.jsonl,b.jsonl]").touch()
    assert settings_of(*given, "data.path=[a.jsonl,b.jsonl]").data["path"] == "[a.jsonl,b.jsonl]"


def test_values_may_be_of_any_language() -> None:
    parts = "[{name: classifier, path: runs/情感 (1)/reward}, {name: keywords, words: [好]}]"
    assert settings_of("stage=evaluate", "reward=sum", f"reward.parts={parts}").reward["parts"] == [
        {"name": "classifier", "path": "runs/情感 (1)/reward"},
        {"name": "keywords", "words": ["好"]},
    ]
    assert settings_of("stage=reward", "reward=sum", f"reward.parts={parts}").reward["path"] == "runs/情感 (1)/reward"
    assert settings_of("stage=ppo", "reward=keywords", "reward.words=[好]").reward["words"] == ["好"]
    assert settings_of("stage=sft", "trainer.run_name=好 (1)").trainer["run_name"] == "好 (1)"


@pytest.mark.parametrize("typed", ["data.labels={正面: 1, 负面: 0}", "data.labels={it's good: 1, so-so (bad): 0}"])
def test_labels_of_other_letters_are_shown_as_they_were_typed(typed: str) -> None:
    assert [as_user_types(word) for word in read_words("stage=reward", typed)][-1] == typed


def test_a_prompt_reaches_the_chat_as_it_was_typed() -> None:
    every = [word for text in TEXTS for word in ("--prompt", text)]
    assert settings_of("stage=chat", *every).chat.prompt == list(TEXTS)
    assert read_words(*every) == read_words(*(f"--prompt={text}" for text in TEXTS))


def test_a_stages_own_word_goes_over_a_general_one_and_that_over_the_experiment() -> None:
    for stage, limit in (("sft", 5), ("reward", 9)):
        assert settings_of(f"stage={stage}", "data.limit=9", "stages.sft.data.limit=5").data["limit"] == limit
    asked = ("stage=reward", "experiment=chinese_dialog_from_scratch", "data.path=a.jsonl", "data.limit=9")
    for own, data in (
        ("stages.reward.data.path=b.csv", {"name": "sentiment", "path": "b.csv", "limit": 9}),
        ("data=preferences", {"name": "preferences", "path": "a.jsonl", "limit": 9}),
    ):
        assert settings_of(*asked, own).data == data


def test_what_one_process_must_do_is_refused_to_several(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for asked in ("stage=chat", "stage=plan", "stage=collect labels=pull", "stage=evaluate compare=[a,b]"):
        assert "runs in one process" in refused(asked)
    assert "a sweep starts one process per job" in refused("-m stage=ppo seed=0,1")


@pytest.mark.parametrize(("size", "rate", "warmup"), [("small", 5e-4, 1000), ("tiny", 1e-3, 0.05)])
def test_code_gpt_is_trained_as_the_course_does_unless_it_is_small(
    size: str, rate: float, warmup: float, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("experiment=code_gpt", f"policy.size={size}")
    own = settings_of("stage=pretrain", *asked, "seed=7").trainer
    assert command_line("stage=pipeline", *asked, "--cfg", "job") == 0
    for trainer in (own, yaml.safe_load(capsys.readouterr().out)["stages"]["pretrain"]["trainer"]):
        assert (trainer["learning_rate"], trainer["warmup_steps"]) == (rate, warmup)
    assert settings_of("stage=pretrain", *asked, "trainer.warmup_steps=7").trainer["warmup_steps"] == 7


def test_every_group_file_names_an_entry_of_its_registry() -> None:
    from rlhf_pipeline import data
    from rlhf_pipeline.models import policies, rewards

    for kind, registry in (("policy", policies.registry), ("reward", rewards.registry), ("data", data.registry)):
        files = {path.stem for path in (CONF / kind).glob("*.yaml")}
        assert files == set(registry.entries), kind


def test_one_name_in_all_places() -> None:
    files = (ROOT / "rlhf_pipeline" / "stages").glob("[a-z]*.py")
    stages = {path.stem for path in files if "\ndef run(settings: Settings, out: RunDir)" in path.read_text()}
    assert stages | {"pipeline"} == {path.stem for path in (CONF / "stage").glob("*.yaml")}
    assert stages | {"pipeline"} == set(STAGES)
    make = ["make", "--dry-run", "--always-make", *stages, "pipeline"]
    made = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {stage for stage in STAGES if f"-m rlhf_pipeline stage={stage} " in made} == set(STAGES)
    for readme in ("README.md", "README.zh-CN.md"):
        assert all(f"stage={stage}" in (ROOT / readme).read_text() for stage in stages), readme
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for stage in STAGES:
        assert re.search(rf"^  make {stage} +\w.{{20}}", shown, re.MULTILINE), stage


def test_make_takes_what_was_typed_whatever_signs_it_holds() -> None:
    name = '情感 (1) it\'s "a"=b #c $d %e \\ [f] {g},h'
    targets = ["label-studio", "report", "pipeline", f"NAME={name}", "ARGS='data.path=a $b (1).csv'"]
    make = ["make", "--no-print-directory", "--dry-run", "--always-make", *targets]
    made = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = [word for line in made.splitlines() if "rlhf_pipeline" in line for word in shlex.split(line)]
    assert (words.count(f"name={name}"), words.count(f"runs/{name}")) == (2, 1)
    assert words.count("data.path=a $b (1).csv") == 3


def test_the_fields_of_trls_configs_are_found_without_importing_them() -> None:
    from trl import RewardConfig, SFTConfig

    from rlhf_pipeline.ppo import PPOConfig

    for stage, config in (("sft", SFTConfig), ("reward", RewardConfig), ("ppo", PPOConfig)):
        declared = {name for name, field in config.__dataclass_fields__.items() if field.init}
        assert declared - set(trainer_fields(stage)) == set()


def test_runs_are_compared_by_name_or_folder(
    command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("runs/a/sft", "elsewhere/b"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "run.json").write_text(f'{{"stage": "sft", "results": {{"eval_loss": {len(folder)}.25}}}}')
    assert command_line("stage=evaluate", "name=both", "compare=[a,elsewhere/b]", "report.lang=zh") == 0
    assert "runs/both/compare.html shows the runs" in capsys.readouterr().out
    page = Path("runs/both/compare.html").read_text(encoding="utf-8")
    assert "<td>10.25</td>" in page
    assert "<td>11.25</td>" in page
    assert "留出集损失" in page
    assert sorted(path.name for path in Path("runs/both").iterdir()) == ["compare.html"]


WINDOWS = """
import os, runpy, sys
sys.modules["fcntl"] = sys.modules["readline"] = None
del os.register_at_fork, os.fork
runpy.run_module("rlhf_pipeline", run_name="__main__")
"""


def test_without_posix_what_needs_none_runs_and_the_rest_says_so_in_one_line(workplace: Path) -> None:
    """Windows' Python has none of the three; that is all of Windows that is tried here."""

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        code = ["-W", "ignore:only soft file lock", "-c", WINDOWS]
        return subprocess.run([sys.executable, *code, *args], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip

    shown = call("stage=ppo", "--cfg", "job")
    assert (shown.returncode, shown.stderr) == (0, "")
    folder = workplace / "runs" / "demo" / "collect"
    folder.mkdir(parents=True)
    for name in ("tasks.json", "candidates.jsonl"):
        (folder / name).write_text("[]")
    (folder / "run.json").write_text('{"stage": "collect", "status": "waiting"}')
    served = call("stage=collect", "labels=serve")
    assert served.returncode == 2
    assert served.stderr.startswith("error: there is no .venv-label-studio/bin/label-studio; install Label Studio")
    assert served.stderr.count("\n") == 1

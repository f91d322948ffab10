"""Rounds of human feedback in miniature: collect, label, reward, PPO, and again; with a labeler and with people."""

import contextlib
import csv
import html
import io
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import CommandLine, Refused, jsonl

from rlhf_pipeline.data import load_data
from rlhf_pipeline.data.records import Turn
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.report.rounds import by_round, write_rounds
from rlhf_pipeline.runs.lineage import content_hash
from rlhf_pipeline.texts import words_of

SMALL = (
    "experiment=human_feedback",
    "data.limit=300",
    "policy.vocabulary=400",
    "collect.prompts=12",
    "collect.batch_size=5",
    "evaluate.prompts=16",
    "++stages.pretrain.trainer.num_train_epochs=1",
    "++stages.sft.data.limit=200",
    "++stages.reward.trainer.num_train_epochs=1",
    "++stages.ppo.trainer.total_episodes=32",
    "++stages.ppo.trainer.per_device_train_batch_size=8",
    "++stages.ppo.trainer.gradient_accumulation_steps=1",
    "++stages.ppo.trainer.response_length=8",
)
SOURCES = ("collect.policies=[pretrain,sft]", "collect.temperatures=[0.7,1]")
LABELER = ("labeler=length", "labeler.target=5", "labeler.noise=0.5")


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """The folder of a finished run of two rounds with a labeler, the second added later. Tests read it, or copy it."""
    folder = tmp_path_factory.mktemp("two_rounds")
    run = folder / "runs" / "human_feedback"
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
        assert command_line("stage=pipeline", *SMALL, "rounds=1", *LABELER) == 0
        first = content_hash(run / "round1")
        said.truncate(0)
        assert command_line("stage=pipeline", *SMALL, "rounds=2", *LABELER) == 0
    assert content_hash(run / "round1") == first
    assert "round2: ppo" in said.getvalue()
    assert said.getvalue().count("by round; reward: length") == 1, "nothing is new of the first"
    return run


@pytest.fixture
def with_people(two_rounds: Path, workplace: Path) -> Path:
    """A run with an SFT policy and nothing after it, in the current folder."""
    run = workplace / "runs" / "human_feedback"
    for stage in ("pretrain", "sft"):
        shutil.copytree(two_rounds / stage, run / stage)
    return run


@pytest.fixture(scope="module")
def collection(two_rounds: Path, tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """A run that waits for people to label its candidates. Tests take it as `asked`."""
    folder = tmp_path_factory.mktemp("collection")
    for stage in ("pretrain", "sft"):
        shutil.copytree(two_rounds / stage, folder / "runs" / "human_feedback" / stage)
    with contextlib.chdir(folder):
        assert command_line("stage=collect", *SMALL, *SOURCES) == 0
    return folder / "runs" / "human_feedback"


@pytest.fixture
def asked(collection: Path, workplace: Path) -> Path:
    """The folder of a collection, in the current folder."""
    return Path(shutil.copytree(collection, workplace / "runs" / "human_feedback")) / "collect"


@pytest.fixture
def label(command_line: CommandLine) -> Callable[..., int]:
    """Bring a file of labels in."""
    return lambda file, *more: command_line("stage=collect", "name=human_feedback", f"labels={file}", *more)


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def evaluated(folder: Path) -> dict:
    return json.loads((folder / "evaluate" / "evaluation.json").read_text())


def test_each_round_is_a_folder_made_from_the_one_before(two_rounds: Path) -> None:
    first, second = two_rounds / "round1", two_rounds / "round2"
    parents = {f"{r.name}/{s}": record(r / s)["parents"] for r in (first, second) for s in ("collect", "reward", "ppo")}
    sft, ppo = "runs/human_feedback/sft/model", "runs/human_feedback/round1/ppo/model"
    assert parents["round1/collect"]["policy"]["path"] == sft
    assert parents["round2/collect"]["policy"] == {"path": ppo, "sha256": content_hash(first / "ppo" / "model")}
    assert parents["round1/ppo"]["policy"]["path"] == parents["round2/ppo"]["policy"]["path"] == sft
    assert parents["round2/ppo"]["reward"]["path"] == "runs/human_feedback/round2/reward/model"
    assert parents["round1/reward"]["labels"]["path"] == "runs/human_feedback/round1/collect/labels.jsonl"
    labels = {key: value["path"] for key, value in parents["round2/reward"].items() if key.startswith("labels")}
    assert labels == {
        "labels": "runs/human_feedback/round2/collect/labels.jsonl",
        "labels[1]": "runs/human_feedback/round1/collect/labels.jsonl",
    }
    counts = [json.loads((r / "reward" / "labels.json").read_text())["judgements"] for r in (first, second)]
    assert counts == [12, 24]
    rows = load_data({"name": "toy_reviews", "limit": 300}, 0).train
    asked = [{row["prompt"] for row in read_jsonl(r / "collect" / "candidates.jsonl")} for r in (first, second)]
    assert len(asked[0]) == len(asked[1]) == 12
    assert not asked[0] & asked[1], "each round asks other prompts"
    assert all(any(row.text.startswith(prompt) for row in rows) for prompt in asked[0] | asked[1])
    assert evaluated(second)["reward"] == "length", "what labels also judges the policies"
    assert list(evaluated(second)["metrics"]) == ["base", "sft", "ppo"]


def test_a_labelers_ranks_follow_its_scores_but_for_its_noise(two_rounds: Path) -> None:
    right = []
    for row in read_jsonl(two_rounds / "round1" / "collect" / "labels.jsonl"):
        assert row["annotator"] == "length"
        assert row["scores"] == [-abs(len(words_of(response)) - 5) / 5 for response in row["responses"]]
        both = list(zip(row["ranks"], row["scores"], strict=True))
        right += [a[1] > b[1] for a in both for b in both if a[0] < b[0] and a[1] != b[1]]
    assert 0.55 < sum(right) / len(right) < 1


def test_the_run_that_has_rounds_compares_what_each_made(
    two_rounds: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(two_rounds, workplace / "runs" / "human_feedback"))
    small = [arg for arg in SMALL if "stages" not in arg]
    assert command_line("stage=evaluate", *small, "evaluate.rewards=[{name: preference_model}]") == 2  # judged by it
    more = (*small, *LABELER, "evaluate.rewards=[{name: preference_model}]")
    assert command_line("stage=evaluate", *more) == 0
    evaluation = evaluated(run)
    assert list(evaluation["metrics"]) == ["base", "sft", "round1", "round2"]
    assert evaluation["reference"] == "sft"
    assert evaluation["reward"] == "length"
    assert evaluation["rewards"]["preference_model"]["reward"] == "runs/human_feedback/round2/reward/model"
    assert evaluation["metrics"]["round2"] == evaluated(run / "round2")["metrics"]["ppo"]

    assert command_line("stage=evaluate", *more) == 0
    assert "is done already" in capsys.readouterr().out
    shutil.copytree(run / "round2" / "ppo", run / "round3" / "ppo")
    newer = {**record(run / "round3" / "ppo"), "name": "human_feedback/round3", "finished": "2999-01-01T00:00:00+00:00"}
    (run / "round3" / "ppo" / "run.json").write_text(json.dumps(newer))
    assert command_line("stage=evaluate", *more) == 2
    assert "round3/ppo has been made since" in capsys.readouterr().err


def test_the_report_shows_reward_model_and_policy_by_round(two_rounds: Path) -> None:
    rows = json.loads((two_rounds / "rounds.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        folder = two_rounds / f"round{row['round']}"
        assert row["reward_mean"] == evaluated(folder)["metrics"]["ppo"]["reward_mean"]
        assert row["reward_accuracy"] == record(folder / "reward")["results"]["accuracy"]
        assert row["labelled"] == 12
        assert row["reward_pairs"] == record(folder / "reward")["results"]["pairs"]  # an accuracy of how many
    assert rows[0]["reward_mean"] == evaluated(two_rounds / "round2")["metrics"]["sft"]["reward_mean"]
    page = (two_rounds / "report.html").read_text()
    assert f"{rows[2]['reward_mean']:.4g}" in page
    assert "Reward: length, on the same held-out prompts." in page
    assert "<svg" in page


def test_the_report_shows_what_is_there(two_rounds: Path, workplace: Path) -> None:
    runs = workplace / "runs"
    run = Path(shutil.copytree(two_rounds, runs / "mine"))
    (run / "round2" / "evaluate" / "evaluation.json").write_text("{")
    assert [row["round"] for row in by_round(runs, "mine")] == [0, 1, 2]
    shutil.copytree(run / "round2", run / "round4")
    shutil.rmtree(run / "round2")
    (run / "round3").mkdir()
    assert [row["round"] for row in by_round(runs, "mine")] == [0, 1, 4]
    page = write_rounds(runs, "mine").read_text()
    assert "round4/reward/report.html" in page
    assert "round2/" not in page
    shutil.rmtree(run / "round1")
    assert "round4/reward/report.html" in write_rounds(runs, "mine").read_text()


def test_where_each_round_has_its_own_judge_one_can_judge_all(
    two_rounds: Path, workplace: Path, command_line: CommandLine
) -> None:
    run = Path(shutil.copytree(two_rounds, workplace / "runs" / "human_feedback"))
    for number in (1, 2):
        judge = f"runs/human_feedback/round{number}/reward/model"
        own = json.dumps({**evaluated(run / f"round{number}"), "reward": judge})
        (run / f"round{number}" / "evaluate" / "evaluation.json").write_text(own)
    page = html.unescape(write_rounds(Path("runs"), "human_feedback").read_text())
    assert "compare rewards only within a round" in page
    words = page.partition("To judge all rounds with the newest reward model: ")[2].partition("</p>")[0]
    small = [arg for arg in SMALL if "stages" not in arg and "experiment" not in arg]
    assert "policy: reward on held-out prompts" not in page
    assert command_line(*shlex.split(words)[3:], *small) == 0
    page = html.unescape((run / "report.html").read_text())
    evaluation = evaluated(run)
    assert "Common judge: runs/human_feedback/round2/reward/model." in page
    assert "policy: reward on held-out prompts" in page
    for name in ("sft", "round1", "round2"):
        assert f"<td>{evaluation['metrics'][name]['reward_mean']:.4g}</td>" in page
    chinese = write_rounds(workplace / "runs", "human_feedback", "zh").read_text()
    assert "每一轮由该轮的奖励模型评判" in chinese
    assert "held-out prompts" not in chinese


def fill_in(sheet: Path, ranks: list[str], first: int = 1, end: int | None = None) -> Path:
    """Give the rows from `first`, up to but not `end`, of a sheet the same ranks, as a person in a spreadsheet."""
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.reader(file))
    at = table[0].index("rank1")
    for row in table[first:end]:
        row[at : at + len(ranks)] = ranks
    with sheet.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(table)
    return sheet


def test_a_pipeline_waits_for_people_and_goes_on_from_there(
    with_people: Path, command_line: CommandLine, label: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("stage=pipeline", *SMALL, "collect.enough=0.75") == 2
    said = capsys.readouterr()
    assert "0 of 12 labelled; run again when done" in said.err
    assert "error" not in said.err.lower()
    assert "make label-studio NAME=human_feedback/round1" in said.out
    assert "collect  0 of 12 labelled\n" in said.out
    in_a_sheet = said.out.rpartition("then: ")[2].strip()
    collect = with_people / "round1" / "collect"
    assert record(collect)["status"] == "waiting"
    candidates = (collect / "candidates.jsonl").read_bytes()

    fill_in(collect / "sheet.csv", ["2", "1", "3", "3"], end=6)
    assert command_line("stage=pipeline", *SMALL, "collect.enough=0.75") == 2
    said = capsys.readouterr()
    assert "sheet.csv has been filled in but not read yet; read it with labels=" in said.out
    assert said.err.endswith("0 of 12 labelled; run again when done.\n")
    assert command_line(*shlex.split(in_a_sheet)[3:]) == 0
    assert "5 of 12 labelled" in capsys.readouterr().out
    assert command_line("stage=pipeline", *SMALL, "collect.enough=0.75") == 2
    said = capsys.readouterr()
    assert said.err.endswith(
        "5 of 12 labelled; run again when done, or add collect.enough=0.416 to continue with these.\n"
    )
    assert "has been filled in" not in said.out

    fill_in(collect / "sheet.csv", ["2", "1", "3", "3"], end=10)
    assert label(collect / "sheet.csv") == 0
    assert command_line("stage=pipeline", *SMALL, "collect.enough=0.75") == 0
    assert (collect / "candidates.jsonl").read_bytes() == candidates
    learnt = json.loads((with_people / "round1" / "reward" / "labels.json").read_text())
    assert (learnt["judgements"], learnt["pairs"]) == (9, 45)  # of six pairs a prompt, one is a tie
    assert record(with_people / "round1" / "evaluate")["status"] == "done"


def label_some(collect: Path, sheet: Path, ranks: str, first: int = 1, end: int | None = None) -> Path:
    """A person's copy of the sheet with some of its rows filled in."""
    sheet.parent.mkdir(exist_ok=True)
    return fill_in(Path(shutil.copy(collect / "sheet.csv", sheet)), [*ranks], first, end)


def test_a_label_means_the_answer_that_was_sampled_and_is_never_overwritten(
    asked: Path, command_line: CommandLine, label: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(fill_in(asked / "sheet.csv", ["4", "1", "2", "3"])) == 0
    candidates = {row["task"]: row for row in read_jsonl(asked / "candidates.jsonl")}
    labels = read_jsonl(asked / "labels.jsonl")
    assert len(labels) == 12
    for row in labels:
        assert row["responses"] == [answer["text"] for answer in candidates[row["task"]]["answers"]]
        assert row["ranks"] == [4, 1, 2, 3]
        assert row["annotator"] == "sheet"
    tasks = json.loads((asked / "tasks.json").read_text())
    assert "policy" not in json.dumps(tasks[0])  # who labels does not see who said what
    assert tasks[0]["data"]["items"][1]["body"] == candidates[tasks[0]["data"]["task"]]["answers"][1]["text"]
    assert command_line("stage=collect", *SMALL, "collect.answers=3", "overwrite=true") == 2
    assert "holds labels by people" in capsys.readouterr().err
    assert read_jsonl(asked / "labels.jsonl") == labels


def test_sheets_of_one_name_are_two_annotators_and_one_sheet_twice_is_one(
    asked: Path, workplace: Path, label: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for who, ranks, first, end in (("anna", "1234", 1, 8), ("bo", "1243", 5, 13), ("anna", "1234", 1, 7)):
        capsys.readouterr()
        assert label(label_some(asked, workplace / who / "sheet.csv", ranks, first, end)) == 0
    people = [(row["annotator"], Path(row["source"]).parent.name) for row in read_jsonl(asked / "labels.jsonl")]
    assert people.count(("sheet", "anna")) == 6, "she has taken one back"
    assert people.count(("bo/sheet", "bo")) == 8
    assert "2 annotators agree on 83.3% of pairs" in capsys.readouterr().out  # all but one pair of six
    assert (record(asked)["results"]["labelled"], record(asked)["results"]["contradictions"]) == (12, 2)


def test_a_labeler_leaves_peoples_labels_alone(
    with_people: Path, command_line: CommandLine, label: Callable[..., int]
) -> None:
    assert command_line("stage=collect", *SMALL, *LABELER) == 0
    collect, home = with_people / "collect", with_people.parent.parent
    assert label(label_some(collect, home / "mine.csv", "1234")) == 0
    before = (collect / "labels.jsonl").read_bytes()
    assert label("typo.csv") == 2
    assert record(collect)["status"] == "done"  # a wrong file spoils nothing
    (collect / "run.json").write_text(json.dumps({**record(collect), "status": "waiting"}))
    assert command_line("stage=collect", *SMALL, *LABELER) == 0
    assert sorted((collect / "labels.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())
    assert command_line("stage=collect", *SMALL, "labeler=length", "overwrite=true") == 2


def test_a_sheet_that_was_begun_is_not_overwritten(
    asked: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("stage=collect", *SMALL, "collect.answers=3", "overwrite=true") == 0  # nobody has begun
    fill_in(asked / "sheet.csv", ["1", "2", "3"], end=2)
    assert command_line("stage=collect", *SMALL, "overwrite=true") == 2
    assert "sheet.csv has been filled in" in capsys.readouterr().err


def test_overwriting_a_pipeline_keeps_what_people_labelled(
    with_people: Path, command_line: CommandLine, label: Callable[..., int]
) -> None:
    assert command_line("stage=collect", *SMALL, "name=human_feedback/round1") == 0
    collect = with_people / "round1" / "collect"
    assert label(fill_in(collect / "sheet.csv", ["1", "2", "3", "4"])) == 0
    before = content_hash(collect)
    assert command_line("stage=reward", *SMALL, "name=human_feedback/round1") == 0
    assert label(label_some(collect, with_people / "second.csv", "1234", 1, 3)) == 0
    assert content_hash(collect) != before
    assert command_line("stage=reward", *SMALL, "name=human_feedback/round1") == 2  # its labels have changed
    after = content_hash(collect)
    assert command_line("stage=collect", *SMALL, "name=human_feedback/round1", "overwrite=true") == 0
    assert command_line("stage=reward", *SMALL, "name=human_feedback/round1", "overwrite=true") == 0
    assert content_hash(collect) == after


def test_a_policy_of_ones_own_is_asked_first_and_what_it_became_after(
    two_rounds: Path, with_people: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    own = with_people.rename(workplace / "own")
    others = [f"~stages.{stage}" for stage in ("pretrain", "sft", "reward", "ppo", "evaluate")]
    small = [word for word in SMALL if not word.startswith("++stages")]
    given = (*small, *others, f"policy.path={own / 'sft'}", "collect.response_length=8", "rounds=2", *LABELER)
    assert command_line("stage=pipeline", *given, "collect.policies=[sft,ppo]") == 2
    assert "has made no policy sft" in capsys.readouterr().err
    shutil.rmtree(workplace / "runs")
    shutil.copytree(two_rounds / "round1" / "ppo", workplace / "runs/human_feedback/round1/ppo")
    assert command_line("stage=pipeline", *given) == 0
    asked = [record(workplace / f"runs/human_feedback/round{n}/collect")["parents"]["policy"]["path"] for n in (1, 2)]
    assert asked == [str(own / "sft" / "model"), "runs/human_feedback/round1/ppo/model"]


def test_in_the_first_round_sft_answers_in_the_place_of_ppo_and_another_runs_policy_never(
    with_people: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, message in (
        ("mine/round1", "no policy to answer yet"),
        ("human_feedback/round2", "round1 has made no policy ppo"),
    ):
        assert command_line("stage=collect", *SMALL, f"name={name}") == 2
        assert message in capsys.readouterr().err
    assert command_line("stage=collect", *SMALL, "name=human_feedback/round1", "collect.policies=[ppo]") == 0
    assert "from round 2 on" in capsys.readouterr().out
    parents = record(with_people / "round1" / "collect")["parents"]
    assert parents["policy"]["path"] == "runs/human_feedback/sft/model"


def test_a_task_is_through_when_all_annotators_have_labelled_or_skipped_it(
    asked: Path, workplace: Path, label: Callable[..., int]
) -> None:
    assert label(label_some(asked, workplace / "anna.csv", "1234"), "collect.annotators=2") == 0
    assert record(asked)["results"]["labelled"] == 0
    tasks = [row["task"] for row in read_jsonl(asked / "candidates.jsonl")]
    skips = [{"task": task, "annotator": "bo", "source": "there"} for task in tasks[:2]]
    jsonl(asked / "skipped.jsonl", *skips)
    assert label(label_some(asked, workplace / "bo.csv", "2134", 3, 6)) == 0
    results = record(asked)["results"]
    assert (results["labelled"], results["skipped"], record(asked)["status"]) == (5, 0, "waiting")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.prompt_tokens=[60,62]", "no prompt leaves room for an answer"),
        ("collect.temperatures=[0.000001]", "none of 12 prompts got two different answers"),
    ],
)
def test_a_collection_of_nothing_is_refused(
    with_people: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert command_line("stage=collect", *SMALL, setting) == 2
    assert message in capsys.readouterr().err
    assert not (with_people / "collect" / "candidates.part.jsonl").exists()


def test_labels_of_other_candidates_are_set_aside(
    asked: Path, workplace: Path, label: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"task": row["task"], "prompt": row["prompt"], "responses": [a["text"] for a in row["answers"]],
             "ranks": [1, 2, 3, 4]} for row in read_jsonl(asked / "candidates.jsonl")]  # fmt: skip
    rows[3]["task"] = "t0"
    rows[4]["responses"] = ["another", "task's", "answers", "these"]
    assert label(jsonl(workplace / "mine.jsonl", *rows)) == 0
    assert "10 of 12 labelled" in capsys.readouterr().out
    whys = {row["task"]: row["why"] for row in read_jsonl(asked / "rejected.jsonl")}
    assert whys == {
        "t0": "no candidate of this run has that task",
        rows[4]["task"]: "its answers are not those of the task",
    }
    assert label(jsonl(workplace / "none.jsonl", {**rows[0], "task": "t1"})) == 2
    assert "labels none of the tasks" in capsys.readouterr().err
    assert len(read_jsonl(asked / "labels.jsonl")) == 10


def test_a_collection_that_was_cut_off_goes_on_to_the_same_candidates(
    collection: Path, with_people: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_pipeline.feedback import candidates

    collect = with_people / "collect"
    draw = candidates.Asker._draw

    def die_later(*args: object) -> list[str]:
        if read_jsonl(collect / "candidates.part.jsonl"):  # the first batch is done
            raise KeyboardInterrupt
        return draw(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(candidates.Asker, "_draw", die_later)
    assert command_line("stage=collect", *SMALL, *SOURCES) == 130
    assert 0 < len(read_jsonl(collect / "candidates.part.jsonl")) < 12
    monkeypatch.undo()
    os.chdir(with_people.parent.parent)
    assert command_line("stage=collect", *SMALL, *SOURCES) == 0
    assert (collect / "candidates.jsonl").read_bytes() == (collection / "collect" / "candidates.jsonl").read_bytes()
    assert not (collect / "candidates.part.jsonl").exists()
    answers = [answer for row in read_jsonl(collect / "candidates.jsonl") for answer in row["answers"]]
    sources = {(Path(answer["policy"]).parent.name, answer["temperature"]) for answer in answers}
    assert sources == {("pretrain", 0.7), ("sft", 0.7), ("pretrain", 1), ("sft", 1)}
    config = yaml.safe_load((collect / "config.yaml").read_text())
    assert config["collect"]["response_length"] == 8  # as this experiment's PPO will


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("stage=pipeline experiment=demo rounds=2", "but this experiment has no collect"),
        ("stage=collect labels=pull", "run stage=collect without labels= first"),
        ("stage=sft labels=pull", "labels=pull is only for stage=collect"),
        ("stage=collect", "there is no policy to answer yet"),
        ("stage=collect collect.policies=[reward]", "has made no policy reward"),
        ("stage=collect labeler.noise=1", "labeler has fields but no name; add labeler=<reward>."),
        ("stage=collect labeler=classifier", "labeler=classifier has no model yet"),
        ("stage=collect collect.policies=[ppo]", "has made no policy ppo"),
        ("stage=collect collect.answers=1", "collect.answers is 1; it takes a whole number of at least 2"),
        ("stage=collect collect.temperatures=[0]", "above 0"),
        ("stage=collect labeler=toy_sentiment labeler.noise=-1", "labeler.noise is -1"),
        ("stage=collect labeler=keyword", "Did you mean 'keywords'"),
        ("stage=collect labeler=toy_sentiment labeler.words=[a]",
         "labeler=toy_sentiment: there is no setting 'labeler.words'"),
        ("stage=reward reward=preference_model", "preference_model does not learn from them"),
        ("stage=reward reward=preference_model data=preferences", "the labels of this run's stage=collect"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(refused: Refused, asked: str, message: str) -> None:
    assert message in refused(asked)


def test_conversations_stay_turns_from_prompt_to_reward_model(workplace: Path, command_line: CommandLine) -> None:
    rows = [{"instruction": f"Name {n} things that are {w}.", "output": f"{w} sky, {w} sea."}
            for n in range(2, 12) for w in ("blue", "red", "old", "new")]  # fmt: skip
    jsonl(workplace / "asked.jsonl", *rows)
    own = ("name=talk", "experiment=null", "policy.size=tiny", "policy.vocabulary=300", "policy.positions=96",
           "data=instructions", "data.path=asked.jsonl", "reward=preference_model")  # fmt: skip
    assert command_line("stage=sft", *own, "trainer.per_device_train_batch_size=4") == 0
    collect = ("collect.prompts=8", "collect.response_length=12", "collect.min_new_tokens=2")
    assert command_line("stage=collect", *own, *collect, "labeler=length", "labeler.target=4") == 0
    folder = workplace / "runs" / "talk"
    candidates = read_jsonl(folder / "collect" / "candidates.jsonl")
    for row in candidates:
        (turn,) = row["prompt"]
        assert turn["role"] == "user"
        assert turn["content"].startswith("Name ")
        assert turn["content"] in row["shown_prompt"] != turn["content"]  # in the words of the policy's template
    tasks = json.loads((folder / "collect" / "tasks.json").read_text())
    assert [task["data"]["prompt"] for task in tasks] == [row["prompt"][0]["content"] for row in candidates]
    assert (
        command_line("stage=reward", *own, "trainer.num_train_epochs=1", "trainer.per_device_train_batch_size=4") == 0
    )
    assert record(folder / "reward")["parents"]["labels"]["path"] == "runs/talk/collect/labels.jsonl"
    learnt = load_data({"name": "preferences", "path": str(folder / "collect" / "labels.jsonl")}, 0)
    assert {row.prompt[0] for row in learnt.train} <= {Turn("user", row["prompt"][0]["content"]) for row in candidates}

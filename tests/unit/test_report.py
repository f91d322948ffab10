"""The report is a plain page of the numbers in the files, and text in the files never becomes markup."""

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report import rounds
from rlhf_pipeline.report import words as page_words
from rlhf_pipeline.report.__main__ import main
from rlhf_pipeline.report.compare import write_comparison
from rlhf_pipeline.report.stage import write_report

NASTY = (
    "<script>alert(1)</script> \" ' onload=x <img src=https://evil.example/x.png onerror=alert(2)>"
    " \u202eabc\u2066 \x1b[2J\x9b\r\u200b"
)


class Page(HTMLParser):
    """Collects what a browser would make of the page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def build(folder: Path, word: str = "plain") -> Path:
    """A stage with every file, whose words are all the given one."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "stage": word, "name": word, "experiment": word, "status": word, "seed": 7, "command": f"python -m x {word}",
        "started": word, "finished": None, "seconds": 12.3, "git": {"commit": word, "dirty": True},
        "parents": {word: {"path": word, "sha256": "ab12cd"}}, "data": {"name": word, "fingerprint": "f00d"},
        "versions": {"trl": "1.12.0", word: word}, "hardware": {"cpu": word, "cores": 2, "gpu": None},
        "results": {"reward_mean": 0.9137, word: word, "steps": 250000, "nested": {"kl": 0.0421}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    rows = [{"step": i * 10, "loss": 3 - i / 7, word: i / 3, "flat": 1, "note": word} for i in range(5)]
    (folder / "metrics.jsonl").write_text(lines(*rows, {"step": 40, "eval_loss": 2.625}))
    said = [{"step": i, "prompt": word, "response": f"{word} answer{i};", "reward": i / 8} for i in range(60)]
    (folder / "samples.jsonl").write_text(lines(*said))
    judged = {"prompt": word, "responses": {"base": "", word: word}, "rewards": {"base": None, word: 0.8125}}
    metrics = {"base": {"reward_mean": 0.1234}, word: {"reward_mean": 0.5678, word: None}}
    evaluation = {"metrics": metrics, "paired_gain": {f"{word} - base": {"mean": 0.4444}}, "samples": [judged] * 25}
    gains = {f"{word} - base": {"mean": -0.0625, "low": -0.09, "win_rate": 0.2}}
    others = {word: {"reward": word, "metrics": {word: {"reward_mean": 0.2468}}, "paired_gain": gains}}
    worst = {"prompt": word, "responses": {word: f"the worst {word}"}, "rewards": {word: -7.5}}
    evaluation |= {"rewards": others, "moved": {word: {word: 1.432}}, "warnings": [f"{word} fell by 0.7531"]}
    evaluation |= {"extremes": {"worst": [worst]}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    quality = {"accuracy": 0.9612, word: word, "calibration": [{"predicted": 0.25, "observed": 0.3125, "count": 31}]}
    (folder / "quality.json").write_text(json.dumps(quality))
    spot = {"reward_mean": 0.7771, "kl": 2.125, "rewards": {word: {"reward_mean": 0.3331}},
            "answers": [{"response": word}]}  # fmt: skip
    best = [{"n": 2, "reward_mean": 0.6661, "kl": 0.19}]
    begun = {"key": word, "path": word, "asked": [word], **spot, "best_of": best}
    way = [{"run": word, "step": step, "start": word, **spot, "gain": {"low": 0.1919}} for step in (7, None)]
    (folder / "frontier.json").write_text(json.dumps({"reward": word, "starts": [begun], "points": way}))
    answers = [{"id": "answer1", "text": word}, {"id": "answer2", "text": f"{word} b"}]
    asked = [{"task": f"t{n}", "shown_prompt": word, "answers": answers} for n in range(30)]
    (folder / "candidates.jsonl").write_text(lines(*asked))
    ranked = {"task": "t0", "responses": [word, f"{word} b"], "ranks": [17, 1.25]}
    (folder / "labels.jsonl").write_text(lines(ranked, ranked))
    (folder / "warnings.jsonl").write_text(lines({"step": 3, "warning": f"update 3: {word} fell to 0.07"}))
    return folder


def made(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def chart(source: str, name: str) -> str:
    """The figure of one measure."""
    return source[source.index(f"<b>{name}</b>") :].partition("</figure>")[0]


def test_the_page_shows_what_the_files_hold(tmp_path: Path) -> None:
    source = made(build(tmp_path))
    shown = Page(source).text
    wanted = (
        "fell to 0.07|12.3 s|ab12cd|f00d|1.12.0|0.9137|250000|kl 0.0421|0.1234|0.5678|0.4444|0.9612|0.3125|31|0.8125"
        "|0.2468|1.432|fell by 0.7531|0.7771|2.125|0.3331|0.6661|0.1919|plain · plain|-0.0625|the worst plain|-7.5"
        "|python -m x plain|rank 17, 17|rank 1.25, 1.25|(60 of 60)|(25 of 25)|(30 of 30)"
    )
    for text in wanted.split("|"):
        assert text in shown, text
    assert source.count("(empty)") == 25
    # Training and held-out data share a chart; what does not change has none.
    assert source.count("<svg") == source.count("<figure") == 5  # with the calibration, and a sweep's two rewards
    assert re.search(r"Not drawn[^<]*: flat\.", source)
    for text in ("train 2.429", "eval 2.625", ">3</text>", ">2.429</text>", ">40</text>"):
        assert text in chart(source, "loss"), text
    found = [int(n) for n in re.findall(r"answer(\d+);", source)]
    assert sorted(found) == list(range(60))  # each once: the start beside the newest
    assert found[:4] == [0, 59, 1, 58]


def test_of_many_samples_the_first_and_the_latest_are_shown(tmp_path: Path) -> None:
    many = [{"step": i, "prompt": f"p{i}", "response": f"answer{i};", "reward": 0} for i in range(3000)]
    (tmp_path / "samples.jsonl").write_text(lines(*many))
    source = made(tmp_path)
    assert "(200 of 3000)" in source
    shown = {int(n) for n in re.findall(r"answer(\d+);", source)}
    assert shown == {*range(100), *range(2900, 3000)}


@pytest.mark.parametrize("word", [NASTY, "\ud800", "</title><h1 onclick='x'>", "-->]]>&lt;&#x202e;"])
def test_text_stays_text(tmp_path: Path, word: str) -> None:
    source = made(build(tmp_path, word))
    assert made(tmp_path) == source  # to the byte
    page, plain = Page(source), Page(made(build(tmp_path / "plain")))
    assert page.tags == plain.tags
    assert page.tags.count("script") == 1  # ours
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.text)
    names = [name for name, _ in page.attributes]
    assert names == [name for name, _ in plain.attributes]
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "data", "action")]
    assert all(value and value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href"))
    assert {re.sub(r"\W", "", tag) for tag in page.tags} == set(page.tags)
    if word == NASTY:
        assert "<script>alert(1)</script> \" ' onload=x" in page.text
        for escape in ("\\u202eabc\\u2066", "\\u001b[2J\\u009b\\u000d\\u200b"):
            assert escape in source


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = Page(made(build(tmp_path)))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\s*\(|@import|<link|<base|<form|<iframe|\bsrc\s*=", source)
    kinds = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        assert len(found) == 1
        kinds[tag] = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
    hashes = "; ".join(f"{tag}-src 'sha256-{kinds[tag]}'" for tag in ("style", "script"))
    assert ("content", f"default-src 'none'; {hashes}; base-uri 'none'; form-action 'none'") in page.attributes
    assert "style" not in dict(page.attributes)  # such an attribute would not be applied
    assert not {"img", "object", "embed", "use", "image"} & set(page.tags)


def test_empty_folder(tmp_path: Path) -> None:
    source = made(tmp_path)
    assert source.count("Nothing recorded.") == 1
    assert "<section" not in source
    assert tmp_path.name in source
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "quality.json",
                                  "candidates.jsonl", "labels.jsonl", "warnings.jsonl"])  # fmt: skip
@pytest.mark.parametrize("cut", [0, 9, 50, -3])
def test_any_file_may_be_cut_short(tmp_path: Path, name: str, cut: int) -> None:
    path = build(tmp_path) / name
    path.write_bytes(path.read_bytes()[:cut])
    source = made(tmp_path)
    assert (f"{name}: 1 of" in source) == bool(cut)
    assert ("train 2.429" in source) == (name != "metrics.jsonl" or cut == -3), "the lines before are lost"


@pytest.mark.parametrize("value", [[], [1], "x", 3, 0, None, {"a": "x"}, {"a": [1, None]}, [{"a": {}}]])
def test_any_shape_of_value(tmp_path: Path, value: Any) -> None:
    keys = (
        "name status seconds parents data git hardware versions results command metrics paired_gain samples calibration"
        " rewards moved warnings extremes shown key start run step kl reward_mean answers asked way reward alpha beta"
        " to gain seeds"
    )
    row = dict.fromkeys(keys.split(), value)
    content = {
        **row, "starts": [{**row, "best_of": value}], "points": [row, value], "fits": [{**row, "reward": ""}, value],
        "algorithms": {"a": row, "b": {"rewards": {"c": row}}, "c": value},
    }  # fmt: skip
    for name in ("run", "evaluation", "quality", "frontier", "comparison"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "metrics.jsonl").write_text(lines({"step": value, "loss": value}, value))
    (tmp_path / "samples.jsonl").write_text(lines({"step": value, "prompt": value, "response": value}))
    asked = {"task": value, "shown_prompt": value, "answers": value}
    (tmp_path / "candidates.jsonl").write_text(lines(asked, {**asked, "answers": [{"text": value}]}, value))
    (tmp_path / "labels.jsonl").write_text(lines({"task": value, "responses": value, "ranks": value}, value))
    assert "<h1>" in made(tmp_path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    nan, big = float("nan"), 10**400
    rows = [{"step": i, "loss": nan if i == 2 else i * 1.5, "gone": nan, "huge": (-1) ** i * 1e308} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text(lines(*rows, {"step": nan, "loss": big}))
    (tmp_path / "run.json").write_text(json.dumps({"results": {"kl": nan, "reward": float("inf")}, "seconds": big}))
    source = made(tmp_path)
    assert "train 4.5 " in source
    assert "2 not finite" in source
    assert re.search(r"Not drawn[^<]*: gone\.", source)
    assert "<b>nan</b>" in source
    for points in re.findall(r'points="([^"]*)"', source):
        assert re.fullmatch(r"[-\d., ]+", points)


def test_long_lines_are_thinned_without_losing_a_spike(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 99.5 if i == 7777 else i % 5} for i in range(20000)]
    (tmp_path / "metrics.jsonl").write_text(lines(*rows))
    source = made(tmp_path)
    assert ">99.5</text>" in source
    assert ">19999</text>" in source
    assert ",8.0 " in source
    assert len(source) < 30_000


def test_at_most_so_many_charts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(*({f"m{k}": k + i for k in range(36)} | {"step": i} for i in (1, 2))))
    source = made(tmp_path)
    assert source.count("<svg") == 32
    assert "m32, m33, m34, m35." in source


def test_names_that_training_and_evaluation_give_to_one_thing_share_a_chart(tmp_path: Path) -> None:
    rows = [{"step": i, "objective/scores": i / 8, "eval_reward": i / 4, "objective/kl": i / 2} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text(lines(*rows))
    source = made(tmp_path)
    charts = re.findall(r"<figure>.*?</figure>", source, re.DOTALL)
    assert len(charts) == 2
    assert "train 0.375" in charts[0]
    assert "eval 0.75" in charts[0]
    assert source.index("<h3>Reward</h3>") < source.index("<h3>KL</h3>")
    assert "KL to the reference" in charts[1]


def test_the_stages_before_are_a_tree_from_the_first(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    taken = {"pretrain": {}, "sft": {"policy": "pretrain/model"}, "reward": {"start": "sft/model"},
             "ppo": {"policy": "sft/model", "reward": "reward/model"}}  # fmt: skip
    for stage, before in taken.items():
        (runs / "a" / "b" / stage / "model").mkdir(parents=True)
        parents = {role: {"path": f"runs/a/b/{where}", "sha256": "00"} for role, where in before.items()}
        record = {"stage": stage, "name": "a/b", "parents": parents, "data": {"name": f"data-of-{stage}"}}
        (runs / "a" / "b" / stage / "run.json").write_text(json.dumps(record))
    source = made(runs / "a" / "b" / "ppo")
    tree = re.findall(r"<li><b>(\w+)</b>(.*)</li>", source)
    assert [stage for stage, _ in tree] == ["pretrain", "sft", "reward", "ppo"]
    assert "data-of-sft" in tree[1][1]
    assert "policy b/sft, reward b/reward" in tree[3][1]
    own = json.loads((runs / "a" / "b" / "pretrain" / "run.json").read_text())
    own |= {"parents": {"x": {"path": "runs/a/b/ppo"}}}
    (runs / "a" / "b" / "pretrain" / "run.json").write_text(json.dumps(own))
    assert made(runs / "a" / "b" / "ppo").count("<li><b>") == 4  # a ring ends


def test_the_language_is_the_runs_own_or_the_one_asked_for(tmp_path: Path) -> None:
    build(tmp_path)
    assert '<html lang="en">' in made(tmp_path)
    (tmp_path / "config.yaml").write_text("report: {lang: zh}\n")
    chinese = made(tmp_path)
    for said in ('<html lang="zh-CN">', "<h2>运行概况</h2>", "训练 2.429", "评估 2.625", "<b>损失</b>"):
        assert said in chinese
    assert "What ran" not in chinese
    assert "What ran" in write_report(tmp_path, "en").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text("report: {lang: [")
    assert '<html lang="en">' in made(tmp_path)


def test_every_phrase_of_the_page_is_translated() -> None:
    measures, chinese = page_words.load_yaml("measures"), page_words.load_yaml("zh")
    said = {phrase for named in measures["drawn"].values() for phrase in (*named.values(), *measures["drawn"])}
    said |= {*measures["names"].values(), page_words.OTHER, *rounds._CHARTS.values()}
    package = Path(page_words.__file__).parent
    patterns = {"*.py": (r"\bwords\(\s*[\"'](.*?)[\"']", r'\bTable\(\s*"(.*?)"', r'\bTable\(\s*"[^"]*", "(.*?)"')}
    patterns["templates/*.html"] = (
        r'\b(?:_|named|answers|judged|figures)\("(.*?)"', r'"([^"]*)": \w', r'figures\("[^"]*", "(.*?)"'
    )  # fmt: skip
    for files, phrases in patterns.items():
        source = "".join(path.read_text(encoding="utf-8") for path in package.glob(files))
        said |= {phrase for pattern in phrases for phrase in re.findall(pattern, source)}
    said.discard("")
    assert len(said) > 150
    assert {phrase for phrase in said if phrase not in chinese} == set()
    for phrase, translation in chinese.items():
        assert phrase.count("{}") == translation.count("{}"), phrase


def two_runs(folder: Path) -> tuple[Path, Path]:
    """Runs with a PPO and an evaluation each, which differ in a setting."""
    for name, kl_coef, reward in (("mild", 0.1, 0.625), ("strict", 0.4, 0.375)):
        for stage in ("ppo", "evaluate"):
            own = build(folder / name / stage)
            (own / "config.yaml").write_text(f"name: {name}\nseed: 3\ntrainer: {{kl_coef: {kl_coef}, batch: 4}}\n")
            metrics = {"base": {"reward_mean": 0.125}, "ppo": {"reward_mean": reward}}
            sample = {"prompt": "Say", "responses": {"ppo": f"I am {name}"}, "rewards": {"ppo": reward}}
            gain = {"ppo - base": {"mean": reward - 0.125}}
            evaluation = {"metrics": metrics, "paired_gain": gain, "samples": [sample]}
            (own / "evaluation.json").write_text(json.dumps(evaluation))
            (own / "run.json").write_text(json.dumps({"name": name, "stage": stage, "results": {"scores": reward}}))
    return folder / "mild", folder / "strict"


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    target = write_comparison(two_runs(tmp_path), tmp_path / "out" / "compare.html")
    source = target.read_text(encoding="utf-8")
    page = Page(source)
    for said in ("mild · base", "strict · ppo", "strict · ppo - base", "0.625", "0.375", "0.5", "0.25", "I am mild"):
        assert said in page.text, said
    assert re.search(r"trainer.kl_coef</th><td>0.1</td><td>0.4</td>", source)
    for same in ("trainer.batch", "seed</th>"):
        assert same not in source
    loss = chart(source, "loss")
    assert re.findall(r'<polyline class="([^"]*)"', loss) == ["c0", "c0 dashed", "c1", "c1 dashed"]
    assert "mild train 2.429" in loss
    assert "strict eval 2.625" in loss
    answers = source[source.index("last policy to the same prompts") :]
    assert re.search(r"I am mild.*I am strict", answers[: answers.index("</table>")], re.DOTALL)
    assert page.tags.count("script") == 1


def test_a_comparison_needs_runs_that_are_there(tmp_path: Path) -> None:
    mild, _ = two_runs(tmp_path)
    with pytest.raises(UserError, match="2 to 8 different runs"):
        write_comparison([mild, mild], tmp_path / "compare.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no stage that has run"):
        write_comparison([mild, tmp_path / "empty"], tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()


def test_the_pages_of_a_run_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mild, _ = two_runs(tmp_path)
    build(mild / "round1" / "collect")
    (mild / "ppo" / "model").mkdir()
    (mild / "ppo" / "model" / "run.json").write_text("{}")  # whatever it is, no stage of ours
    (mild / "elsewhere").symlink_to("../strict")
    assert main([str(mild), "zh"]) == 0
    pages = {path.relative_to(mild) for path in mild.rglob("report.html")}
    assert pages == {Path(p) / "report.html" for p in ("ppo", "evaluate", "round1/collect", ".")}
    assert all('lang="zh-CN"' in (mild / path).read_text(encoding="utf-8") for path in pages)
    assert capsys.readouterr().out.count("report.html") == 4
    assert not list((tmp_path / "strict").rglob("report.html")), "a link is not followed"
    (mild / "round1").rename(mild / "round2")  # one that is gone, and from within the run
    monkeypatch.chdir(mild)
    assert main(["."]) == 0
    assert 'href="round2/collect/report.html"' in (mild / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main([str(mild), "fr"]) == 2
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err

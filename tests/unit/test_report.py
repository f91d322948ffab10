"""The report is a plain page of the numbers in the files, and text in the files never becomes markup."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.report import write_report

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
    evaluation = {"metrics": metrics, "paired_gain": {"mean": 0.4444}, "samples": [judged] * 25}
    others = {word: {"reward": word, "metrics": {word: {"reward_mean": 0.2468}}}}
    evaluation |= {"rewards": others, "moved": {word: {word: 1.432}}, "warnings": [f"{word} fell by 0.7531"]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    quality = {"accuracy": 0.9612, word: word, "calibration": [{"predicted": 0.25, "observed": 0.3125, "count": 31}]}
    (folder / "quality.json").write_text(json.dumps(quality))
    answers = [{"id": "answer1", "text": word}, {"id": "answer2", "text": f"{word} b"}]
    asked = [{"task": f"t{n}", "shown_prompt": word, "answers": answers} for n in range(30)]
    (folder / "candidates.jsonl").write_text(lines(*asked))
    ranked = {"task": "t0", "responses": [word, f"{word} b"], "ranks": [17, 1.25]}
    (folder / "labels.jsonl").write_text(lines(ranked, ranked))
    return folder


def made(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_numbers_of_the_files_appear(tmp_path: Path) -> None:
    page = Page(made(build(tmp_path)))
    wanted = "12.3 s|ab12cd|f00d|1.12.0|0.9137|250000|kl 0.0421|0.1234|0.5678|0.4444|0.9612|0.3125|31|0.8125"
    wanted += "|0.2468|1.432|fell by 0.7531"
    for number in [*wanted.split("|"), "python -m x plain", "rank 17, 17", "rank 1.25, 1.25"]:
        assert number in page.text, number


def test_train_and_eval_share_a_chart_and_constants_are_left_out(tmp_path: Path) -> None:
    source = made(build(tmp_path))
    assert source.count("<svg") == source.count("<figure") == 2
    assert "train 2.429" in source
    assert "eval 2.625" in source
    assert re.search(r"Not drawn[^<]*: flat\.", source)
    loss = source[source.index("<figure") : source.index("</figure>")]
    assert ">3</text>" in loss
    assert ">2.429</text>" in loss
    assert ">40</text>" in loss


def test_samples_are_the_latest_and_bounded(tmp_path: Path) -> None:
    source = made(build(tmp_path))
    found = [int(n) for n in re.findall(r"answer(\d+);", source)]
    assert found == list(range(59, 19, -1))
    assert "(40 of 60)" in source
    assert "(20 of 25)" in source
    assert "(20 of 30)" in source
    assert source.count("(empty)") == 20


@pytest.mark.parametrize("word", [NASTY, "\ud800", "</title><h1 onclick='x'>", "-->]]>&lt;&#x202e;"])
def test_text_stays_text(tmp_path: Path, word: str) -> None:
    source = made(build(tmp_path, word))
    page, plain = Page(source), Page(made(build(tmp_path / "plain")))
    assert page.tags == plain.tags
    assert "script" not in page.tags
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.text)
    names = [name for name, _ in page.attributes]
    assert names == [name for name, _ in plain.attributes]
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "data", "action")]
    assert all(value and value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href"))
    assert {re.sub(r"\W", "", tag) for tag in page.tags} == set(page.tags)


def test_what_would_hide_is_shown(tmp_path: Path) -> None:
    source = made(build(tmp_path, NASTY))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &quot; &#x27;" in source
    for escape in ("\\u202eabc\\u2066", "\\u001b[2J\\u009b\\u000d\\u200b"):
        assert escape in source


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = Page(made(build(tmp_path)))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\s*\(|@import|<link|<base|<form|<iframe|\bsrc\s*=", source)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not {"script", "img", "object", "embed", "use", "image"} & set(page.tags)


def test_empty_folder(tmp_path: Path) -> None:
    source = made(tmp_path)
    assert source.count("Nothing recorded.") == 4
    assert tmp_path.name in source
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.json",
        "quality.json",
        "candidates.jsonl",
        "labels.jsonl",
    ],
)
@pytest.mark.parametrize("cut", [0, 9, 60])
def test_any_file_may_be_cut_short(tmp_path: Path, name: str, cut: int) -> None:
    path = build(tmp_path) / name
    path.write_bytes(path.read_bytes()[:cut])
    assert (f"{name}: 1 of" in made(tmp_path)) == bool(cut)


def test_truncated_last_line_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        lines({"step": 1, "loss": 3.25}, {"step": 2, "loss": 2.75}) + '{"step": 3, "lo'
    )
    source = made(tmp_path)
    assert "train 2.75" in source
    assert "metrics.jsonl: 1 of 3 JSON objects could not be read." in source


@pytest.mark.parametrize("value", [[], [1], "x", 3, None, {"a": "x"}, {"a": [1, None]}, [{"a": {}}]])
def test_any_shape_of_value(tmp_path: Path, value: Any) -> None:
    for name in ("run", "evaluation", "quality"):
        keys = ("name", "status", "seconds", "parents", "data", "git", "hardware", "versions", "results", "command")
        content = dict.fromkeys(
            [*keys, "metrics", "paired_gain", "rewards", "moved", "warnings", "samples", "calibration"], value
        )
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
    assert "<td>nan</td>" in source
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


def test_at_most_sixteen_charts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(*({f"m{k}": k + i for k in range(20)} | {"step": i} for i in (1, 2))))
    source = made(tmp_path)
    assert source.count("<svg") == 16
    assert "m16, m17, m18, m19." in source


def test_two_runs_give_identical_bytes(tmp_path: Path) -> None:
    first = made(build(tmp_path, NASTY))
    assert made(tmp_path) == first


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(build(tmp_path))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert not list(tmp_path.glob(".report*"))

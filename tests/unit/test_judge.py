"""A language model at an address as a reward: asked once, a few at a time, again if it is busy, and never trusted."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge, Wrong, completion, serving

from rlhf_pipeline.composition import check_functions
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models import judge, rewards

KEY = "sk-secret/0123456789"
BUSY: Wrong = (503, {}, b"busy")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as found:
        yield found


@pytest.fixture
def choice(server: FakeJudge, tmp_path: Path) -> dict[str, Any]:
    cache = str(tmp_path / "cache" / "replies.sqlite")
    return {"name": "judge", "url": server.url, "model": "m", "template": "{prompt}|{response}", "cache_path": cache}


def built(choice: dict[str, Any], **options: Any) -> rewards.Reward:
    """The reward, without its self-test."""
    rewards.check_choice({**choice, **options})
    return rewards.registry.build({**choice, **options}, None)


def test_each_response_is_rated_once(server: FakeJudge, choice: dict[str, Any]) -> None:
    prompts, answers = ["a", "a", "a", "b"], ["x", "xyz", "x", ""]
    assert built(choice)(prompts, answers) == [3.0, 5.0, 3.0, 2.0]
    assert sorted(server.questions()) == ["a|x", "a|xyz", "b|"]
    assert server.asked[0] == {"model": "m", "messages": [{"role": "user", "content": server.questions()[0]}]}
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert built(choice)(prompts, answers) == [3.0, 5.0, 3.0, 2.0]
    assert len(server.asked) == 3, "the second time all is known"
    for other in ({"options": {"temperature": 0}}, {"model": "n"}, {"template": "{prompt}:{response}"}):
        before = len(server.asked)
        built(choice, **other)(prompts, answers)
        assert len(server.asked) == before + 3, "another question, model or option is another answer"
    assert built(choice, pattern=r"\d")(prompts, answers) == [3.0, 5.0, 3.0, 2.0]
    assert len(server.asked) == 12, "how a reply is read changes no reply"


def test_it_is_tried_when_it_is_loaded(server: FakeJudge, choice: dict[str, Any]) -> None:
    reward, where = rewards.load_reward(choice, None)
    assert where == reward.name == f"m at {server.url}"
    server.reply = lambda question: "7"
    with pytest.raises(UserError, match="gave 7 for all of 2 texts"):
        rewards.load_reward({**choice, "probes": ["good", "bad"]}, None)


def test_several_are_asked_at_once(server: FakeJudge, choice: dict[str, Any]) -> None:
    server.together = threading.Barrier(4)
    assert built(choice, threads=4)([""] * 8, [str(n) for n in range(8)]) == [2.0] * 8


@pytest.mark.parametrize(
    ("options", "reply", "expected"),
    [
        ({}, "7/10", 7.0),
        ({}, "First 3, no: -2.5.", -2.5),
        ({"pattern": r"Score: (\d+)"}, "10 reasons. Score: 8. Scored by 3.", 8.0),
        ({"scores": {"A": 1, "B": 0}}, "Not A, so B.", 0.0),
        ({"scores": {"A": 1, "B": 0}}, "An Apple: A", 1.0),
        ({"scores": {"good": 1, "very good": 2}, "pattern": ".+"}, " very good\n", 2.0),
        ({"otherwise": -1}, "I cannot say.", -1.0),
        ({"otherwise": 0, "scores": {"A": 1}, "pattern": r"\w"}, "C", 0.0),
    ],
)
def test_how_a_reply_is_read(
    options: dict[str, Any], reply: str, expected: float, server: FakeJudge, choice: dict[str, Any]
) -> None:
    server.reply = lambda question: reply
    assert built(choice, **options)(["p"], ["r"]) == [expected]


def test_a_question_may_hold_columns_and_text_that_looks_like_a_gap(server: FakeJudge, choice: dict[str, Any]) -> None:
    reward = built(choice, template='{"json": 1} {prompt}: {response} or {reference}?')
    assert reward.needs == ["reference"]
    reward(["{response}"], [r"\1 {prompt}"], reference=["{reference} 𝄞"])
    assert server.questions() == [r'{"json": 1} {response}: \1 {prompt} or {reference} 𝄞?']
    with pytest.raises(UserError, match="needs the column reference"):
        reward(["a"], ["b"])


def test_a_server_that_is_busy_is_asked_again(server: FakeJudge, choice: dict[str, Any]) -> None:
    server.wrong = [BUSY, (429, {"Retry-After": "0"}, b""), None, (500, {"Retry-After": "soon"}, b"")]
    assert built(choice)(["a"], ["b"]) == [3.0]
    assert len(server.asked) == 5
    server.wrong = [BUSY] * 9
    with pytest.raises(UserError, match=r"v1 answers 503: 'busy'\. Its replies so far are kept"):
        built(choice, tries=3)(["a"], ["c"])
    assert len(server.asked) == 8
    server.wrong = [None, None]
    with pytest.raises(UserError, match=r"v1 does not answer \(ConnectionError\)\. Its"):
        built(choice, tries=2)(["a"], ["c"])


def test_what_was_answered_is_kept(server: FakeJudge, choice: dict[str, Any]) -> None:
    def reply(question: str) -> str:
        return "odd" if question == "a|7" else "1"

    server.reply = reply
    answers = [str(n) for n in range(8)]
    with pytest.raises(UserError, match=r"m replied 'odd', in which reward\.pattern finds no score"):
        built(choice, threads=1)(["a"] * 8, answers)
    assert len(server.asked) == 8
    server.reply = lambda question: "2"
    assert built(choice, threads=1)(["a"] * 8, answers) == [1.0] * 7 + [2.0]
    assert server.questions()[8:] == ["a|7"], "an odd reply is not kept"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((200, {}, b"<html>"), "did not send a chat completion: '<html>'"),
        ((200, {}, b'{"choices": []}'), "did not send a chat completion"),
        ((200, {}, b"[" * 100_000), "did not send a chat completion"),
        ((200, {}, b"\xff\x00\x1b[2J"), "did not send a chat completion"),
        ((200, {}, completion(None)), "did not send a chat completion"),
        ((200, {}, completion(["7"])), "did not send a chat completion"),
        (
            (200, {}, completion("I\x1b[J will not \ud83d say.\n")),
            r"replied 'I\\x1b\[J will not \? say.\\n', in which",
        ),
        ((200, {}, completion("9" * 9000)), "replied '9999"),
        ((200, {}, b" " * (judge.LARGEST + 1)), "sends more than 1 MiB"),
        ((200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), "did not send a chat completion"),
        ((400, {}, f"bad {KEY}".encode()), r"answers 400: 'bad \*\*\*'"),
        ((401, {}, KEY.encode() * 99), r"answers 401: '\*\*\*"),
        ((200, {}, completion(f"Your key is {KEY}.").replace(b"/", b"\\/")), r"replied 'Your key is \*\*\*\.'"),
        ((302, {"Location": "http://localhost:1/"}, b""), "answers 302"),
    ],
)
def test_an_odd_answer_is_one_line_without_the_key(
    wrong: Wrong, said: str, server: FakeJudge, choice: dict[str, Any], tmp_path: Path
) -> None:
    server.wrong = [wrong]
    with pytest.raises(UserError, match=said) as refused:
        built(choice)(["a"], ["b"])
    message = str(refused.value)
    assert KEY not in message
    assert message.isprintable()
    assert len(message) < 600
    assert len(server.asked) == 1, "asking again would change nothing"
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert built(choice)(["a"], ["b"]) == [3.0]


def test_a_key_may_be_missing_or_none(
    server: FakeJudge, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY + "\nX-Evil: 1")
    with pytest.raises(UserError, match="the environment variable OTHER_KEY holds no valid key") as refused:
        built(choice, key_variable="OTHER_KEY")(["a"], ["b"])
    assert KEY not in str(refused.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    server.wrong = [(401, {}, b"who are you?")]
    with pytest.raises(UserError, match=r"answers 401: 'who are you\?'; OPENAI_API_KEY holds no key"):
        built(choice)(["a"], ["b"])
    assert built(choice)(["a"], ["b"]) == [3.0], "a server of one's own may need none"
    assert not any("authorization" in headers for headers in server.headers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": f"http://me:{KEY}@host/v1"}, r"reward\.url takes an address without a login"),
        ({"url": f"https://host/v1?key={KEY}"}, r"reward\.url takes an address without a login"),
        ({"url": "file:///etc/passwd"}, r"reward\.url takes an address"),
        ({"key_variable": KEY}, r"reward\.key_variable takes the name of an environment variable"),
        ({"template": "Rate {prompt}."}, r"reward\.template has no {response}"),
        ({"scores": {"A": "good"}}, r"reward\.scores is .* it takes a number for each choice"),
        ({"pattern": "("}, r"reward\.pattern='\(' is no regular expression"),
        ({"threads": 0}, r"reward\.threads is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_asked(
    options: dict[str, Any], said: str, server: FakeJudge, choice: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        rewards.check_choice({**choice, **options})
    assert KEY not in str(refused.value)
    assert not server.asked


def test_a_damaged_cache_is_one_line(choice: dict[str, Any], server: FakeJudge) -> None:
    place = Path(choice["cache_path"])
    place.parent.mkdir()
    place.write_text("no database " * 99)
    with pytest.raises(UserError, match=r"the judge's cache .*replies\.sqlite cannot be used \(.*\); delete it"):
        built(choice)(["a"], ["b"])


def test_a_strangers_configuration_sends_nothing_that_the_command_does_not_name() -> None:
    judged = {"name": "judge", "url": "https://evil/v1", "model": "m"}
    for recorded in (
        {"reward": judged},
        {"reward": {"name": "python", "path": "mine.py:f"}, "labeler": judged},
        {"reward": {"name": "sum", "parts": [{"name": "length"}, judged]}},
        {"evaluate": {"rewards": [judged]}},
    ):
        for said in ([], ["reward.path=mine.py:f"]):
            with pytest.raises(UserError, match=r"reward\.(url=https://evil/v1|path=mine\.py:f)\.$"):
                check_functions(recorded, said)
        check_functions(json.loads(json.dumps(recorded)), ["reward.path=mine.py:f", "x.url=https://evil/v1"])

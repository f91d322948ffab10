"""Rows to token ids: templates, what is learnt of a conversation, prompts, code."""

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import data
from rlhf_pipeline.data import tokenization
from rlhf_pipeline.data.records import Code, Demonstration, Dialogue, Preference, Ranking, Row, Text, Turn
from rlhf_pipeline.data.templates import visible_prompt
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import open_policy, train_tokenizer
from rlhf_pipeline.models.sampling import make_batch

CHAT = (
    Turn("system", "Be kind."), Turn("user", "Was it good?"), Turn("assistant", "It was."),
    Turn("user", "Why?"), Turn("assistant", "The cast was fine."),
)  # fmt: skip
TALK = Dialogue((Turn("user", "你好"), Turn("assistant", "你好啊"), Turn("user", "再见")), both=True)


def asked(rows: list[Any], tokenizer: PreTrainedTokenizerBase, choice: dict[str, Any], seed: int) -> list[list[int]]:
    return [question.ids for question in tokenization.questions(rows, tokenizer, choice, seed)]


def chinese() -> PreTrainedTokenizerBase:
    return train_tokenizer(["你好啊，再见。 hello world"] * 5, 200, 64, characters=True)


def learnt(lesson: tokenization.Lesson, tokenizer: PreTrainedTokenizerBase) -> str:
    """The part of a lesson that is learnt, as text; a bar where something else lies between."""
    parts: list[list[int]] = []
    before = 0
    for token, is_learnt in zip(*lesson, strict=True):
        if is_learnt:
            parts += [] if before else [[]]
            parts[-1].append(token)
        before = is_learnt
    return "|".join(tokenizer.decode(part) for part in parts)


def test_of_two_peoples_talk_every_turn_but_the_first_is_learnt() -> None:
    tokenizer = chinese()
    (lesson,) = tokenization.demonstrations([TALK], tokenizer, {}, seed=0)
    tokens = ["[CLS]", *"你好", "[SEP]", *"你好啊", "[SEP]", *"再见", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(lesson.ids) == tokens
    assert lesson.learnt == [0] * 4 + [1] * 7
    assert tokenization.documents([TALK], tokenizer) == [lesson.ids], "no second end"
    assert visible_prompt(tokenizer, TALK.turns[:1]) == "你好", "a reward sees no special tokens"
    first, both = (asked([TALK], tokenizer, {"prompt_turns": n}, 0)[0] for n in (None, 2))
    assert tokenizer.convert_ids_to_tokens(first) == ["[CLS]", *"你好", "[SEP]"]
    assert both == lesson.ids[:8]


def instruction(text: str) -> str:
    """A user's turn as our own template asks it."""
    return f"### Instruction:\n{text}\n\n### Response:\n"


WAS_IT, COLOUR, A = f"Be kind.\n\n{instruction('Was it good?')}", instruction("Name a colour."), instruction("a?")
ASKED = Turn("user", "a?")
ANNOUNCING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWRITING = (  # an earlier reply is written otherwise
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' and loop.last %}(thought) {% endif %}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (  # as Gemma 4's: something stands only before a reply to come
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>(no thought) {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "row", "turns", "prompt", "text", "taught"),
    [
        (None, Demonstration((Turn("user", "Name a colour."),), "Blue."), None,
         COLOUR, f"{COLOUR}Blue.<end>", "Blue.<end>"),
        (None, Demonstration("Say hi:", " Hi."), None, "Say hi:", "Say hi: Hi.<end>", " Hi.<end>"),
        (None, Dialogue(CHAT), None, f"{WAS_IT}It was.<end>{instruction('Why?')}",
         f"{WAS_IT}It was.<end>{instruction('Why?')}The cast was fine.<end>",
         "It was.<end>|The cast was fine.<end>"),
        (None, Dialogue((ASKED, Turn("assistant", " "), Turn("user", "c?"), Turn("assistant", "d"))), 1,
         A, f"{A} <end>{instruction('c?')}d<end>", "d<end>"),
        (None, Dialogue((*CHAT[:3], CHAT[1])), 2, WAS_IT, f"{WAS_IT}It was.<end>", "It was.<end>"),
        (ANNOUNCING, Dialogue(CHAT), 2, "<system>Be kind.\n<user>Was it good?\n<assistant>",
         "<system>Be kind.\n<user>Was it good?\n<assistant>It was.\n<user>Why?\n<assistant>The cast was fine.\n<end>",
         "It was.\n|The cast was fine.\n<end>"),
        (ANNOUNCING, Dialogue((ASKED, Turn("assistant", "b"), Turn("user", "c")), both=True), 2,
         "<user>a?\n<assistant>b\n", "<user>a?\n<assistant>b\n<user>c\n<end>", "b\n<user>c\n<end>"),
        (REWRITING, Dialogue(CHAT), 2, "system: Be kind.\nuser: Was it good?\nassistant: ",
         "system: Be kind.\nuser: Was it good?\nassistant: It was.\nuser: Why?\n"
         "assistant: (thought) The cast was fine.\n<end>",
         "(thought) The cast was fine.\n<end>"),
        (THINKING, Dialogue(CHAT), 2, "<system>Be kind.</><user>Was it good?</><assistant>(no thought) ",
         "<system>Be kind.</><user>Was it good?</><assistant>It was.</><user>Why?</>"
         "<assistant>The cast was fine.</><end>",
         "It was.</>|The cast was fine.</><end>"),
    ],
    ids=["instruction", "text", "chat", "blank reply", "user last", "announcing", "announcing two people", "rewriting",
         "thinking"],
)  # fmt: skip
def test_a_prompt_is_asked_and_every_reply_learnt_as_the_template_writes_them(
    template: str | None, row: Any, turns: int | None, prompt: str, text: str, taught: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    (lesson,) = tokenization.demonstrations([row], tokenizer, {}, seed=0)
    (ids,) = asked([row], tokenizer, {"prompt_turns": turns}, seed=0)
    found = (tokenizer.decode(ids), tokenizer.decode(lesson.ids), learnt(lesson, tokenizer))
    assert found == tuple(words.replace("<end>", "<|endoftext|>") for words in (prompt, text, taught))
    if not template:
        assert lesson.ids[: len(ids)] == ids, "SFT and PPO read the same prompt"


def test_of_a_preference_the_prompt_is_asked_and_the_better_answer_learnt_as_language() -> None:
    tokenizer = tiny_tokenizer()
    rows: list[Row] = [
        Preference("Is it?", " Yes.", " No."), Ranking((Turn("user", "a?"),), ("b", "c")), Ranking("", ("x", "y")),
    ]  # fmt: skip
    shown = [tokenizer.decode(ids) for ids in asked(rows, tokenizer, {}, 0)]
    assert shown == ["Is it?", "### Instruction:\na?\n\n### Response:\n"], "one without a prompt gives none"
    learnt_texts = [tokenizer.decode(ids[:-1]) for ids in tokenization.documents(rows, tokenizer)]
    assert learnt_texts == ["Is it? Yes.", f"{shown[1]}b", "x"]


def test_code_gives_its_functions_heads_and_bodies() -> None:
    tokenizer = tiny_tokenizer()
    second = "def second(with_a_long_head, and_more, and_yet_more):\n    return 2\n"
    source = f"import os\n\n\ndef first(a):\n    return a\n\n\n{second}"
    rows: list[Row] = [Code(source)]
    choice: dict[str, Any] = {"prompt_tokens": (1, 20)}
    (lesson,) = tokenization.demonstrations(rows, tokenizer, choice, seed=0)
    assert tokenizer.decode(lesson.ids) == "def first(a):\n    return a\n<|endoftext|>"
    assert learnt(lesson, tokenizer) == "\n    return a\n<|endoftext|>"
    (in_a_file,) = tokenization.documents(rows, tokenizer)
    assert tokenizer.decode(in_a_file) == source + "<|endoftext|>"
    head = lesson.ids[: lesson.learnt.index(1)]
    start = next(i for i in range(len(in_a_file)) if in_a_file[i : i + len(head)] == head)
    assert in_a_file[start:][: len(lesson.ids) - 2] == lesson.ids[:-2], "cut apart, the tokens are those of the file"
    assert asked(rows, tokenizer, choice, 0) == [head]


def sentencepiece_like() -> PreTrainedTokenizerBase:
    """As Llama's: a BOS before every text, and a blank before its first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "▁", "▁Say", "▁hi", "Say", "hi", "▁a", "a", ":", "▁yes", "yes"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split(":", "isolated")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_bos_that_a_tokenizer_begins_with_stands_in_every_row_and_no_blank_is_made_up_or_lost() -> None:
    tokenizer = sentencepiece_like()
    row = Demonstration("Say hi:", "hi a")
    (lesson,) = tokenization.demonstrations([row], tokenizer, {}, seed=0)
    assert tokenizer.convert_ids_to_tokens(lesson.ids) == ["<s>", "\u2581Say", "\u2581hi", ":", "hi", "\u2581a", "</s>"]
    assert lesson.learnt == [0, 0, 0, 0, 1, 1, 1]
    assert asked([row], tokenizer, {}, 0) == [lesson.ids[:4]], "SFT and PPO read the same prompt"
    assert tokenization.documents([Text("Say hi")], tokenizer) == [[0, 4, 5, 1]]
    long = tokenization.Lesson([0, *range(100, 130), 200, 1], [0] * 31 + [1, 1])
    assert tokenization.shortened([[long]], tokenizer, 6) == [[([0, 127, 128, 129, 200, 1], [0] * 4 + [1, 1])]]
    assert make_batch([[0, 4]], [[5, 8]]).texts(tokenizer) == (["Say"], [" hi a"])
    words = train_tokenizer(["this movie is great"] * 9, 200, 64, characters=True)
    ids = tokenization.encode(words, ["this movie is great"])[0]
    assert make_batch([ids[:2]], [ids[2:]]).texts(words) == (["this movie"], [" is great"])


def test_a_prompt_alone_is_asked_as_it_stands_and_nothing_ends_after_it() -> None:
    tokenizer = tiny_tokenizer()
    talk = Dialogue((Turn("user", "a?"), Turn("assistant", "b"), Turn("user", "c?")))
    rows: list[Row] = [Demonstration("Say hi:", ""), talk, Dialogue((Turn("user", "a?"),)), Dialogue(CHAT[:2])]
    shown = [tokenizer.decode(ids) for ids in asked(rows, tokenizer, {}, 0)]
    assert shown[0] == "Say hi:"
    assert shown[1].endswith("### Response:\nb<|endoftext|>### Instruction:\nc?\n\n### Response:\n")
    assert shown[2] == "### Instruction:\na?\n\n### Response:\n"
    assert [tokenizer.decode(ids) for ids in tokenization.documents(rows, tokenizer)] == shown, "no end to learn"
    (alone,) = asked([Dialogue((Turn("user", "你好"),), both=True)], chinese(), {}, 0)
    assert chinese().convert_ids_to_tokens(alone) == ["[CLS]", *"你好", "[SEP]"]


def lesson_of(prompt: int, answer: int, first: int = 100) -> tokenization.Lesson:
    return tokenization.Lesson([*range(first, first + prompt), *range(200, 200 + answer)], [0] * prompt + [1] * answer)


@pytest.mark.parametrize(
    ("apart", "rows", "said"),
    [
        (True, {
            "fits": (lesson_of(4, 6), lesson_of(4, 6)),
            "the answer stays whole": (lesson_of(30, 6), lesson_of(4, 6, first=126)),
            "what does not fit by itself loses its end, and the prompt stays": (lesson_of(3, 30), lesson_of(3, 7)),
            "neither fits": (lesson_of(30, 30), lesson_of(5, 5, first=125)),
            "the answer fits exactly": (lesson_of(30, 10), lesson_of(5, 5, first=125)),
        }, "4 of 5 rows are longer than 10 tokens (trainer.max_length, at most the policy's positions): "
           "3 prompts lose their beginning, 3 answers lose their end"),
        (False, {
            "fits": (lesson_of(4, 6), lesson_of(4, 6)),
            "its end": (lesson_of(4, 8), lesson_of(4, 6)),
            "a prompt above half": (lesson_of(9, 6), lesson_of(5, 5, first=104)),
        }, "2 of 3 rows are longer than 10 tokens (trainer.max_length, at most the policy's positions): "
           "1 prompts lose their beginning, 2 answers lose their end"),
    ],
    ids=["prompt and answer", "one text"],
)  # fmt: skip
def test_a_prompt_loses_its_beginning_before_an_answer_loses_its_end(
    capsys: pytest.CaptureFixture[str], apart: bool, rows: dict[str, tuple[Any, Any]], said: str
) -> None:
    tokenizer = tiny_tokenizer()
    cut, empty = tokenization.shortened([[long for long, _ in rows.values()], []], tokenizer, 10, apart)
    assert dict(zip(rows, cut, strict=True)) == {name: short for name, (_, short) in rows.items()}
    assert (empty, capsys.readouterr().out) == ([], f"warning: {said}\n")
    assert tokenization.shortened([[lesson_of(4, 6)]], tokenizer, 10) == [[lesson_of(4, 6)]]
    with pytest.raises(UserError, match=r"2 of 2 rows are longer than 1 tokens .* 2 rows are left out, so that"):
        tokenization.shortened([[lesson_of(3, 3)], [lesson_of(1, 1)]], tokenizer, 1)
    assert capsys.readouterr().out == ""


def test_texts_that_end_within_their_prompt_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, choice = tiny_tokenizer(), {"name": "text", "prompt_tokens": (3, 3)}
    rows: list[Row] = [Text("a b c d e f g h"), Text("a")]
    assert len(tokenization.demonstrations(rows, tokenizer, choice, 0)) == 1
    said = "warning: 1 of 2 texts end within their prompt (data.prompt_tokens), and are left out\n"
    assert capsys.readouterr().out == said
    for without in (Demonstration("", "c"), Dialogue((Turn("assistant", "c"),))):
        assert len(asked([Demonstration("p", "c"), without], tokenizer, {}, 0)) == 1
        assert capsys.readouterr().out == "warning: 1 of 2 rows have no prompt, and are left out\n"


def test_data_without_prompts_or_anything_to_learn_is_named() -> None:
    tokenizer, choice, rows = tiny_tokenizer(), {"name": "text", "prompt_tokens": (8, 8)}, [Text("a b")]
    with pytest.raises(UserError, match="data=text gives no prompts: none of 1 rows"):
        asked(rows, tokenizer, choice, 0)
    with pytest.raises(UserError, match="data=text gives nothing to learn"):
        tokenization.demonstrations(rows, tokenizer, choice, 0)
    with pytest.raises(UserError, match=r"data\.prompt_tokens is \[3, 2\]"):
        asked(rows, tokenizer, {"prompt_tokens": (3, 2)}, 0)
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(UserError, match=r"a conversation of system, user.*no system, please.*policy\.template="):
        asked([Dialogue(CHAT)], tokenizer, {"name": "dialogue"}, 0)


def test_the_real_chinese_dialogues_lose_next_to_nothing(shared: Path, hub: dict[str, str]) -> None:
    root = Path(hub["REQUESTS_LOG"]).parent
    policy = open_policy(str(root / "models" / "shibing624" / "gpt2-dialogbot-base-chinese"))
    tokenizer = policy.tokenizer
    assert policy.model.config.bos_token_id is None
    rows = data.load_data({"name": "dialogue", "path": str(shared / "data/chinese_dialog/test.jsonl.gz")}, seed=0).train
    lessons = tokenization.demonstrations(rows, tokenizer, {}, seed=0)
    assert len(lessons) == len(rows)
    unknown = sum(lesson.ids.count(100) for lesson in lessons) / sum(len(lesson.ids) for lesson in lessons)
    assert unknown < 0.001, "signs that the vocabulary lacks are read as those it has"
    shown = tokenizer.batch_decode(asked(rows, tokenizer, {}, 0), skip_special_tokens=True)
    same = [said == row.turns[0].text.lower() for said, row in zip(shown, rows, strict=True)]
    assert sum(same) / len(same) > 0.9, "Chinese is written without blanks"

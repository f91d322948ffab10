"""Which script texts are in, and which vocabularies fit them; with real ones where there are some."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import texts as scripts
from rlhf_pipeline.data.readers import read_labelled, read_texts


def test_the_words_and_the_script_of_texts() -> None:
    assert scripts.words_of("我 看了 a good film，很好") == [*"我看了", "a", "good", "film，", *"很好"]
    assert scripts.script_of(["It was a good film, c'est déjà vu."]) == "Latin"
    assert scripts.script_of(["这家酒店的房间很大，服务也很好，WiFi 很快，下次来还住这里。"]) == "Chinese"
    assert scripts.script_of(["Это был очень хороший фильм, мне понравилось."]) is None
    assert scripts.script_of(["12345 67890 !!!", "好"]) is None
    assert scripts.script_of(["好"], least=1) == "Chinese"
    assert scripts.script_of([]) is None


def tokenizer_of(tokens: Sequence[str]) -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["[UNK]", *tokens])}, unk_token="[UNK]"))
    split = [pre_tokenizers.Split(c, "isolated") for c in "很好的电影"]
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), *split])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")


def test_a_vocabulary_of_many_languages_fits_both_and_one_that_lacks_the_words_neither() -> None:
    chinese, english = ["很好的电影，" * 5], ["a very good film " * 3]
    own = [*"很好的电影，", "a", "very", "good", "film"]
    many = tokenizer_of([*own, *map(chr, range(0x4E00, 0x4E00 + 150)), *(f"w{i}" for i in range(850))])
    assert 0.14 < scripts.chinese_share(many) < 0.16
    assert scripts.mismatch(many, chinese) is None
    assert scripts.mismatch(many, english) is None
    lacking = tokenizer_of([*map(chr, range(0x6000, 0x6000 + 150)), *(f"w{i}" for i in range(850))])
    for texts in (chinese, english):
        assert scripts.mismatch(lacking, texts) == "its vocabulary does not know 100% of the texts' tokens"
    assert scripts.mismatch(lacking, ["1 2 3"]) is None


@pytest.fixture(scope="module")
def real_texts(shared: Path) -> dict[str, list[str]]:
    """English and Chinese reviews by their files."""
    files = {path.name: read_labelled(path) for path in (shared / "data/chinese_sentiment").glob("*.csv.gz")}
    every = {**files, "imdb": read_texts(shared / "data/imdb/unsup_20k.jsonl.gz")}
    return {name: [row.text for row in rows] for name, rows in every.items()}


@pytest.mark.parametrize(
    ("name", "kind", "share"),
    [
        ("bert-base-chinese", "BertTokenizer", 0.693),
        ("bert-base-uncased", "BertTokenizer", 0.016),
        ("gpt2", "GPT2Tokenizer", 0.0007),
        ("gpt2-chitchat", "BertTokenizer", 0.550),
    ],
)
def test_real_vocabularies_fit_the_texts_they_were_made_for(
    shared: Path, real_texts: dict[str, list[str]], name: str, kind: str, share: float
) -> None:
    import transformers

    tokenizer = getattr(transformers, kind).from_pretrained(shared / "data" / "tokenizers" / name)
    assert scripts.chinese_share(tokenizer) == pytest.approx(share, rel=0.1)
    reasons = {"Chinese": "the texts are Chinese, but only", "Latin": "the texts are in Latin letters, but"}
    reasons["Chinese" if share > 0.5 else "Latin"] = "None"
    assert len(real_texts) == 4
    for file, texts in real_texts.items():
        script = "Latin" if file == "imdb" else "Chinese"
        assert scripts.script_of(texts) == script
        assert str(scripts.mismatch(tokenizer, texts)).startswith(reasons[script]), file

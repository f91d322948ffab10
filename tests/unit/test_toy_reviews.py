"""The toy reviews: reproducible, varied, and not to be solved by counting words."""

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.data.toy_reviews import MAX_WORDS, MIN_WORDS, toy_reviews, true_sentiment

TRAIN = 16_000


@pytest.fixture(scope="module")
def reviews() -> list[Labelled]:
    return [*toy_reviews(20_000, seed=0)]


def held_out_accuracy(texts: list[str], labels: list[int], ngrams: int = 1) -> float:
    model = make_pipeline(CountVectorizer(ngram_range=(1, ngrams)), LogisticRegression(max_iter=1000))
    model.fit(texts[:TRAIN], labels[:TRAIN])
    return float(model.score(texts[TRAIN:], labels[TRAIN:]))


def test_same_seed_same_reviews_and_a_longer_draw_begins_with_the_shorter() -> None:
    drawn = toy_reviews(50, seed=3)
    toy_reviews.cache_clear()
    assert toy_reviews(50, seed=3) == drawn
    assert toy_reviews(200, seed=3)[:50] == drawn
    assert toy_reviews(50, seed=4) != drawn
    assert toy_reviews(0, seed=3) == ()


def test_reviews_are_varied_balanced_and_well_formed(reviews: list[Labelled]) -> None:
    assert len({review.text for review in reviews}) >= 15_000
    assert 0.48 < sum(review.label for review in reviews) / len(reviews) < 0.52
    assert len({" ".join(review.text.split()[:4]) for review in reviews}) > 100  # prompts
    for review in reviews:
        assert MIN_WORDS <= len(review.text.split()) <= MAX_WORDS
        assert "<" not in review.text
        assert "  " not in review.text
        assert review.text.endswith(".")
        sentences = review.text.removesuffix(".").split(". ")
        assert 2 <= len(sentences) <= 3
        assert all(sentence[0].isupper() for sentence in sentences)
    lengths = [len(review.text.split()) for review in reviews]
    assert sum(14 <= length <= 26 for length in lengths) > 0.6 * len(reviews)
    words = {word.strip(".,").lower() for review in reviews for word in review.text.split()}
    assert 250 <= len(words) <= 450


def test_counting_words_is_not_enough(reviews: list[Labelled]) -> None:
    texts, labels = [review.text for review in reviews], [review.label for review in reviews]
    assert 0.70 < held_out_accuracy(texts, labels) <= 0.89
    assert held_out_accuracy(texts, labels, ngrams=2) < 0.95


def test_an_opening_says_nothing(reviews: list[Labelled]) -> None:
    openings = [" ".join(review.text.split()[:6]) for review in reviews]
    assert held_out_accuracy(openings, [review.label for review in reviews]) <= 0.56
    assert {true_sentiment(opening) for opening in openings} == {0.5}


def test_held_out_reviews_begin_with_words_that_no_other_begins_with(reviews: list[Labelled]) -> None:
    held_out = toy_reviews(2_000, seed=1, held_out=True)
    known = {" ".join(review.text.split()[:2]) for review in reviews}
    new = {" ".join(review.text.split()[:2]) for review in held_out}
    assert len(known) > 80
    assert len(new) > 15
    assert not {b for b in new if any(k.startswith(b) or b.startswith(k) for k in known)}
    words = {word for review in reviews for word in review.text.split()}
    assert {word for pair in new for word in pair.split()} <= words  # each word is known, the pair is not
    assert 0.45 < sum(review.label for review in held_out) / len(held_out) < 0.55


def test_true_sentiment_agrees_with_the_label(reviews: list[Labelled]) -> None:
    reviews = [*reviews, *toy_reviews(2_000, seed=1, held_out=True)]
    agree = sum((true_sentiment(review.text) > 0.5) == (review.label == 1) for review in reviews)
    assert agree >= 0.995 * len(reviews)


POSITIVE = [
    "The plot was never dull.",
    "It was far from boring",
    "It was anything but tedious.",
    "There was hardly a dull scene in it.",
    "Although the acting was dull and the music bored me, it was a triumph in the end.",
    "It was a joy, even though the script was clumsy.",
    "It was slow and confused at first, but ended up really brilliant.",
    "My brother called it awful, but I disagree.",
    "My brother called it awful; I disagree.",
    "The critics loved it, and I cannot argue with that.",
    "It was not nearly as dull as the book.",
    "It was much better than the weak first part.",
    "I did not want it to end.",
]
NEGATIVE = [
    "The plot was hardly gripping.",
    "It was far from funny",
    "I can't say that it was clever.",
    "Nobody could say that the story moved me.",
    "Although the acting was wonderful and the music moving, the story let me down in the end.",
    "I loved the title, but it was a mess.",
    "I was prepared for something witty and fresh, and got something dull.",
    "My brother called it wonderful, but the opposite is true.",
    "The critics hated it, and I understand why.",
    "It was not nearly as witty as the book.",
    "I would not see it again.",
]
NOTHING = [
    "", " ", "...", "I saw this film with my sister last Friday.", "Although the acting was wonderful",
    "My brother called it awful", "not never hardly no", "but but, but. and I agree", "Duller than dullness",
    "\x00\ud800 \U0001f600 ẞ İ", "这部电影", "<|endoftext|>", "(((",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [(t, 0.7, 1) for t in POSITIVE] + [(t, 0, 0.3) for t in NEGATIVE] + [(t, 0.5, 0.5) for t in NOTHING],
)
def test_sentiment_by_the_rules(text: str, low: float, high: float) -> None:
    assert low <= true_sentiment(text) <= high


def test_repeating_oneself_does_not_count() -> None:
    assert true_sentiment("It was funny. " * 20) == true_sentiment("It was funny.") < true_sentiment("Funny. Witty.")

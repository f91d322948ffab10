"""A grammar of short English movie reviews whose sentiment is known: the data that a demo carries with it."""

import math
import random
import re
import zlib

from rlhf_pipeline.records import Labelled

MIN_WORDS, MAX_WORDS = 12, 30


def _list(text: str) -> list[str]:
    return text.split(", ")


# Two lists a symbol: how a negative review says it, and how a positive one does. No opening uses these words.
SIGNED: dict[str, tuple[list[str], list[str]]] = {
    "adj": (
        _list(
            "bland, boring, clumsy, confused, dreary, dull, empty, flat, forced, lazy, lifeless, muddled, pointless, "
            "predictable, shallow, silly, slow, stale, tedious, tired, weak, wooden"
        ),
        _list(
            "beautiful, brilliant, charming, clever, convincing, delightful, elegant, exciting, funny, graceful, "
            "fresh, gripping, inspired, lively, memorable, moving, powerful, subtle, tender, thrilling, touching, witty"
        ),
    ),
    "verb": (
        _list("annoyed me, bored me, dragged, fell flat, left me cold, let me down, lost me, wore me out"),
        _list("amused me, cheered me up, impressed me, made me laugh, moved me, surprised me, shone, won me over"),
    ),
    "verdict": (
        _list("a bore, a disaster, a failure, a mess, a waste of time, awful, dreadful, terrible"),
        _list("a delight, a gem, a joy, a masterpiece, a triumph, excellent, superb, wonderful"),
    ),
    "opinion": (_list("despised it, disliked it, hated it"), _list("admired it, enjoyed it, loved it")),
    "better": (_list("worse, weaker, less fun"), _list("better, stronger, more fun")),
    "closer": (
        _list(
            "I would not see it again, I could never recommend it to anyone, I just wanted it to end, "
            "I would like to forget it, I kept looking at my watch, it was not worth a minute of my time, "
            "I regret every minute of it, I want my money back"
        ),
        _list(
            "I would gladly see it again, I could recommend it to anyone, I did not want it to end, "
            "I will never forget it, I never once looked at my watch, it was worth every minute of my time, "
            "I do not regret a minute of it, nobody will want their money back"
        ),
    ),
}
# <+x> takes an x of the sentiment that is being expressed, <-x> one of the opposite sentiment.
RULES: dict[str, list[str]] = {
    # What comes twice is drawn twice as often: the mix decides how far one gets by counting words.
    # The mix decides how far one gets by counting words: most of what is not "direct" misleads who does that.
    "review": [*["<+direct>"] * 6, *["<+contrast>"] * 4, *["<+report>"] * 2, "<+rivalry>"],
    "tail": ["", "", "", " <+detail>.", " <+detail>.", " <+closer>.", " <+denial>."],
    "direct": [
        "<+detail>, and <+praise>.",
        "<+detail>, and <+whole>.",
        "<+detail>, and <+detail>.",
        "<+denial>, and <+praise>.",
        "<frame> that <+detail>, and that <+detail>.",
        "I <+opinion> for its <+adj> <part>, and <+whole>.",
    ],
    "detail": ["<aspect> was <adv> <+adj>", "<aspect> was <+adj> and <+adj>", "<aspect> <+verb>"],
    "praise": ["it was <+verdict>", "it was <adv> <+adj>", "it was <+adj> and <+adj>", "it <+verb>", "I <+opinion>"],
    "whole": ["<+praise>", "it was <neg> <-adj>", "it never <-verb>"],
    "denial": [
        "I can't say that <-claim>",
        "nobody could say that <-claim>",
        "I never felt that <-claim>",
        "<aspect> was neither <-adj> nor <-adj>",
        "there was nothing <-adj> about <aspect>",
        "there was hardly a <-adj> scene in it",
    ],
    "claim": ["<aspect> was <+adj>", "<aspect> <+verb>", "it was <+adj>"],
    "contrast": [
        "although <-detail> and <-detail> <once>, <+praise> in the end.",
        "although <-detail> <once>, <+praise>.",
        "<+praise>, even though <-detail>.",
        "<-detail> and <-detail> <once>, but <+praise>.",
        "despite its <-adj> <part>, <+praise>.",
        "it was <adv> <-adj> and <-adj> at first, but ended up <adv> <+adj>.",
        "it was <-adj> and <-adj> for an hour, but the rest was <+adj> and <+adj>.",
        "I expected something <-adj> from it, but <+whole>.",
        "I was prepared for something <-adj> and <-adj>, and got something <+adj> and <+adj>.",
        "the trailer looked <-adj> to me, but <+praise>.",
    ],
    "report": [
        "<who> called it <-verdict> <after>, but <disagree>.",
        "<who> found it <-adj> and <-adj> <after>, but <disagree>.",
        "<who> <-opinion> <after>, but <unlike>.",
        "<who> called it <+verdict> <after>, and <agree>.",
        "<who> found it <+adj> and <+adj> <after>, and <agree>.",
        "<who> <+opinion> <after>, and <like>.",
    ],
    "rivalry": [
        "it was much <+better> than the <-adj> <rival>.",
        "it was not nearly as <-adj> as the <rival>.",
        "compared with the <-adj> <rival>, it was <adv> <+adj>.",
    ],
    # At least six words each, so that the first six say nothing. The first two decide which side of the split a review
    # is on (`_is_held_out`), so they are drawn from many.
    "opening": [
        *["<whose> <people> <saw> this <film> <place>."] * 2,
        *["<whose> <people> <saw> this <film> <time>."] * 2,
        "<whose> <people> and I <saw> this <film>.",
        "I <saw> this <film> <place> <time>.",
        "<day> <evening> we all <saw> this <film>.",
        "<day> <evening> I <saw> this <film> <place>.",
        "<this> <film> <origin> is about <topic>.",
        "<this> <film> tells the story of <topic>.",
    ],
    "whose": _list("my, our, his, her, your, their"),
    "people": _list(
        "parents, sisters, brothers, cousins, uncles, aunts, children, students, friends, guests, neighbours, teachers"
    ),
    "saw": _list("saw, watched, chose"),
    "day": _list("Monday, Tuesday, Friday, Saturday, Sunday"),
    "evening": _list("morning, afternoon, evening, night"),
    "this": _list("this, that, one"),
    "film": _list("film, movie, comedy, drama, thriller, western, romance, mystery, musical, cartoon, sequel"),
    "place": _list("in a small cinema, on the train, on television, at a festival, at home, on a plane"),
    "time": _list("last winter, last summer, two weeks ago, some years ago"),
    "origin": _list("from the nineties, from the sixties, from France, from Japan, from last year"),
    "topic": _list(
        "two brothers, a young doctor, a lost dog, a bank robbery, a family in Rome, three sisters, "
        "an old sailor, a chess player, a school by the sea, the first woman in space"
    ),
    "aspect": _list("the acting, the story, the script, the dialogue, the ending, the music, the cast, the humour"),
    "part": _list("start, title, opening scene, first hour, main character"),
    "rival": _list("book, first part, original, stage play, television series"),
    "adv": _list("really, quite, truly, so, very, rather"),
    "neg": _list("not at all, never, hardly, far from, by no means, anything but, in no way"),
    "once": _list("at first, at times, now and then, here and there"),
    "after": _list("at the time, back then, straight away"),
    "frame": _list("I must say, I have to admit, I always felt, I can only say"),
    "who": _list("my brother, the critics, my neighbour, a colleague, the local paper, my teacher, most people"),
    "agree": _list("I agree, I cannot argue with that, that is true, that is not wrong, I had to agree"),
    "disagree": _list("I disagree, I cannot agree, that is not true, that is wrong, the opposite is true"),
    "like": _list("I feel the same, I understand why, I cannot disagree"),
    "unlike": _list("I do not feel the same, I do not understand why, I disagree"),
}


def _roles() -> dict[str, float | str]:
    """What each phrase that matters does: a number says something, a word changes what the others say."""
    roles: dict[str, float | str] = {}
    for symbol in ("adj", "verb", "verdict", "opinion", "better"):
        for value, phrases in zip((-1.0, 1.0), SIGNED[symbol], strict=True):
            roles |= dict.fromkeys((phrase.removeprefix("a ") for phrase in phrases), value)
    roles |= dict.fromkeys(_list("it to end, forget it, at my watch, regret, money back"), -1.0)
    roles |= dict.fromkeys(_list("see it again, recommend, worth"), 1.0)
    roles |= dict.fromkeys(_list("not, never, hardly, far from, no, anything but, neither, nobody, nothing"), "negate")
    roles |= dict.fromkeys(_list("can't, cannot, opposite"), "negate")
    roles |= dict.fromkeys(_list("although, though, despite, expected, prepared, trailer"), "aside")
    roles |= dict.fromkeys(["than", "compared", *RULES["who"]], "aside")
    roles |= dict.fromkeys(_list("agree, true, feel the same, understand why"), "agree")
    roles |= dict.fromkeys(_list("disagree, wrong, argue"), "disagree")
    return roles | {",": "comma", ";": "comma", "but": "but", ".": "stop", "!": "stop", "?": "stop"}


ROLES = _roles()
# Longest first, so that "anything but" is not read as "but".
_PHRASES = "|".join(sorted((re.escape(phrase) for phrase in ROLES if phrase[0].isalpha()), key=len, reverse=True))
_PATTERN = re.compile(rf"\b(?:{_PHRASES})\b|[.,;!?]")


def _expand(template: str, sign: int, rng: random.Random, used: set[str]) -> str:
    """Fills a template in, without saying anything twice where there is a choice."""

    def draw(match: re.Match[str]) -> str:
        relative, symbol = match.groups()
        own = -sign if relative == "-" else sign
        options = SIGNED[symbol][own > 0] if symbol in SIGNED else RULES[symbol]
        choice = rng.choice([option for option in options if option not in used] or options)
        used.add(choice)
        return _expand(choice, own, rng, used)

    return re.sub(r"<([+-]?)(\w+)>", draw, template)


def _is_held_out(opening: str) -> bool:
    """By the first two words, so that no prompt of two words or more begins reviews of both sides."""
    return zlib.crc32(" ".join(opening.lower().split()[:2]).encode()) % 6 == 0


def _review(sign: int, rng: random.Random, held_out: bool) -> str:
    while _is_held_out(opening := _expand("<opening> ", sign, rng, set())) != held_out:
        pass
    while True:  # draws the rest again, and only the rest, so that an opening stays independent of the sentiment
        text = opening + _expand("<+review><+tail>", sign, rng, set())
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            break
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return re.sub(r"(?:^|\. )[a-z]", lambda match: match.group().upper(), text)


def toy_reviews(count: int, seed: int, held_out: bool = False) -> list[Labelled]:
    """`count` reviews, about half of them positive (1). A longer draw with the same seed begins with a shorter one.

    Reviews that are `held_out` begin with other words than all others: no pair of first words is on both sides.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.randrange(2)
        rows.append(Labelled(_review(1 if label else -1, rng, held_out), label))
    return rows


def true_sentiment(text: str) -> float:
    """How likely any text is positive by the rules of the grammar: 0.5 where it says nothing."""
    said: dict[str, float] = {}  # by phrase, so that repeating oneself does not count
    sentence: dict[str, float] = {}
    sign, aside, reported = 1.0, False, 0.0
    for phrase in _PATTERN.findall(text.lower()):
        role = ROLES[phrase]
        if role == "negate":
            sign = -sign
        elif role == "aside":
            aside = True
        elif role in ("agree", "disagree"):
            sentence[phrase] = sign * (reported if role == "agree" else -reported)
        elif isinstance(role, str):  # a comma, "but" or the end of a sentence
            sign, aside = 1.0, False
            if role == "but":
                sentence.clear()  # what comes after it decides
            elif role == "stop":
                said |= sentence
                sentence.clear()
        elif aside:  # a concession, an expectation, another's opinion: counts only if one agrees with it
            reported = sign * role
        else:
            sentence[phrase] = sign * role
    return 0.5 + 0.5 * math.tanh(0.75 * sum((said | sentence).values()))
